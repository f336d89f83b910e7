"""A run from its first line on the console to its last: what surrounds the training loop."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from utils.command_line import Diverged, Unfinished, UserError, format_duration
from utils.console import announced
from utils.data_loader import WindowLoader
from utils.distributed import Distributed
from utils.runtime import peak_memory_bytes
from utils.training.data_source import Data
from utils.training.dry_run import Plan
from utils.training.log_reader import BEST
from utils.training.micro_batch import warm_up
from utils.training.resume import Identity, save_checkpoint, why_it_ended
from utils.training.run_log import RunLog
from utils.training.signals import Stopped, StopSignals
from utils.training.state import TrainState


class Run(NamedTuple):
    """Objects shared by the training loop and what surrounds it."""

    args: Namespace
    dist: Distributed
    stop: StopSignals
    dtype: torch.dtype  # of matmuls, under autocast
    state: TrainState
    data: Data
    train_loader: WindowLoader
    val_loader: WindowLoader
    num_val_windows: int  # of a validation
    val_bytes_per_token: float  # of the targets of a validation; 0 where nothing logs it
    hellaswag: list[Any]  # tokenized examples; empty where HellaSwag is off
    micro_steps: int  # of an update
    plan: Plan
    identity: Identity  # what a checkpoint must match


def run_to_the_end(run: Run, lines: list[str], train: Callable[[Run, RunLog], None]) -> int:
    """Calls `train`, the training loop, and returns the exit code; `lines` are printed after the plan.

    Raises what `train` raises, and Unfinished where something of the run could not be written.
    """
    args, dist, state, started = run.args, run.dist, run.state, time.perf_counter()
    steps = dict(max_steps=args.max_steps, start_step=state.progress.step, log_every=args.log_every)
    with RunLog(args.log_dir, is_master=dist.is_master, **steps) as log:
        log_start(run, log, lines)
        try:
            warm_up_if_needed(run, log)
            run.stop.defer()
            train(run, log)
        except Stopped as stop:
            save_stopped_run(stop, run, log)
            return stop.exit_code
        except Exception as error:
            # The other ranks fail after this one: the message must say which failed first, and where.
            if not (dist.is_alone or isinstance(error, UserError)):
                print(f"rank {dist.rank} failed at step {state.progress.step}:", file=sys.stderr, flush=True)
            if isinstance(error, Diverged) and dist.is_alone:  # other ranks' exits may end this one
                log.draw_curves()
            raise
        if lost := log.lost_files():
            what = f"{args.log_dir} was removed or renamed during the run: it lacks {', '.join(lost)}"
            raise Unfinished(what, f"the weights are in {state.newest_checkpoint}; the rest is where it went")
        log.write_report()
        memory = peak_memory_bytes(dist.device) / 1e9
        log.say(f"done in {format_duration(time.perf_counter() - started)}, peak memory {memory:.2f} GB")
        log.say_what_was_written(state.newest_checkpoint, args.sample_prompt)
        if state.progress.step < args.max_steps:
            log.say(why_it_ended(state.progress, args))
    return 0


def log_start(run: Run, log: RunLog, lines: list[str]) -> None:
    """Prints the plan and `lines`, and records settings, environment and model."""
    for line in run.plan.lines() + lines:
        log.say(line)
    if warning := run.plan.space_warning():
        log.warn(warning)
    identity, state = run.identity, run.state
    record = dict(settings=identity.settings, environment=identity.environment, step=state.progress.step)
    record.update(reasons=run.plan.reasons, parameters=state.model.num_parameters(), model=identity.config)
    record["best"] = {name: getattr(state.progress, name) for name in BEST}
    log.log_start(record, tensorboard=run.args.tensorboard, wandb=run.args.wandb)


def warm_up_if_needed(run: Run, log: RunLog) -> None:
    """One micro-batch before the first step of a compiled run, and of one of several ranks; see `warm_up`."""
    compiled, dist, args = run.identity.environment["compiled"], run.dist, run.args
    if not compiled and dist.is_alone:
        return
    with announced("compiling" if compiled else "warming up", shown=dist.is_master):
        seconds = warm_up(run.state.trained_model, args.micro_batch, args.seq_len, run.dtype, dist.device)
    if compiled:
        log.say(f"compiled in {seconds:.0f} s, which is in no step's time")


def save_stopped_run(stop: Stopped, run: Run, log: RunLog) -> None:
    """Saves what a stopped run has reached. Raises Unfinished if it cannot be saved."""
    step, log_dir = run.state.progress.step, run.args.log_dir
    if step == 0:
        log.say(f"{stop} before the first update: nothing to save")
        return
    if not save_checkpoint(run.state, run.identity, run.args, log, run.dist):
        hint = "make room on the disk; --resume continues from the checkpoint before"
        raise Unfinished(f"{stop}, but could not save", hint) from stop
    log.say(f"{stop}: saved {log_dir} at step {step}; run it again with --resume to continue")
    log.draw_curves()  # last: all else is done if the process is killed meanwhile
