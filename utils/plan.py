"""What a run will be, in words and arithmetic, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils import runtime
from utils.checkpoint import versions


def describe(run, reasons: dict[str, str]) -> list[str]:
    """Lines for the console: every decision with its reason, the model, the data and the batch as arithmetic.

    Args:
        run: the training script's Run.
        reasons: what was decided, in words.
    """
    args, T = run.args, run.args.seq_len
    train, val, config = run.train_loader, run.val_loader, run.model.config
    windows = train.windows_per_epoch
    left_out = train.stream.num_tokens - 1 - windows * T
    steps_per_epoch = windows * T / args.total_batch_tokens
    return [
        *(f"{name}: {reason}" for name, reason in reasons.items()),
        f"model: {run.model.num_parameters():,} parameters ({config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} channels, block {config.block_size}, vocabulary {config.vocab_size})",
        f"train: {train.stream.num_tokens:,} tokens = {windows:,} windows of {T} "
        f"(the last {left_out} left out), "
        f"{steps_per_epoch:,.1f} steps an epoch, {args.max_steps / steps_per_epoch:.2f} epochs",
        f"val: {val.num_val_windows(args.val_tokens):,} windows of {T}, of {val.stream.num_tokens:,} tokens",
        f"batch: {args.total_batch_tokens} tokens = {args.micro_batch} rows x {T} tokens x "
        f"{run.dist.world_size} process(es) x {run.micro_steps} micro-step(s)",
    ]


def record(run, reasons: dict[str, str]) -> dict[str, Any]:
    """Settings and environment of a run as plain values: the first record of metrics.jsonl."""
    device, world_size = runtime.device_name(run.dist.device), run.dist.world_size
    return {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(run.args).items()},
        "environment": dict(versions(), device=device, world_size=world_size),
        "reasons": reasons,
        "parameters": run.model.num_parameters(),
    }
