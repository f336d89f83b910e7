"""Muon beside AdamW: which parameters, which rates, and runs that are stopped, resumed, split and skipped."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.conftest import tiny_config, tiny_model
from tests.small_runs import (
    Killed,
    assert_same_losses,
    assert_same_run,
    kill_in_update,
    tensors_of,
    train,
)
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.training import dry_run, optimizers
from utils.training.guards import SpikeFilter
from utils.training.optimizers import (
    Float32Muon,
    make_optimizers,
    num_moments,
    orthogonalized,
    state_bytes,
)
from utils.training.state import TrainState
from utils.weights.checkpoint import pair_bytes

pytestmark = pytest.mark.usefixtures("no_pictures")

CPU = torch.device("cpu")
ALONE = Distributed(CPU)
MUON = ("--optimizer", "muon", "--schedule", "linear")


def muon_state(scaler: torch.amp.GradScaler | None = None) -> TrainState:
    """A tiny model trained by Muon and AdamW, whose rates are 0.02 and 0.01 at the peak."""
    model = tiny_model()
    args = Namespace(optimizer="muon", weight_decay=0.1, max_lr=0.01, muon_lr=0.02)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, model, make_optimizers(args, model, ALONE), scaler, SpikeFilter(0.0))


def make_update(state: TrainState, lr: float = 0.005) -> tuple[float, float]:
    """One update on 2 random rows of 16 tokens."""
    rows = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
    return train_gpt.update(state, iter([(rows[:, :-1], rows[:, 1:])]), lr, 1.0, 1, ALONE, torch.float32)


# ------------------------------------------------------------------------------------------------------------
# The optimizers


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest(capsys):
    """Each parameter has one optimizer; embeddings, biases and layer norms stay with AdamW."""
    state = muon_state()
    names = {id(p): name for name, p in state.model.named_parameters()}
    trained = {
        key: [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for key, optimizer in state.optimizers.items()
    }
    assert sorted(trained["optimizer"] + trained["muon"]) == sorted(names.values())
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = [f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in matrices]
    assert sorted(trained["muon"]) == sorted(expected)
    assert isinstance(state.optimizers["muon"], Float32Muon)  # on a CPU
    assert "Muon on the 8 matrices of the blocks (24,576 parameters)\n" in capsys.readouterr().out


def test_adamw_alone_is_the_only_optimizer_by_default():
    """With all parameters, as before there was a choice."""
    model, args = tiny_model(), Namespace(optimizer="adamw", weight_decay=0.1, max_lr=0.01)
    (optimizer,) = make_optimizers(args, model, ALONE).values()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert all("lr_scale" not in group for group in optimizer.param_groups)


def test_both_rates_follow_one_schedule():
    """At half of AdamW's peak Muon has half of its own; both are known by name."""
    state = muon_state()
    make_update(state, lr=0.005)
    assert state.learning_rates() == {"lr": 0.005, "muon_lr": pytest.approx(0.01)}


@pytest.mark.parametrize("shape", [(48, 16), (16, 16), (16, 64)])
def test_newton_schulz_sets_singular_values_to_about_one(shape):
    """And keeps the singular vectors, of tall, square and wide matrices of any scale."""
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    defaults = torch.optim.Muon([torch.zeros(1, 1)]).defaults
    found = orthogonalized(matrix, defaults["ns_coefficients"], defaults["ns_steps"])
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.25 and found.shape == shape
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.t() @ found @ v.t()
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-3


def test_muon_in_float32_is_muon():
    """Three steps equal PyTorch's up to bf16; the state has the same names, so either resumes the other."""
    torch.manual_seed(0)
    weights = [torch.randn(48, 16), torch.randn(16, 64)]
    results = []
    for kind in (torch.optim.Muon, Float32Muon):
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append((parameters, optimizer.state_dict()["state"]))
    (theirs, their_state), (ours, our_state) = results
    for before, a, b in zip(weights, theirs, ours):
        assert (a - b).norm() < 0.02 * (a - before).norm()
    assert our_state.keys() == their_state.keys()
    for index in our_state:
        assert our_state[index].keys() == their_state[index].keys() == {"momentum_buffer"}
        assert torch.equal(our_state[index]["momentum_buffer"], their_state[index]["momentum_buffer"])


def test_bytes_of_checkpoints_and_memory_count_one_moment_for_muon():
    """As many numbers as the optimizers hold after a step; less than with AdamW alone."""
    state = muon_state()
    make_update(state)
    held = sum(
        tensor.numel()
        for optimizer in state.optimizers.values()
        for moments in optimizer.state.values()
        for name, tensor in moments.items()
        if name != "step"
    )
    assert num_moments(state.model, "muon") == held < num_moments(state.model, "adamw")
    assert num_moments(state.model, "adamw") == 2 * state.model.num_parameters()
    assert pair_bytes(10, 15) == (40, 60)
    config = tiny_config()
    with torch.device("meta"):
        needed = state_bytes(GPT(config), "muon")
    assert needed == 8 * state.model.num_parameters() + 4 * held


