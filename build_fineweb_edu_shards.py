"""Writes token shards: FineWeb-Edu from the Hugging Face hub, or text of your own.

    python build_fineweb_edu_shards.py                        FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python build_fineweb_edu_shards.py --max-shards 10        the first billion tokens
    python build_fineweb_edu_shards.py --input 'corpus/*.jsonl' notes.txt book.parquet --output-dir my_tokens
    python build_fineweb_edu_shards.py --verify               compare every shard with the manifest

Every document is <|endoftext|> followed by its GPT-2 tokens; documents stand in order, as uint16, and are cut
into shards without a gap. Shard 0 is val. A build that was stopped, however it was, goes on when the same
command runs again, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from argparse import Namespace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Iterator

from utils.command_line import ArgumentParser, positive_int
from utils.errors import UserError, run_script
from utils.shards.builder import cannot_write, choose_way, pack, rebuild
from utils.shards.documents import (
    PART_BYTES,
    LocalFiles,
    Position,
    find_files,
    open_parquet,
)
from utils.shards.format import find_shards, remove_unfinished
from utils.shards.hub import HubFiles
from utils.shards.manifest import FILE_NAME, Manifest
from utils.shards.workers import TokenQueue, blocks_from, num_cores
from utils.tokenizer import MERGES_SHA256, GPT2Tokenizer, tiktoken_is_installed

ROOT = Path(__file__).resolve().parent

SHARD_TOKENS = 100_000_000  # 200 MB a shard
DATASET = "HuggingFaceFW/fineweb-edu"
SUBSET = "sample-10BT"

KEPT = "finished shards are kept; run the same command again to continue"

# For the plan before the start only, all of them rough.
TEXT_BYTES_PER_TOKEN = 4.5
PARQUET_BYTES_PER_TOKEN = 2.9  # compressed, with the other columns: FineWeb-Edu's
GZIP_BYTES_PER_TOKEN = 1.7
TOKENS_PER_DOCUMENT = 1030  # FineWeb-Edu's
TOKENS_PER_SECOND = 4_000_000  # of one core


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """The command line. Raises UserError for what cannot be meant."""
    parser = ArgumentParser(prog="build_fineweb_edu_shards.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", metavar="FILE", help="files, globs or folders: .parquet .jsonl .jsonl.gz .txt")
    add("--text-field", default="text", help="column of parquet, or field of jsonl, that holds the text")
    add("--output-dir", type=Path, default=ROOT / "edu_fineweb10B", help="folder of the shards")
    add("--shard-tokens", type=positive_int, default=SHARD_TOKENS, help="tokens in a shard")
    add("--max-shards", type=positive_int, help="stop after so many shards, val among them; default: all")
    add("--num-workers", type=positive_int, default=num_cores(), help="tokenizing processes")
    add("--dataset", default=DATASET, help="on the Hugging Face hub")
    add("--subset", default=SUBSET, help="of the data set")
    add("--revision", help="of the data set: branch, tag or commit; default: main when the build starts")
    val_help = "val is the first documents up to so many tokens; default: a shard, or 1 %% of a small corpus"
    add("--val-tokens", type=positive_int, help=val_help)
    add("--tokenizer", choices=("gpt2",), default="gpt2", help="how text becomes tokens")
    add(
        "--verify", action="store_true", help="read every shard again, compare it with the manifest, and stop"
    )
    args = parser.parse_args(arguments)
    if args.val_tokens and args.val_tokens > args.shard_tokens:
        raise UserError(
            f"--val-tokens {args.val_tokens} is more than a shard (--shard-tokens {args.shard_tokens})",
            "val is one shard: lower the one or raise the other",
        )
    if args.input and (args.revision, args.dataset, args.subset) != (None, DATASET, SUBSET):
        raise UserError(
            "--dataset, --subset and --revision do not go with --input", "leave out the one or the other"
        )
    return args


# ----------------------------------------------------------------------------------------------------------
# Before the first token


def open_source(args: Namespace, manifest: Manifest | None) -> LocalFiles | HubFiles:
    """The files of `--input`, or the hub's, at the revision that an earlier start wrote down."""
    if args.input:
        return LocalFiles(find_files(args.input))
    recorded = manifest.settings["source"] if manifest else {}
    if recorded.get("kind") == "files" and manifest.shards:
        names = ", ".join(entry[0] for entry in recorded["files"][:4])
        raise UserError(
            f"{args.output_dir} was built from {len(recorded['files'])} files ({names})",
            "name them again with --input, or use another --output-dir",
        )
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(
            "huggingface_hub is not installed", "pip install datasets, or give --input"
        ) from error
    read_ahead = args.max_shards is None  # else the next file may not be needed
    same = (recorded.get("dataset"), recorded.get("subset")) == (args.dataset, args.subset)
    if same and args.revision in (None, recorded["revision"]):
        return HubFiles(recorded, read_ahead)
    return HubFiles.resolve(args.dataset, args.subset, args.revision, read_ahead)


