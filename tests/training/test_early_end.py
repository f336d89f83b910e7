"""The best checkpoint, --patience and --max-hours: how a run ends before its last step."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.small_runs import Killed, assert_same_run, kill_in, kill_in_update, losses_of, train
from utils.command_line import UserError
from utils.training import resume, signals
from utils.training.state import Progress, TrainState
from utils.weights.checkpoint import saved_step

pytestmark = pytest.mark.usefixtures("no_pictures")

LOSSES = {0: 3.0, 4: 2.5, 8: 2.5, 12: 2.4, 16: 2.6, 20: 2.7}  # an equal loss is no new best


@pytest.fixture
def with_losses(monkeypatch) -> Callable[..., None]:
    """Replaces the measured val loss of each step by that of `losses`."""
    note = Progress.note_val_loss

    def replace(losses: dict[int, float] = LOSSES) -> None:
        monkeypatch.setattr(Progress, "note_val_loss", lambda self, loss: note(self, losses[self.step]))

    return replace


def test_the_best_checkpoint_holds_the_weights_of_the_lowest_val_loss(short_text, tmp_path, with_losses):
    """A model file like any other: weights, step and val loss; a later, higher loss leaves it alone."""
    with_losses()
    assert train(short_text, tmp_path, "--keep-every", "3") == 0
    best = torch.load(tmp_path / "model_best.pt", weights_only=True)
    kept = torch.load(tmp_path / "model_00012.pt", weights_only=True)
    assert (best["step"], best["val_loss"]) == (12, 2.4)
    assert all(torch.equal(best["model"][name], kept["model"][name]) for name in kept["model"])
    assert GPT.load(tmp_path / "model_best.pt").config == GPT.load(tmp_path / "model_00012.pt").config


def test_the_initial_weights_are_no_best_checkpoint(short_text, tmp_path, with_losses):
    """They are no result of the run, but their loss is the one to beat."""
    with_losses({**LOSSES, 0: 1.0})
    assert train(short_text, tmp_path, "--max-steps", "8") == 0
    assert not (tmp_path / "model_best.pt").exists()


def test_a_run_without_a_new_best_ends_complete(short_text, tmp_path, with_losses, capsys):
    """After --patience validations, with evaluations and checkpoint; the last line says why."""
    with_losses()
    assert train(short_text, tmp_path, "--patience", "1") == 0
    last = f"ended by --patience 1 at step 8 of 20; best val loss 2.5000 at step 4: {tmp_path}/model_best.pt"
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (tmp_path / "model_00008.pt").exists() and losses_of(tmp_path)[-1][0] == "8 val"
    assert "--- step 8, " in (tmp_path / "samples.txt").read_text()
    assert train(short_text, tmp_path, "--patience", "1", "--resume") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("already complete: step 8 of 20, the model is ") and out[-1] == last
    (tmp_path / "model_best.pt").unlink()
    assert train(short_text, tmp_path, "--patience", "1", "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" at step 4: not in {tmp_path}")


def test_the_report_says_why_the_run_ended_and_its_best_val_loss(short_text, tmp_path, with_losses):
    """As the console does; also where the best val loss is in the log of another directory."""
    with_losses()
    patience, other = ("--patience", "1"), tmp_path / "other"
    assert train(short_text, tmp_path / "a", *patience, "--keep-checkpoints", "9") == 0
    assert train(short_text, other, *patience, "--resume", str(tmp_path / "a" / "model_00006.pt")) == 0
    for log_dir in (tmp_path / "a", other):
        report = (log_dir / "report.md").read_text()
        assert "| steps | 8 of 20: ended by --patience 1 |" in report
        assert "| best val loss | 2.5000 nats per token after step 4 |" in report
    assert train(short_text, other, "--patience", "2", "--max-steps", "30", "--resume") == 0
    assert "| steps | 20 of 30: ended by --patience 2 |" in (other / "report.md").read_text()


def test_the_patience_survives_a_kill_and_can_be_raised(short_text, tmp_path, with_losses, monkeypatch):
    """Lowest loss and count are part of the state of a run: bitwise the run that was never killed."""
    losses = {**LOSSES, 8: 2.6}
    with_losses(losses)
    every = ("--sample-every", "4")  # as in the last pass of a run
    assert train(short_text, tmp_path / "whole", *every) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_update(patch, 7)  # after the checkpoint of step 6
        train(short_text, tmp_path / "killed", *every, "--patience", "1")
    assert train(short_text, tmp_path / "killed", *every, "--patience", "1", "--resume") == 0
    assert losses_of(tmp_path / "killed")[-1][0] == "8 val"
    assert train(short_text, tmp_path / "killed", *every, "--patience", "3", "--resume") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_best_checkpoint_survives_a_kill_after_the_next_one(
    short_text, tmp_path, with_losses, monkeypatch, capsys
):
    """The run continues from an older checkpoint, which was the best one; the later file is archived."""
    with_losses({**LOSSES, 8: 2.4})
    every = ("--checkpoint-every", "4", "--sample-every", "0")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "save_checkpoint", lambda state, *rest: state.progress.step == 8)
        train(short_text, tmp_path, *every)
    assert saved_step(tmp_path / "model_best.pt") == 8
    with_losses({step: 2.5 if step == 4 else 3.0 for step in LOSSES})  # another GPU may round differently
    assert train(short_text, tmp_path, *every, "--patience", "2", "--resume") == 0
    assert saved_step(tmp_path / "model_best.pt") == 4
    (archived,) = tmp_path.glob("archive/*/model_best.pt")
    assert saved_step(archived) == 8
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" 2.5000 at step 4: {tmp_path}/model_best.pt")


def test_val_losses_on_other_tokens_are_not_compared(short_text, tmp_path, with_losses, monkeypatch, capsys):
    """With another --val-tokens the first one is the best again; the file of the earlier best is kept."""
    with_losses({**LOSSES, 4: 1.0})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_update(patch, 10)
        train(short_text, tmp_path, "--val-tokens", "16")
    assert train(short_text, tmp_path, "--val-tokens", "32", "--patience", "1", "--resume") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" best val loss 2.4000 at step 12: {tmp_path}/model_best.pt")
    (archived,) = tmp_path.glob("archive/*/model_best.pt")
    assert (saved_step(archived), saved_step(tmp_path / "model_best.pt")) == (4, 12)


def test_a_best_checkpoint_that_could_not_be_saved_is_not_named(
    short_text, tmp_path, with_losses, monkeypatch, capsys
):
    """The last line does not name a file with the weights of an earlier step."""
    with_losses({**LOSSES, 8: 2.45})
    real = resume.save_model

    def save_model(path: Path, content: dict[str, Any]) -> None:
        if content["step"] == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(resume, "save_model", save_model)
    assert train(short_text, tmp_path, "--patience", "1", "--keep-checkpoints", "9") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].endswith(f"; best val loss 2.4000 at step 12: not in {tmp_path}")
    assert saved_step(tmp_path / "model_best.pt") == 8
    assert train(short_text, tmp_path, "--patience", "2", "--resume", str(tmp_path / "model_00012.pt")) == 0
    assert saved_step(tmp_path / "model_best.pt") == 12  # copied from the checkpoint, which was the best


def test_the_best_checkpoint_cannot_be_resumed_from(short_text, stopped_run):
    """Two lines; the hint names both things that may have been meant, and one of them works as typed."""
    best = str(stopped_run / "model_best.pt")
    with pytest.raises(UserError, match=r"model_best.pt holds weights only") as caught:
        train(short_text, stopped_run, "--resume", best)
    assert f"--init-from {best}" in caught.value.hint
    for path in stopped_run.glob("model_0*"):
        path.unlink()
    with pytest.raises(UserError, match=r"model_best.pt holds weights only"):
        train(short_text, stopped_run, "--resume", str(stopped_run))
    assert train(short_text, stopped_run, "--init-from", best, "--max-steps", "3") == 0


def test_a_time_limit_stops_like_a_signal(short_text, tmp_path, undisturbed, monkeypatch, capsys):
    """Saved, with exit code 143 and the way to continue; the hours count from the start of the process."""
    real = train_gpt.update

    def update(state: TrainState, *rest: Any) -> tuple[float, float]:
        if state.progress.step == 7:
            patch.setattr(signals.time, "monotonic", lambda: signals.PROCESS_START + 3601)
        return real(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "update", update)
        patch.setattr(signals, "PROCESS_START", time.monotonic())
        assert train(short_text, tmp_path, "--max-hours", "1") == 143
    out = capsys.readouterr().out
    assert re.search(r"reached --max-hours: saved .* at step 7; run it again with --resume", out)
    assert train(short_text, tmp_path, "--resume", "--max-hours", "1e6") == 0
    assert_same_run(tmp_path, undisturbed)
