"""Run by torchrun in test_distributed.py: the training script, watched.

Environment: WATCH names a folder that receives, for every rank, the windows of each micro-step and the
gradients of the first step; FAULT is WHAT@STEP:RANK with raise, kill, hang, exit, sigterm or nan for WHAT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gpt_model
import train_gpt
from utils import data_loader, distributed
from utils.errors import run_script
from utils.weights import checkpoint

torch.set_num_threads(1)
RANK = distributed.environment_rank()
real_update = train_gpt.update
real_clip = torch.nn.utils.clip_grad_norm_


def watched_update(run, batches, progress):
    what, _, where = os.environ.get("FAULT", "").partition("@")
    restarted = distributed.restart_count() > 0
    if where == f"{progress.step}:{RANK}" and not restarted:
        if what == "raise":
            raise RuntimeError("planted fault")
        if what == "exit":
            os._exit(0)
        if what == "hang":
            time.sleep(600)
        if what == "nan":
            real_loss = gpt_model.fused_cross_entropy
            gpt_model.fused_cross_entropy = lambda *args: real_loss(*args) * float("nan")
            return real_update(run, batches, progress)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM}[what])
    return real_update(run, batches, progress)


def watch(folder: Path) -> None:
    """Writes down what this rank reads, and the gradients of its first step before they are clipped."""
    windows = open(folder / f".windows_{RANK}.jsonl", "a")
    real_batch = data_loader.WindowLoader.batch

    def batch(self, numbers):
        if self.seed is not None:  # training, not validation
            windows.write(json.dumps([int(n) for n in numbers]) + "\n")
            windows.flush()
        return real_batch(self, numbers)

    def clip(parameters, max_norm):
        parameters = list(parameters)
        path = folder / f".gradients_{RANK}.pt"
        if not path.exists():
            torch.save([p.grad.clone() for p in parameters], path)
        return real_clip(parameters, max_norm)

    data_loader.WindowLoader.batch = batch
    torch.nn.utils.clip_grad_norm_ = clip


def slow_saves(seconds: float) -> None:
    """Makes rank 0 work alone for longer than the others' timeout."""
    real_save = checkpoint.save_atomically
    checkpoint.save_atomically = lambda contents: (time.sleep(seconds), real_save(contents))


if __name__ == "__main__":
    slow_saves(float(os.environ.get("SLOW_SAVE", 0)))
    train_gpt.update = watched_update
    if "WATCH" in os.environ:
        watch(Path(os.environ["WATCH"]))
    sys.exit(run_script(train_gpt.main, RANK))
