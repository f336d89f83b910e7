"""`--micro-batch auto`: the largest power of two that fits, found by real steps before the run starts."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from pathlib import Path
from typing import Callable, Iterator

import torch

from utils import runtime
from utils.distributed import Distributed
from utils.errors import UserError
from utils.runtime import OutOfMemory
from utils.weights.checkpoint import load_checked, model_files, state_path

HEADROOM = 0.9  # of the device's memory: exchange buffers, fragments and longer-lived caches need the rest


def choose(args: Namespace, model, dist: Distributed, dtype: torch.dtype, fallback: int) -> runtime.Decision:
    """The micro-batch for `auto`: that of the resumed run, or the largest that fits, or `fallback` on a CPU.

    The smallest answer of all ranks wins. Weights are as before when it returns.
    """
    remembered = dist.on_master(lambda: _remembered(args)) if args.resume else None
    if remembered:
        return runtime.Decision(remembered, "that of the checkpoint")
    if dist.device.type != "cuda":
        return runtime.Decision(
            fallback, f"auto: a search pays on CUDA only, so the preset's on {dist.device.type}"
        )
    rows, rest = divmod(args.total_batch_tokens, args.seq_len * dist.world_size)
    if rest or not rows:
        return runtime.Decision(fallback, "the batch is no multiple of the windows of all ranks")
    weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    found = largest_that_fits(lambda B: _real_step(model, args, dist.device, dtype, B), rows)
    model.load_state_dict(weights)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(dist.device)
    agreed = int(-dist.max_number(-found))
    return runtime.Decision(agreed, f"the largest power of two that fits and divides {rows} windows a rank")


def largest_that_fits(try_step: Callable[[int], None], rows: int) -> int:
    """The largest power of two that divides `rows` and whose step does not run out of memory.

    Raises:
        UserError: not even one row fits.
    """
    found, B = 0, 1
    while rows % B == 0:
        try:
            try_step(B)
        except OutOfMemory:
            break
        found, B = B, 2 * B
    if not found:
        hint = "use a smaller model or --seq-len"
        raise UserError("not even one window fits the device's memory", hint, one_rank_only=True)
    return found


@contextlib.contextmanager
def explains_out_of_memory(args: Namespace) -> Iterator[None]:
    """Turns a device without room into a UserError that names the flag to change."""
    try:
        yield
    except OutOfMemory as error:
        smaller = max(1, args.micro_batch // 2) if args.micro_batch != "auto" else 1
        raise UserError(
            f"out of memory with --micro-batch {args.micro_batch}",
            f"use --micro-batch {smaller} or auto: the batch of an update stays the same; then --resume",
            one_rank_only=True,
        ) from error


def _real_step(model, args: Namespace, device: torch.device, dtype: torch.dtype, B: int) -> None:
    """Forward, backward and update of B random rows on the bare module: no collective, ranks may differ."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    optimizer = model.configure_optimizers(args.weight_decay, 0.0, device.type, is_master_process=False)
    rows = torch.randint(0, model.config.vocab_size, (B, args.seq_len), device=device)
    try:
        with runtime.autocast(device, dtype):
            loss = model(rows, rows, return_logits=False)[1]
        loss.backward()
        optimizer.step()
        total = torch.cuda.get_device_properties(device).total_memory
        if torch.cuda.max_memory_allocated(device) > HEADROOM * total:
            raise OutOfMemory(f"{B} rows leave no headroom")
    finally:
        model.zero_grad(set_to_none=True)


def _remembered(args: Namespace) -> int | None:
    """The micro-batch of the checkpoint that --resume will take, or None."""
    if args.resume == "newest":
        candidates = [path for path in reversed(model_files(args.log_dir)) if state_path(path).exists()]
    else:
        candidates = [Path(args.resume)]
    for path in candidates:
        try:
            return load_checked(state_path(path))["train_args"]["micro_batch"]
        except (UserError, KeyError, TypeError):  # resuming itself will say what is wrong with it
            continue
    return None
