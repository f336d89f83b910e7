"""A text that every machine has: Python's documentation, and the sources of its library and packages."""

from __future__ import annotations

import os
import random
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from utils.tokenizer import END_OF_TEXT


def python_documents() -> Iterator[str]:
    """Documentation topics, then source files in the order of their paths; test files are left out."""
    from pydoc_data.topics import topics

    yield from topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    for folder in (library, *map(Path, site.getsitepackages())):
        for root, names, files in os.walk(folder):
            names[:] = sorted(set(names) - {"test", "tests", "site-packages", "__pycache__"})
            for name in sorted(files):
                if name.endswith(".py"):
                    yield Path(root, name).read_text(encoding="utf-8", errors="replace")


def write_python_text(path: Path, num_bytes: int) -> Path:
    """Writes at most so many bytes of documents in random order, the same on every call; returns the path."""
    chosen, size = [], 0
    for document in python_documents():
        size += len(document.encode())
        if size > num_bytes:
            break
        chosen.append(document.rstrip())
    random.Random(1337).shuffle(chosen)  # the end of the text is the val split
    path.write_text(f"\n{END_OF_TEXT}\n".join(chosen) + "\n", encoding="utf-8")
    print(
        f"{path.stat().st_size / 1e6:.1f} MB of Python's documentation and sources, {len(chosen):,} documents"
    )
    return path
