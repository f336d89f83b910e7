"""The log directory: locked by a run, archived by the next one, cut back by a resumed one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import train_gpt
from tests.small_runs import train
from utils.command_line import Unfinished, UserError
from utils.training import log_directory
from utils.training.log_directory import RUN_FILES, archive_run, cut_logs_back, locked_log_dir, log_sizes
from utils.training.state import TrainState


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
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (moved.append(Path(a).name), real(a, b)))
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
    out = capsys.readouterr().err
    assert "metrics.jsonl has 14 bytes and had 1,200 at the checkpoint" in out and "log.txt" not in out
    assert "samples.txt has 0 bytes" in out


@pytest.mark.parametrize("name", [".lock", ".lock-holder", "log.txt", "metrics.jsonl", "samples.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_entry_that_is_no_regular_file_is_refused(name, make, tmp_path):
    """A FIFO in its place would block the run for ever, a folder end it with a traceback."""
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        with locked_log_dir(tmp_path):
            pass


def test_an_archive_that_is_no_folder_is_refused(tmp_path):
    """Before anything is moved."""
    (tmp_path / "archive").touch()
    with pytest.raises(UserError, match="archive is not a folder"):
        with locked_log_dir(tmp_path):
            pass


def test_an_archive_on_another_file_system_receives_copies(tmp_path, monkeypatch):
    """Files and folders, with their times; no temporary name is left."""
    (tmp_path / "model_00001.pt").write_bytes(b"weights")
    (tmp_path / "tensorboard" / "inner").mkdir(parents=True)
    (tmp_path / "tensorboard" / "inner" / "events").write_text("numbers")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    archive = archive_run(tmp_path)
    assert (archive / "model_00001.pt").read_bytes() == b"weights"
    assert (archive / "tensorboard" / "inner" / "events").read_text() == "numbers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]
    assert sorted(path.name for path in archive.iterdir()) == ["model_00001.pt", "tensorboard"]


def test_a_log_directory_that_cannot_be_created_again_ends_no_run(
    short_text, tmp_path, monkeypatch, capsys, no_pictures
):
    """A file stands in its place: warnings until the last step, then exit code 1."""
    log_dir, real = tmp_path / "log", train_gpt.update

    def update(state: TrainState, *rest: object) -> tuple[float, float]:
        if state.progress.step == 4:
            shutil.rmtree(log_dir)
            log_dir.touch()
        return real(state, *rest)

    monkeypatch.setattr(train_gpt, "update", update)
    with pytest.raises(Unfinished, match="the final checkpoint could not be saved"):
        train(short_text, log_dir)
    assert "warning: could not save step 20: File exists (free " in capsys.readouterr().err


@pytest.mark.parametrize("fate", ["removed", "renamed"])
def test_a_log_directory_that_disappears_ends_no_run(
    fate, short_text, tmp_path, monkeypatch, capsys, no_pictures
):
    """A warning, and further checkpoints in a new folder; at the end exit code 1 with what is lost."""
    log_dir, real = tmp_path / "log", train_gpt.update

    def update(state: TrainState, *rest: object) -> tuple[float, float]:
        if state.progress.step == 4:
            shutil.rmtree(log_dir) if fate == "removed" else log_dir.rename(tmp_path / "moved")
        return real(state, *rest)

    monkeypatch.setattr(train_gpt, "update", update)
    with pytest.raises(Unfinished, match="removed or renamed .*: it lacks log.txt, metrics") as caught:
        train(short_text, log_dir)
    assert "the weights are in " in caught.value.hint and (log_dir / "model_00020.pt").exists()
    err = capsys.readouterr().err
    assert err.count(f"warning: {log_dir} was removed or renamed during the run; creating it again\n") == 1
    assert "could not" not in err
    if fate == "renamed":
        assert (tmp_path / "moved" / "log.txt").read_text().splitlines()[-1].startswith("20 val ")
