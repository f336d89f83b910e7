"""Forward and backward of a micro-batch, and the search for the largest one that fits the device."""

import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from utils.command_line import UserError, is_out_of_memory
from utils.console import announced
from utils.distributed import Distributed
from utils.runtime import Decision, autocast, choose_compile
from utils.training.flags import fitting_micro_batch

if TYPE_CHECKING:
    from gpt_model import GPT

HEADROOM = 0.9  # share of the device's memory: exchange buffers and kernels need the rest


def forward_backward(
    model: nn.Module, idx: Tensor, targets: Tensor, dtype: torch.dtype,
    scaler: torch.amp.GradScaler | None = None, micro_steps: int = 1,
) -> Tensor:  # fmt: skip
    """Adds the gradient of a micro-batch, divided by `micro_steps`, to the parameters' gradients.

    `idx` and `targets` are (B, T) token ids, `dtype` is that of matmuls under autocast. Returns the mean loss
    of the micro-batch in nats, detached and still on the device.
    """
    with autocast(idx.device, dtype):
        _, loss = model(idx, targets, return_logits=False)
    scaled = loss / micro_steps
    (scaled if scaler is None else scaler.scale(scaled)).backward()
    return loss.detach()


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds the generators of all devices, and so the dropout masks of the next forward pass.

    The masks are a function of these four numbers alone, so a resumed run repeats them without a saved state.
    Each number is below 2**32: SeedSequence hashes them, and its algorithm never changes between versions.
    """
    sequence = np.random.SeedSequence((seed, step, micro_step, rank))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def warm_up(model: nn.Module, B: int, T: int, dtype: torch.dtype, device: torch.device) -> float:
    """Runs one micro-batch of (B, T) tokens and discards its gradients; returns the seconds it took.

    It keeps compilation out of the first step. With several ranks it also lets DDP rebuild its buckets, which
    happens after the first exchange and changes the order of sums: without it, the first step after a resume
    would differ.
    """
    started = time.perf_counter()
    rows = torch.zeros(B, T + 1, dtype=torch.long, device=device)
    # With the strides of the loader's batches, or a compiled model would be compiled again.
    forward_backward(model, rows[:, :-1], rows[:, 1:], dtype).item()  # waits for the device
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def time_micro_batch(model: "GPT", B: int, T: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for a micro-batch of (B, T) tokens; infinite if it does not fit, 0 for a model without weights.

    Of three executions the fastest. Leaves no trace in the peak memory.
    """
    if model.lm_head.weight.is_meta:
        return 0.0
    seconds = math.inf
    with contextlib.suppress(torch.OutOfMemoryError):
        seconds = min(warm_up(model, B, T, dtype, device) for _ in range(3))
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return seconds


def decide_compile(
    args: Namespace, model: "GPT", micro_steps: int, dtype: torch.dtype, dist: Distributed
) -> Decision:
    """Whether all ranks compile the model, whose run has `micro_steps` in all; see `choose_compile`."""

    def eager_seconds() -> float:
        with announced("timing a micro-batch", shown=dist.is_master):
            return micro_steps * time_micro_batch(model, args.micro_batch, args.seq_len, dtype, dist.device)

    compiles = choose_compile(
        args.compile, dist.device, deterministic=args.deterministic, eager_seconds=eager_seconds
    )
    if dist.max_number(not compiles.value) and compiles.value:
        return Decision(False, "auto: on some rank it does not pay or is not possible")
    return compiles


def choose_micro_batch(
    args: Namespace, model: "GPT", dist: Distributed, dtype: torch.dtype, default: int
) -> Decision:
    """The largest B that fits on every rank, or `default` where a search does not pay; keeps the weights."""
    default = fitting_micro_batch(args, default, dist.world_size)
    if model.lm_head.weight.device.type != "cuda":
        return Decision(default, "auto: the preset's, because a search pays on CUDA only")
    rows, rest = divmod(args.total_batch_tokens, args.seq_len * dist.world_size)
    if rest or not rows:
        return Decision(default, "the batch is not a multiple of the windows of all ranks")
    weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    with announced("searching for the largest micro-batch", shown=dist.is_master):
        torch.cuda.set_per_process_memory_fraction(HEADROOM, dist.device)
        try:
            found = largest_that_fits(lambda B: _trial_step(model, B, args.seq_len, dist.device, dtype), rows)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, dist.device)
    model.load_state_dict(weights)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(dist.device)
    agreed = int(-dist.max_number(-found))
    return Decision(agreed, f"the largest power of two that fits and divides {rows} windows a rank")


def largest_that_fits(try_step: Callable[[int], None], rows: int) -> int:
    """The largest power of two that divides `rows` and whose step fits. Raises UserError if none does."""
    found, B = 0, 1
    while rows % B == 0:
        try:
            try_step(B)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        found, B = B, 2 * B
    if not found:
        hint = "use a smaller model or --seq-len"
        raise UserError("not even one window fits the device's memory", hint, one_rank_only=True)
    return found


def _trial_step(model: "GPT", B: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
    """Two updates on B random rows through the bare module, without collectives: ranks may differ."""
    torch.cuda.empty_cache()
    optimizer = model.configure_optimizers(0.0, 0.0, device.type, is_master_process=False)
    rows = torch.randint(0, model.config.vocab_size, (B, seq_len), device=device)
    try:
        for _ in range(2):  # the second with the moments in place, as every step of a run but its first
            forward_backward(model, rows, rows, dtype)
            optimizer.step()
    finally:
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def explain_out_of_memory(args: Namespace) -> Iterator[None]:
    """Turns an out-of-memory error of the device into a UserError that names the flag to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # OutOfMemoryError of CUDA is a RuntimeError
        if not is_out_of_memory(error):
            raise
        smaller = max(1, args.micro_batch // 2) if args.micro_batch != "auto" else 1
        what = f"out of memory with --micro-batch {args.micro_batch}"
        hint = f"use --micro-batch {smaller} or auto: the batch of an update stays the same; then --resume"
        raise UserError(what, hint, one_rank_only=True) from error
