"""The state of a run, and an update of it without a run."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice

import pytest
import torch

import train_gpt
from tests.conftest import tiny_model
from utils.distributed import Distributed
from utils.training.guards import SpikeFilter
from utils.training.state import Progress, TrainState, due_steps, is_due

ALONE = Distributed(torch.device("cpu"))


def state_with_two_optimizers(seed: int, weight_decay: float = 0.1) -> TrainState:
    """Matrices are trained by AdamW, everything else by SGD with momentum."""
    model = tiny_model(seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizers = {
        "optimizer": torch.optim.AdamW(matrices, lr=1e-3, weight_decay=weight_decay),
        "sgd": torch.optim.SGD(others, lr=1e-3, momentum=0.9),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, model, optimizers, scaler, SpikeFilter(5.0))


def batches(seed: int, rows: int = 2) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random batches (B, T), endlessly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 97, (rows, 17), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def make_updates(state: TrainState, first: int, last: int, lr: float = 1e-3) -> list[tuple[float, float]]:
    """Updates [first, last) of two micro-steps; returns their losses and norms."""
    results = []
    for step in range(first, last):
        results.append(train_gpt.update(state, batches(step), lr, 1.0, 2, ALONE, torch.float32))
        state.progress.complete_update(4, 0.5)
    return results


def test_an_update_needs_no_run():
    """Mean loss of the micro-steps, norm before clipping, every parameter moved, no gradient left behind."""
    state = state_with_two_optimizers(0)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    expected = sum(state.model(*batch)[1] for batch in islice(batches(0), 2)) / 2
    gradients = torch.autograd.grad(expected, list(state.model.parameters()))
    ((loss, norm),) = make_updates(state, 0, 1, lr=0.05)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert norm == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-4)
    assert not any(torch.equal(p, before[name]) for name, p in state.model.named_parameters())
    assert all(p.grad is None for p in state.model.parameters())
    assert {group["lr"] for o in state.optimizers.values() for group in o.param_groups} == {0.05}


def test_poll_comes_before_every_micro_step_and_leaves_the_weights():
    """An exception of `poll` leaves the weights unchanged."""
    state = state_with_two_optimizers(0)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    calls = []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_gpt.update(state, batches(0), 1e-3, 1.0, 3, ALONE, torch.float32, poll)
    assert len(calls) == 3
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())


def test_a_restored_state_continues_bitwise():
    """Weights, the moments of every optimizer, spike filter and progress come back from plain values."""
    whole = state_with_two_optimizers(0)
    make_updates(whole, 0, 3)
    whole.progress.val_loss, whole.progress.done = 3.5, ["val"]
    restored = state_with_two_optimizers(1)
    restored.load_state_dict(deepcopy(whole.state_dict()))
    assert restored.progress == whole.progress == Progress(3, 12, 3.5, done=["val"], seconds=1.5)
    assert restored.moment() == (3, ["val"])
    assert restored.spikes.state_dict() == whole.spikes.state_dict()
    assert make_updates(restored, 3, 6) == make_updates(whole, 3, 6)
    pairs = zip(restored.model.parameters(), whole.model.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_hyperparameters_of_the_optimizers_are_those_of_the_run():
    """A resumed run may change them; only the moments and step counts are restored."""
    saved = state_with_two_optimizers(0, weight_decay=0.1)
    make_updates(saved, 0, 1)
    state = state_with_two_optimizers(0, weight_decay=0.5)
    state.load_state_dict(saved.state_dict())
    (group,) = state.optimizers["optimizer"].param_groups
    assert group["weight_decay"] == 0.5
    moments = [
        o.state_dict()["state"][0] for o in (state.optimizers["optimizer"], saved.optimizers["optimizer"])
    ]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"]) and moments[0]["step"] == 1


@pytest.mark.parametrize(
    ("step", "done", "complete"),
    [
        (9, [], False),
        (10, [], False),
        (10, ["val"], False),
        (10, ["val", "samples"], True),
        (11, [], True),
    ],
)
def test_a_run_is_complete_after_its_last_evaluations(step, done, complete):
    """HellaSwag counts only where it is on; more steps than were asked for are complete as well."""
    args = train_gpt.read_arguments(["--max-steps", "10", "--hellaswag-every", "3"])[0]
    progress = Progress(step=step, done=done)
    assert progress.is_complete(args, with_hellaswag=False) is complete
    assert progress.is_complete(args, with_hellaswag=True) is (complete and step > 10)
    progress.done = [*done, "hella"]
    assert progress.is_complete(args, with_hellaswag=True) is complete


@pytest.mark.parametrize("every", [0, 1, 3, 4, 12, 50])
def test_the_steps_of_a_run_at_which_something_is_due(every):
    """The list for the dry run agrees with what the loop asks at each step, the last included."""
    asked = [step for step in range(13) if is_due(step, every, last=step == 12)]
    assert due_steps(every, 12) == asked
