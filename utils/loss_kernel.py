"""A Triton kernel that turns logits in place into the gradient of their cross-entropy.

In eager PyTorch the loss on CUDA is bound by about ten passes over the (R, V) logits: casts, maxima, softmax
and copies. The kernel reads the logits twice, the second time mostly from the L2 cache, and writes them once.

Shapes: R rows of a chunk, V vocabulary.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from utils.runtime import Decision, find_triton

# Logits of a row that a program processes at a time, and how many of them per warp: 16 per thread are two
# 128-bit loads in 16 bits. Compiled for sm_80 and sm_90 this takes 46 to 64 registers without spills, so two
# programs share a multiprocessor, and the 264 rows in progress on an H100 (27 MB) fit into its L2 cache.
MAX_BLOCK = 8192
BLOCK_PER_WARP = 512


@cache
def choose_kernel(device: torch.device) -> Decision:
    """Whether `logits_to_gradient_` is to be used on a device.

    It runs where Triton, which PyTorch's CUDA builds for Linux install, can compile. With TRITON_INTERPRET=1
    in the environment it also runs on a CPU, slowly: that is for tests.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        return Decision(True, "Triton's interpreter")
    if device.type != "cuda":
        return Decision(False, f"the kernel runs on CUDA, not on {device.type}")
    if torch.version.hip is not None:
        return Decision(False, "the kernel runs on CUDA, not on ROCm")
    return find_triton(device)


def logits_to_gradient_(
    logits: Tensor, targets: Tensor, ignore_index: int, max_block: int = MAX_BLOCK
) -> Tensor:
    """Replaces logits by the gradient of the *sum* of their cross-entropies, and returns the cross-entropies.

    Computes in float32 for any dtype, with the online softmax of Milakov & Gimelshein 2018.

    Args:
        logits: (R, V) in bfloat16, float16 or float32, with contiguous rows.
        targets: (R,) token ids. Loss and gradient are zero for `ignore_index`; for any other id outside of
            the vocabulary the loss is NaN.
        max_block: upper bound of the logits that are processed at a time, a power of two.

    Returns:
        (R,) float32, in nats.

    Raises:
        ValueError: the rows of `logits` are not contiguous.
    """
    R, V = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"rows of logits must be contiguous (stride 1), not of stride {logits.stride(1)}")
    losses = torch.empty(R, dtype=torch.float32, device=logits.device)
    block = min(max_block, 1 << (V - 1).bit_length())  # the next power of two
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not on that of its arguments
        _kernel()[(R,)](
            *(logits, targets.contiguous(), losses, logits.stride(0)),
            V=V,
            IGNORE_INDEX=ignore_index,
            BLOCK=block,
            num_warps=max(1, block // BLOCK_PER_WARP),
            enable_fp_fusion=True,  # named because Triton 3.9 warns that its default will change
        )
    return losses


@cache
def _kernel() -> Any:
    """The kernel, one program per row; defined at the first use, because Triton is optional."""
    global tl, triton  # Triton's interpreter looks for `tl` in the globals of the kernel's module
    import triton
    import triton.language as tl

    @triton.jit
    def logits_to_gradient(
        logits: tl.tensor,
        targets: tl.tensor,
        losses: tl.tensor,
        row_stride: tl.tensor,
        V: tl.constexpr,
        IGNORE_INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        row = tl.program_id(0)
        row_logits = logits + row.to(tl.int64) * row_stride  # 64 bits: 42,691 rows of 50,304 exceed 31
        target = tl.load(targets + row)
        target_logit = tl.load(row_logits + target, mask=(target >= 0) & (target < V), other=float("nan"))
        target_logit = target_logit.to(tl.float32)

        # Maximum and sum of exponentials in one pass: the sum is rescaled whenever the maximum grows. The
        # maximum starts at a finite number: for a block of -inf, -inf - -inf would be NaN.
        maximum = -3e38
        total = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            previous = maximum
            maximum = tl.maximum(maximum, tl.max(x, 0))
            total = total * tl.exp(previous - maximum) + tl.sum(tl.exp(x - maximum), 0)
        counts = target != IGNORE_INDEX
        loss = (maximum - target_logit) + tl.log(total)  # large logits cancel before the small term is added
        tl.store(losses + row, tl.where(counts, loss, 0.0))

        tl.debug_barrier()  # all threads of the program have read what the second pass overwrites
        scale = 1.0 / total
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            gradient = tl.exp(x - maximum) * scale - tl.where(columns == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty)
            tl.store(row_logits + columns, gradient, mask=columns < V)

    return logits_to_gradient
