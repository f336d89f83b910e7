"""What a run records: log.txt, metrics.jsonl, samples.txt, the console, and mirrors of the metrics.

The files are the record. TensorBoard and Weights & Biases are optional and imported on request; a failing one
is dropped after one warning, and never stops the run.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from utils.command_line import bits_per_byte, command_name, format_duration, perplexity
from utils.console import announced, line_width, lost_streams, say
from utils.text_files import quoted
from utils.training.curves import plot_run
from utils.training.log_directory import LOGS, RUN_FILES
from utils.training.report import write_report

LONGEST_LINE = 80  # of a result on the console, also where the terminal is wider
FIRST_LINES = 3  # updates after a start that all have a line
LONGEST_SILENCE = 30.0  # seconds without a line for an update, unless --log-every was given
WANDB_ID_FILE = "wandb_id.txt"  # in the log directory: a resumed run continues the same wandb run


class RunLog:
    """The files and the console of a run; on ranks other than 0 every call does nothing.

    `log.txt` holds lines `{step} train|val|hella {value}` and no times, so that two runs can be compared byte
    for byte. `max_steps` and `start_step` are those of the progress bar. The console shows the first updates,
    the last, and every `log_every`-th, by default 100 to 250 in a run and at least one in 30 seconds.
    """

    def __init__(
        self, log_dir: Path, *, is_master: bool, max_steps: int = 0, start_step: int = 0,
        log_every: int | None = None,
    ):  # fmt: skip
        self.log_dir, self.is_master = log_dir, is_master
        self.max_steps, self.start_step = max_steps, start_step
        self.line_every = log_every or interval_of_lines(max_steps)
        self.longest_silence = math.inf if log_every else LONGEST_SILENCE
        self.last_line = time.monotonic()  # when the console showed an update
        self.bar: Any = None
        self.files: dict[str, IO[str]] = {}
        self.mirrors: list[Mirror] = []
        self.failures: set[str] = set()  # warned about once each
        if not is_master:
            return
        log_dir.mkdir(parents=True, exist_ok=True)
        # Line-buffered: a kill loses no line, and a full disk is noticed at once.
        options = dict(buffering=1, encoding="utf-8", errors="backslashreplace")  # as whole_file does
        self.files = {name: open(log_dir / name, "a", **options) for name in LOGS}
        if sys.stderr.isatty() and find_spec("tqdm"):
            from tqdm import tqdm

            form = "{l_bar}{bar}| {n_fmt}/{total_fmt}"  # without an eta: each step's line has one
            self.bar = tqdm(total=max_steps, initial=start_step, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        for mirror in self.mirrors:
            self._try(f"{mirror.name} failed", mirror.close)
        for file in self.files.values():
            with suppress(OSError):  # the failed write has been reported
                file.close()

    def say(self, line: str, *, stream: str = "stdout", wrap: bool = True) -> None:
        """`console.say` on rank 0; a lost console is recorded once."""
        if not self.is_master:
            return
        say(line, stream=stream, wrap=wrap)
        if lost_streams and "console" not in self.failures:
            self.failures.add("console")
            self.add_record("console", lost=dict(lost_streams))  # the files are now the only place to look

    def warn(self, text: str) -> None:
        """Prints a warning on standard error."""
        self.say(f"warning: {text}", stream="stderr", wrap=False)

    def log_start(self, record: dict[str, Any], *, tensorboard: bool, wandb: bool) -> None:
        """Records settings and environment, and opens the mirrors that are asked for."""
        requested = {"TensorBoard": tensorboard and open_tensorboard, "wandb": wandb and open_wandb}
        for name, start in requested.items():
            if start and self.is_master:
                with announced(f"starting {name}"):
                    mirror = self._try(
                        f"{name} failed", start, self.log_dir, record["settings"], record["step"]
                    )
                self.mirrors += [mirror] if mirror else []
        self.add_record("run", **record)

    def log_update(
        self, step: int, loss: float, norm: float, rates: dict[str, float], speed: "Speed", num_skipped: int,
        memory: int,
    ) -> None:  # fmt: skip
        """Records an update: loss and norm before it, updates skipped so far, peak memory in bytes.

        `rates` holds the learning rates; the console shows the first one, "lr", which is AdamW's.
        """
        self._add_result(step, "train", f"{loss:.6f}")
        known_norm = norm if math.isfinite(norm) else None  # JSON has no infinity
        values = dict(loss=loss, **rates, norm=known_norm, skipped=num_skipped)
        self.add_record("train", step=step, **values, seconds=speed.seconds, mfu=speed.mfu, memory=memory)
        if self.is_master and self._shows(step):
            self.last_line = time.monotonic()
            lr, norm_text = f"lr {rates['lr']:.1e}", f"norm {norm:.2f}"
            tokens = f"{speed.recent_tokens_per_second:,.0f} tok/s"
            mfu = "" if speed.recent_mfu is None else f"mfu {100 * speed.recent_mfu:.1f}%"
            skipped = f"skipped {num_skipped}" if num_skipped else ""
            eta = f"eta {format_duration(speed.eta)}"
            parts = [f"step {step:5d}", f"loss {loss:.4f}", lr, norm_text, tokens, mfu, skipped, eta]
            self.say(one_line(parts, least_needed=[lr, mfu, norm_text, tokens, eta]))
        if self.bar is not None:
            self.bar.update()

    def _shows(self, step: int) -> bool:
        """Whether the console shows the update of a step; the files record all of them."""
        is_first_or_last = step < self.start_step + FIRST_LINES or step == self.max_steps - 1
        is_silent = time.monotonic() - self.last_line > self.longest_silence
        return is_first_or_last or is_silent or step % self.line_every == 0

    def log_validation(
        self, step: int, loss: float, bytes_per_token: float, tokens: int, seconds: float
    ) -> None:
        """Records a val loss in nats per token, after `tokens` training tokens and `seconds` of updates."""
        self._add_result(step, "val", f"{loss:.4f}")
        bits = bits_per_byte(loss, bytes_per_token)
        self.add_record("val", step=step, loss=loss, bits_per_byte=bits, tokens=tokens, seconds=seconds)
        per_token, per_byte = f"perplexity {perplexity(loss)}", f"{bits:.4f} bits per byte" if bits else ""
        parts = [f"step {step:5d}", f"val loss {loss:.4f}", per_token, per_byte]
        self.say(one_line(parts, least_needed=[per_token, per_byte]))

    def log_hellaswag(self, step: int, num_correct: int, num_examples: int) -> None:
        """Records how many of the examples were answered correctly (acc_norm, completion style)."""
        accuracy = num_correct / num_examples
        self._add_result(step, "hella", f"{accuracy:.4f}")
        self.add_record("hella", step=step, accuracy=accuracy, correct=num_correct, examples=num_examples)
        self.say(f"step {step:5d} | hellaswag {accuracy:.4f} ({num_correct} of {num_examples} examples)")

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Prints generated texts and adds them to samples.txt."""
        if self.is_master:
            for number, text in enumerate(texts):
                self.say(f"sample {number}: {text}")
                self._write("samples.txt", f"--- step {step}, sample {number}\n{text}\n")

    def draw_curves(self) -> None:
        """Draws curves.png from what has been recorded so far."""
        if self.is_master:
            with announced("drawing curves.png"):
                self._try("no curves.png", plot_run, self.log_dir)

    def write_report(self) -> None:
        """Writes report.md about the finished run."""
        if self.is_master:
            with announced("writing report.md"):
                self._try("no report.md", write_report, self.log_dir)

    def lost_files(self) -> list[str]:
        """The logs that are no longer in the log directory: it was removed or renamed during the run."""
        lost = []
        for name, file in self.files.items():
            path = self.log_dir / name
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                lost.append(name)
        return lost

    def say_what_was_written(self, model: Path | None, prompt: str) -> None:
        """Prints what is in the log directory, and a command that samples from the model."""
        if self.is_master:
            written = (pattern for pattern in RUN_FILES if any(self.log_dir.glob(pattern)))
            self.say(f"in {self.log_dir}/: {', '.join(written)}")
            command = f"python {command_name('generate.py')} -m {quoted(model)} -p {quoted(prompt)}"
            self.say(f"sample from it: {command}", wrap=False)

    def sync(self) -> None:
        """Flushes the files to the disk, before a checkpoint that records their sizes."""
        for file in self.files.values():
            with suppress(OSError):  # not supported by this kind of file; a full disk has been reported
                os.fsync(file.fileno())

    def add_record(self, kind: str, **values: Any) -> None:
        """Adds a record to metrics.jsonl; mirrors get its numbers as `kind/name`, at its step."""
        if not self.is_master:
            return
        self._write("metrics.jsonl", json.dumps({"kind": kind, **values}) + "\n")
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for mirror in list(self.mirrors):
            if numbers and self._try(f"{mirror.name} failed", mirror.write, values["step"], numbers) is False:
                self.mirrors.remove(mirror)  # a retry at every step could cost a timeout each

    def _add_result(self, step: int, kind: str, value: str) -> None:
        if self.is_master:
            self._write("log.txt", f"{step} {kind} {value}\n")

    def _write(self, name: str, text: str) -> None:
        self._try(f"cannot write the logs in {self.log_dir}", self.files[name].write, text)

    def _try(self, failure: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; False if it failed, after one warning: nothing here may end a run."""
        try:
            return action(*arguments)
        except Exception as error:  # of any library
            if failure not in self.failures:
                self.failures.add(failure)
                reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
                reason = reason or type(error).__name__
                self.warn(f"{failure}: {reason}; continuing without it")
            return False


def interval_of_lines(max_steps: int) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that gives a run at least a hundred lines, or else 1."""
    intervals = [digit * 10**power for power in range(len(str(max_steps))) for digit in (1, 2, 5)]
    return max((every for every in intervals if 100 * every <= max_steps), default=1)


def one_line(parts: list[str], least_needed: list[str]) -> str:
    """Those parts of a result that are not empty; where the line is too long, without the least needed."""
    longest = min(LONGEST_LINE, line_width(sys.stdout))
    for number in range(len(least_needed) + 1):
        line = " | ".join(part for part in parts if part and part not in least_needed[:number])
        if len(line) <= longest:
            break
    return line


class Speed(NamedTuple):
    """How fast one update was, how fast the last 20 or so were, and how long the rest will take."""

    seconds: float
    mfu: float | None  # model FLOPs utilisation, the share of the devices' peak; None where that is unknown
    recent_tokens_per_second: float
    recent_mfu: float | None
    eta: float  # seconds left, at the recent speed, with what evaluations and checkpoints have taken so far


@dataclass
class Speedometer:
    """Turns the seconds of updates into speeds."""

    tokens_per_step: int
    max_steps: int  # of the run
    flops_per_step: int
    peak_flops: float | None  # FLOP/s of all devices together, None if unknown
    average: float = 0.0  # seconds of an update: the mean of the first 20, then a moving average
    between: float = 0.0  # seconds between updates so far: evaluations, samples, checkpoints
    steps_timed: int = 0
    last_end: float = math.inf  # of an update, on time.perf_counter

    def measure(self, step: int, seconds: float) -> Speed:
        """Adds the update of `step`, which took `seconds` and has just ended."""
        now = time.perf_counter()
        self.between += max(0.0, now - seconds - self.last_end)
        self.steps_timed, self.last_end = self.steps_timed + 1, now
        self.average += (seconds - self.average) / min(self.steps_timed, 20)
        seconds_per_step = self.average + self.between / self.steps_timed
        return Speed(
            seconds,
            self._mfu(seconds),
            self.tokens_per_step / self.average,
            self._mfu(self.average),
            eta=(self.max_steps - step - 1) * seconds_per_step,
        )

    def _mfu(self, seconds: float) -> float | None:
        return self.flops_per_step / seconds / self.peak_flops if self.peak_flops else None


class Mirror(NamedTuple):
    """An open mirror: its name, and functions that write numbers by name at a step, and end it."""

    name: str
    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def open_tensorboard(log_dir: Path, settings: dict[str, Any], start_step: int) -> Mirror:
    """Event files in `log_dir/tensorboard/`; events of an earlier start from `start_step` on are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=start_step or None)
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return Mirror("TensorBoard", write, writer.close)


def open_wandb(log_dir: Path, settings: dict[str, Any], start_step: int) -> Mirror:
    """A run of the wandb project mini-gpt; account and mode are wandb's own settings."""
    import wandb

    id_path = log_dir / WANDB_ID_FILE
    known = id_path.read_text(encoding="utf-8").strip() if start_step and id_path.is_file() else None
    run = wandb.init(project="mini-gpt", dir=str(log_dir), config=settings, id=known, resume="allow")
    id_path.write_text(run.id, encoding="utf-8")
    # The step is an ordinary number for wandb: its own may never decrease, ours does when resuming.
    return Mirror("wandb", lambda step, numbers: run.log({**numbers, "step": step}), run.finish)
