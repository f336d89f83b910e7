"""Files that appear whole or not at all, checked downloads, and locks.

A file is written as `.NAME.tmp-PID` in its folder and renamed when it is complete, so a process that is
killed leaves the old file or the new one, and at most one temporary file for the next start to remove.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from utils.console import announced, warn

# What fsync of a folder answers where it does not exist: CIFS, vboxsf and some FUSE file systems.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
LOCK_IS_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # flock's answers, by file system


def sha256_of(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hexadecimal; `advance` is called with the size of each piece that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def sha256_of_code() -> str:
    """SHA-256 of this project's source files, in hexadecimal."""
    root = Path(__file__).resolve().parent.parent
    paths = [*root.glob("*.py"), *root.joinpath("utils").rglob("*.py")]
    names = {path.relative_to(root).as_posix(): sha256_of(path) for path in paths}
    return hashlib.sha256(repr(sorted(names.items())).encode()).hexdigest()


def temporary_name(path: Path) -> Path:
    """The name under which this process writes a file, or a folder, until it is complete."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_temporary_files(folder: Path, name: str = "*") -> list[str]:
    """Deletes files that killed processes left under temporary names, and returns these names.

    Call it under the folder's lock. `name` is a pattern of the final names, as for `Path.glob`.
    """
    found = sorted(path for path in folder.glob(f".{name}.tmp*") if path.is_file())
    leftovers = [path for path in found if re.search(r"\.tmp(-\d+)?$", path.name)]  # older names have no PID
    for path in leftovers:
        path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def destination(path: Path) -> Path | None:
    """The regular file, existing or not, that writing to `path` replaces: of a symbolic link, its target.

    None for a device, FIFO or socket, which is never replaced. Raises OSError for a folder.
    """
    try:
        mode = os.stat(path).st_mode  # of the target: /dev/stdout is a link to what may be a pipe
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return Path(os.path.realpath(path)) if stat.S_ISREG(mode) else None


def check_writable(path: Path) -> None:
    """Raises OSError now if `whole_file` could not write `path`; an existing file is untouched."""
    if (target := destination(path)) is not None:
        probe = temporary_name(target)
        probe.touch()
        probe.unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def whole_file(path: Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO[Any]]:
    """Opens a file under a temporary name, which becomes `path` when the block ends without an exception.

    Only a regular file is replaced: through a symbolic link, its target; a device or FIFO is written to, as
    it is.

    Args:
        path: where it appears, replacing an earlier file; if anything fails, that one is untouched.
        mode: as for `open`; text is UTF-8, with what has no UTF-8 (names of files may) as `\\udce9`.
        durable: flush file and folder, so that a power cut, too, leaves the old file or the new one. A device
            or FIFO is then an OSError.
    """
    options = {} if "b" in mode else dict(encoding="utf-8", errors="backslashreplace")
    target = destination(path)
    if target is None:
        if durable:
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(path, mode, **options) as file:
            yield file
        return
    temporary = temporary_name(target)
    try:
        with open(temporary, mode, **options) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, target)
        if durable:
            sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of a folder, so that a rename survives a power cut, where the system can."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written, but not be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system releases it however this process ends.

    The file is created if missing, and stays. Where it cannot be locked (some network file systems, Windows,
    a lock file that others may not open) the block runs without a lock, after a warning. Raises
    BlockingIOError if another process holds the lock (with `wait`, the call waits for it instead), OSError if
    the file is missing and cannot be created.
    """
    with ExitStack() as stack:
        try:
            descriptor = _open_lock_file(path)
            stack.callback(os.close, descriptor)
            with announced(f"waiting for another process to release {path}", shown=wait):
                _lock(descriptor, wait=wait)
        except BlockingIOError:
            raise
        except (ImportError, OSError) as error:
            if not os.path.exists(path):
                raise
            reason = getattr(error, "strerror", None) or error
            warn(f"{path} cannot be locked ({reason}); let no other process use its folder")
        yield


def _open_lock_file(path: Path) -> int:
    """A descriptor of a lock file, which is created if missing; for reading only where that is allowed."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY)  # of another user: a local file system locks it nevertheless


def _lock(descriptor: int, *, wait: bool) -> None:
    import fcntl  # not on Windows

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCK_IS_HELD:
            raise BlockingIOError(error.errno, error.strerror) from error
        raise


def download(url: str, path: Path, sha256: str, num_bytes: int | None = None) -> None:
    """Fetches `url` to `path`, which appears only when its checksum and, if given, its size are right.

    Raises OSError without a network, or for an HTTP error or an unexpected file; nothing is left behind.
    """
    opener = urllib.request.build_opener()  # urlopen would keep the proxies of its first call
    try:
        # 10 seconds are the longest wait for the connection, and for each piece of data.
        bar = announced(f"downloading {path.name}", num_bytes, "B")
        with bar as advance, whole_file(path, "wb") as file, opener.open(url, timeout=10) as response:
            for chunk in iter(lambda: response.read(1 << 16), b""):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            size, digest = file.tell(), sha256_of(Path(file.name))
            if digest != sha256 or num_bytes not in (None, size):
                found = f"{size:,} bytes, SHA-256 {digest} (expected {sha256})"
                raise OSError(f"{url} is not the expected file: {found}")
    except http.client.HTTPException as error:  # not an OSError, unlike all other network failures
        raise OSError(f"{url}: no valid HTTP response ({error!r})") from error


def move(source: Path, target: Path) -> None:
    """Moves a file or folder by one rename; onto another file system by a copy that appears when complete."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = temporary_name(target)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, copy, symlinks=True)
            os.rename(copy, target)
            shutil.rmtree(source)
        else:
            shutil.copy2(source, copy, follow_symlinks=False)
            os.rename(copy, target)
            source.unlink()


def free_bytes(folder: Path) -> int:
    """Free space of the file system on which a folder is, or will be created."""
    folder = folder.resolve()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
