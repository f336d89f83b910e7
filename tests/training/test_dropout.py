"""Dropout in a run: masks are a function of seed, step, micro-step and rank, and resuming repeats them."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.conftest import tiny_model
from tests.small_runs import Killed, assert_same_run, kill_in, stop_by_signal_in, train
from tests.training.test_distributed import finish, finished, torchrun
from utils.command_line import run_script
from utils.distributed import Distributed
from utils.runtime import make_scaler
from utils.training.guards import SpikeFilter
from utils.training.micro_batch import seed_dropout
from utils.training.state import Progress, TrainState
from utils.weights import export
from utils.weights.checkpoint import load_model_file

CPU = torch.device("cpu")
DROPOUT = ("--dropout", "0.2")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def dropped(short_text, tmp_path_factory) -> Path:
    """The log directory of an uninterrupted run with dropout."""
    log_dir = tmp_path_factory.mktemp("dropped") / "log"
    assert train(short_text, log_dir, *DROPOUT) == 0
    return log_dir


def test_seeds_of_small_numbers_are_all_different():
    """Of 64 bits, and also of the lower 32, which are all that a CPU's generator uses."""
    numbers = itertools.product((0, 1, 1337, 2**32 - 1), (0, 1, 2, 3, 256, 65536), range(8), range(8))
    seeds = [seed_dropout(*each) or torch.initial_seed() for each in numbers]
    assert len(seeds) == 4 * 6 * 8 * 8
    assert len(set(seeds)) == len({seed % 2**32 for seed in seeds}) == len(seeds)


