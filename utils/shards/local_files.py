"""A corpus of files on this machine's disk."""

import glob
import hashlib
from pathlib import Path
from typing import Any

from utils.command_line import UserError
from utils.shards.documents import BYTES_PER_TOKEN, KINDS, TOKENS_PER_DOCUMENT, open_parquet

PROBE_BYTES = 1 << 16  # at both ends of a file, for its fingerprint


class LocalFiles:
    """Files on this machine's disk, in the order of the documents."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.kinds = [kind_of(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.paths[index]

    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "files": [_fingerprint(path) for path in self.paths]}

    def estimate(self, text_field: str) -> tuple[int, int]:
        num_tokens = num_documents = 0
        for path, kind in zip(self.paths, self.kinds, strict=True):
            tokens_of_file = int(path.stat().st_size / BYTES_PER_TOKEN[kind])
            num_tokens += tokens_of_file
            if kind == "parquet":
                num_documents += open_parquet(path, text_field).metadata.num_rows
            else:
                num_documents += 1 if kind == "text" else max(1, tokens_of_file // TOKENS_PER_DOCUMENT)
        return num_tokens, num_documents


def kind_of(path: Path) -> str:
    """The kind of a file, by its name. Raises UserError if documents cannot be read from it."""
    for suffix, kind in KINDS.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise UserError(f"{path} is not a corpus file (expected {', '.join(KINDS)})", "convert it or omit it")


def find_files(arguments: list[str]) -> list[Path]:
    """The files that `--input` names: files, globs or folders, in the order given, sorted within each.

    Raises UserError for a name that matches nothing and for empty files.
    """
    found: dict[Path, Path] = {}  # resolved -> as given; a file named twice counts once
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = [
                file
                for file in sorted(path.rglob("*"))
                if file.name.lower().endswith(tuple(KINDS))
                and not any(name.startswith(".") for name in file.relative_to(path).parts)
            ]
        else:
            matches = [path] if path.exists() else map(Path, sorted(glob.glob(argument, recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            hint = f"give files, globs or folders: {', '.join(KINDS)}"
            raise UserError(f"--input {argument}: no such file", hint)
        for file in files:
            found.setdefault(file.resolve(), file)
    for path in found.values():
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)", "remove it from --input")
    return list(found.values())


def _fingerprint(path: Path) -> list[Any]:
    """Name, size, and SHA-256 of both ends: enough to notice another file without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [path.name, size, digest.hexdigest()]
