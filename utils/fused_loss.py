"""The language model's loss without the (B*T, V) logits.

At 64 x 1024 tokens and 50304 words the logits alone are 13 GB, their softmax and its gradient as much again.
Here some rows at a time go through projection, softmax, loss *and* gradient, in one buffer that every chunk
reuses, and only the gradients of the hidden states and of the weight are kept. The result is that of
`F.cross_entropy(hidden @ weight.T, targets)`.

Shapes: N rows (B*T tokens), C channels, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from typing import Callable, Iterator

import torch
from torch import Tensor

IGNORE_INDEX = -100  # F.cross_entropy's default: a row with this target counts for nothing

# Rows of logits that exist at one time. Fewer make the matrix products less efficient, more take memory:
# 1024 x 50304 floats are 206 MB. A GPU needs larger products to be busy.
CHUNK_ROWS = {"cpu": 1024, "cuda": 8192}


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against `targets`, the logits never existing as a whole.

    Args:
        hidden: (N, C) last hidden states.
        weight: (V, C) output projection, one row a word.
        targets: (N,) word ids; IGNORE_INDEX marks rows that do not count.
        chunk_rows: rows of logits that exist at one time; by default what suits the device.

    Returns:
        The mean over the rows that count, in nats, a float32 scalar (NaN where none counts, as in PyTorch).
    """
    # Asked here, because inside an autograd function grad mode is always off and needs_input_grad is True
    # under no_grad.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _eager_loss(hidden, weight, targets, _compute_dtype(hidden), chunk_rows)
    counted = (targets != IGNORE_INDEX).sum()
    return cross_entropy_rows(hidden, weight, targets, chunk_rows).sum() / counted


@torch.no_grad()
def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Cross-entropy of every row, (N,) float32 in nats, without gradients; zero for IGNORE_INDEX."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for rows, chunk_losses, _, _ in _chunks(hidden, weight, targets, _compute_dtype(hidden), chunk_rows):
        losses[rows] = chunk_losses
    return losses


class _FusedCrossEntropy(torch.autograd.Function):
    """Forward computes the loss and both gradients of the *sum* of losses; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compute_dtype, chunk_rows):
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=compute_dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # fp32: the sum runs over all chunks
        low_weight = weight.to(compute_dtype)  # cast once a call, not once a chunk
        counts = targets != IGNORE_INDEX  # (N,)
        for rows, chunk_losses, probs, logits in _chunks(
            hidden, low_weight, targets, compute_dtype, chunk_rows
        ):
            losses[rows] = chunk_losses
            # d(sum of losses)/d(logits) = softmax - onehot, unscaled: divided by N = 65,536 rows it would
            # vanish in fp16.
            probs[torch.arange(len(probs), device=hidden.device), targets[rows].clamp(min=0)] -= 1
            grad_logits = probs if probs.dtype == compute_dtype else logits.copy_(probs)
            # Ignored rows are zeroed in the (R, C) operands, not in the (R, V) one.
            counting = counts[rows].unsqueeze(1)
            torch.mm(grad_logits, low_weight, out=grad_hidden[rows]).mul_(counting)
            counted_hidden = hidden[rows].to(compute_dtype) * counting
            if compute_dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), counted_hidden)
            else:
                # A product of thousands of rows may leave fp16's range, before any scaler sees it.
                shrink = 64 if compute_dtype == torch.float16 else 1
                grad_weight.add_(grad_logits.t() @ (counted_hidden / shrink), alpha=shrink)
        num_counted = counts.sum()
        ctx.save_for_backward(grad_hidden, grad_weight, num_counted)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum() / num_counted

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, num_counted = ctx.saved_tensors
        scale = grad_output.float() / num_counted
        hidden_dtype, weight_dtype = ctx.dtypes
        # The weight's gradient is large and ours alone, so it is scaled in place; autograd's version counter
        # turns a second backward pass over the same graph into an error. It is returned, never written to
        # .grad: DDP's hooks must see it, and the tied embedding adds its own part.
        grad_hidden = (grad_hidden.float() * scale).to(hidden_dtype)
        return grad_hidden, grad_weight.mul_(scale).to(weight_dtype), None, None, None


def _outside_graphs(function: Callable) -> Callable:
    """Compiled graphs stop before `function` and go on after it.

    `torch._disable_dynamo` is the form of `torch.compiler.disable` that torch.optim uses itself: it imports
    the compiler at the first call, not here, which saves every script two seconds at its start.
    """
    if hasattr(torch, "_disable_dynamo"):  # torch >= 2.1
        return torch._disable_dynamo(function)
    from torch import _dynamo

    return _dynamo.disable(function)


@_outside_graphs  # traced, the loop would be unrolled, and each chunk would have a buffer of its own
def _eager_loss(hidden, weight, targets, compute_dtype, chunk_rows):
    return _FusedCrossEntropy.apply(hidden, weight, targets, compute_dtype, chunk_rows)


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, compute_dtype: torch.dtype, chunk_rows: int | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yields for each chunk of rows (rows, losses (R,), probabilities (R, V) float32, scratch (R, V)).

    A loss is -log p(target), zero for ignored rows. The scratch is of the compute dtype; it and the
    probabilities are views of buffers that the next chunk overwrites, in float32 one and the same buffer.
    """
    N, V = len(targets), weight.size(0)
    R = min(N, chunk_rows or CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cpu"]))
    logits_buffer = torch.empty(R, V, dtype=compute_dtype, device=hidden.device)
    in_place = compute_dtype == torch.float32
    probs_buffer = logits_buffer if in_place else torch.empty(R, V, dtype=torch.float32, device=hidden.device)
    weight = weight.to(compute_dtype)
    for start in range(0, N, R):
        rows = slice(start, min(start + R, N))
        logits, probs = logits_buffer[: rows.stop - start], probs_buffer[: rows.stop - start]
        torch.mm(hidden[rows].to(compute_dtype), weight.t(), out=logits)
        highest = logits.amax(dim=1).float()  # (R,)
        of_target = logits.gather(1, targets[rows].clamp(min=0).unsqueeze(1)).squeeze(1).float()  # (R,)
        if not in_place:
            probs.copy_(logits)
        torch.softmax(probs, dim=1, out=probs)  # has read each number for the last time when it writes it
        # By way of the likeliest word, whose probability cannot vanish as the target's can: as exact as
        # log_softmax, and without its exponential, which would be one more pass over the buffer.
        losses = (highest - of_target) - probs.amax(dim=1).log()
        yield rows, losses.masked_fill_(targets[rows] == IGNORE_INDEX, 0.0), probs, logits


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in here: autocast's where it is on, else its input's."""
    device_type = hidden.device.type
    if hasattr(torch, "get_autocast_dtype"):  # torch >= 2.4
        return (
            torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        )
    if device_type == "cuda" and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    if device_type == "cpu" and torch.is_autocast_cpu_enabled():
        return torch.get_autocast_cpu_dtype()
    return hidden.dtype
