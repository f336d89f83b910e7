"""Activation recomputation: the same gradients from fewer saved activations, in training only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpt_model
from gpt_model import GPT
from tests.conftest import tiny_model
from utils import cpu_matmul
from utils.cpu_matmul import use_fast_linear

IDX = torch.arange(32).view(2, 16)


def gradients(*, recompute: bool, dropout: float, fast: bool = False) -> list[Tensor]:
    """The loss and all gradients of two accumulated micro-batches."""
    model = tiny_model(dropout=dropout).train()
    model.recompute = recompute
    if fast:
        use_fast_linear(model)
    torch.manual_seed(7)
    losses = [model(idx, IDX, return_logits=False)[1] for idx in (IDX, IDX + 32)]
    torch.rand(5)  # the state of the generator at the backward pass is another one
    sum(losses).backward()
    return [*losses, torch.get_rng_state(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_equal_bit_for_bit(dropout, fast, monkeypatch):
    """With dropout the masks are repeated, and the generator ends where it would without recomputation."""
    if fast:
        has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: has_onednn)
    plain, recomputed = (gradients(recompute=r, dropout=dropout, fast=fast) for r in (False, True))
    assert len(plain) > 20 and all(map(torch.equal, plain, recomputed))
    if dropout:  # the comparison can fail: it sees the masks
        assert not torch.equal(plain[0], gradients(recompute=False, dropout=0.0)[0])


def saved_elements(model: GPT) -> int:
    """The number of elements that the graph of a training step holds, parameters apart."""
    parameters = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}  # by address: a tensor that two operations save is held once

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss = model(IDX, IDX, return_logits=False)
    loss.backward()
    return sum(saved.values())


def test_a_block_saves_its_input_only():
    """Each layer beyond the first adds B * T * C elements; without recomputation more than ten times that."""
    per_layer = {}
    for recompute in (False, True):
        models = [tiny_model(n_layer=n).train() for n in (2, 6)]
        for model in models:
            model.recompute = recompute
        few, many = map(saved_elements, models)
        per_layer[recompute] = (many - few) / 4 / (IDX.numel() * 32)
    assert per_layer[True] == 1 and per_layer[False] > 10


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_recomputed_in_training_only(training, monkeypatch):
    """Evaluation and sampling have no backward pass to save memory for."""
    calls, real = [], gpt_model.checkpoint
    monkeypatch.setattr(gpt_model, "checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    model = tiny_model().train(training)
    model.recompute = True
    model(IDX)
    if not training:
        model.generate(IDX, 3)
    assert len(calls) == (2 if training else 0)
