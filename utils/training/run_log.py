"""What a run records: log.txt, metrics.jsonl, samples.txt, the console, and mirrors of the metrics.

The files are the record. TensorBoard and Weights & Biases are optional and imported on request; one that
fails costs one warning and never a step.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from utils.command_line import UserError, format_duration, perplexity
from utils.training.log_directory import written
from utils.training.report import plot_run, write_report

PROJECT = "mini-gpt"
WANDB_ID_FILE = "wandb_id.txt"  # in the log directory: a resumed run continues the same wandb run


class RunLog:
    """The files and the console of a run; on ranks other than 0 every call does nothing.

    `log.txt` holds lines `{step} train|val|hella {value}` and no times, so that two runs can be compared byte
    for byte. `max_steps` and `start_step` are those of the progress bar.
    """

    def __init__(self, log_dir: Path, *, is_master: bool, max_steps: int = 0, start_step: int = 0):
        self.log_dir = log_dir
        self.is_master = is_master
        self.bar: Any = None
        self.mirrors: Mirrors | None = None
        self.write_failed = False  # a log file: warned once
        self.failed_pages: set[str] = set()  # pictures and pages: warned once each
        if not is_master:
            return
        log_dir.mkdir(parents=True, exist_ok=True)
        self.files = {
            name: open(log_dir / name, "a", encoding="utf-8")
            for name in ("log.txt", "metrics.jsonl", "samples.txt")
        }
        if sys.stderr.isatty() and find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=max_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar and the mirrors, and closes the files."""
        if not self.is_master:
            return
        if self.bar is not None:
            self.bar.close()
        if self.mirrors is not None:
            self.mirrors.close()
        for file in self.files.values():
            try:
                file.close()
            except OSError:  # the failed write has been reported
                pass

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if not self.is_master:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def log_start(self, record: dict[str, Any], *, tensorboard: bool, wandb: bool) -> None:
        """Records settings and environment, and opens the mirrors that are asked for."""
        if self.is_master and (tensorboard or wandb):
            self.mirrors = Mirrors(
                self.log_dir,
                record["settings"],
                record["step"],
                self.say,
                tensorboard=tensorboard,
                wandb=wandb,
            )
        self._add_record("run", **record)

    def log_update(
        self, step: int, loss: float, norm: float, lr: float, speed: "Speed", num_skipped: int, memory: int
    ) -> None:
        """Records an update: loss and norm before it, updates skipped so far, peak memory in bytes."""
        self._add_result(step, "train", f"{loss:.6f}")
        known_norm = norm if math.isfinite(norm) else None  # JSON has no infinity
        values = dict(loss=loss, lr=lr, norm=known_norm, skipped=num_skipped)
        self._add_record("train", step=step, **values, seconds=speed.seconds, mfu=speed.mfu, memory=memory)
        parts = [
            f"step {step:5d} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}",
            f"{1000 * speed.seconds:.0f} ms | {speed.tokens_per_second:,.0f} tok/s",
            *([] if speed.mfu is None else [f"mfu {100 * speed.mfu:.1f}%"]),
            *([f"skipped {num_skipped}"] if num_skipped else []),
            f"eta {format_duration(speed.eta)}",
        ]
        self.say(" | ".join(parts))
        if self.bar is not None:
            self.bar.update()

    def log_validation(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Records a val loss in nats, after `tokens` training tokens and `seconds` of updates."""
        self._add_result(step, "val", f"{loss:.4f}")
        self._add_record("val", step=step, loss=loss, tokens=tokens, seconds=seconds)
        self.say(f"step {step:5d} | val loss {loss:.4f} | perplexity {perplexity(loss)}")

    def log_hellaswag(self, step: int, num_correct: int, num_examples: int) -> None:
        """Records how many of the examples were answered correctly (acc_norm, completion style)."""
        accuracy = num_correct / num_examples
        self._add_result(step, "hella", f"{accuracy:.4f}")
        self._add_record("hella", step=step, accuracy=accuracy, correct=num_correct, examples=num_examples)
        self.say(f"step {step:5d} | hellaswag {accuracy:.4f} ({num_correct} of {num_examples} examples)")

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Prints generated texts and adds them to samples.txt."""
        if self.is_master:
            for number, text in enumerate(texts):
                self.say(f"sample {number}: {text}")
                self._write("samples.txt", f"--- step {step}, sample {number}\n{text}\n")

    def draw_curves(self) -> None:
        """Draws curves.png from what has been recorded so far."""
        self._try_page("curves.png", plot_run)

    def write_report(self) -> None:
        """Writes report.md about the finished run."""
        self._try_page("report.md", write_report)

    def say_what_was_written(self, model: Path | None, prompt: str) -> None:
        """Prints what is in the log directory, and a command that samples from the model."""
        if self.is_master:
            self.say(f"in {self.log_dir}/: {', '.join(written(self.log_dir))}")
            self.say(f'sample from it: python generate.py -m {model} -p "{prompt}"')

    def sync(self) -> None:
        """Flushes the files to the disk, before a checkpoint that records their sizes."""
        if not self.is_master:
            return
        for file in self.files.values():
            try:
                os.fsync(file.fileno())
            except OSError:  # not supported by this kind of file; a full disk has been reported by _write
                pass

    def _add_result(self, step: int, kind: str, value: str) -> None:
        if self.is_master:
            self._write("log.txt", f"{step} {kind} {value}\n")

    def _add_record(self, kind: str, **values: Any) -> None:
        if self.is_master:
            self._write("metrics.jsonl", json.dumps({"kind": kind, **values}) + "\n")
            if self.mirrors is not None:
                self.mirrors.add(kind, values)

    def _write(self, name: str, text: str) -> None:
        # A full disk must not end the run: warn once and continue.
        try:
            self.files[name].write(text)
            self.files[name].flush()
        except OSError as error:
            if not self.write_failed:
                path = self.log_dir / name
                self.say(f"warning: cannot write {path}: {error.strerror}; training continues without it")
            self.write_failed = True

    def _try_page(self, name: str, write: Callable[[Path], Any]) -> None:
        if self.is_master:
            try:
                write(self.log_dir)
            except Exception as error:  # of any library: no picture is worth a run
                if name not in self.failed_pages:
                    self.say(f"warning: no {name}: {error}")
                self.failed_pages.add(name)


class Speed(NamedTuple):
    """How fast one update was, and how long the rest will take."""

    seconds: float
    tokens_per_second: float
    mfu: float | None  # model FLOPs utilisation, the share of the devices' peak; None where that is unknown
    eta: float  # seconds left, at the mean speed of this process so far, without evaluations


class Speedometer:
    """Turns the seconds of updates into speeds.

    Args:
        tokens_per_step: tokens of an update.
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


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raises UserError if a mirror is requested whose package is missing. Imports nothing."""
    for requested, name in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if requested and find_spec(name) is None:
            raise UserError(f"--{name} needs the package {name}", f"pip install {name}")


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
    run = wandb.init(project=PROJECT, dir=str(log_dir), config=settings, id=known, resume="allow")
    id_path.write_text(run.id, encoding="utf-8")
    # The step is an ordinary number for wandb: its own may never decrease, ours does when resuming.
    return Mirror("wandb", lambda step, numbers: run.log({**numbers, "step": step}), run.finish)


class Mirrors:
    """The requested mirrors of a run that starts at `start_step`; `say` prints warnings."""

    def __init__(
        self, log_dir: Path, settings: dict[str, Any], start_step: int, say: Callable[[str], None],
        *, tensorboard: bool, wandb: bool,
    ):  # fmt: skip
        self.say = say
        self.active: list[Mirror] = []
        for requested, name, start in (
            (tensorboard, "TensorBoard", open_tensorboard),
            (wandb, "wandb", open_wandb),
        ):
            if requested and (mirror := self._try(name, start, log_dir, settings, start_step)):
                self.active.append(mirror)

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Mirrors a record of metrics.jsonl: every number in it, as `kind/name`, at its step."""
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for mirror in list(self.active):
            if numbers and self._try(mirror.name, mirror.write, values["step"], numbers) is False:
                self.active.remove(mirror)  # warned once; a retry at every step could cost a timeout each

    def close(self) -> None:
        """Ends all mirrors."""
        for mirror in self.active:
            self._try(mirror.name, mirror.close)

    def _try(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; False, after a warning, if it failed: no service may end the run."""
        try:
            return action(*arguments)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self.say(f"warning: {name} failed ({reason}); training continues without it")
            return False