def settings_of(args: Namespace, source: LocalFiles | HubFiles) -> dict[str, Any]:
    """Everything that decides the bytes of the shards."""
    return {
        "tokenizer": args.tokenizer,
        "merges_sha256": MERGES_SHA256,
        "shard_tokens": args.shard_tokens,
        "val_tokens": args.val_tokens,
        "text_field": args.text_field if any(kind != "text" for kind in source.kinds) else None,
        "source": source.describe(),
    }


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and tries to write there.

    Raises UserError if it cannot be written, or holds shards of unknown origin.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)  # a build that starts beside this one sweeps the folder
    except OSError as error:
        raise cannot_write_to(folder, error) from error
    shards = find_shards(folder, "val") + find_shards(folder, "train")
    if shards and not (folder / FILE_NAME).exists():
        raise UserError(
            f"{folder} holds {shards[0].name}, but no {FILE_NAME} that says how it was made",
            "use another --output-dir, or move the shards away",
        )


def cannot_write_to(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to output dir {folder}: {error.strerror}", "give another --output-dir")


@contextlib.contextmanager
def only_build_in(folder: Path):
    """Holds a lock on the folder; two builds in one would take each other's files away. Windows has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise cannot_write_to(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another build is at work in {folder}", "wait for it, or stop it") from error
        except OSError as error:  # Lustre, some NFS: no locks there
            what = f"{folder} cannot be locked ({error.strerror}); start one build at a time in it"
            print(f"warning: {what}", file=sys.stderr)
        yield


def estimate(source: LocalFiles | HubFiles, text_field: str) -> tuple[int, int]:
    """Tokens and documents of a corpus, roughly, from sizes and parquet's own counts."""
    if isinstance(source, HubFiles):
        tokens = int(source.num_bytes / PARQUET_BYTES_PER_TOKEN)
        return tokens, tokens // TOKENS_PER_DOCUMENT
    tokens = documents = 0.0
    for path, kind in zip(source.paths, source.kinds):
        size = path.stat().st_size
        if kind == "parquet":
            metadata = open_parquet(path, text_field).metadata
            tokens += size / PARQUET_BYTES_PER_TOKEN
            documents += metadata.num_rows
        elif kind == "text":
            tokens += size / TEXT_BYTES_PER_TOKEN
            documents += 1
        else:
            of_file = size / (GZIP_BYTES_PER_TOKEN if kind == "jsonl.gz" else TEXT_BYTES_PER_TOKEN)
            tokens += of_file
            documents += max(1, of_file / TOKENS_PER_DOCUMENT)
    return int(tokens), int(documents)


def print_plan(source: LocalFiles | HubFiles, manifest: Manifest, args: Namespace) -> int:
    """Says what the build will need. Returns the number of tokens to expect, the finished ones among them."""
    tokens, documents = estimate(source, args.text_field)
    if args.max_shards and args.max_shards * args.shard_tokens < tokens:
        documents = documents * args.max_shards * args.shard_tokens // tokens
        tokens = args.max_shards * args.shard_tokens
    to_write = 2 * max(0, tokens - manifest.num_tokens)
    minutes = max(0, tokens - manifest.num_tokens) / TOKENS_PER_SECOND / args.num_workers / 60
    free = shutil.disk_usage(args.output_dir).free
    print(
        f"{args.output_dir}: about {tokens:,} tokens of {documents:,} documents in {len(source)} files; "
        f"{to_write / 1e9:,.2f} GB to write, {free / 1e9:,.1f} GB free; "
        f"about {minutes:,.1f} minutes with {args.num_workers} processes"
    )
    if isinstance(source, HubFiles):
        name = " ".join(source.description[key] for key in ("dataset", "subset", "revision"))
        print(
            f"hub: {name}: {source.num_bytes / 1e9:,.1f} GB to download, but for what is in the hub's cache"
        )
    if manifest.shards:
        print(
            f"{len(manifest.shards)} shards ({manifest.num_tokens:,} tokens) are there; going on after them"
        )
    if to_write > free:
        print(f"warning: {to_write / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free", file=sys.stderr)
    return tokens


# ----------------------------------------------------------------------------------------------------------
# The build


def build(args: Namespace, source: LocalFiles | HubFiles, manifest: Manifest) -> None:
    """Brings the folder from where it is to where `args` want it."""
    from tqdm import tqdm

    missing = list(manifest.missing())
    expected = print_plan(source, manifest, args)

    start = manifest.start_of(min([*missing, len(manifest.shards)]))[0]
    way = lru_cache(maxsize=None)(partial(choose_way, source, args.text_field, start))  # once a build

    @contextlib.contextmanager
    def queue_from(position: Position, documents: int, on_tokens) -> Iterator[TokenQueue]:
        blocks = blocks_from(source, args.text_field, position, args.num_workers, way)
        with contextlib.closing(blocks):
            yield TokenQueue(blocks, position, documents, on_tokens)

    for index in missing:
        with queue_from(*manifest.start_of(index), lambda count: None) as queue:
            rebuild(manifest, index, queue)
    if is_done(manifest, args):
        return
    rate = 0.5 if sys.stderr.isatty() else 30  # seconds between two states of the line
    units = dict(unit=" tokens", unit_scale=True, mininterval=rate)
    with tqdm(total=expected, initial=manifest.num_tokens, **units) as bar:
        with queue_from(*manifest.start_of(len(manifest.shards)), bar.update) as queue:
            pack(manifest, queue, args.max_shards, lambda number: bar.set_description(f"shard {number}"))


def is_done(manifest: Manifest, args: Namespace) -> bool:
    """Whether no shard is to be added."""
    return manifest.complete or (args.max_shards is not None and len(manifest.shards) >= args.max_shards)


def verify(args: Namespace) -> int:
    """Compares every shard with the manifest. Raises UserError that names the damaged ones."""
    manifest = Manifest.load(args.output_dir)
    if manifest is None:
        raise UserError(f"{args.output_dir} has no {FILE_NAME}", "name the folder of a build: --output-dir")
    damaged = []
    for name, problem in manifest.verify(GPT2Tokenizer.num_words):
        print(f"{name}: {problem or 'ok'}", flush=True)
        if problem:
            damaged.append(name)
    if damaged:
        raise UserError(
            f"{args.output_dir}: damaged are {len(damaged)} of {len(manifest.shards)} shards: "
            + ", ".join(damaged),
            "delete them and run the command that built them again: only they are built",
        )
    manifest.check_folder(goes_on=False)
    state = "the build is complete" if manifest.complete else "the corpus has more: the build can go on"
    print(f"{len(manifest.shards)} shards, {manifest.num_tokens:,} tokens, all as written; {state}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.verify:
        return verify(args)
    if not tiktoken_is_installed():
        raise UserError("tiktoken is not installed", "pip install tiktoken")
    prepare_folder(args.output_dir)
    with only_build_in(args.output_dir):
        manifest = Manifest.load(args.output_dir)
        source = open_source(args, manifest)
        settings = settings_of(args, source)
        if manifest is None or not manifest.shards:  # an attempt that wrote nothing binds nobody
            manifest = Manifest(args.output_dir, settings)
        manifest.check_settings(settings)
        manifest.check_folder(goes_on=not is_done(manifest, args))
        for name in remove_unfinished(args.output_dir):
            print(f"removed {name}, left unfinished by an earlier build")
        if is_done(manifest, args) and not any(True for _ in manifest.missing()):
            print(f"nothing to do: {summary(manifest)}")
            return 0
        try:
            manifest.save()
        except OSError as error:
            raise cannot_write(args.output_dir / FILE_NAME, PART_BYTES, error) from error
        build(args, source, manifest)
    print(f"done: {summary(manifest)}")
    return 0


def summary(manifest: Manifest) -> str:
    """What is in the folder, in words."""
    return (
        f"{len(manifest.shards)} shards in {manifest.folder}, {manifest.num_tokens:,} tokens of "
        f"{manifest.shards[-1]['documents']:,} documents"
    )


def stop(signal_number: int, frame: object) -> None:
    """SIGTERM: leave as with Ctrl-C, so that temporary files go; finished shards are on the disk already."""
    print("stopped by SIGTERM; " + KEPT, file=sys.stderr)
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    code = run_script(main)
    if code == 130:
        print(KEPT, file=sys.stderr)
    sys.exit(code)
