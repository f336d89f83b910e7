"""Dropout is where GPT-2 has it, drops the share asked for, and is on in training only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import generate
import gpt_model
import train_gpt
from eval_hellaswag import evaluate_hellaswag, score_examples
from gpt_model import GPT
from tests.conftest import tiny_config, tiny_model
from tests.test_eval_hellaswag import FoldedTokenizer, fixture_rows, folded_model, make_examples
from utils import decoding
from utils.command_line import UserError
from utils.data_loader import TextStream, WindowLoader
from utils.decoding import StaticDecoder
from utils.distributed import Distributed
from utils.tokenizer import CharTokenizer

P = 0.3
ALONE = Distributed(torch.device("cpu"))
IDX = torch.arange(32).view(2, 16)


def assert_dropped(found: Tensor, whole: Tensor) -> None:
    """About P of the elements are zero, within five standard errors; the others are scaled by 1 / (1 - P)."""
    kept = found != 0
    assert abs((~kept).float().mean().item() - P) < 5 * (P * (1 - P) / kept.numel()) ** 0.5
    assert torch.allclose(found[kept], whole[kept] / (1 - P), rtol=1e-5)


def test_embeddings_and_both_projections_are_dropped():
    """What enters the first block, and what each residual projection adds, in units of its own output."""
    model, seen = tiny_model(block_size=64, dropout=P).train(), {}
    block, idx = model.transformer.h[0], torch.randint(0, 97, (8, 64))
    block.register_forward_pre_hook(lambda module, inputs: seen.update(embedded=inputs[0]))
    for name in ("attn", "mlp"):
        part = getattr(block, name)
        part.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        part.c_proj.register_forward_hook(lambda m, i, out, name=name: seen.update({f"{name} whole": out}))
    model(idx)
    positions = torch.arange(64)
    assert_dropped(seen["embedded"], model.transformer.wte(idx) + model.transformer.wpe(positions))
    assert_dropped(seen["attn"], seen["attn whole"])
    assert_dropped(seen["mlp"], seen["mlp whole"])


def test_attention_weights_are_dropped():
    """With equal scores and the unit vectors as values, the sum over values is the row of weights itself."""
    T, seen = 64, []
    attention = tiny_model(n_head=1, n_embd=T, block_size=T, dropout=P).train().transformer.h[0].attn
    with torch.no_grad():
        attention.c_attn.bias.zero_()
        attention.c_attn.weight.zero_()[2 * T :] = torch.eye(T)
    attention.c_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    attention(torch.eye(T).expand(4, T, T))
    past = torch.ones(T, T).tril().bool().expand(4, T, T)
    weights = (1 / torch.arange(1, T + 1)).view(T, 1).expand(4, T, T)
    assert_dropped(seen[0][past], weights[past])
    assert torch.all(seen[0][~past] == 0)


def test_without_dropout_training_computes_what_evaluation_does():
    """Bit for bit, and nothing is drawn."""
    model = tiny_model()
    before = torch.get_rng_state()
    losses = [m(IDX, IDX, return_logits=False)[1] for m in (model, model.train())]
    assert torch.equal(*losses) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), 7, "0.1", None])
def test_an_impossible_dropout_is_refused(dropout):
    """By the config, with the value."""
    with pytest.raises(UserError, match=f"dropout={dropout} is not at least 0 and below 1"):
        tiny_config(dropout=dropout)


def test_dropout_changes_no_parameter_name():
    """So weights fit a model with any dropout, also one of the released GPT-2."""
    with_dropout = tiny_model(dropout=P)
    assert list(with_dropout.state_dict()) == list(tiny_model().state_dict())
    assert with_dropout.num_parameters() == tiny_model().num_parameters()
    assert with_dropout.flops_per_token(16) == tiny_model().flops_per_token(16)


def val_loss(model: GPT) -> float:
    """Of `train_gpt.evaluate`."""
    stream = TextStream("t", torch.arange(90).numpy(), 0, {})
    return train_gpt.evaluate(model, WindowLoader(stream, 16, 2).val_batches(80), ALONE, torch.float32)


def samples(model: GPT) -> list[str]:
    """As training writes them."""
    tokenizer = CharTokenizer("".join(map(chr, range(97))))
    return generate.sample_texts(model, tokenizer, "abc", 2, 20, seed=1)


def completion(model: GPT) -> str:
    """As a notebook asks for it."""
    model.tokenizer_state = CharTokenizer("".join(map(chr, range(97)))).state()
    return generate.complete(model, "abc", max_new_tokens=20)


def hellaswag(model: GPT) -> tuple:
    """Losses of the endings and counts, of a model with a longer block in the same mode."""
    other = folded_model(dropout=model.config.dropout).train(model.training)
    examples = make_examples(fixture_rows(), other, FoldedTokenizer())
    labelled = [example for example in examples if example.label is not None]
    sums = []
    for batch, losses in score_examples(other, labelled, torch.float32, None, ALONE):
        sums += [(example.index, *loss) for example, loss in zip(batch, losses)]
    assert other.training == model.training
    return sums, evaluate_hellaswag(other, labelled, ALONE, torch.float32)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("use", [val_loss, samples, completion, hellaswag])
def test_dropout_is_off_in_every_other_use(use, static, monkeypatch):
    """Of a model in training: validation, samples by either decoder, HellaSwag; it then trains on."""
    if static:
        monkeypatch.setattr(gpt_model, "graph_pays", lambda device, max_new_tokens: True)
        monkeypatch.setattr(decoding, "BUCKETS", (8, 16))
        monkeypatch.setattr(gpt_model, "StaticDecoder", lambda *a: StaticDecoder(*a, lambda step: step))
    model = tiny_model(dropout=P).train()
    assert use(model) == use(tiny_model())
    assert model.training and all(module.training for module in model.modules())
    assert not torch.equal(model(IDX)[0], model(IDX)[0])  # here it is on
