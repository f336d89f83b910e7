"""Matrix products on a CPU, faster than PyTorch makes them by itself.

PyTorch multiplies float32 matrices with Intel's MKL, which is at its best on Intel's processors. Two
remedies:

- On AMD's, MKL does not use AVX-512. oneDNN does, and PyTorch ships it for its compiled models: measured on
  two Zen 5 cores, 330 to 520 GFLOP/s instead of 210 to 235.
- A few rows, as in sampling, take as long to multiply as their weights take to read, and MKL reads with one
  thread. A batch of products, each with a part of the weights, has all threads at work: measured there, 55
  GB/s instead of 18.

`torch.backends.mkldnn.enabled = False` takes oneDNN out.

Shapes: R rows, C in features, K out features, P parts.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 4  # texts that are sampled together; with eight, parts gain nothing
PARTS = 8  # of the weight's rows; two do as well on two cores


class Linear(nn.Linear):
    """`nn.Linear` whose products are made in the fastest way there is, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or is_traced():
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # (R, C)
        if not torch.is_grad_enabled():
            y = linear(rows, self.weight, self.bias)
        elif onednn_is_faster(rows, self.weight):
            y = _OneDNNLinear.apply(rows, self.weight, self.bias)
        else:
            y = F.linear(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients: rows (R, C) times weight (K, C), both of any strides, to (R, K)."""
    if len(rows) <= FEW_ROWS and rows.device.type == "cpu" and torch.backends.mkl.is_available():
        return _linear_in_parts(rows, weight, bias)
    if onednn_is_faster(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a (M, N) times b (N, K) to `total` (M, K), without gradients; see `zeros_to_add_to`."""
    if onednn_is_faster(a, b):
        total.t().add_(linear(b.t(), a))
    else:
        total.addmm_(a, b)


def zeros_to_add_to(M: int, K: int, like: Tensor) -> Tensor:
    """Zeros (M, K) in float32, strided as suits `add_product` best where the factors are like `like`."""
    if onednn_is_faster(like, like):
        return torch.zeros(K, M, device=like.device).t()  # it would have to turn the larger factor around
    return torch.zeros(M, K, dtype=torch.float32, device=like.device)


class _OneDNNLinear(torch.autograd.Function):
    """`linear` with its gradients, which are such products themselves and so have gradients, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, weight, bias):
        return linear(rows, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):  # (R, K)
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        product = _OneDNNLinear.apply
        grad_rows = product(grad, weight.t(), None) if needs_rows else None  # (R, C)
        grad_weight = product(grad.t(), rows.t(), None) if needs_weight else None  # (K, C)
        return grad_rows, grad_weight, grad.sum(dim=0) if needs_bias else None


def _linear_in_parts(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of few rows, by as many products as there are parts."""
    C, K = rows.size(1), len(weight)
    whole = K - K % PARTS
    parts = weight[:whole].unflatten(0, (PARTS, whole // PARTS))  # (P, K / P, C)
    y = torch.bmm(parts, rows.t().expand(PARTS, C, len(rows)))  # (P, K / P, R)
    y = y.view(whole, len(rows)).t().contiguous()  # (R, K)
    if whole < K:  # 50257 words are an odd number
        y = torch.cat((y, F.linear(rows, weight[whole:])), dim=1)
    return y if bias is None else y + bias.to(y.dtype)


def onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN can multiply a and b here, and is the faster one."""
    if a.device.type != "cpu" or not a.dtype == b.dtype == compute_dtype(a) == torch.float32:
        return False
    if a.numel() == 0 or b.numel() == 0:  # oneDNN refuses some of these
        return False
    return torch.backends.mkldnn.enabled and mkl_is_slow()


@lru_cache(maxsize=None)
def onednn_is_here() -> bool:
    """Whether this PyTorch has oneDNN's product, an operation that it keeps for its compiled models."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return hasattr(torch.backends, "cpu")  # torch >= 2.1; in 2.0 it is called in another way


@lru_cache(maxsize=None)
def mkl_is_slow() -> bool:
    """Whether PyTorch multiplies with MKL on a processor of AMD's that has AVX-512."""
    if not (torch.backends.mkl.is_available() and onednn_is_here()):
        return False
    try:
        maker = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        maker = platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in here: autocast's where it is on, else its input's."""
    device_type = x.device.type
    if hasattr(torch, "get_autocast_dtype"):  # torch >= 2.4
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    if device_type == "cuda" and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    if device_type == "cpu" and torch.is_autocast_cpu_enabled():
        return torch.get_autocast_cpu_dtype()
    return x.dtype


def is_traced() -> bool:
    """Whether torch.compile or torch.jit is tracing: they choose products of their own."""
    compiler = getattr(torch, "compiler", None)
    if hasattr(compiler, "is_compiling") and compiler.is_compiling():  # torch >= 2.3
        return True
    return torch.jit.is_tracing()


def described() -> str:
    """Who multiplies float32 matrices on this CPU, and why, in words for the console."""
    if onednn_is_faster(torch.ones(1, 1), torch.ones(1, 1)):
        return "products by oneDNN (MKL has no AVX-512 for AMD)"
    return "products as PyTorch makes them"
