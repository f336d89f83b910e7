"""Faster float32 matmuls on some CPUs, installed in an existing model by `use_fast_linear`.

- PyTorch multiplies with Intel's MKL, which does not use AVX-512 on AMD. oneDNN, which PyTorch ships for
  compiled models, does: 330 to 520 GFLOP/s instead of 210 to 235, measured on two Zen 5 cores.
- With a few rows, as in sampling, a matmul takes as long as reading its weights, which MKL does with one
  thread. As a batched matmul over parts of the weights it uses all threads: 55 GB/s instead of 18 there.

`torch.backends.mkldnn.enabled = False` turns oneDNN off.

Shapes: R rows, C in features, K out features, P parts.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 4  # sequences sampled together; from eight on, splitting gains nothing
PARTS = 8  # of the weight's rows; on two cores, two parts are as fast


class FastLinear(nn.Linear):
    """`nn.Linear` whose matmuls, forward and backward, use the fastest GEMM backend on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(x)  # compilers choose their own matmuls
        rows = x.reshape(-1, self.in_features)  # (R, C)
        if not torch.is_grad_enabled():
            y = linear(rows, self.weight, self.bias)
        elif onednn_is_faster(rows, self.weight):
            y = _OneDNNLinear.apply(rows, self.weight, self.bias)
        else:
            y = F.linear(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def use_fast_linear(model: nn.Module) -> None:
    """Turns every `nn.Linear` of a model into a `FastLinear`: the same parameters, hooks and state dict."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients: rows (R, C) times weight (K, C), both of any strides, to (R, K)."""
    if len(rows) <= FEW_ROWS and rows.device.type == "cpu" and torch.backends.mkl.is_available():
        return _linear_in_parts(rows, weight, bias)
    if onednn_is_faster(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a (M, N) times b (N, K) to `total` (M, K), without gradients; see `zeros_for_add_matmul`."""
    if onednn_is_faster(a, b):
        total.t().add_(linear(b.t(), a))
    else:
        total.addmm_(a, b)


def zeros_for_add_matmul(M: int, K: int, like: Tensor) -> Tensor:
    """Zeros (M, K) in float32 with the strides that make `add_matmul` fastest for factors like `like`."""
    if onednn_is_faster(like, like):
        return like.new_zeros(K, M).t()  # else oneDNN would transpose the larger factor
    return like.new_zeros(M, K, dtype=torch.float32)


class _OneDNNLinear(torch.autograd.Function):
    """`linear` with gradients, which are matmuls of the same kind and so have gradients themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: (R, K)
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        grad_rows = _OneDNNLinear.apply(grad, weight.t(), None) if needs_rows else None  # (R, C)
        grad_weight = _OneDNNLinear.apply(grad.t(), rows.t(), None) if needs_weight else None  # (K, C)
        return grad_rows, grad_weight, grad.sum(dim=0) if needs_bias else None


def _linear_in_parts(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a few rows as one batched matmul over parts of the weight."""
    C, K = rows.size(1), len(weight)
    whole = K - K % PARTS
    parts = weight[:whole].unflatten(0, (PARTS, whole // PARTS))  # (P, K / P, C)
    y = torch.bmm(parts, rows.t().expand(PARTS, C, len(rows)))  # (P, K / P, R)
    y = y.view(whole, len(rows)).t().contiguous()  # (R, K)
    if whole < K:  # GPT-2's unpadded vocabulary is odd
        y = torch.cat((y, F.linear(rows, weight[whole:])), dim=1)
    return y if bias is None else y + bias.to(y.dtype)


def onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN can multiply a and b here, and is faster than MKL."""
    if a.device.type != "cpu" or not a.dtype == b.dtype == compute_dtype(a) == torch.float32:
        return False
    has_elements = a.numel() > 0 and b.numel() > 0  # oneDNN refuses some empty matrices
    return has_elements and torch.backends.mkldnn.enabled and mkl_is_slow()


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch would use MKL on an AMD processor with AVX-512, and has oneDNN's matmul instead."""
    # The operation is internal to PyTorch, which calls it from compiled models: a release may drop it.
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.backends.mkl.is_available() and has_onednn and has_avx512 and "AuthenticAMD" in cpu_info()


@cache
def cpu_info() -> str:
    """What the system says about its CPU: on Linux /proc/cpuinfo."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute here: autocast's where it is on, else its input's."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
