"""The language model's loss without the (B*T, V) logits.

At 64 x 1024 tokens and a vocabulary of 50304 the logits alone are 13 GB in float32, their softmax and its
gradient as much again. Here a chunk of rows goes through projection, softmax, loss *and* gradient, then the
next chunk reuses its memory, and only the gradients of the hidden states and of the weight are kept. The
result equals `F.cross_entropy(hidden @ weight.T, targets)`.

On CUDA a chunk takes three matmuls and one Triton kernel (`utils/loss_kernel.py`). Where Triton is missing,
PyTorch's operations do the kernel's work.

Shapes: N rows (B*T tokens), C channels, V vocabulary, R rows of a chunk.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from utils.cpu_matmul import add_matmul, compute_dtype, linear, zeros_for_add_matmul
from utils.loss_kernel import choose_kernel, logits_to_gradient_
from utils.runtime import Decision

IGNORE_INDEX = -100  # F.cross_entropy's default: rows with this target are ignored

# Rows of logits in memory at a time: fewer make the matmuls less efficient, more take memory (1024 x 50304
# floats are 206 MB). A GPU needs larger matmuls to be busy. In 16 bits the kernel processes twice as many: at
# 2 bytes a logit they take 1.6 GB, less than the 2.5 GB of 8192 rows with PyTorch's operations, which hold
# a float32 copy. Not measured with the kernel; compiled, 16,384 rows took 30.2 ms and 8192 rows 31.3 (H200).
CHUNK_ROWS = {"cpu": 1024, "cuda": 8192}


# Traced, the loop would be unrolled, and each chunk would have a buffer of its own. `torch._disable_dynamo`
# is the form of `torch.compiler.disable` that torch.optim uses: it imports the compiler at the first call,
# not here, which saves two seconds at the start of every script.
@torch._disable_dynamo
def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against `targets`, in nats, a float32 scalar.

    Args:
        hidden: (N, C) last hidden states.
        weight: (V, C) output projection.
        targets: (N,) token ids; rows with IGNORE_INDEX are ignored. The mean over no rows is NaN.
        chunk_rows: rows of logits in memory at a time; by default what suits the device.
    """
    # Checked here: in an autograd function grad mode is off, and needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedCrossEntropy.apply(hidden, weight, targets, chunk_rows)
    num_counted = (targets != IGNORE_INDEX).sum()
    return cross_entropy_rows(hidden, weight, targets, chunk_rows).sum() / num_counted


@torch.no_grad()
def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Cross-entropy of every row, (N,) float32 in nats, without gradients; zero for IGNORE_INDEX."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    dtype = compute_dtype(hidden)
    low_weight = weight.to(dtype)
    for rows in _chunks(hidden, dtype, chunk_rows):
        chunk = hidden[rows].to(dtype)
        if loss_backend(hidden.device).value:
            losses[rows] = logits_to_gradient_(linear(chunk, low_weight), targets[rows], IGNORE_INDEX)
        else:
            losses[rows] = _losses(chunk, low_weight, targets[rows])[0]
    return losses


