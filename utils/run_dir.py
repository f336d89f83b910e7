"""The log directory of a run: nothing in it is ever truncated or overwritten by the next one."""

from __future__ import annotations

import os
import time
from pathlib import Path

KEPT = ("README.md", "archive")  # what stays when a run's files move


def archive_earlier_run(log_dir: Path) -> Path | None:
    """Moves what an earlier run left to `archive/<time of its log>/`.

    Checkpoints go first, one rename each, so that a kill halfway loses nothing.

    Returns:
        The folder, or None if there was nothing to move.
    """
    files = [path for path in log_dir.iterdir() if path.name not in KEPT and not path.name.startswith(".")]
    if not files:
        return None
    started = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(min(path.stat().st_mtime for path in files)))
    archive = log_dir / "archive" / started
    count = 1
    while archive.exists():
        count += 1
        archive = log_dir / "archive" / f"{started}_{count}"
    archive.mkdir(parents=True)
    for path in sorted(files, key=lambda path: (path.suffix != ".pt", path.name)):
        os.replace(path, archive / path.name)
    return archive
