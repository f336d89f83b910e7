"""Training runs that take a second: their settings, and functions that stop and compare them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from utils.training.log_directory import LOGS

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps on.\n"
TINY = (  # shared by all small runs; flags that follow override these
    *("--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--tokenizer", "char", "--max-lr", "1e-2"),
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--seq-len", "16"),
)
# A run to stop and resume. An epoch is three windows short of 15 steps, so the 20 steps cross its end in the
# middle of a step.
RESUMABLE = (
    *(*TINY, "--micro-batch", "2", "--total-batch-tokens", "64", "--max-steps", "20", "--warmup-steps", "2"),
    *("--val-every", "4", "--sample-every", "5", "--checkpoint-every", "3", "--keep-every", "6"),
)
# A run whose output is examined.
SMALL = (
    *(*TINY, "--micro-batch", "4", "--total-batch-tokens", "128"),
    *("--val-every", "10", "--sample-every", "15", "--checkpoint-every", "10"),
)


def small_args(text_file: Path, log_dir: Path, *flags: str) -> list[str]:
    """Arguments of train_gpt.py for a run whose output is examined."""
    return [*SMALL, "--data", str(text_file), "--log-dir", str(log_dir), *flags]


class Killed(BaseException):
    """Ends a run in this process as abruptly as SIGKILL ends a process: no `except Exception` catches it."""


def train(text_file: Path, log_dir: Path, *flags: str) -> int:
    """Runs train_gpt.main with `RESUMABLE` in this process; returns the exit code."""
    return train_gpt.main([*RESUMABLE, "--data", str(text_file), "--log-dir", str(log_dir), *flags])


def kill_in(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool]) -> None:
    """Kills the run at the start of a function of train_gpt when `when(*its arguments)` first holds."""
    real = getattr(train_gpt, name)

    def killed(*args, **kwargs):
        if when(*args):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(train_gpt, name, killed)


def kill_in_update(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Kills the run at the start of the update of `step`."""
    kill_in(monkeypatch, "update", lambda state, *rest: state.progress.step == step)


def stop_by_signal_in(monkeypatch: pytest.MonkeyPatch, name: str, number: int, at_call: int) -> None:
    """Sends this process a signal at the start of the n-th call of a function of train_gpt."""
    real, calls = getattr(train_gpt, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(train_gpt, name, signalled)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint file, by their path in its nested dicts and lists."""

    def walk(value: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, (dict, list)):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(entry, f"{place}.{key}")

    return dict(walk(torch.load(path, weights_only=True), path.name))


def losses_of(log_dir: Path) -> list[tuple[str, float]]:
    """The lines of log.txt, as ("3 train", value)."""
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    return [(f"{step} {kind}", float(value)) for step, kind, value in lines]


def assert_same_losses(log_dir: Path, expected: Path, tolerance: float = 1e-4) -> None:
    """Both logs have the same lines in the same order; values may differ by `tolerance`."""
    ours, theirs = losses_of(log_dir), losses_of(expected)
    assert ours and [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(abs(a - b) <= tolerance for (_, a), (_, b) in zip(ours, theirs))


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Also of NaN and of negative zero, which compare otherwise as numbers."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)))


def differences(log_dir: Path, expected: Path, step: int = 20, *, with_rng: bool = False) -> list[str]:
    """Where a run of `step` steps differs from another one: in a byte of log.txt or samples.txt, in a bit of
    weights, moments and step counts, in a training step that metrics.jsonl lacks or repeats.

    Generators of random numbers (`with_rng`) are equal only if both runs had a process of their own.
    """
    files = (f"model_{step:05d}.pt", f"optimizer_{step:05d}.pt")
    missing = [f"{name} (missing)" for name in (*LOGS, *files) if not (log_dir / name).exists()]
    if missing:
        return missing
    names = ("log.txt", "samples.txt")
    found = [name for name in names if (log_dir / name).read_bytes() != (expected / name).read_bytes()]
    for name in files:
        ours, theirs = tensors_of(log_dir / name), tensors_of(expected / name)
        assert len(theirs) > 20
        found += sorted(ours.keys() ^ theirs.keys())
        both = [place for place in theirs if place in ours and (with_rng or ".rng." not in place)]
        found += [place for place in both if not same_bits(ours[place], theirs[place])]
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    if [r["step"] for r in records if r["kind"] == "train"] != list(range(step)):
        found.append("the steps of metrics.jsonl")
    return found


def assert_same_run(log_dir: Path, expected: Path, step: int = 20) -> None:
    """No `differences`."""
    assert differences(log_dir, expected, step) == []
