"""What a run will be, in words and arithmetic, before it starts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from utils import runtime
from utils.training.memory_estimate import MemoryEstimate, estimate_memory
from utils.training.run_log import format_duration
from utils.weights.checkpoint import versions

DRY_RUN_STEPS = 5  # micro-steps
FORWARD_SHARE = 1 / 3  # of a training token's work: the backward pass takes the other two thirds


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


def dry_run(run, reasons: dict[str, str]) -> int:
    """`--dry-run`: says what the run would be, with the speed of a few real micro-steps; writes nothing.

    Args:
        run: the training script's Run.
        reasons: what was decided, in words.
    """
    seconds = []
    batches = run.train_loader.train_batches(0, run.args.total_batch_tokens // run.args.seq_len)
    for _ in range(DRY_RUN_STEPS):
        started = time.perf_counter()
        with runtime.autocast(run.dist.device, run.dtype):
            _, loss = run.trained_model(*next(batches), return_logits=False)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    run.optimizer.step()  # its moments are part of what must fit
    lines = dry_run_lines(run, sorted(seconds)[DRY_RUN_STEPS // 2], run.args.cost_per_hour)
    if run.dist.is_master:
        print("\n".join([*describe(run, reasons), *lines]))
    return 0


def dry_run_lines(run, seconds_per_micro_step: float, cost_per_hour: float | None = None) -> list[str]:
    """What a run would take: disk, memory, time and money. The rest of `--dry-run`, after `describe`.

    Args:
        run: the training script's Run.
        seconds_per_micro_step: measured, forward and backward of one micro-batch.
        cost_per_hour: of all devices together, in whatever money; None leaves the line out.
    """
    config, args = run.model.config, run.args
    shape = (args.micro_batch, args.seq_len, run.dtype, run.dist.device.type, run.micro_steps)
    estimate = estimate_memory(config, run.model.num_parameters(), *shape)
    updates, validation = run_seconds(run, seconds_per_micro_step)
    lines = [checkpoints_line(run), memory_line(estimate), speed_line(run, seconds_per_micro_step)]
    lines.append(
        f"time: {format_duration(updates + validation)} = {args.max_steps} steps {format_duration(updates)} "
        f"+ validation about {format_duration(validation)} (HellaSwag, samples and checkpoints come on top)"
    )
    if cost_per_hour is not None:
        hours = (updates + validation) / 3600
        lines.append(f"cost: {hours * cost_per_hour:,.2f} = {hours:,.2f} hours x {cost_per_hour:g} an hour")
    return lines


def run_seconds(run, seconds_per_micro_step: float) -> tuple[float, float]:
    """Seconds of all updates, and of all validations."""
    args = run.args
    updates = args.max_steps * run.micro_steps * seconds_per_micro_step
    if not args.val_every:
        return updates, 0.0
    # The steps 0, E, 2E, ... and the one after the last, which may be one of them.
    count = len({*range(0, args.max_steps, args.val_every), args.max_steps})
    windows = run.val_loader.num_val_windows(args.val_tokens)
    micro_batches = windows / (args.micro_batch * run.dist.world_size)
    return updates, count * micro_batches * FORWARD_SHARE * seconds_per_micro_step


def num_checkpoints(args) -> tuple[int, int]:
    """(model files, optimizer files) in the log directory when a run has ended."""
    every = args.checkpoint_every
    saved = {args.max_steps, *(range(every, args.max_steps, every) if every else ())}
    recent = set(sorted(saved)[-args.keep_checkpoints :])
    kept = {step for step in saved if args.keep_every and step % args.keep_every == 0}
    return len(recent | kept), len(recent)


def checkpoints_line(run, there: int = 0) -> str:
    """Bytes that checkpoints will take beside what is free. While one is written, there is one more pair.

    Args:
        there: bytes of checkpoints that are among them and exist already.
    """
    models, pairs = num_checkpoints(run.args)
    model = 4 * run.model.num_parameters()  # float32; Adam's two moments take twice as much
    need = (models + 1) * model + (pairs + 1) * 2 * model
    folder = next(path for path in (run.args.log_dir, *run.args.log_dir.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    line = (
        f"checkpoints: model {in_words(model)} + optimizer {in_words(2 * model)}; {models} models and "
        f"{pairs} optimizers stay, at most {in_words(need)} at one time; free {in_words(free)}"
    )
    return line if need <= free + there else f"warning: {line}: not enough"


def space_warning(run) -> list[str]:
    """The line above if the checkpoints will not fit beside those of the resumed run, else nothing."""
    there = (path for name in ("model", "optimizer") for path in run.args.log_dir.glob(f"{name}_*.pt"))
    line = checkpoints_line(run, sum(path.stat().st_size for path in there))
    return [line] if line.startswith("warning") else []


def memory_line(estimate: MemoryEstimate) -> str:
    """The estimate of one process, term by term."""
    return (
        f"memory: about {in_words(estimate.peak)} a process (parameters {in_words(estimate.parameters)}, "
        f"gradients {in_words(estimate.gradients)}, optimizer {in_words(estimate.optimizer)}, "
        f"activations {in_words(estimate.activations)}, loss {in_words(estimate.loss)}, "
        f"fragmentation {in_words(estimate.unused)}; not all of them at one time)"
    )


def speed_line(run, seconds_per_micro_step: float) -> str:
    """Tokens per second over all processes, and the share of the devices' peak where that is known."""
    args, world_size = run.args, run.dist.world_size
    step = run.micro_steps * seconds_per_micro_step
    tokens_per_second = args.total_batch_tokens / step
    peak = runtime.peak_flops(run.dist.device)
    mfu = "n/a"
    if peak is not None:
        flops = run.model.flops_per_token(args.seq_len) * tokens_per_second
        mfu = f"{100 * flops / (peak * world_size):.1f}%"
    return (
        f"speed: {1000 * seconds_per_micro_step:,.0f} ms x {run.micro_steps} micro-step(s) = "
        f"{1000 * step:,.0f} ms a step, {tokens_per_second:,.0f} tok/s, mfu {mfu}"
    )


def in_words(num_bytes: float) -> str:
    """`1.49 GB`, or `12.3 MB` where that says more."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
