"""What a run writes down: log.txt, metrics.jsonl, samples.txt, and lines on the console."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.errors import UserError


class RunLog:
    """The files and the console of one run; on ranks other than 0 every call does nothing.

    `log.txt` holds `{step} train|val|hella {value}` and no time, so that two runs can be compared byte for
    byte.

    Args:
        log_dir: folder for the files, made if missing.
        is_master: whether this process writes.
        max_steps: length of the progress bar.
        start_step: where it starts.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, log_dir: Path, is_master: bool, max_steps: int, start_step: int = 0):
        self.log_dir = log_dir
        self.is_master = is_master
        self.bar = None
        self.broken = False
        if not is_master:
            return
        prepare_log_dir(log_dir)
        self.log_file = open(log_dir / "log.txt", "a", encoding="utf-8")
        self.metrics_file = open(log_dir / "metrics.jsonl", "a", encoding="utf-8")
        self.samples_file = open(log_dir / "samples.txt", "a", encoding="utf-8")
        if sys.stderr.isatty():
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

    def sample(self, step: int, texts: list[str]) -> None:
        """Prints the model's samples and adds them to samples.txt."""
        if not self.is_master:
            return
        for number, text in enumerate(texts):
            self.say(f"sample {number}: {text}")
            self._write(self.samples_file, f"--- step {step}, sample {number}\n{text}\n")

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        if self.bar is not None:
            self.bar.update()

    def _write(self, file, text: str) -> None:
        # A full disk must not end a run: it is said once, and the weights go on.
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self.broken:
                self.say(f"warning: cannot write {file.name}: {error.strerror}; training goes on without it")
            self.broken = True

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if not self.is_master:
            return
        if self.bar is not None:
            self.bar.close()
        for file in (self.log_file, self.metrics_file, self.samples_file):
            try:
                file.close()
            except OSError:  # what could not be written was said above
                pass

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def prepare_log_dir(log_dir: Path) -> None:
    """Makes the folder and tries a file in it. Raises UserError if that fails."""
    trial = log_dir / ".trial"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to log dir {log_dir}: {error.strerror}", "give --log-dir a folder you can write to"
        ) from error


def format_step(
    step: int, loss: float, lr: float, norm: float, seconds: float, tokens: int, eta: float, mfu: float | None
) -> str:
    """The line of one update: loss and norm before it, its time, speed and what is left."""
    speed = tokens / seconds
    parts = [
        f"step {step:5d}",
        f"loss {loss:.4f}",
        f"lr {lr:.1e}",
        f"norm {norm:.2f}",
        f"{1000 * seconds:.0f} ms",
        f"{speed:,.0f} tok/s",
    ]
    if mfu is not None:
        parts.append(f"mfu {100 * mfu:.1f}%")
    return " | ".join([*parts, f"eta {format_duration(eta)}"])


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


def read_log(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """log.txt as {kind: (steps, values)}. A torn last line is left out."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        words = line.split()
        if len(words) == 3 and line.endswith("\n"):
            steps, values = curves.setdefault(words[1], ([], []))
            steps.append(int(words[0]))
            values.append(float(words[2]))
    return curves


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl. A torn last line is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
