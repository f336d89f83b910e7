"""GPT-2 and its training step as a tutorial writes them: the reference of the benchmarks.

All logits of a batch at once, PyTorch's own cross-entropy, AdamW with its defaults, sampling without a cache.
Nothing here uses the project's code. The parameter names are those of `gpt_model.GPT`, so that both can start
from the same weights.

Shapes: B batch, T time (tokens), C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from gpt_model import GPT, GPTConfig


class PlainBlock(nn.Module):
    """Pre-norm block: attention, then MLP; (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """GPT-2: tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"].weight[: idx.size(1)]  # (B, T, C)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def plain_twin(model: GPT) -> PlainGPT2:
    """The plain model with the weights of `model`, on its device."""
    twin = PlainGPT2(model.config).to(model.lm_head.weight.device)
    twin.load_state_dict(model.state_dict())
    return twin


def plain_adamw(model: nn.Module, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
    """PyTorch's AdamW in its default implementation; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)


def plain_step(
    logits_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[tuple[Tensor, Tensor]],
    autocast: AbstractContextManager,
    grad_clip: float,
) -> float:
    """One update on micro-batches `[(idx, targets), ...]`, each (B, T). Returns the mean loss in nats."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mean = torch.zeros((), device=parameters[0].device)
    for idx, targets in batches:
        with autocast:
            logits = logits_of(idx)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        scaler.scale(loss / len(batches)).backward()
        mean = mean + loss.detach() / len(batches)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean.item()


@torch.no_grad()
def plain_greedy(model: PlainGPT2, idx: Tensor, num_tokens: int) -> Tensor:
    """Greedy continuation (B, T + num_tokens); the whole text goes through the model for every new token."""
    for _ in range(num_tokens):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx
