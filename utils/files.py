"""What everything that writes files needs: a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator

CHUNK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it is whole; `run_dir.sweep` removes what a kill leaves."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextmanager
def whole_file(
    path: Path, mode: str = "w", *, temporary: Path | None = None, durable: bool = False
) -> Iterator[IO[Any]]:
    """Opens a file under a temporary name, which becomes `path` when the block ends without an exception.

    Args:
        path: where it appears, replacing what was there; if anything fails, that is untouched.
        mode: as for `open`; text is UTF-8.
        temporary: a name in the same folder, by default `temporary_name(path)`. It is gone at the end.
        durable: flushes the file before the rename and the folder after it: a power cut leaves one of both.
    """
    temporary = temporary or temporary_name(path)
    file = open(temporary, mode, encoding=None if "b" in mode else "utf-8")
    try:
        with file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename survives a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
