"""Stop a run at any instant, run it again with --resume: the same log, the same weights.

Signals are in test_resume_signals.py, bad files in test_resume_saves.py, other settings in
test_resume_settings.py, what needs several processes in test_distributed.py, single files in test_files.py.
"""

from __future__ import annotations

import signal

import pytest
import torch

from tests.small_runs import Killed, assert_same_run, kill_in, stop_by_signal_in, tensors_of, train
from utils.errors import UserError
from utils.training.resume import Progress

pytestmark = pytest.mark.usefixtures("no_pictures")  # drawing takes longer than the run


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 11, 15, 19])
def test_killed_in_an_update_and_resumed_it_is_the_same_run(
    step, short_text, undisturbed, tmp_path, monkeypatch
):
    """Bitwise resume: before the first checkpoint, after one, at an evaluation, across an epoch's end."""
    with monkeypatch.context() as patch:
        kill_in(patch, "update", lambda args: args[2].step == step)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["evaluate", "write_samples", "save"])
def test_killed_in_an_evaluation_a_sample_or_a_save(name, short_text, undisturbed, tmp_path, monkeypatch):
    """No line is lost and none is there twice, wherever in a pass the run ended."""
    calls = []
    with monkeypatch.context() as patch:
        kill_in(patch, name, lambda args: calls.append(1) or len(calls) == 3)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_resumed_twice(short_text, undisturbed, tmp_path, monkeypatch):
    """A resumed run saves as good a state as a fresh one."""
    for step in (5, 13):
        with monkeypatch.context() as patch:
            kill_in(patch, "update", lambda args, step=step: args[2].step == step)
            with pytest.raises(Killed):
                train(short_text, tmp_path, "--resume")
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)
    assert (tmp_path / "log.txt.stale").exists()


def test_a_complete_run_resumed_changes_nothing(short_text, undisturbed, capsys):
    """Resume at MAX_STEPS: it says so, exit 0, every file as it was."""
    before = {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()}
    assert train(short_text, undisturbed, "--resume") == 0
    model = undisturbed / "model_00020.pt"
    assert f"already complete: step 20 of 20, the model is {model}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()} == before


def test_resume_without_a_checkpoint_is_a_fresh_start(short_text, undisturbed, tmp_path):
    """So that one command, in a loop, starts a run and continues it."""
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_resume_without_a_usable_checkpoint_is_no_fresh_start(stopped_run, short_text):
    """All damaged, or without their twins: days of work are not begun anew without a word."""
    names = {path.name for path in stopped_run.iterdir()}
    for path in stopped_run.glob("optimizer_*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"none of the \d model files .* can be resumed from"):
        train(short_text, stopped_run, "--resume")
    assert {path.name for path in stopped_run.iterdir()} >= names


def test_an_older_checkpoint_sends_the_newer_ones_to_the_archive(stopped_run, short_text, undisturbed):
    """Resuming step 6 while step 9 exists: the dead branch cannot be taken up later."""
    older = str(stopped_run / "model_00006.pt")
    assert train(short_text, stopped_run, "--resume", older, "--max-steps", "20") == 0
    (archive,) = (stopped_run / "archive").iterdir()
    assert sorted(path.name for path in archive.iterdir()) == ["model_00009.pt", "optimizer_00009.pt"]
    assert_same_run(stopped_run, undisturbed)


def test_a_checkpoint_from_another_folder_starts_a_new_log(
    stopped_run, short_text, undisturbed, tmp_path_factory
):
    """The old folder is left alone; the weights end up the same."""
    new = tmp_path_factory.mktemp("new")
    before = sorted(path.name for path in stopped_run.iterdir())
    assert train(short_text, new, "--resume", str(stopped_run / "model_00009.pt")) == 0
    assert sorted(path.name for path in stopped_run.iterdir()) == before
    assert (new / "log.txt").read_text() in (undisturbed / "log.txt").read_text()
    assert (new / "log.txt").read_text().startswith("9 train")
    ours, theirs = (tensors_of(folder / "model_00020.pt") for folder in (new, undisturbed))
    assert all(torch.equal(ours[place], theirs[place]) for place in theirs)


@pytest.mark.parametrize("key", ["optimizer", "step", "windows", "log", "done"])
def test_without_one_part_of_the_state_the_run_would_be_another(
    key, short_text, undisturbed, tmp_path, monkeypatch
):
    """Negative controls: the comparison above sees the loss of any part of the state."""
    with monkeypatch.context() as patch:  # stopped in step 12, whose validation is in the log already
        stop_by_signal_in(patch, "update", signal.SIGTERM, 13)
        assert train(short_text, tmp_path) == 143
    path = tmp_path / "optimizer_00012.pt"
    content = torch.load(path, weights_only=True)
    if key == "optimizer":
        for entry in content["optimizer"]["state"].values():
            entry["exp_avg"].zero_()
    else:
        content[key] = {"step": 11, "windows": 0, "log": {}, "done": []}[key]
    torch.save(content, path)
    train(short_text, tmp_path, "--resume")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_same_run(tmp_path, undisturbed)


def test_the_last_val_loss_comes_back(stopped_run, short_text):
    """A resumed run that evaluates no more saves the val loss of before with its last model."""
    before = torch.load(stopped_run / "model_00009.pt", weights_only=True)["val_loss"]
    assert before is not None and train(short_text, stopped_run, "--resume", "--val-every", "0") == 0
    assert torch.load(stopped_run / "model_00020.pt", weights_only=True)["val_loss"] == before


def test_what_is_due_is_due_once_a_pass():
    """Every N steps and after the last, 0 never, and not again once it is in the log."""
    progress = Progress(step=10)
    assert progress.is_due("val", 5, last=False) and progress.is_due("val", 7, last=True)
    assert not progress.is_due("val", 3, last=False) and not progress.is_due("val", 0, last=True)
    progress.done.append("val")
    assert not progress.is_due("val", 5, last=False)
    progress.updated(4, 0.5)
    assert (progress.step, progress.windows, progress.done) == (11, 4, [])
