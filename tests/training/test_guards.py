"""Spikes of the gradient norm are skipped; a non-finite loss ends the run before its weights are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from tests.small_runs import small_args, train
from utils.command_line import Diverged, UserError
from utils.distributed import Distributed
from utils.training.guards import WINDOW, SpikeFilter, stop_on_divergence
from utils.training.run_log import RunLog, Speed
from utils.training.session import Run
from utils.training.state import TrainState

UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def test_a_spike_is_an_outlier_among_128_accepted_norms():
    """None before 128 norms; a skipped norm does not enter the statistics; the state can be restored."""
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        assert spikes.accepts(1.0 + 0.1 * (i % 2) + (99.0 if i == 3 else 0.0))
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        assert spikes.accepts(1.0 + 0.1 * (i % 2))
    assert not spikes.accepts(10.0) and not spikes.accepts(10.0)
    assert spikes.accepts(1.2) and spikes.num_skipped == 2
    again = SpikeFilter(5.0)
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.state_dict() == spikes.state_dict() and not again.accepts(10.0)
    assert SpikeFilter(0.0).accepts(1e30)


def test_too_many_spikes_end_the_run():
    """More than ten skipped updates of a hundred raise Diverged."""
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        spikes.accepts(1.0 + 0.1 * (i % 2))
    for _ in range(10):
        assert not spikes.accepts(10.0)
    with pytest.raises(Diverged, match="11 of the last"):
        spikes.accepts(10.0)


@pytest.mark.usefixtures("no_pictures")
def test_a_skipped_spike_leaves_the_weights_unchanged(short_text, tmp_path, monkeypatch):
    """With --skip-spikes the update of an outlier does not happen, and every other one does."""
    norms: list[float] = []
    real_accepts, real_update = SpikeFilter.accepts, train_gpt.update

    def accepts(self: SpikeFilter, norm: float) -> bool:
        norms.append(norm)
        return len(norms) != 7 and real_accepts(self, norm)

    unchanged: list[bool] = []

    def recorded(state: TrainState, *rest: Any) -> tuple[float, float]:
        before = state.model.lm_head.weight.detach().clone()
        result = real_update(state, *rest)
        unchanged.append(torch.equal(before, state.model.lm_head.weight))
        return result

    monkeypatch.setattr(SpikeFilter, "accepts", accepts)
    monkeypatch.setattr(train_gpt, "update", recorded)
    assert train(short_text, tmp_path, "--skip-spikes", "1000") == 0
    assert [step for step, same in enumerate(unchanged) if same] == [6]


def test_a_non_finite_loss_stops_the_run_before_the_update(text_file, tmp_path, monkeypatch):
    """Exit code 3 with rank, micro-step, position and text, and no weight has changed."""
    recorded: list[tuple[TrainState, dict[str, torch.Tensor]]] = []
    real_update = train_gpt.update

    def poisoned(state: TrainState, *rest: Any) -> tuple[float, float]:
        if state.progress.step == 3:
            with torch.no_grad():
                state.model.transformer.ln_f.bias[0] = float("nan")
            recorded.append((state, {name: p.clone() for name, p in state.model.state_dict().items()}))
        return real_update(state, *rest)

    monkeypatch.setattr(train_gpt, "update", poisoned)
    message = "non-finite loss at step 3 .rank 0, micro-step 0, .*text.txt position .*quick"
    with pytest.raises(Diverged, match=message) as caught:
        train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "5"))
    assert caught.value.exit_code == 3
    ((state, before),) = recorded
    after = state.model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.usefixtures("no_pictures")
def test_non_finite_weights_are_refused_at_the_start(text_file, tmp_path):
    """By a run, with a hint to give other weights, and by --eval-only."""
    flags = "--max-steps 1 --val-every 1".split()
    assert train_gpt.main(small_args(text_file, tmp_path / "a", *flags)) == 0
    content = torch.load(tmp_path / "a" / "model_00001.pt")
    content["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    start = ("--init-from", str(tmp_path / "nan.pt"), *flags)
    with pytest.raises(Diverged, match="non-finite val loss at step 0") as caught:
        train_gpt.main(small_args(text_file, tmp_path / "b", *start))
    assert "give --init-from other weights" in caught.value.hint
    with pytest.raises(UserError, match="nan.pt: val loss nan"):
        train_gpt.main(small_args(text_file, tmp_path / "b", *start, "--eval-only"))


@pytest.mark.usefixtures("no_pictures")
def test_weights_with_a_non_finite_val_loss_are_not_saved(text_file, tmp_path):
    """When the last update made them so: exit code 3 before anything is logged or saved."""
    flags = "--max-lr 1e30 --warmup-steps 0 --max-steps 1 --val-every 1".split()
    with pytest.raises(Diverged, match="non-finite val loss at step 1") as caught:
        train_gpt.main(small_args(text_file, tmp_path, *flags))
    assert caught.value.exit_code == 3 and "none yet" in caught.value.hint
    assert not list(tmp_path.glob("model_*.pt"))
    assert "nan" not in (tmp_path / "log.txt").read_text().lower()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_samples_of_a_model_with_non_finite_logits_are_skipped(text_file, tmp_path, monkeypatch, capsys):
    """With one line; the run continues."""
    real = train_gpt.write_samples

    def broken(run: Run, log: RunLog) -> None:
        weight = run.state.model.transformer.ln_f.weight
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        real(run, log)
        weight.data.copy_(kept)

    monkeypatch.setattr(train_gpt, "write_samples", broken)
    assert train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "2", "--val-every", "0")) == 0
    assert "generation skipped: non-finite logits" in capsys.readouterr().out


def test_an_infinite_norm_in_fp16_is_skipped_counted_and_logged_as_null(tmp_path):
    """It is no spike, so it never ends a run as too many of them do; JSON has no infinity."""
    spikes = SpikeFilter(0.0)
    assert not spikes.accepts(float("inf")) and spikes.num_skipped == 1
    with RunLog(tmp_path, is_master=True) as log:
        speed = Speed(1.0, None, 1.0, None, 1.0)
        log.log_update(0, 1.0, float("inf"), {"lr": 1e-3}, speed, spikes.num_skipped, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert record["norm"] is None and record["skipped"] == 1


def diverged(
    loss: float, norm: float, losses: list[float], scaler: torch.amp.GradScaler = UNSCALED
) -> str | None:
    """The message of `stop_on_divergence` for these values, or None if it lets them pass."""
    try:
        stop_on_divergence(
            *(7, loss, norm, list(map(torch.tensor, losses)), scaler, Distributed(torch.device("cpu"))),
            *("text of batch {}".format, Path("log/model_00006.pt")),
        )
    except Diverged as error:
        assert "last good checkpoint: log/model_00006.pt" in error.hint
        return str(error)
    return None


def test_loss_and_norm_must_be_finite():
    """The message has the step and, for a loss, the first micro-step that is not finite, with its text."""
    nan, inf = float("nan"), float("inf")
    assert diverged(2.0, 1.0, [2.0, 2.0]) is None
    assert diverged(nan, nan, [2.0, nan, nan]) == (
        "non-finite loss at step 7 (rank 0, micro-step 1, text of batch 1)"
    )
    assert diverged(2.0, inf, [2.0]) == "non-finite gradient norm at step 7 (loss 2.0000, norm inf)"


def test_in_fp16_an_infinite_norm_is_accepted_while_the_scale_can_be_lowered():
    """The gradient scaler skips that update; below a scale of 1 the gradients themselves have diverged."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(1))  # creates the scale
    assert diverged(2.0, float("inf"), [2.0], scaler) is None
    assert "non-finite loss" in diverged(float("nan"), float("inf"), [float("nan")], scaler)
    lowest = torch.amp.GradScaler("cpu", init_scale=0.5)
    lowest.scale(torch.ones(1))
    assert "non-finite gradient norm" in diverged(2.0, float("inf"), [2.0], lowest)