class _FusedCrossEntropy(torch.autograd.Function):
    """Forward computes the loss and both gradients of the *sum* of losses; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None) -> Tensor:
        dtype = compute_dtype(hidden)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=dtype)
        low_weight = weight.to(dtype)  # cast once per call, not once per chunk
        grad_weight = zeros_for_add_matmul(*weight.shape, like=low_weight)  # fp32: summed over all chunks
        add_gradients = _add_gradients_with_kernel if loss_backend(hidden.device).value else _add_gradients
        for rows in _chunks(hidden, dtype, chunk_rows):
            chunk = hidden[rows].to(dtype)
            losses[rows] = add_gradients(chunk, low_weight, targets[rows], grad_hidden[rows], grad_weight)
        num_counted = (targets != IGNORE_INDEX).sum()
        ctx.save_for_backward(grad_hidden, grad_weight.contiguous(), num_counted)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum() / num_counted

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, num_counted = ctx.saved_tensors
        scale = grad_output.float() / num_counted
        hidden_dtype, weight_dtype = ctx.dtypes
        # The weight's gradient is large and referenced only here, so it is scaled in place; autograd's
        # version counter turns a second backward pass over the same graph into an error. It is returned,
        # never written to .grad: DDP's hooks must see it, and the tied embedding adds its own part.
        grad_hidden = (grad_hidden.float() * scale).to(hidden_dtype)
        return grad_hidden, grad_weight.mul_(scale).to(weight_dtype), None, None


@cache
def loss_backend(device: torch.device) -> Decision:
    """Whether the kernel computes the loss on a device, after a comparison with PyTorch there."""
    decision = choose_kernel(device)
    if not decision.value or device.type == "cpu":  # on a CPU it is asked for by tests, which compare it
        return decision
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw).to(device, torch.bfloat16) for n in (32, 1024))
    targets = torch.randint(1024, (32,), generator=draw).to(device)
    results = []
    try:
        with torch.autocast(device.type, enabled=False):  # the first call may come from within it
            for add_gradients in (_add_gradients, _add_gradients_with_kernel):
                grads = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
                losses = add_gradients(hidden, weight, targets, *grads)
                results.append(torch.cat([x.float().flatten() for x in (losses, *grads)]))
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel; the next call compares again
    except Exception as error:  # of Triton, its compilers or cuBLAS
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return Decision(False, f"the loss kernel failed here: {reason}")
    expected, found = results
    if (found - expected).norm() > 1e-2 * expected.norm():
        return Decision(False, "the loss kernel's results differ from PyTorch's here")
    return Decision(True, "the loss kernel, compared with PyTorch's operations")


def _chunks(hidden: Tensor, dtype: torch.dtype, chunk_rows: int | None) -> list[slice]:
    R = chunk_rows or CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cpu"])
    if chunk_rows is None and dtype.itemsize == 2 and loss_backend(hidden.device).value:
        R *= 2
    return [slice(start, start + R) for start in range(0, len(hidden), R)]  # of the rows


def _add_gradients_with_kernel(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad_hidden: Tensor, grad_weight: Tensor
) -> Tensor:
    """Does what `_add_gradients` does with three matmuls and one kernel."""
    logits = linear(hidden, weight)
    losses = logits_to_gradient_(logits, targets, IGNORE_INDEX)
    torch.mm(logits, weight, out=grad_hidden)  # `logits` now holds the gradient
    _add_grad_weight(grad_weight, logits, hidden)
    return losses


def _add_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad_hidden: Tensor, grad_weight: Tensor
) -> Tensor:
    """Losses (R,) of a chunk; writes their gradient to `grad_hidden`, adds it to `grad_weight`."""
    # The (R, V) tensors are freed at the end of this call, so the next chunk reuses their memory.
    losses, probs, logits = _losses(hidden, weight, targets)
    # d(sum of losses)/d(logits) = softmax - onehot; divided by N = 65,536 rows it would underflow in fp16.
    probs[torch.arange(len(probs), device=hidden.device), targets.clamp(min=0)] -= 1
    grad_logits = probs if probs is logits else logits.copy_(probs)
    # Ignored rows are zeroed in the (R, C) operands, which is cheaper than in the (R, V) one.
    counting = (targets != IGNORE_INDEX).unsqueeze(1)
    torch.mul(linear(grad_logits, weight.t()), counting, out=grad_hidden)
    _add_grad_weight(grad_weight, grad_logits, hidden * counting)
    return losses


def _add_grad_weight(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Adds grad_logits.T (V, R) times hidden (R, C), of any dtype, to `grad_weight` (V, C) in float32."""
    if hidden.dtype == torch.float32:
        add_matmul(grad_weight, grad_logits.t(), hidden)
    elif hidden.is_cuda and torch.version.hip is None:
        # cuBLAS adds its float32 sums to grad_weight: no rounding, no overflow in fp16, no (V, C) buffer.
        torch.addmm(grad_weight, grad_logits.t(), hidden, out_dtype=torch.float32, out=grad_weight)
    else:
        # A sum over thousands of rows may overflow fp16 before the gradient scaler sees it.
        shrink = 64 if hidden.dtype == torch.float16 else 1
        grad_weight.add_(grad_logits.t() @ (hidden / shrink), alpha=shrink)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (R,) float32, zero for ignored rows; probabilities (R, V) float32; logits (R, V))."""
    logits = linear(hidden, weight)
    highest = logits.amax(dim=1).float()  # (R,)
    of_target = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).float()  # (R,)
    probs = logits.float()  # in float32 the same tensor: the probabilities overwrite the logits
    torch.softmax(probs, dim=1, out=probs)  # in place: safe, because each row is read before it is written
    # Relative to the likeliest token, whose probability cannot underflow as the target's can: as exact as
    # log_softmax, without its exponential, which would be one more pass over the (R, V) numbers.
    losses = (highest - of_target) - probs.amax(dim=1).log()
    return losses.masked_fill_(targets == IGNORE_INDEX, 0.0), probs, logits
