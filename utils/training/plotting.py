"""Curves: log/curves.png while a run goes on, and several runs in one picture.

python -m utils.training.plotting log other_run/log --out compare.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Sequence

from utils.command_line import ArgumentParser
from utils.errors import UserError, run_script
from utils.files import whole_file
from utils.hellaswag.results import PUBLISHED_GPT2

# Accuracy (acc_norm, completion style) of the models that a 124M run is measured against.
HELLASWAG_REFERENCES = {
    "GPT-2 124M": PUBLISHED_GPT2["completion"]["gpt2"].acc_norm,
    "GPT-3 124M": 0.337,  # Brown et al. 2020, table H.1
}
TOKEN_UNITS = ((10**9, "billion training tokens"), (10**6, "million training tokens"), (1, "training tokens"))
TIME_UNITS = ((3600, "hours of updates"), (60, "minutes of updates"), (1, "seconds of updates"))
LONGEST_LABEL = 30  # characters of a run's name in a legend
SKIPPED_PART = 0.06  # of a run's validations: not what the loss axis of a comparison is scaled to


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average without a bias towards the start (Kingma & Ba 2015, section 3)."""
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = memory * average + (1 - memory) * value
        result.append(average / (1 - memory**count))
    return result


# ------------------------------------------------------------------------------------------------------------
# One run


def plot_run(log_dir: Path) -> Path | None:
    """Draws `curves.png` in the log directory.

    Returns its path, or None where nothing was logged.

    Raises:
        UserError: matplotlib is missing.
    """
    Figure = _figure_class()
    curves = read_log(log_dir / "log.txt")
    if not curves:
        return None
    rates = [(r["step"], r["lr"]) for r in read_metrics(log_dir / "metrics.jsonl") if r["kind"] == "train"]
    panels = 3 if "hella" in curves else 2
    figure = Figure(figsize=(10, 3.6 * 2) if panels == 3 else (10, 5.6), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, height_ratios=[3, 1, 1.5][:panels])
    _draw_losses(axes[0], curves)
    if rates:
        axes[1].plot(*zip(*rates), color="tab:green")
    axes[1].set_ylabel("learning rate")
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if panels == 3:
        axes[2].plot(*curves["hella"], color="tab:red", marker="o", markersize=3)
        _draw_references(axes[2])
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return save_picture(figure, log_dir / "curves.png")


def _draw_losses(axis, curves: dict) -> None:
    if "train" in curves:
        steps, losses = curves["train"]
        axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train")
        axis.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="train, smoothed")
    if "val" in curves:
        steps, losses = curves["val"]
        style = dict(color="tab:orange", marker="o", markersize=4, linewidth=1.6)
        axis.plot(steps, losses, label=f"val (last {losses[-1]:.4f})", **style)
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


def _draw_references(axis) -> None:
    """Dashed lines at the accuracies of GPT-2 and GPT-3."""
    for name, accuracy in HELLASWAG_REFERENCES.items():
        axis.axhline(accuracy, color="gray", linestyle="--", linewidth=1)
        place = dict(xycoords=("axes fraction", "data"), va="top", color="gray")
        axis.annotate(f"{name} {accuracy:.4f}", (0.005, accuracy), **place)
    axis.set_ylabel("HellaSwag accuracy")


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed", "pip install matplotlib") from error
    return Figure