def losses_of_one_batch(step: int, rank: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of three micro-steps of an update that all train on the same batch."""
    losses, real = [], train_gpt.forward_backward

    def recording(*arguments: object) -> torch.Tensor:
        losses.append(real(*arguments))
        return losses[-1]

    model = tiny_model(dropout=0.5).train()
    optimizer = model.configure_optimizers(0.0, 0.0, "cpu", is_master_process=False)
    scaler = make_scaler(CPU, torch.float32)
    state = TrainState(model, model, {"optimizer": optimizer}, scaler, SpikeFilter(0.0), Progress(step))
    batches = itertools.repeat((torch.arange(32).view(2, 16), torch.arange(32).view(2, 16)))
    settings = (batches, 0.0, 1.0, 3, Distributed(CPU, rank=rank), torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "forward_backward", recording)
        train_gpt.update(state, *settings, lambda: None, seed)
    return [loss.item() for loss in losses]


def test_every_step_micro_step_and_rank_has_masks_of_its_own(monkeypatch):
    """And they depend on the seed; the same four numbers give the same masks."""
    cases = list(itertools.product((0, 1), (0, 1), (5, 6)))
    losses = [losses_of_one_batch(*case, monkeypatch) for case in cases]
    assert len(set(sum(losses, []))) == 3 * len(cases)
    assert losses_of_one_batch(*cases[-1], monkeypatch) == losses[-1]


def test_without_dropout_nothing_is_seeded(short_text, tmp_path, undisturbed, monkeypatch):
    """Not once in a run: it costs nothing, and the random state is as before."""
    monkeypatch.setattr(train_gpt, "seed_dropout", None)
    assert train(short_text, tmp_path) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("micro_step", [0, 1])
@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_stopped_in_the_middle_of_a_step_is_resumed_bitwise(
    how, micro_step, short_text, dropped, tmp_path, monkeypatch
):
    """Before or after its first micro-step has drawn its masks: the resumed step draws them again."""
    calls, at_call = [], 2 * 10 + micro_step + 1  # in the update of step 10, after the checkpoint of step 9
    with monkeypatch.context() as patch:
        if how == "killed":
            kill_in(patch, "forward_backward", lambda *a: calls.append(1) or len(calls) == at_call)
            with pytest.raises(Killed):
                train(short_text, tmp_path, *DROPOUT)
        else:
            stop_by_signal_in(patch, "forward_backward", signal.SIGTERM, at_call)
            assert train(short_text, tmp_path, *DROPOUT) == 143
            assert (tmp_path / "model_00010.pt").exists() or (tmp_path / "model_00011.pt").exists()
    assert train(short_text, tmp_path, *DROPOUT, "--resume") == 0
    assert_same_run(tmp_path, dropped)


def test_dropout_changes_the_run(dropped, undisturbed):
    """So that the comparisons here compare something: all losses but the first val loss differ."""
    ours, theirs = ((folder / "log.txt").read_text().splitlines() for folder in (dropped, undisturbed))
    assert ours[0].startswith("0 val") and ours[0] == theirs[0]
    assert all(a != b for a, b in zip(ours[1:], theirs[1:]))


@pytest.mark.slow
def test_two_ranks_are_resumed_bitwise_also_with_recomputation(short_text, tmp_path):
    """A job of two ranks with --recompute, killed, and resumed without it, is the uninterrupted one."""
    flags = ("--total-batch-tokens", "128", "--max-steps", "8", *DROPOUT)
    whole = finished(2, short_text, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    finish(torchrun(2, short_text, killed, *flags, "--recompute", FAULT="kill@5:0"))
    finished(2, short_text, killed, *flags, "--resume")
    assert_same_tensors(killed, whole, 8)


def assert_same_tensors(log_dir: Path, expected: Path, step: int) -> None:
    """log.txt byte for byte, and the weights."""
    assert (log_dir / "log.txt").read_bytes() == (expected / "log.txt").read_bytes()
    ours, theirs = (load_model_file(f / f"model_{step:05d}.pt")["model"] for f in (log_dir, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_recomputation_changes_no_bit_of_a_run(short_text, undisturbed, dropped, tmp_path, capsys):
    """Without dropout and with it; and a resumed run says nothing about the flag."""
    assert train(short_text, tmp_path / "plain", "--recompute") == 0
    assert_same_run(tmp_path / "plain", undisturbed)
    assert train(short_text, tmp_path / "dropped", "--recompute", *DROPOUT, "--max-steps", "20") == 0
    assert_same_run(tmp_path / "dropped", dropped)
    capsys.readouterr()
    assert train(short_text, tmp_path / "plain", "--resume", "--max-steps", "21") == 0
    assert "settings have changed: max_steps 20 -> 21; " in capsys.readouterr().err


def test_the_flag_reaches_the_model(short_text, tmp_path, monkeypatch):
    """In every update, after evaluations and samples too, and the model is then in train mode."""
    seen, real = [], train_gpt.update

    def spying(state: TrainState, *rest: object) -> tuple[float, float]:
        seen.append((state.model.recompute, state.model.config.dropout, state.model.training))
        return real(state, *rest)

    monkeypatch.setattr(train_gpt, "update", spying)
    assert train(short_text, tmp_path / "a", "--recompute", *DROPOUT, "--max-steps", "6") == 0
    assert seen == 6 * [(True, 0.2, True)]
    seen.clear()
    start = ("--init-from", str(tmp_path / "a" / "model_00006.pt"), "--max-steps", "6")
    assert train(short_text, tmp_path / "b", *start) == 0
    assert seen == 6 * [(False, 0.0, True)]  # dropout is a setting of the run, not of the loaded weights
    seen.clear()
    assert train(short_text, tmp_path / "c", *start, "--dropout", "0.4") == 0
    assert seen == 6 * [(False, 0.4, True)]


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan", "inf"])
def test_an_impossible_dropout_ends_in_two_lines(value, short_text, tmp_path, capsys):
    """That name the flag and the value, before anything is read or written."""
    assert run_script(lambda: train(short_text, tmp_path / "log", "--dropout", value)) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: argument --dropout: {value} is ") and hint.startswith("hint: ")
    assert not (tmp_path / "log").exists()


# ------------------------------------------------------------------------------------------------------------
# Files


def test_a_checkpoint_holds_its_dropout_only_if_there_is_some(dropped, undisturbed):
    """Without it the file is as it always was; a loaded model has the dropout it was trained with."""
    assert load_model_file(dropped / "model_00020.pt")["config"]["dropout"] == 0.2
    sizes = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}
    assert load_model_file(undisturbed / "model_00020.pt")["config"].keys() == sizes
    models = [GPT.load(folder / "model_00020.pt") for folder in (dropped, undisturbed)]
    assert [(model.config.dropout, model.training) for model in models] == [(0.2, False), (0.0, False)]


def test_another_dropout_warns_and_is_used(short_text, dropped, undisturbed, tmp_path, capsys):
    """Also none after some, and some after none, which older checkpoints have."""
    for start, flags, change in (
        (dropped, (), "dropout 0.2 -> 0.0"),
        (dropped, ("--dropout", "0.4"), "dropout 0.2 -> 0.4"),
        (undisturbed, DROPOUT, "dropout 0.0 -> 0.2"),
    ):
        folder = tmp_path / change
        path = start / "model_00018.pt"
        assert train(short_text, folder, "--resume", str(path), *flags) == 0
        assert f"settings have changed: {change}; continuing with the new values" in capsys.readouterr().err
        final = GPT.load(folder / "model_00020.pt").config.dropout
        assert final == float(flags[1] if flags else 0)
        theirs, ours = (load_model_file(f / "model_00020.pt")["model"] for f in (start, folder))
        assert not torch.equal(ours["transformer.ln_f.weight"], theirs["transformer.ln_f.weight"])


def test_an_exported_model_says_its_dropout(dropped, tmp_path, monkeypatch):
    """All three of transformers' settings; and loading the folder ignores them."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert export.main([str(dropped / "model_00020.pt"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{place}_pdrop"] for place in ("attn", "embd", "resid")] == [0.2, 0.2, 0.2]
    model = GPT.load(tmp_path / "out")
    assert model.config.dropout == 0 and not model.training
