"""What a run will do and need, before it starts: the start lines, and `--dry-run`."""

import time
from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from utils.command_line import format_bytes, format_count, format_duration
from utils.console import announced, say, warn
from utils.data_loader import WindowLoader
from utils.distributed import Distributed
from utils.files import free_bytes
from utils.fused_loss import loss_backend
from utils.runtime import memory_bytes, peak_flops, peak_memory_bytes
from utils.training.micro_batch import forward_backward
from utils.training.model_source import least_bytes
from utils.training.optimizers import num_moments, state_bytes
from utils.training.state import TrainState, due_steps
from utils.weights.checkpoint import checkpoints_to_keep, pair_bytes

if TYPE_CHECKING:
    from gpt_model import GPT

DRY_RUN_STEPS = 5  # micro-steps
FORWARD_SHARE = 1 / 3  # of the work on a training token: the backward pass takes the other two thirds


@dataclass
class Plan:
    """What a run will do, as text; `reasons` holds decisions with their reasons."""

    args: Namespace
    model: "GPT"
    train: WindowLoader
    val: WindowLoader
    micro_steps: int  # of an update
    dist: Distributed
    reasons: dict[str, str]

    def lines(self) -> list[str]:
        """Lines for the console: decisions with reasons, the model, the data, and the batch as arithmetic."""
        args, T, config = self.args, self.args.seq_len, self.model.config
        windows, parameters = self.train.windows_per_epoch, self.model.num_parameters()
        left_out = self.train.stream.num_tokens - 1 - windows * T
        steps_per_epoch = windows * T / args.total_batch_tokens
        loss = [f"loss: {loss_backend(device).reason}"] if (device := self.dist.device).type == "cuda" else []
        return [
            *(f"{name}: {reason}" for name, reason in self.reasons.items()),
            *loss,
            f"model: {parameters:,} parameters ({config.n_layer} layers, {config.n_head} heads, "
            f"{config.n_embd} channels, block {config.block_size}, vocabulary {config.vocab_size})",
            f"train: {self.train.stream.num_tokens:,} tokens = {windows:,} windows of {T} "
            f"(the last {left_out} left out), "
            f"{steps_per_epoch:,.1f} steps an epoch, {args.max_steps / steps_per_epoch:.2f} epochs",
            f"val: {self.val.num_val_windows(args.val_tokens):,} windows of {T}, "
            f"of {self.val.stream.num_tokens:,} tokens",
            f"batch: {args.total_batch_tokens} tokens = {args.micro_batch} rows x {T} tokens x "
            f"{format_count(self.dist.world_size, 'process')} x "
            f"{format_count(self.micro_steps, 'micro-step')}",
        ]

    def checkpoints(self, existing_bytes: int = 0) -> tuple[str, bool]:
        """Bytes of all checkpoints, one more pair during a save, beside the free space; whether they fit."""
        args = self.args
        saved = due_steps(args.checkpoint_every, args.max_steps)[1:] or [args.max_steps]
        kept = checkpoints_to_keep(saved, args.keep_checkpoints, args.keep_every, args.max_steps)
        models, optimizers = map(len, kept)
        moments = num_moments(self.model, args.optimizer)
        model_bytes, optimizer_bytes = pair_bytes(self.model.num_parameters(), moments)
        best = 1 if args.val_every else 0  # model_best.pt; while it is written, no other file is
        need = (models + best + 1) * model_bytes + (optimizers + 1) * optimizer_bytes
        free = free_bytes(args.log_dir)
        line = (
            f"checkpoints: model {format_bytes(model_bytes)} + optimizer {format_bytes(optimizer_bytes)}; "
            f"{models} models and {optimizers} optimizers stay, at most {format_bytes(need)} at one time"
            f"{' with model_best.pt' * best}; "
            f"free {format_bytes(free)}"
        )
        fits = need <= free + existing_bytes
        return line if fits else f"{line}: not enough", fits

    def space_warning(self) -> str | None:
        """The line above if the checkpoints will not fit beside those of a resumed run, else None."""
        log_dir = self.args.log_dir
        existing = (*log_dir.glob("model_*.pt"), *log_dir.glob("optimizer_*.pt"))
        line, fits = self.checkpoints(sum(path.stat().st_size for path in existing))
        return None if fits else line

    def time_lines(self, micro_step_seconds: float) -> list[str]:
        """Speed, time and cost of the run, from the measured time of a micro-step."""
        args, device = self.args, self.dist.device
        step_seconds = self.micro_steps * micro_step_seconds
        tokens_per_second = args.total_batch_tokens / step_seconds
        peak, mfu = peak_flops(device, self.dist.world_size), "n/a"
        if peak is not None:
            mfu = f"{100 * self.model.flops_per_token(args.seq_len) * tokens_per_second / peak:.1f}%"
        updates = args.max_steps * step_seconds
        count = len(due_steps(args.val_every, args.max_steps))
        micro_batches = self.val.num_val_windows(args.val_tokens) / args.micro_batch / self.dist.world_size
        validation = count * micro_batches * FORWARD_SHARE * micro_step_seconds
        lines = [
            f"speed: {1000 * micro_step_seconds:,.0f} ms x {format_count(self.micro_steps, 'micro-step')} = "
            f"{1000 * step_seconds:,.0f} ms a step, {tokens_per_second:,.0f} tok/s, mfu {mfu}",
            f"time: {format_duration(updates + validation)} = {args.max_steps} steps "
            f"{format_duration(updates)} + validation about {format_duration(validation)} "
            "(plus HellaSwag, samples and checkpoints)",
        ]
        if args.cost_per_hour is not None:
            hours = (updates + validation) / 3600
            cost = f"{hours * args.cost_per_hour:,.2f}"
            lines.append(f"cost: {cost} = {hours:,.2f} hours x {args.cost_per_hour:g} an hour")
        return lines


def dry_run(plan: Plan, state: TrainState, dtype: torch.dtype) -> int:
    """`--dry-run`: prints the plan, measures a few micro-steps, writes nothing. Returns the exit code."""

    def show(*lines: str) -> None:
        if plan.dist.is_master:
            say("\n".join(lines))

    show(*plan.lines())
    checkpoints, fits = plan.checkpoints()
    if fits:
        show(checkpoints)
    elif plan.dist.is_master:
        warn(checkpoints)
    device, minimum = plan.dist.device, format_bytes(state_bytes(plan.model, plan.args.optimizer))
    if state.model.lm_head.weight.is_meta:  # see outline_if_too_large
        memory = format_bytes(memory_bytes(device))
        least = format_bytes(least_bytes(plan.model, plan.args))
        needed = f"parameters, gradients and moments take {minimum}, with activations at least {least}"
        show(f"memory: {needed}, {device} has {memory}: this does not fit, so nothing is measured")
        return 0
    seconds = []
    batches = plan.train.train_batches(0)
    with announced("timing micro-steps", DRY_RUN_STEPS, shown=plan.dist.is_master) as advance:
        for i in range(DRY_RUN_STEPS):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the step of the optimizers is not timed
            started = time.perf_counter()
            forward_backward(state.trained_model, *next(batches), dtype).item()  # waits for the device
            seconds.append(time.perf_counter() - started)
            if i % plan.micro_steps == 0:  # the first at once: a run holds the moments beside activations
                for optimizer in state.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            advance(1)
    peak = format_bytes(plan.dist.max_number(peak_memory_bytes(device)))
    show(f"memory: peak {peak} a process, measured (parameters, gradients and moments: {minimum})")
    show(*plan.time_lines(sorted(seconds)[DRY_RUN_STEPS // 2]))
    return 0
