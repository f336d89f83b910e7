"""The output layer and its loss, forward and backward: ours with and without its kernel, and other forms.

From hidden states (N, C) to a mean cross-entropy, under bf16 autocast with float32 weights, as in training.
All forms run in this process. Errors are those against full logits in float32, at a smaller N.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.interleaved import reset_peak_memory, time_once
from utils import fused_loss
from utils.command_line import ArgumentParser, positive_int
from utils.cpu_matmul import compute_dtype
from utils.fused_loss import fused_cross_entropy
from utils.loss_kernel import choose_kernel
from utils.runtime import Decision, autocast, choose_device, device_name
from utils.tokenizer import PADDED_GPT2_VOCAB

# Largest errors of our forms: of the loss in float32, and of gradients in bf16 (norm relative to theirs).
MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-5, 1e-2
ERROR_ROWS = 8192  # N at which errors are measured

Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, C), weight (V, C), targets (N,) to a loss


class Unavailable(Exception):
    """A form does not exist on this machine; the message says why."""


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks loss`."""
    add = parser.add_argument
    add("--rows", type=positive_int, default=64 * 1024, help="N: rows of hidden states")
    add("--channels", type=positive_int, default=768, help="C: number of channels")
    add("--vocab-size", type=positive_int, default=PADDED_GPT2_VOCAB, help="V: vocabulary size")
    add("--rounds", type=positive_int, default=7, help="number of timed executions; the median is reported")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


# ------------------------------------------------------------------------------------------------------------
# The forms


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's cross-entropy of all logits, as `GPT.forward` computes it with `return_logits`."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def with_kernel(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Our loss as it is with Triton. Raises RuntimeError where Triton is installed but fails."""
    kernel, backend = choose_kernel(hidden.device), fused_loss.loss_backend(hidden.device)
    if not kernel.value:
        raise Unavailable(kernel.reason)
    if not backend.value:  # training would use PyTorch's operations
        raise RuntimeError(backend.reason)
    return fused_cross_entropy(hidden, weight, targets)


def without_kernel(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Our loss as it is where Triton is missing."""
    with mock.patch.object(fused_loss, "loss_backend", lambda device: Decision(False, "measured without")):
        return fused_cross_entropy(hidden, weight, targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The fused linear cross-entropy of liger-kernel."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise Unavailable("not installed (pip install liger-kernel)") from error
    dtype = compute_dtype(hidden)
    return liger_fused_linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets)


def all_forms(device: torch.device) -> dict[str, Form]:
    """The forms by name; ours first."""
    # Compiled by inductor on CUDA only: on a CPU that takes longer than all the rest.
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled = torch.compile(full_logits, backend=backend, dynamic=False)
    return {
        "ours, kernel": with_kernel,
        "ours, PyTorch's operations": without_kernel,
        "full logits, eager": full_logits,
        "full logits, compiled": compiled,
        "liger-kernel": liger,
    }


# ------------------------------------------------------------------------------------------------------------
# The measurement


def loss_and_gradients(
    form: Form, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to hidden states (N, C) and weight (V, C)."""
    hidden = hidden.detach().requires_grad_()
    with autocast(hidden.device, dtype):
        loss = form(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def measure_errors(form: Form, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Error of the loss in float32, and of gradients in bf16: the larger of their two relative norms."""
    reference = loss_and_gradients(full_logits, *inputs, torch.float32)
    exact, low = (
        loss_and_gradients(form, *inputs, precision) for precision in (torch.float32, torch.bfloat16)
    )
    errors = [((ours - full).norm() / full.norm()).item() for ours, full in zip(low[1:], reference[1:])]
    return {"loss_error": abs(exact[0] - reference[0]).item(), "gradient_error": max(errors)}


def measure_speed(form: Form, inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, Any]:
    """Seconds and peak memory beyond the inputs at the largest N, halved as often as needed, that fits."""
    hidden, weight, targets = inputs
    device, N = hidden.device, len(hidden)
    on_gpu = device.type == "cuda"
    while True:
        work = partial(loss_and_gradients, form, hidden[:N], weight, targets[:N], torch.bfloat16)
        try:
            work()  # compiles
            reset_peak_memory(device)
            held = torch.cuda.memory_allocated(device) if on_gpu else 0
            seconds = statistics.median(time_once(work, device)[0] for _ in range(rounds))
            peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
            return {"rows": N, "milliseconds": 1e3 * seconds, "peak_memory_bytes": peak - held}
        except torch.OutOfMemoryError:
            if N == 1:
                raise
            N //= 2
        if on_gpu:
            torch.cuda.empty_cache()


def measure_form(form: Form, inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, Any]:
    """Errors and speed of a form; or the reason why it is `missing`, or has `failed`."""
    few = (inputs[0][:ERROR_ROWS], inputs[1], inputs[2][:ERROR_ROWS])
    try:
        return measure_errors(form, few) | measure_speed(form, inputs, rounds)
    except Unavailable as reason:
        return {"missing": str(reason)}
    except Exception as error:  # of any compiler: the other forms are still worth measuring
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def measure(args: Namespace) -> dict[str, Any]:
    """Prints a line for each form and whether ours are exact. Returns all figures."""
    device = choose_device(args.device).value
    torch.manual_seed(1337)
    weight = (0.02 * torch.randn(args.vocab_size, args.channels)).to(device).requires_grad_()
    hidden = torch.randn(args.rows, args.channels).to(device)
    targets = torch.randint(args.vocab_size, (args.rows,)).to(device)
    targets[:5] = fused_loss.IGNORE_INDEX
    print(
        f"N {args.rows:,}, C {args.channels}, V {args.vocab_size:,}, bf16; errors at N "
        f"{min(args.rows, ERROR_ROWS):,}: of the loss in float32, of gradients in bf16"
    )
    print(f"{'':28}{'N':>7}{'ms':>9}{'memory':>10}{'loss':>10}{'gradients':>11}")
    forms = {}
    for name, form in all_forms(device).items():
        forms[name] = row = measure_form(form, (hidden, weight, targets), args.rounds)
        print(f"{name:28}{described(row)}", flush=True)
    exact = all(is_exact(row) for name, row in forms.items() if name.startswith("ours"))
    limits = f"{MAX_LOSS_ERROR:g} for the loss, {MAX_GRADIENT_ERROR:g} for gradients"
    print(f"ours {'is exact' if exact else 'is NOT EXACT'} (limits: {limits})")
    sizes = {"rows": args.rows, "channels": args.channels, "vocab_size": args.vocab_size}
    return {"device": device_name(device), **sizes, "forms": forms, "agree": exact}


def described(row: dict[str, Any]) -> str:
    """The figures of a form as a line of the table."""
    if "rows" not in row:
        return f" {row.get('missing') or 'FAILED ' + row['failed'][:150]}"
    return (
        f"{row['rows']:7}{row['milliseconds']:9.2f}{row['peak_memory_bytes'] / 1e9:7.2f} GB"
        f"{row['loss_error']:10.1e}{row['gradient_error']:11.1e}"
    )


def is_exact(row: dict[str, Any]) -> bool:
    """Whether the errors of a form are within the limits; one that is missing is not judged."""
    if "rows" not in row:
        return "missing" in row
    return row["loss_error"] < MAX_LOSS_ERROR and row["gradient_error"] < MAX_GRADIENT_ERROR  # False for NaN