# ------------------------------------------------------------------------------------------------------------
# Updates that are skipped


def changed(state: TrainState, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that differ from those before."""
    return [name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("overflow", ["transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_an_overflow_in_one_optimizer_skips_both(overflow):
    """In fp16 they share the scaler: one step each, one lower scale, and weights and momentum as before."""
    state = muon_state(torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6))
    make_update(state)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in state.optimizers["muon"].state.values()]
    handle = dict(state.model.named_parameters())[overflow].register_hook(lambda grad: grad * torch.inf)
    _, norm = make_update(state)
    handle.remove()
    assert not norm < torch.inf and changed(state, before) == [] and state.spikes.num_skipped == 1
    assert state.scaler.get_scale() == 2.0
    after = [s["momentum_buffer"] for s in state.optimizers["muon"].state.values()]
    assert all(torch.equal(old, new) for old, new in zip(momentum, after))
    make_update(state)
    assert len(changed(state, before)) == len(before) and state.scaler.get_scale() == 2.0


def test_scaled_gradients_give_the_update_of_unscaled_ones():
    """Each optimizer's gradients are unscaled once, so a scale of 4, a power of two, changes no bit."""
    scaled, plain = muon_state(torch.amp.GradScaler("cpu", init_scale=4.0)), muon_state()
    assert [make_update(scaled) for _ in range(3)] == [make_update(plain) for _ in range(3)]
    assert changed(scaled, plain.model.state_dict()) == []


def test_a_spike_changes_no_weight_of_either(monkeypatch):
    """Nor the momentum of Muon."""
    state = muon_state()
    make_update(state)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in state.optimizers["muon"].state.values()]
    monkeypatch.setattr(SpikeFilter, "accepts", lambda self, norm: False)
    make_update(state)
    assert changed(state, before) == []
    after = [s["momentum_buffer"] for s in state.optimizers["muon"].state.values()]
    assert all(torch.equal(old, new) for old, new in zip(momentum, after))


# ------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def muon_run(short_text, tmp_path_factory) -> Path:
    """The log directory of an uninterrupted run with Muon."""
    log_dir = tmp_path_factory.mktemp("muon")
    assert train(short_text, log_dir, *MUON) == 0
    return log_dir


def killed(step: int, short_text: Path, log_dir: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    with monkeypatch.context() as patch:
        kill_in_update(patch, step)
        with pytest.raises(Killed):
            train(short_text, log_dir, *flags)


@pytest.mark.parametrize("step", [0, 3, 11, 19])
def test_a_killed_run_with_muon_is_resumed_bitwise(step, short_text, muon_run, tmp_path, monkeypatch):
    """Log, weights, moments and momentum: before the first checkpoint, right after one, and at the end."""
    killed(step, short_text, tmp_path, monkeypatch, *MUON)
    assert train(short_text, tmp_path, *MUON, "--resume") == 0
    assert_same_run(tmp_path, muon_run)
    saved = tensors_of(tmp_path / "optimizer_00020.pt")
    assert sum(".muon.state." in place for place in saved) == 8


def test_the_comparison_detects_the_loss_of_the_momentum(short_text, muon_run, tmp_path, monkeypatch):
    """Negative control: a run that is resumed with another momentum is not the same run."""
    killed(11, short_text, tmp_path, monkeypatch, *MUON)
    path = tmp_path / "optimizer_00009.pt"
    content = torch.load(path, weights_only=True)
    for entry in content["muon"]["state"].values():
        entry["momentum_buffer"].zero_()
    torch.save(content, path)
    assert train(short_text, tmp_path, *MUON, "--resume") == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, muon_run)


def test_muon_of_pytorch_is_resumed_bitwise_and_is_the_same_run_to_bf16(
    short_text, muon_run, tmp_path, monkeypatch
):
    """As on a GPU: it iterates in bf16."""
    monkeypatch.setattr(optimizers, "Float32Muon", torch.optim.Muon)
    assert train(short_text, tmp_path / "whole", *MUON) == 0
    killed(7, short_text, tmp_path / "killed", monkeypatch, *MUON)
    assert train(short_text, tmp_path / "killed", *MUON, "--resume") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert_same_losses(tmp_path / "whole", muon_run, tolerance=0.03)


@pytest.mark.parametrize("micro_batch", ["1", "4"])
def test_another_micro_batch_changes_rounding_only(micro_batch, short_text, muon_run, tmp_path):
    """The losses of 20 steps agree to 1e-4; with iterations in bf16 they would not."""
    assert train(short_text, tmp_path, *MUON, "--micro-batch", micro_batch) == 0
    assert_same_losses(tmp_path, muon_run)


