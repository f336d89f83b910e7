"""A corpus of files on this machine's disk."""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.command_line import UserError
from utils.console import announced
from utils.files import sha256_of
from utils.shards.documents import KINDS, TOKENS_PER_DOCUMENT, bytes_per_token, check_kind, is_text, kind_of
from utils.shards.rows import open_parquet
from utils.suggestions import similar_file
from utils.text_files import first_bytes, kind_of_bytes, quoted, read_errors, wrong_kind

PROBE_BYTES = 1 << 16  # at both ends of a file, for its fingerprint
NAMES_SHOWN = 3  # of the files that are left out for one reason

SPECIAL = "broken links or special files"
LeftOut = dict[str, list[Path]]  # reason -> files


class LocalFiles:
    """Files on this machine's disk, in the order of the documents. Raises UserError for foreign names."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.kinds = [kind_of(path) for path in paths]
        if None in self.kinds:
            path = paths[self.kinds.index(None)]
            with read_errors(path):
                head = first_bytes(path)
            if kind_of_bytes(head) is not None:
                raise wrong_kind(path, head, ", ".join(KINDS))
            what = f"{path} is not a corpus file (expected {', '.join(KINDS)})"
            raise UserError(what, "rename it if its content is of that kind, else convert or omit it")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.paths[index]

    @announced("looking at the input files")
    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "files": [fingerprint_of(path) for path in self.paths]}

    @announced("estimating the size of the input")
    def estimate(self, text_field: str) -> tuple[int, int]:
        num_tokens = num_documents = 0
        for path, kind in zip(self.paths, self.kinds, strict=True):
            check_kind(path, kind)
            tokens_of_file = int(path.stat().st_size / bytes_per_token(kind))
            num_tokens += tokens_of_file
            if kind == "parquet":
                num_documents += open_parquet(path, text_field).metadata.num_rows
            elif is_text(kind):
                num_documents += 1
            else:
                num_documents += max(1, tokens_of_file // TOKENS_PER_DOCUMENT)
        return num_tokens, num_documents

    def checksums(self) -> list[dict[str, Any]]:
        sizes = [path.stat().st_size for path in self.paths]
        records = []
        with announced("checksums of the input", sum(sizes), "B") as advance:
            for path, size in zip(self.paths, sizes):
                with read_errors(path):
                    digest = sha256_of(path, advance)
                records.append({"path": os.path.abspath(path), "bytes": size, "sha256": digest})
        return records


def find_files(arguments: list[str], flag: str = "--input") -> tuple[list[Path], LeftOut]:
    """The files that `flag` names: files, globs or folders, in the order given, sorted within each.

    Folders are read with everything below, and links are followed; what is left out is returned as well.
    Raises UserError for a name that matches nothing, for empty files and for unreadable folders.
    """
    found: dict[Path, Path] = {}  # resolved -> as given; a file named twice counts once
    left_out: LeftOut = {}
    for argument in arguments:
        matches = [Path(argument)] if os.path.exists(argument) else _matches_of(argument)
        files = [file for match in matches for file in _files_of(match, left_out)]
        if not files:
            others = f" (left out: {describe_left_out(left_out)})" if left_out else ""
            hint = f"give files, globs or folders: {', '.join(KINDS)}{others}"
            is_name = not os.path.exists(argument) and set("*?[").isdisjoint(argument)
            if is_name and (close := similar_file(Path(argument))):
                hint = f"did you mean {flag} {quoted(close)}?"
            problem = "not a regular file" if os.path.exists(argument) else "no such file"
            problem = "a folder without corpus files" if os.path.isdir(argument) else problem
            raise UserError(f"{flag} {argument}: {problem}", hint)
        for file in files:
            if found.setdefault(file.resolve(), file) is not file:
                left_out.setdefault("named twice", []).append(file)
    for path in found.values():
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)", f"remove it from {flag}")
    return list(found.values()), left_out


def describe_left_out(left_out: LeftOut) -> str:
    """`3 hidden (.a.txt, .git, ...), 1 of other kinds (x.docx)`."""
    parts = []
    for reason, paths in left_out.items():
        names = [path.name for path in paths[:NAMES_SHOWN]] + ["..."][: len(paths) > NAMES_SHOWN]
        parts.append(f"{len(paths):,} {reason} ({', '.join(names)})")
    return ", ".join(parts)


def _matches_of(pattern: str) -> Iterator[Path]:
    """What a glob matches, in order. Its existing first part is taken as it is: it may contain brackets."""
    path = Path(pattern)
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    rest = str(path.relative_to(folder))
    return (folder / name for name in sorted(glob.glob(rest, root_dir=folder, recursive=True)))


def _files_of(path: Path, left_out: LeftOut) -> list[Path]:
    """The path itself, or the corpus files in a folder and below, sorted; adds the others to `left_out`."""
    if not os.path.isdir(path):  # Path.is_dir raises where a folder may not be read
        if not os.path.isfile(path):
            left_out.setdefault(SPECIAL, []).append(path)
        return [path] if os.path.isfile(path) else []
    files, visited = [], set()
    folders, links = [path], []  # links last: a folder is found under its own name where it has one here
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status, entries = folder.stat(), sorted(folder.iterdir())
        except OSError as error:
            hint = "make it readable, or name the files that you want"
            raise UserError(f"cannot read folder {folder}: {error.strerror}", hint) from error
        if (status.st_dev, status.st_ino) in visited:  # links may form a cycle
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                left_out.setdefault("hidden", []).append(entry)
            elif os.path.isdir(entry):
                (links if entry.is_symlink() else folders).append(entry)
            elif not entry.name.lower().endswith(tuple(KINDS)):
                left_out.setdefault("of other kinds", []).append(entry)
            elif not os.path.isfile(entry):
                left_out.setdefault(SPECIAL, []).append(entry)
            else:
                files.append(entry)
    return sorted(files)


def fingerprint_of(path: Path) -> list[Any]:
    """Name, size, and SHA-256 of both ends: enough to notice another file without reading all of it."""
    with read_errors(path):
        size = path.stat().st_size
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            digest.update(file.read(PROBE_BYTES))
            file.seek(max(0, size - PROBE_BYTES))
            digest.update(file.read(PROBE_BYTES))
    return [path.name, size, digest.hexdigest()]
