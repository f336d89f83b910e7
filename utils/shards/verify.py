"""Comparison of shards, and of the files that they were built from, with the manifest."""

from pathlib import Path

from utils.command_line import UserError
from utils.console import announced, printable
from utils.files import sha256_of
from utils.shards.documents import DocumentSource
from utils.shards.manifest import FILE_NAME, Manifest
from utils.shards.tokenizer import tokenizer_of
from utils.text_files import read_errors
from utils.tokenizer import tokenizer_from_state


def check_inputs(manifest: Manifest, source: DocumentSource) -> None:
    """Records the checksums of the input before the first shard; later raises UserError if they differ."""
    if manifest.shards and manifest.inputs is None:  # the hub's, or started by an earlier version
        return
    inputs = source.checksums()
    if not manifest.shards:
        manifest.inputs = inputs
        return
    for old, new in zip(manifest.inputs, inputs):
        if old["sha256"] != new["sha256"]:
            what = f"{new['path']} has changed since the build started (SHA-256 {new['sha256']})"
            raise UserError(what, f"restore it ({old['sha256']}), or build into another --output-dir")


def verify_inputs(manifest: Manifest) -> None:
    """Compares the input files with the manifest. Raises UserError that names those that differ."""
    if manifest.inputs is None:
        what = f"{manifest.folder / FILE_NAME} records no checksums of input files"
        raise UserError(what, "omit --inputs: it was built from the hub, or by an earlier version")
    differ = []
    for record in manifest.inputs:
        path = Path(record["path"])
        problem = None if path.is_file() else "missing"
        if not problem:
            with read_errors(path), announced(f"reading {path}", record["bytes"], "B") as advance:
                is_same = sha256_of(path, advance) == record["sha256"]
            problem = None if is_same else f"SHA-256 is not {record['sha256']}: the content has changed"
        print(printable(f"{path}: {problem or 'ok'}"), flush=True)
        differ += [str(path)] if problem else []
    if differ:
        what = f"{len(differ)} of {len(manifest.inputs)} input files differ: {', '.join(differ[:4])}"
        raise UserError(what, "the shards hold the earlier content: restore it, or build in a new folder")


def verify(folder: Path, *, inputs: bool = False) -> int:
    """Compares every shard, and on request the input, with the manifest. Raises UserError for differences."""
    manifest = Manifest.load(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {FILE_NAME}", "name the folder of a build: --output-dir")
    damaged, vocab_size = [], tokenizer_from_state(tokenizer_of(folder)).vocab_size
    for record in manifest.shards:
        with announced(f"reading {record['name']}"):
            problem = manifest.find_damage(record, vocab_size)
        print(f"{record['name']}: {problem or 'ok'}", flush=True)
        if problem:
            damaged.append(record["name"])
    if damaged:
        what = f"{folder}: {len(damaged)} of {len(manifest.shards)} shards are damaged: {', '.join(damaged)}"
        raise UserError(what, "delete them and run the command that built them again: only they are rebuilt")
    manifest.check_folder(next_allowed=False)
    if inputs:
        verify_inputs(manifest)
    state = "the build is complete" if manifest.complete else "the corpus has more: the build can continue"
    print(f"{len(manifest.shards)} shards, {manifest.num_tokens:,} tokens, all as written; {state}")
    return 0
