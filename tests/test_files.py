"""Files appear whole or not at all, downloads are checked, and a lock has one holder."""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from tests.conftest import ROOT, FileServer
from utils.files import (
    check_writable,
    download,
    locked,
    remove_temporary_files,
    sha256_of,
    sync_folder,
    temporary_name,
    whole_file,
)


def names(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def failing(number: int) -> Callable[..., NoReturn]:
    """A system call that always answers with this error."""

    def call(*arguments: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def test_a_file_appears_when_its_block_ends(tmp_path):
    """Until then it has a temporary name; an exception leaves the earlier content and no temporary file."""
    path = tmp_path / "a.txt"
    with whole_file(path) as file:
        file.write("ä")
        assert names(tmp_path) == [temporary_name(path).name] == [f".a.txt.tmp-{os.getpid()}"]
    assert path.read_bytes() == "ä".encode() and names(tmp_path) == ["a.txt"]
    with pytest.raises(KeyError), whole_file(path, "wb") as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == "ä".encode() and names(tmp_path) == ["a.txt"]


def test_a_durable_file_is_flushed_before_its_rename_and_the_folder_after(tmp_path, monkeypatch):
    """So that a power cut leaves the old file or the new one; without `durable` nothing is flushed."""
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    with whole_file(tmp_path / "a", durable=True):
        pass
    assert calls == ["fsync", "replace", "fsync"]
    with whole_file(tmp_path / "a"):
        pass
    assert calls[3:] == ["replace"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_flushed_is_no_error(number, tmp_path, monkeypatch, capsys):
    """As on CIFS: the file is written and flushed, and there is nothing to say."""
    flushed, real = [], os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flushed.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_file(tmp_path / "a", durable=True) as file:
        file.write("x")
    assert (tmp_path / "a").read_text() == "x" and len(flushed) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_to_flush_is_an_error(number, tmp_path, monkeypatch):
    """Of a file as of a folder."""
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError), whole_file(tmp_path / "a", durable=True):
        pass
    with pytest.raises(OSError):
        sync_folder(tmp_path)


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    """Also a chain of relative links into another folder, and a link to a file that does not exist yet."""
    (tmp_path / "data").mkdir()
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("data/file")
    for content in ("new", "newer"):
        check_writable(tmp_path / "first")
        with whole_file(tmp_path / "first", durable=True) as file:
            file.write(content)
            assert Path(file.name).parent == tmp_path / "data"
        assert (tmp_path / "data" / "file").read_text() == content
    assert (tmp_path / "first").is_symlink() and (tmp_path / "second").is_symlink()
    assert names(tmp_path) == ["data", "first", "second"] and names(tmp_path / "data") == ["file"]


def test_a_fifo_and_a_device_are_written_to_and_stay(tmp_path):
    """As root, a rename would replace them by a regular file; through a link likewise."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("fifo", "link"):
        check_writable(tmp_path / name)
        with whole_file(tmp_path / name) as file:
            file.write(name)
        assert os.read(reader, 10) == name.encode()
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode) and names(tmp_path) == ["fifo", "link"]
    (tmp_path / "null").symlink_to(os.devnull)
    with whole_file(tmp_path / "null", "wb") as file:
        file.write(b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(OSError, match="not a regular file"), whole_file(tmp_path / "fifo", durable=True):
        pass


def test_a_folder_a_loop_of_links_and_a_missing_folder_are_refused(tmp_path):
    """By the check as by the writer, which leave nothing behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    for name in ("folder", "to folder", "loop", "nowhere/file", "folder/file/file"):
        with pytest.raises(OSError):
            check_writable(tmp_path / name)
        with pytest.raises(OSError), whole_file(tmp_path / name):
            pass
    assert names(tmp_path) == before and names(tmp_path / "folder") == []


def test_a_name_that_is_not_utf8_can_be_written_about(tmp_path):
    """As an escape: a report about a file from another system is UTF-8 nevertheless."""
    with whole_file(tmp_path / "a") as file:
        file.write(os.fsdecode(b"caf\xe9 \xe2\x82\xac"))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "caf\\udce9 €"


def test_temporary_files_of_killed_processes_are_removed_by_name(tmp_path):
    """Those of any process, restricted to a pattern of final names if one is given; other files stay."""
    for name in (".a.pt.tmp-1", ".a.pt.tmp-22", ".b.txt.tmp-1", ".lock", "a.pt", "c.tmp-1"):
        (tmp_path / name).touch()
    assert remove_temporary_files(tmp_path, "*.pt") == [".a.pt.tmp-1", ".a.pt.tmp-22"]
    assert remove_temporary_files(tmp_path) == [".b.txt.tmp-1"]
    (tmp_path / ".d.tmp-1").mkdir()  # left by an export into this folder: not a file to delete
    (tmp_path / ".e.tmpl").touch()
    assert remove_temporary_files(tmp_path) == []
    assert names(tmp_path) == [".d.tmp-1", ".e.tmpl", ".lock", "a.pt", "c.tmp-1"]


HOLD_LOCK = """
import sys
from pathlib import Path
from utils.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path):
    """A second process gets BlockingIOError, until the first is killed; then the lock is free."""
    command = [sys.executable, "-c", HOLD_LOCK, tmp_path / ".lock"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
            pass
        holder.kill()
        with locked(tmp_path / ".lock", wait=True):
            pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESTALE])
def test_a_file_system_without_locks_is_one_warning(number, tmp_path, monkeypatch, capsys):
    """Whatever it answers, the block runs; so it does where the lock waits for its holder."""
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for wait in (False, True):
        with locked(tmp_path / ".lock", wait=wait):
            assert capsys.readouterr().err == (
                f"warning: {tmp_path / '.lock'} cannot be locked ({os.strerror(number)}); "
                "let no other process use its folder\n"
            )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_held_lock_is_never_taken_for_a_missing_one(number, tmp_path, monkeypatch):
    """Some network file systems answer EACCES where another machine holds the lock."""
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass


def test_a_lock_file_that_cannot_be_written_is_locked_all_the_same(tmp_path, monkeypatch, capsys):
    """As one of another user: it is opened for reading; if that fails as well, the block runs unlocked."""
    path, real = tmp_path / ".lock", os.open
    path.touch()

    def refused(name, flags, *mode, allowed=os.O_RDONLY):
        if Path(name) == path and flags != allowed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(os, "open", partial(refused, allowed=-1))
    with locked(path):
        assert "cannot be locked (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_lock_file_that_cannot_be_created_is_an_error(number, tmp_path, monkeypatch):
    """Nothing else could be written either; the reason is the system's."""
    monkeypatch.setattr(os, "open", failing(number))
    with pytest.raises(OSError) as caught, locked(tmp_path / ".lock"):
        pass
    assert caught.value.errno == number


def test_without_locks_the_block_runs_after_a_warning(tmp_path, monkeypatch, capsys):
    """As on some network file systems and on Windows."""
    real_import = builtins.__import__

    def without_fcntl(name, *arguments):
        if name == "fcntl":
            raise ImportError("No module named 'fcntl'")
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_fcntl)
    with locked(tmp_path / ".lock"):
        pass
    assert f"warning: {tmp_path / '.lock'} cannot be locked (No module named" in capsys.readouterr().err


def test_a_download_appears_when_it_is_complete_and_correct(server: FileServer, tmp_path):
    """An incomplete file, an error page and an invalid answer leave the earlier file as it is."""
    body = b"a text" * 1000
    server.files = {"/good": body, "/short": body[:100]}
    digest = hashlib.sha256(body).hexdigest()
    download(f"{server.url}/good", tmp_path / "good", digest, len(body))
    assert (tmp_path / "good").read_bytes() == body and sha256_of(tmp_path / "good") == digest
    for path in ("/short", "/missing", "/invalid"):
        with pytest.raises(OSError):
            download(server.url + path, tmp_path / "good", digest, len(body))
    assert names(tmp_path) == ["good"]
    assert (tmp_path / "good").read_bytes() == body


def test_a_text_with_a_file_name_that_is_not_utf8_is_written(tmp_path):
    """As in a report: every reader of UTF-8 can read it, and the name can be recognised."""
    with whole_file(tmp_path / "a.txt") as file:
        file.write(os.fsdecode(b"caf\xe9.txt") + "\u00e9")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\\udce9.txt\xc3\xa9"
