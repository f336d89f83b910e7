"""What a run writes down: log.txt, metrics.jsonl, samples.txt, and lines on the console."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, NamedTuple

from utils.training.plotting import plot_run


class RunLog:
    """The files and the console of one run; on ranks other than 0 every call does nothing.

    `log.txt` holds `{step} train|val|hella {value}` and no time, so that two runs can be compared byte for
    byte.

    Args:
        log_dir: folder for the files, made if missing.
        is_master: whether this process writes.
        max_steps: length of the progress bar.
        start_step: where it starts.
    """

    def __init__(self, log_dir: Path, is_master: bool, max_steps: int = 0, start_step: int = 0):
        self.log_dir = log_dir
        self.is_master = is_master
        self.bar = None
        self.mirrors = (
            None  # a utils.training.mirrors.Mirrors, set where --tensorboard or --wandb ask for one
        )
        self.broken = False  # a log file: said once
        self.missing: set[str] = set()  # pictures and pages: each said once
        if not is_master:
            return
        log_dir.mkdir(parents=True, exist_ok=True)
        self.log_file = open(log_dir / "log.txt", "a", encoding="utf-8")
        self.metrics_file = open(log_dir / "metrics.jsonl", "a", encoding="utf-8")
        self.samples_file = open(log_dir / "samples.txt", "a", encoding="utf-8")
        if sys.stderr.isatty() and find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if not self.is_master:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def result(self, step: int, kind: str, value: float) -> None:
        """Adds a line to log.txt. kind: "train" (6 decimals), "val" or "hella" (4)."""
        if self.is_master:
            self._write(
                self.log_file,
                f"{step} {kind} {value:.6f}\n" if kind == "train" else f"{step} {kind} {value:.4f}\n",
            )

    def record(self, kind: str, **values: Any) -> None:
        """Adds a record to metrics.jsonl: `{"kind": kind, ...values}`."""
        if self.is_master:
            self._write(self.metrics_file, json.dumps({"kind": kind, **values}) + "\n")
            if self.mirrors is not None:
                self.mirrors.record(kind, values)

    def sample(self, step: int, texts: list[str]) -> None:
        """Prints the model's samples and adds them to samples.txt."""
        if not self.is_master:
            return
        for number, text in enumerate(texts):
            self.say(f"sample {number}: {text}")
            self._write(self.samples_file, f"--- step {step}, sample {number}\n{text}\n")

    def validation(self, step: int, loss: float, tokens: int, seconds: float, verdict: str | None) -> None:
        """Writes down a val loss, in nats, after `tokens` training tokens and `seconds` of updates.

        Args:
            verdict: how it compares with healthy runs, in words for the console, or None.
        """
        self.result(step, "val", loss)
        self.record("val", step=step, loss=loss, tokens=tokens, seconds=seconds)
        parts = [f"step {step:5d} | val loss {loss:.4f} | perplexity {perplexity(loss)}", verdict]
        self.say(" | ".join(filter(None, parts)))

    def hellaswag(self, step: int, num_correct: int, num_examples: int) -> None:
        """Writes down how often the right ending had the lowest mean token loss (completion style)."""
        accuracy = num_correct / num_examples
        self.result(step, "hella", accuracy)
        self.record("hella", step=step, accuracy=accuracy, correct=num_correct, examples=num_examples)
        self.say(f"step {step:5d} | hellaswag {accuracy:.4f} ({num_correct} of {num_examples} examples)")

    def update(
        self, step: int, loss: float, norm: float, lr: float, speed: Speed, skipped: int, memory: int
    ) -> None:
        """Writes down an update: loss and norm before it, and what it took.

        Args:
            skipped: updates skipped so far, for spikes of the norm or because fp16 overflowed.
            memory: most bytes used so far.
        """
        self.result(step, "train", loss)
        took = dict(seconds=speed.seconds, mfu=speed.mfu, memory=memory)
        known_norm = norm if math.isfinite(norm) else None  # JSON has no infinity
        self.record("train", step=step, loss=loss, lr=lr, norm=known_norm, skipped=skipped, **took)
        parts = [
            f"step {step:5d} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}",
            f"{1000 * speed.seconds:.0f} ms | {speed.tokens_per_second:,.0f} tok/s",
            *([] if speed.mfu is None else [f"mfu {100 * speed.mfu:.1f}%"]),
            *([f"skipped {skipped}"] if skipped else []),
            f"eta {format_duration(speed.eta)}",
        ]
        self.say(" | ".join(parts))
        if self.bar is not None:
            self.bar.update()

    def plot(self) -> None:
        """Draws curves.png anew from what has been written so far."""
        self.try_to("curves.png", plot_run)

    def try_to(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a page or a picture of the run, on rank 0; whatever goes wrong with it is said once."""
        if self.is_master:
            try:
                write(self.log_dir)
            except Exception as error:  # a library's, too: no picture is worth a run
                if name not in self.missing:
                    self.say(f"warning: no {name}: {error}")
                self.missing.add(name)

    def _write(self, file, text: str) -> None:
        # A full disk must not end a run: it is said once, and the weights go on.
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self.broken:
                self.say(f"warning: cannot write {file.name}: {error.strerror}; training goes on without it")
            self.broken = True

    def sync(self) -> None:
        """Flushes the files to the disk: a checkpoint that counts on their bytes follows."""
        if not self.is_master:
            return
        for file in (self.log_file, self.metrics_file, self.samples_file):
            try:
                os.fsync(file.fileno())
            except OSError:  # no such call on this kind of file; writing has already warned of a full disk
                pass

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if not self.is_master:
            return
        if self.bar is not None:
            self.bar.close()
        if self.mirrors is not None:
            self.mirrors.close()
        for file in (self.log_file, self.metrics_file, self.samples_file):
            try:
                file.close()
            except OSError:  # what could not be written was said above
                pass

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Speed(NamedTuple):
    """What one update took, and what is left."""

    seconds: float
    tokens_per_second: float
    mfu: float | None  # model FLOPs utilisation: share of the devices' peak, None where that is unknown
    eta: float  # seconds of updates that are left, at the mean speed of this run


class Speedometer:
    """Turns the clock's readings into speeds.

    Args:
        tokens_per_step: of an update.
        max_steps: updates of the run.
        flops_per_step: floating-point operations of an update.
        peak_flops: FLOP/s of all devices together, None if unknown.
    """

    def __init__(self, tokens_per_step: int, max_steps: int, flops_per_step: int, peak_flops: float | None):
        self.tokens_per_step, self.max_steps = tokens_per_step, max_steps
        self.flops_per_step, self.peak_flops = flops_per_step, peak_flops
        self.total_seconds, self.steps_timed = 0.0, 0

    def measure(self, step: int, seconds: float) -> Speed:
        """Adds the update of `step`, which took `seconds`."""
        self.total_seconds += seconds
        self.steps_timed += 1
        mfu = self.flops_per_step / seconds / self.peak_flops if self.peak_flops else None
        eta = (self.max_steps - step - 1) * self.total_seconds / self.steps_timed
        return Speed(seconds, self.tokens_per_step / seconds, mfu, eta)


def perplexity(loss: float) -> str:
    """exp(loss), the number of words a model hesitates between; in words, for the console."""
    return f"{math.exp(min(loss, 700)):,.2f}"


def format_duration(seconds: float) -> str:
    """`2m10s`, `3h05m`, `2d04h`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
