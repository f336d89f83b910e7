"""Files appear whole or not at all, downloads are checked, and a lock has one holder."""

from __future__ import annotations

import builtins
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, FileServer
from utils.files import download, locked, remove_temporary_files, sha256_of, temporary_name, whole_file


def names(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


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