def test_both_rates_are_recorded_and_only_where_there_are_two(muon_run, undisturbed):
    """Warmup of 2 steps, then constant for a fifth of the 20 steps, then linear to zero."""
    records = [json.loads(line) for line in (muon_run / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["kind"] == "train"]
    factors = [0.5, 1, 1, 1, *(n / 16 for n in range(16, 0, -1))]
    assert [r["lr"] for r in updates] == pytest.approx([0.01 * f for f in factors])
    assert [r["muon_lr"] for r in updates] == pytest.approx([0.02 * f for f in factors])
    assert "muon_lr" not in (undisturbed / "metrics.jsonl").read_text().replace('"muon_lr": 0.02', "", 1)


@pytest.mark.parametrize(
    ("before", "flags", "message"),
    [
        (MUON, (), "optimizer=muon, this run has optimizer=adamw"),
        ((), MUON, "optimizer=adamw, this run has optimizer=muon"),
        (("--recipe", "fast"), MUON, "recipe=fast, this run has recipe=faithful"),
    ],
)
def test_resuming_with_another_optimizer_or_recipe_is_refused(
    before, flags, message, short_text, tmp_path, monkeypatch
):
    """Its moments would mean nothing."""
    killed(5, short_text, tmp_path, monkeypatch, *before)
    with pytest.raises(UserError, match=f"was made with .*{message}"):
        train(short_text, tmp_path, *flags, "--resume")


def test_a_checkpoint_older_than_the_setting_was_made_by_adamw(stopped_run, short_text):
    """It resumes without a flag, and is refused with Muon."""
    path = stopped_run / "optimizer_00009.pt"
    content = torch.load(path, weights_only=True)
    for name in ("optimizer", "recipe"):
        del content["train_args"][name]
    torch.save(content, path)
    with pytest.raises(UserError, match="optimizer=adamw, this run has optimizer=muon"):
        train(short_text, stopped_run, "--optimizer", "muon", "--resume")
    assert train(short_text, stopped_run, "--resume") == 0


def test_another_schedule_is_a_warning(short_text, tmp_path, monkeypatch, capsys):
    """The optimizers are the same, so the run continues with the new rates."""
    killed(5, short_text, tmp_path, monkeypatch, *MUON)
    flags = ("--optimizer", "muon", "--schedule", "cosine", "--muon-lr", "0.01", "--resume")
    assert train(short_text, tmp_path, *flags) == 0
    changes = "schedule linear -> cosine, muon_lr 0.02 -> 0.01"
    assert f"settings have changed: {changes}; continuing" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "another shape", "of AdamW"])
def test_a_damaged_momentum_is_refused(damage, short_text, tmp_path, monkeypatch):
    """By the key where it differs, before anything is changed."""
    killed(5, short_text, tmp_path, monkeypatch, *MUON)
    path = tmp_path / "optimizer_00003.pt"
    content = torch.load(path, weights_only=True)
    if damage == "missing":
        del content["muon"]
    elif damage == "another shape":
        content["muon"]["state"][2]["momentum_buffer"] = torch.zeros(3)
    else:
        content["muon"] = content["optimizer"]
    torch.save(content, path)
    where = {"missing": "muon", "another shape": r"muon.state\[2\].momentum_buffer", "of AdamW": "muon"}
    with pytest.raises(UserError, match=f"optimizer_00003.pt: key {where[damage]}"):
        train(short_text, tmp_path, *MUON, "--resume")


def test_a_dry_run_measures_with_the_optimizers_of_the_run(short_text, tmp_path, monkeypatch, capsys):
    """When the peak is read, both have their moments; the bytes are those of fewer moments."""
    made: list[dict[str, torch.optim.Optimizer]] = []
    states: list[bool] = []
    real = optimizers.make_optimizers

    def recorded(*arguments: object) -> dict[str, torch.optim.Optimizer]:
        made.append(real(*arguments))
        return made[-1]

    def peak(device: torch.device) -> int:
        both = made[0].values()
        states.extend(len(o.state) == sum(len(g["params"]) for g in o.param_groups) for o in both)
        return 10**9

    monkeypatch.setattr(train_gpt, "make_optimizers", recorded)
    monkeypatch.setattr(dry_run, "peak_memory_bytes", peak)
    sizes = []
    for flags in (MUON, ("--optimizer", "adamw")):
        assert train(short_text, tmp_path / "log", *flags, "--dry-run") == 0
        sizes.append([line for line in capsys.readouterr().out.splitlines() if "checkpoints: " in line][0])
    assert states[:2] == [True, True] and sizes[0] != sizes[1]
    assert not (tmp_path / "log").exists()
