"""The log directory: locked by a run, archived by the next one, cut back by a resumed one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utils.command_line import UserError
from utils.training import log_directory
from utils.training.log_directory import RUN_FILES, archive_run, cut_logs_back, locked_log_dir, log_sizes


def test_the_holder_of_the_lock_is_named(tmp_path):
    """With process id, host and time; an unreadable note about the holder does not hide the error."""
    with locked_log_dir(tmp_path / "new" / "log"):
        who = rf"is in use by pid {os.getpid()} on host .* since 20\d\d-"
        with pytest.raises(UserError, match=who), locked_log_dir(tmp_path / "new" / "log"):
            pass
        (tmp_path / "new" / "log" / ".lock-holder").write_text("not JSON")
        with pytest.raises(UserError, match="is in use by another process"):
            with locked_log_dir(tmp_path / "new" / "log"):
                pass
    with locked_log_dir(tmp_path / "new" / "log"):
        pass


def test_a_full_disk_is_an_error_unless_temporary_files_fill_it(tmp_path, monkeypatch):
    """Temporary files of a killed run are removed before anything is written."""
    real_write, temporary = Path.write_text, tmp_path / ".model_00021.pt.tmp-99999"
    temporary.write_text("most of the disk")

    def full(path: Path, text: str, **options: str) -> int:
        if temporary.exists() or path.exists():
            raise OSError(28, "No space left on device")
        return real_write(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    with locked_log_dir(tmp_path):
        assert not temporary.exists()
    monkeypatch.setattr(log_directory, "remove_temporary_files", lambda folder: temporary.touch() or [])
    with pytest.raises(UserError, match="cannot write to log dir .*: No space left on device") as caught:
        with locked_log_dir(tmp_path):
            pass
    assert caught.value.hint == "make room on the disk"


def found(log_dir: Path) -> set[str]:
    """The patterns of a run's files that match in a folder."""
    return {pattern for pattern in RUN_FILES if any(log_dir.glob(pattern))}


def test_archiving_moves_checkpoints_first_and_only_files_of_a_run(tmp_path, monkeypatch):
    """A kill halfway leaves no checkpoint without its log; other files stay; two archives get two names."""
    moved: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(a).name), real(a, b)))
    for number in (1, 2):
        for name in ("log.txt", "model_00001.pt", "optimizer_00001.pt", "metrics.jsonl", "notes.md", ".lock"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (1e9, 1e9))
        assert found(tmp_path) == {
            "model_*.pt",
            "optimizer_*.pt",
            "log.txt",
            "metrics.jsonl",
        }
        archive = archive_run(tmp_path)
        assert archive.name.endswith("_2") is (number == 2) and archive.parent == tmp_path / "archive"
        assert moved[-4:] == ["model_00001.pt", "optimizer_00001.pt", "log.txt", "metrics.jsonl"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "archive", "notes.md"]
    assert archive_run(tmp_path) is None
    assert found(tmp_path) == set()


def test_archiving_after_a_step_moves_later_checkpoints_only(tmp_path):
    """What a run leaves behind that is resumed from an earlier step than its last."""
    for name in ("log.txt", "model_00001.pt", "optimizer_00001.pt", "model_00002.pt", "optimizer_00002.pt"):
        (tmp_path / name).touch()
    archive = archive_run(tmp_path, checkpoints_after=1)
    assert sorted(path.name for path in archive.iterdir()) == ["model_00002.pt", "optimizer_00002.pt"]
    assert archive_run(tmp_path, checkpoints_after=1) is None


def test_logs_are_cut_back_to_their_size_at_the_checkpoint(tmp_path, capsys):
    """What came later goes to the stale file."""
    (tmp_path / "log.txt").write_text("0 val 1\n")
    (tmp_path / "samples.txt").write_text("a")
    sizes = log_sizes(tmp_path)
    assert sizes == {"log.txt": 8, "samples.txt": 1}
    for number in (1, 2):
        (tmp_path / "log.txt").write_text(f"0 val 1\n1 val {number}\n")
        cut_logs_back(tmp_path, sizes)
        assert (tmp_path / "log.txt").read_text() == "0 val 1\n"
    assert (tmp_path / "log.txt.stale").read_text() == "1 val 1\n1 val 2\n"
    assert (tmp_path / "samples.txt").read_text() == "a" and capsys.readouterr().out == ""


def test_a_log_that_lost_lines_is_cut_back_to_whole_lines(tmp_path, capsys):
    """With a warning; its incomplete last line goes to the stale file. A missing log is a warning too."""
    (tmp_path / "log.txt").write_text("0 val 1\n1 val 2\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({}) + "\n{incomplete")
    cut_logs_back(tmp_path, {"log.txt": 8, "metrics.jsonl": 1200, "samples.txt": 5})
    assert (tmp_path / "log.txt").read_text() == "0 val 1\n"
    assert (tmp_path / "log.txt.stale").read_text() == "1 val 2\n"
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert (tmp_path / "metrics.jsonl.stale").read_text() == "{incomplete"
    out = capsys.readouterr().out
    assert "metrics.jsonl has 14 bytes and had 1,200 at the checkpoint" in out and "log.txt" not in out
    assert "samples.txt has 0 bytes" in out
