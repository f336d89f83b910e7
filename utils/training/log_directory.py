"""The log directory of a run: one writer at a time, and nothing in it is truncated or overwritten later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Iterator

from utils.distributed import Distributed
from utils.errors import UserError
from utils.weights.checkpoint import step_of

LOGS = ("log.txt", "metrics.jsonl", "samples.txt")  # what a resumed run cuts back to its checkpoint
# All that a run writes: what a later one moves away. Other files in the folder are not ours to move.
OURS = (
    *("model_*.pt", "optimizer_*.pt", *LOGS, *(f"{name}.stale" for name in LOGS)),
    *("curves.png", "report.md", "tensorboard", "wandb", "wandb_id.txt"),
)


@contextlib.contextmanager
def locked(log_dir: Path) -> Iterator[None]:
    """Makes the folder and holds it against a second run; the system lets go of it however this process ends.

    Raises:
        UserError: nothing can be written there, or another live process holds it; the message names it.
    """
    from filelock import FileLock, Timeout  # comes with torch

    lock, holder = FileLock(str(log_dir / ".lock"), timeout=0), log_dir / ".lock-holder"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        sweep(log_dir)  # first of all: this may be what fills the disk
        holder.unlink(missing_ok=True)  # a full disk would have room for as many bytes again
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    except Timeout as error:
        try:
            who = "pid {pid} on host {host} since {since}".format(**json.loads(holder.read_text()))
        except (OSError, ValueError):
            who = "another process"
        raise UserError(
            f"log dir {str(log_dir)!r} is in use by {who}",
            "wait for it, stop it, or give --log-dir another folder",
        ) from error
    except OSError as error:
        lock.release()
        full = error.errno == errno.ENOSPC
        hint = "make room on the disk" if full else "give --log-dir a folder you can write to"
        raise UserError(f"cannot write to log dir {log_dir}: {error.strerror}", hint) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def reserved(log_dir: Path, dist: Distributed) -> Iterator[None]:
    """`locked`, by the one rank that writes."""
    with contextlib.ExitStack() as held:
        dist.on_master(lambda: held.enter_context(locked(log_dir)))
        yield


def sweep(log_dir: Path) -> None:
    """Removes what a killed run was in the middle of writing; call it under the lock."""
    for torn in log_dir.glob(".*.tmp-*"):
        print(f"removed {torn.name}: an earlier run was stopped while writing it")
        torn.unlink()


def written(log_dir: Path) -> list[str]:
    """Names, or their patterns, of what a run has left in its log directory."""
    return [pattern for pattern in OURS if any(log_dir.glob(pattern))]


def archive_run(log_dir: Path, checkpoints_after: int | None = None) -> Path | None:
    """Moves what an earlier run left to `archive/<time of its first file>/`.

    Checkpoints go first, one rename each, so that a kill halfway leaves no checkpoint without its log.

    Args:
        checkpoints_after: moves only the checkpoints of later steps than this one.

    Returns:
        The folder, or None if there was nothing to move.
    """
    files = [path for pattern in OURS for path in log_dir.glob(pattern)]
    if checkpoints_after is not None:
        files = [path for path in files if path.suffix == ".pt" and step_of(path) > checkpoints_after]
    if not files:
        return None
    started = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(min(path.stat().st_mtime for path in files)))
    archive, count = log_dir / "archive" / started, 1
    while archive.exists():
        count += 1
        archive = log_dir / "archive" / f"{started}_{count}"
    archive.mkdir(parents=True)
    for path in sorted(files, key=lambda path: (path.suffix != ".pt", path.name)):
        os.replace(path, archive / path.name)
    print(f"moved {len(files)} file(s) of an earlier run to {archive}")
    return archive


def log_sizes(log_dir: Path) -> dict[str, int]:
    """Bytes of each log, to be saved with a checkpoint."""
    return {name: (log_dir / name).stat().st_size for name in LOGS if (log_dir / name).exists()}


def cut_logs_back(log_dir: Path, sizes: dict[str, int]) -> None:
    """Cuts each log to its size at the checkpoint, or to whole lines; the rest is added to `<name>.stale`."""
    for name in LOGS:
        path, size = log_dir / name, sizes.get(name, 0)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            print(f"warning: {path} has {found:,} bytes and had {size:,} at the checkpoint: lines are lost")
            size = path.read_bytes().rfind(b"\n") + 1 if found else 0  # the next line needs a line of its own
        if found <= size:
            continue
        with open(path, "r+b") as file:
            file.seek(size)
            tail = file.read()
            with open(path.with_name(f"{name}.stale"), "ab") as stale:
                stale.write(tail)
                stale.flush()
                os.fsync(stale.fileno())
            file.truncate(size)
