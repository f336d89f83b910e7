"""The training script with recording and fault injection, started by torchrun in test_distributed.py.

Environment variables:
    WATCH: a folder that receives, for every rank, the windows of each micro-step and the gradients of the
        first step.
    FAULT: WHAT@STEP:RANK; WHAT is raise, kill, hang, exit, sigterm, nan, or wait (for a signal).
    SLOW_SAVE: seconds by which the first save is delayed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gpt_model
import train_gpt
from utils import data_loader, distributed
from utils.command_line import run_script
from utils.start import begin_script
from utils.training.state import TrainState
from utils.weights import checkpoint

torch.set_num_threads(1)
RANK = distributed.environment_rank()
real_update = train_gpt.update
real_clip = torch.nn.utils.clip_grad_norm_


def update_with_fault(state: TrainState, *rest: Any) -> tuple[float, float]:
    """`train_gpt.update`, with the fault if this is its step and rank."""
    what, _, where = os.environ.get("FAULT", "").partition("@")
    restarted = distributed.restart_count() > 0
    if where == f"{state.progress.step}:{RANK}" and not restarted:
        if what == "raise":
            raise RuntimeError("injected fault")
        if what == "exit":
            os._exit(0)
        if what == "hang":
            time.sleep(6000)
        if what == "wait":
            poll = rest[6]
            while not poll.__self__.received:
                time.sleep(0.05)
            return real_update(state, *rest)
        if what == "nan":
            real_loss = gpt_model.fused_cross_entropy
            gpt_model.fused_cross_entropy = lambda *args: real_loss(*args) * float("nan")
            return real_update(state, *rest)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM}[what])
    return real_update(state, *rest)


def watch(folder: Path) -> None:
    """Records the windows this rank reads, and the gradients of its first step before clipping."""
    windows = open(folder / f".windows_{RANK}.jsonl", "a")
    real_batch = data_loader.WindowLoader.batch

    def batch(self: data_loader.WindowLoader, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.seed is not None:  # training, not validation
            windows.write(json.dumps([int(n) for n in numbers]) + "\n")
            windows.flush()
        return real_batch(self, numbers)

    def clip(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        path = folder / f".gradients_{RANK}.pt"
        if not path.exists():
            torch.save([p.grad.clone() for p in parameters], path)
        return real_clip(parameters, max_norm)

    data_loader.WindowLoader.batch = batch
    torch.nn.utils.clip_grad_norm_ = clip


def slow_first_save(seconds: float) -> None:
    """Delays the first save of rank 0, while the other ranks wait."""
    real_save, delays = checkpoint.save_atomically, [seconds]
    checkpoint.save_atomically = lambda contents: (
        time.sleep(delays.pop() if delays else 0),
        real_save(contents),
    )


if __name__ == "__main__":
    begin_script()
    slow_first_save(float(os.environ.get("SLOW_SAVE", 0)))
    train_gpt.update = update_with_fault
    if "WATCH" in os.environ:
        watch(Path(os.environ["WATCH"]))
    sys.exit(run_script(train_gpt.main, lambda: RANK))
