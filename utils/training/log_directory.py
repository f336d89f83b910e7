"""The log directory of a run: one writer at a time, and nothing in it is ever overwritten by a later run."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from utils.command_line import UserError, format_count
from utils.console import say, warn
from utils.distributed import Distributed
from utils.files import locked, move, remove_temporary_files
from utils.text_files import quoted
from utils.weights.checkpoint import best_path, saved_step, step_of

LOGS = ("log.txt", "metrics.jsonl", "samples.txt")  # a resumed run cuts these back to its checkpoint
# Everything that a run writes, and a later run archives. Other files in the directory are left alone.
RUN_FILES = (
    *("model_*.pt", "optimizer_*.pt", *LOGS, *(f"{name}.stale" for name in LOGS)),
    *("curves.png", "report.md", "tensorboard", "wandb", "wandb_id.txt"),
)


def check_entries(log_dir: Path) -> None:
    """Raises UserError if something else stands where a run writes its files: writing could block."""
    for path in (log_dir / ".lock", log_dir / ".lock-holder", *(log_dir / name for name in LOGS)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file", "move it away, or give another --log-dir")
    if (archive := log_dir / "archive").exists() and not archive.is_dir():
        raise UserError(f"{archive} is not a folder", "move it away, or give another --log-dir")


@contextlib.contextmanager
def locked_log_dir(log_dir: Path) -> Iterator[None]:
    """Creates and locks the directory. Raises UserError if another run uses it or it cannot be written."""
    holder = log_dir / ".lock-holder"
    with contextlib.ExitStack() as stack:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            check_entries(log_dir)
            stack.enter_context(locked(log_dir / ".lock"))
            for name in remove_temporary_files(log_dir):  # first: they may be what fills the disk
                say(f"removed {name}: an earlier run was stopped while writing it")
            holder.unlink(missing_ok=True)  # on a full disk this frees the bytes for the next line
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        except BlockingIOError as error:
            try:
                who = "pid {pid} on host {host} since {since}".format(**json.loads(holder.read_text()))
            except (OSError, ValueError):
                who = "another process"
            what = f"log dir {str(log_dir)!r} is in use by {who}"
            raise UserError(what, "wait for it, stop it, or give --log-dir another folder") from error
        except OSError as error:
            full = error.errno == errno.ENOSPC
            hint = "make room on the disk" if full else "give --log-dir a folder you can write to"
            raise UserError(f"cannot write to log dir {log_dir}: {error.strerror}", hint) from error
        yield


@contextlib.contextmanager
def reserved(log_dir: Path, dist: Distributed) -> Iterator[None]:
    """`locked_log_dir` on rank 0, which is the only one that writes; its errors are raised on all ranks."""
    with contextlib.ExitStack() as stack:
        dist.on_master(lambda: stack.enter_context(locked_log_dir(log_dir)))
        yield


def archive_run(
    log_dir: Path, checkpoints_after: int | None = None, *, with_best: bool = False
) -> Path | None:
    """Moves the files of an earlier run to `archive/<time of its first file>/`.

    Checkpoints go first, one rename each, so that a kill halfway leaves no checkpoint without its log. With
    `checkpoints_after`, only those of later steps are moved, and with `with_best` model_best.pt of any step.
    Returns the folder, None if nothing was moved.
    """
    files = [path for pattern in RUN_FILES for path in log_dir.glob(pattern)]
    if checkpoints_after is not None:
        files = [path for path in files if path.suffix == ".pt" and step_of(path) > checkpoints_after]
        best = best_path(log_dir)
        files += [best] if best.exists() and (with_best or saved_step(best) > checkpoints_after) else []
    if not files:
        return None
    started = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(min(path.stat().st_mtime for path in files)))
    archive, count = log_dir / "archive" / started, 1
    while archive.exists():
        count += 1
        archive = log_dir / "archive" / f"{started}_{count}"
    archive.mkdir(parents=True)
    for path in sorted(files, key=lambda path: (path.suffix != ".pt", path.name)):
        move(path, archive / path.name)
    say(f"moved {format_count(len(files), 'file')} of an earlier run to {archive}")
    return archive


def check_not_moved(log_dir: Path, init_from: str) -> None:
    """Raises UserError if an earlier start with the same --init-from has moved that file to the archive.

    The name then means nothing, or a checkpoint of the fine-tuned model.
    """
    path, settings = Path(init_from), {}
    with (
        contextlib.suppress(OSError, ValueError, LookupError, TypeError),
        open(log_dir / LOGS[1], "rb") as file,
    ):
        settings = dict(json.loads(file.readline())["settings"])
    is_folder = path.resolve() == log_dir.resolve()
    if settings.get("init_from") == init_from and (is_folder or path.resolve().parent == log_dir.resolve()):
        name = "" if is_folder else f"/{path.name}"
        archived = sorted(log_dir.glob(f"archive/*{name}"), key=lambda found: found.stat().st_mtime)
        where = f"--init-from {quoted(archived[0])}" if archived else "name another checkpoint"
        what = f"{path} is not what this fine-tuning started from: that was moved to the archive"
        raise UserError(what, f"{where}, or continue with --resume")


def log_sizes(log_dir: Path) -> dict[str, int]:
    """Size of each log in bytes, to be saved with a checkpoint."""
    return {name: (log_dir / name).stat().st_size for name in LOGS if (log_dir / name).exists()}


def cut_logs_back(log_dir: Path, sizes: dict[str, int]) -> None:
    """Cuts each log back to its size at the checkpoint; the rest is appended to `<name>.stale`."""
    for name in LOGS:
        path, size = log_dir / name, sizes.get(name, 0)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            warn(f"{path} has {found:,} bytes and had {size:,} at the checkpoint: lines are lost")
            size = path.read_bytes().rfind(b"\n") + 1 if found else 0  # keep whole lines only
        if found > size:
            with open(path, "r+b") as file, open(path.with_name(f"{name}.stale"), "ab") as stale:
                file.seek(size)
                stale.write(file.read())
                stale.flush()
                os.fsync(stale.fileno())  # before the lines are cut off: a power cut must not lose them
                file.truncate(size)