def save_picture(figure, path: Path) -> Path:
    """Writes a PNG under a temporary name first: a viewer never sees half a picture. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return path


# ------------------------------------------------------------------------------------------------------------
# Several runs


def plot_comparison(log_dirs: Sequence[Path], path: Path) -> Path:
    """Draws the val losses of several runs against steps, tokens and time, and their HellaSwag accuracies.

    Args:
        log_dirs: one for each run, as train_gpt.py writes them.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing, a directory holds no log, or the picture cannot be written.
    """
    Figure = _figure_class()
    logs = {}
    for log_dir in log_dirs:
        curves = read_log(log_dir / "log.txt") if (log_dir / "log.txt").is_file() else {}
        if not curves:
            raise UserError(f"{log_dir} holds no log.txt of a run", "give log directories of train_gpt.py")
        logs[log_dir] = curves
    has_hellaswag = any("hella" in curves for curves in logs.values())
    figure = Figure(figsize=(12, 8) if has_hellaswag else (15, 4.6), layout="constrained")
    axes = figure.subplots(*((2, 2) if has_hellaswag else (1, 3))).flatten()
    vals = {log_dir: _val_records(log_dir, curves) for log_dir, curves in logs.items()}
    _draw_vals(axes[0], vals, "step", 1, "step")
    _draw_vals(axes[1], vals, "tokens", *_unit(vals, "tokens", TOKEN_UNITS))
    _draw_vals(axes[2], vals, "seconds", *_unit(vals, "seconds", TIME_UNITS))
    if has_hellaswag:
        _draw_hellaswag(axes[3], logs)
    for axis in axes:
        axis.grid(alpha=0.3)
    try:
        return save_picture(figure, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}", "give --out a file you can write"
        ) from error


def _unit(vals: dict, key: str, units: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """The largest unit of which the longest run has at least two, and its name."""
    longest = max((r.get(key, 0) for records in vals.values() for r in records), default=0)
    return next((unit for unit in units if longest >= 2 * unit[0]), units[-1])


def _draw_hellaswag(axis, logs: dict) -> None:
    """One line for each run that was evaluated, and the published accuracies."""
    for number, (log_dir, curves) in enumerate(logs.items()):
        if "hella" in curves:
            style = dict(color=f"C{number}", marker="o", markersize=3)
            axis.plot(*curves["hella"], label=_short(log_dir), **style)
    _draw_references(axis)
    axis.set_xlabel("step")
    axis.legend(loc="lower right")


def _short(log_dir: Path) -> str:
    """A directory's name for a legend: the end of a long one, which is where names differ."""
    name = str(log_dir)
    return name if len(name) <= LONGEST_LABEL else "..." + name[3 - LONGEST_LABEL :]


def _val_records(log_dir: Path, curves: dict) -> list[dict]:
    """Step and loss of each validation, with tokens and seconds where metrics.jsonl has them.

    log.txt decides: it is what a resumed run cuts back and what people copy around.
    """
    known = {r["step"]: r for r in read_metrics(log_dir / "metrics.jsonl") if r["kind"] == "val"}
    return [
        {**known.get(step, {}), "step": step, "loss": loss}
        for step, loss in zip(*curves.get("val", ((), ())))
    ]


def _draw_vals(axis, vals: dict, key: str, unit: float, label: str) -> None:
    """One line for each run: val loss against `key`, divided by `unit`.

    The axis ends above what came after the first steep part, where runs differ by less than the line's width.
    """
    later: list[float] = []
    for number, (log_dir, records) in enumerate(vals.items()):
        points = [(r[key] / unit, r["loss"]) for r in records if key in r]
        if points:
            name = f"{_short(log_dir)} (last {points[-1][1]:.4f})"
            axis.plot(*zip(*points), color=f"C{number}", marker="o", markersize=3, label=name)
            later += [loss for _, loss in points[math.ceil(SKIPPED_PART * len(points)) :]]
    axis.set_xlabel(label)
    axis.set_ylabel("val loss (nats per token)")
    if axis.lines:
        axis.legend()
    if later:
        room = 0.08 * (max(later) - min(later)) + 0.01
        axis.set_ylim(min(later) - room, max(later) + room)


# ------------------------------------------------------------------------------------------------------------
# Files


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
    """The records of metrics.jsonl, none if it is missing. A torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="-m utils.training.plotting", description="Draw the curves of runs into one picture."
    )
    parser.add_argument("log_dirs", nargs="+", type=Path, metavar="LOG_DIR", help="of a run")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture, a PNG")
    args = parser.parse_args(argv)
    print(plot_comparison(args.log_dirs, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
