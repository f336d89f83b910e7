"""When a run leaves the road: spikes are skipped, what is not finite ends the run or is not sampled from."""

from __future__ import annotations

import json

import pytest
import torch

import train_gpt
from tests.small_runs import small_args, train
from utils.errors import Diverged, UserError
from utils.training.guards import WINDOW, SpikeFilter
from utils.training.run_log import RunLog, Speed


def test_a_spike_is_an_outlier_of_128_accepted_norms():
    """No decision before 128 norms; an outlier is skipped and judges no later one; state comes back."""
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
    """More than ten of a hundred are no single spikes."""
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        spikes.accepts(1.0 + 0.1 * (i % 2))
    for _ in range(10):
        assert not spikes.accepts(10.0)
    with pytest.raises(Diverged, match="11 of the last"):
        spikes.accepts(10.0)


@pytest.mark.usefixtures("no_pictures")
def test_a_skipped_spike_leaves_the_weights_alone(short_text, tmp_path, monkeypatch):
    """With --skip-spikes the update of an outlier does not happen, and no other is left out."""
    seen = []
    real = SpikeFilter.accepts
    monkeypatch.setattr(
        SpikeFilter, "accepts", lambda self, norm: seen.append(norm) or (len(seen) != 7 and real(self, norm))
    )
    states = []
    real_update = train_gpt.update

    def watched(run, batches, progress):
        before = run.model.lm_head.weight.detach().clone()
        result = real_update(run, batches, progress)
        states.append(torch.equal(before, run.model.lm_head.weight))
        return result

    monkeypatch.setattr(train_gpt, "update", watched)
    assert train(short_text, tmp_path, "--skip-spikes", "1000") == 0
    assert [i for i, unchanged in enumerate(states) if unchanged] == [6]


def test_a_nan_stops_the_run_before_the_update(text_file, tmp_path, monkeypatch):
    """A loss that is not finite is exit code 3, and no weight has moved."""
    runs = []
    real_update = train_gpt.update

    def poisoned(run, batches, progress):
        if progress.step == 3:
            with torch.no_grad():
                run.model.transformer.ln_f.bias[0] = float("nan")
            runs.append((run, {n: p.clone() for n, p in run.model.state_dict().items()}))
        return real_update(run, batches, progress)

    monkeypatch.setattr(train_gpt, "update", poisoned)
    with pytest.raises(
        Diverged, match="non-finite loss at step 3 .rank 0, micro-step 0, .*text.txt position .*quick"
    ) as caught:
        train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "5"))
    assert caught.value.exit_code == 3
    state, before = runs[0][0].model.state_dict(), runs[0][1]
    assert all(torch.equal(state[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.usefixtures("no_pictures")
def test_broken_weights_are_no_start(text_file, tmp_path):
    """Weights that are no numbers, given to a run or to --eval-only: the hint is to give others."""
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
def test_weights_without_a_val_loss_are_not_saved(text_file, tmp_path):
    """The last update broke them: exit code 3 before anything is logged or saved."""
    flags = "--max-lr 1e30 --warmup-steps 0 --max-steps 1 --val-every 1".split()
    with pytest.raises(Diverged, match="non-finite val loss at step 1") as caught:
        train_gpt.main(small_args(text_file, tmp_path, *flags))
    assert caught.value.exit_code == 3 and "none yet" in caught.value.hint
    assert not list(tmp_path.glob("model_*.pt"))
    assert "nan" not in (tmp_path / "log.txt").read_text().lower()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_samples_of_a_broken_model_are_skipped(text_file, tmp_path, monkeypatch, capsys):
    """Logits that are not finite end the sampling with a line, not the run."""
    real = train_gpt.write_samples

    def broken(run, log, step):
        weight = run.model.transformer.ln_f.weight
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        real(run, log, step)
        weight.data.copy_(kept)

    monkeypatch.setattr(train_gpt, "write_samples", broken)
    assert train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "2", "--val-every", "0")) == 0
    assert "generation skipped: non-finite logits" in capsys.readouterr().out


def test_an_overflow_in_fp16_is_counted_and_written_as_json(tmp_path):
    """The scaler skips such an update: it counts as skipped, and no Infinity gets into metrics.jsonl."""
    spikes = SpikeFilter(0.0)
    assert spikes.accepts(float("inf")) and spikes.num_skipped == 1
    with RunLog(tmp_path, True) as log:
        log.update(0, 1.0, float("inf"), 1e-3, Speed(1.0, 1.0, None, 1.0), spikes.num_skipped, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert record["norm"] is None and record["skipped"] == 1
