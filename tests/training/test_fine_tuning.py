"""--init-from: a fine-tuning run is resumed from its own checkpoints, and the same command starts alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_runs import Killed, assert_same_run, kill_in_update, train
from utils.command_line import UserError

pytestmark = pytest.mark.usefixtures("no_pictures")


FLAGS = ("--max-steps", "10")


@pytest.fixture
def fine_tuned(short_text, stopped_run, monkeypatch) -> Path:
    """A log directory with a run that was fine-tuned from a checkpoint in it, and killed at step 8."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_update(patch, 8)
        train(short_text, stopped_run, *FLAGS, "--init-from", str(stopped_run / "model_00009.pt"))
    assert not (stopped_run / "model_00009.pt").exists()
    return stopped_run


def original(log_dir: Path) -> Path:
    """The checkpoint of step 9, which the start of the fine-tuning has moved."""
    return min(log_dir.glob("archive/*/model_00009.pt"), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("source", ["gone", "another file"])
def test_a_resumed_run_does_not_read_the_checkpoint_it_started_from(source, fine_tuned, short_text, tmp_path):
    """Bitwise the uninterrupted run; a file that has taken its name does not matter either."""
    flags = (*FLAGS, "--init-from", str(fine_tuned / "model_00009.pt"))
    if source == "another file":
        (fine_tuned / "model_00009.pt").write_bytes(b"not even a checkpoint")
        flags = (*flags, "--resume", str(fine_tuned / "model_00006.pt"))
    else:
        flags = (*flags, "--resume")
    assert train(short_text, fine_tuned, *flags) == 0
    whole = tmp_path / "whole"
    assert train(short_text, whole, *FLAGS, "--init-from", str(original(fine_tuned))) == 0
    assert_same_run(fine_tuned, whole, step=10)


def test_the_same_fine_tuning_again_names_the_checkpoint_that_was_moved(fine_tuned, short_text, tmp_path):
    """Also when the run has written a file of that name: the hint, followed, starts from the same weights."""
    flags = (*FLAGS, "--init-from", str(fine_tuned / "model_00009.pt"))
    for _ in range(2):
        with pytest.raises(UserError, match="is not what this fine-tuning started from") as caught:
            train(short_text, fine_tuned, *flags)
        shutil.copy(fine_tuned / "model_00006.pt", fine_tuned / "model_00009.pt")
    assert caught.value.hint == f"--init-from {original(fine_tuned)}, or continue with --resume"
    train(short_text, tmp_path / "again", *FLAGS, "--init-from", str(original(fine_tuned)))
    lines = (fine_tuned / "log.txt").read_text().splitlines()
    assert (tmp_path / "again" / "log.txt").read_text().splitlines()[: len(lines)] == lines


def test_the_same_fine_tuning_of_a_folder_again_is_refused(stopped_run, short_text, tmp_path):
    """The log directory then holds the fine-tuned model; the hint, followed, starts from the same weights."""
    flags = (*FLAGS, "--init-from", str(stopped_run))
    assert train(short_text, stopped_run, *flags) == 0
    with pytest.raises(UserError, match="is not what this fine-tuning started from") as caught:
        train(short_text, stopped_run, *flags)
    archive = original(stopped_run).parent
    assert caught.value.hint == f"--init-from {archive}, or continue with --resume"
    assert train(short_text, tmp_path / "again", *FLAGS, "--init-from", str(archive)) == 0
    assert_same_run(tmp_path / "again", stopped_run, step=10)


def test_another_source_of_a_resumed_run_is_a_warning(fine_tuned, short_text, capsys):
    """It is not read: neither a checkpoint nor the name of a model that would be downloaded."""
    assert train(short_text, fine_tuned, "--init-from", "gpt2", "--resume", *FLAGS) == 0
    assert "warning: --init-from gpt2 is not read: the weights are those of " in capsys.readouterr().err


def test_a_resumed_run_refuses_another_architecture(fine_tuned, short_text):
    """Typed flags are compared with the checkpoint, whose sizes the preset's do not contradict."""
    with pytest.raises(UserError, match=r"model_00006.pt contradicts --n-layer 3 \(found 2\)"):
        train(short_text, fine_tuned, "--resume", "--n-layer", "3")
