"""Several runs in one picture: `python -m utils.training.plotting log other_run/log --out compare.png`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where utils is, also if started by its path
    from utils.console import begin_script

    begin_script()

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.command_line import ArgumentParser, UserError, run_script
from utils.training.report import draw_hellaswag_references, new_figure, read_log, read_metrics, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKEN_UNITS = ((10**9, "billion training tokens"), (10**6, "million training tokens"), (1, "training tokens"))
TIME_UNITS = ((3600, "hours of updates"), (60, "minutes of updates"), (1, "seconds of updates"))
MEASURES = {"loss": "val loss (nats per token)", "bits_per_byte": "val loss (bits per byte)"}
LONGEST_LABEL = 30  # characters of a run's name in a legend
SKIPPED_SHARE = 0.06  # of a run's validations, at its start: the loss axis is scaled to the rest


def plot_comparison(log_dirs: Sequence[Path], path: Path) -> Path:
    """Draws the val losses of several runs against steps, tokens and time, and their HellaSwag accuracies.

    In bits per byte where tokens differ, otherwise in nats per token.

    Args:
        log_dirs: one per run, as train_gpt.py writes them.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing, a directory holds no log, or the picture cannot be written.
    """
    figure, logs = new_figure(), {}
    for log_dir in log_dirs:
        curves = read_log(log_dir / "log.txt")
        if not curves:
            raise UserError(f"{log_dir} holds no log.txt of a run", "give log directories of train_gpt.py")
        logs[log_dir] = curves
    has_hellaswag = any("hella" in curves for curves in logs.values())
    figure.set_size_inches((12, 8) if has_hellaswag else (15, 4.6))
    axes = figure.subplots(*((2, 2) if has_hellaswag else (1, 3))).flatten()
    vals = {log_dir: _val_records(log_dir, curves) for log_dir, curves in logs.items()}
    measure = "bits_per_byte" if _tokens_differ(vals) else "loss"
    _draw_vals(axes[0], vals, measure, "step", 1, "step")
    _draw_vals(axes[1], vals, measure, "tokens", *_unit(vals, "tokens", TOKEN_UNITS))
    _draw_vals(axes[2], vals, measure, "seconds", *_unit(vals, "seconds", TIME_UNITS))
    if has_hellaswag:
        _draw_hellaswag(axes[3], logs)
    for axis in axes:
        axis.grid(alpha=0.3)
    try:
        return save_picture(figure, path)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise UserError(what, "give --out a file you can write") from error


def _val_records(log_dir: Path, curves: dict[str, tuple]) -> list[dict[str, Any]]:
    """Step and loss of each validation, with tokens and seconds where metrics.jsonl has them.

    log.txt decides which: a resumed run cuts it back, and it is what people copy.
    """
    known = {r["step"]: r for r in read_metrics(log_dir / "metrics.jsonl") if r["kind"] == "val"}
    return [
        {**known.get(step, {}), "step": step, "loss": loss}
        for step, loss in zip(*curves.get("val", ((), ())))
    ]


def _tokens_differ(vals: dict[Path, list[dict]]) -> bool:
    """Whether the tokens of the runs stand for different numbers of bytes; False if some run does not say."""
    records = [record for of_run in vals.values() for record in of_run]
    if not records or not all(record.get("bits_per_byte") for record in records):
        return False
    ratios = [record["loss"] / record["bits_per_byte"] for record in records]
    return max(ratios) > 1.001 * min(ratios)  # losses in log.txt are rounded


def _unit(vals: dict[Path, list[dict]], key: str, units: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """The largest unit of which the longest run has at least two, and its name."""
    longest = max((r.get(key, 0) for records in vals.values() for r in records), default=0)
    return next((unit for unit in units if longest >= 2 * unit[0]), units[-1])


def _draw_vals(
    axis: "Axes", vals: dict[Path, list[dict]], measure: str, key: str, unit: float, label: str
) -> None:
    """Draws one line per run: val loss, a key of MEASURES, against `key` / `unit`.

    The loss axis ends above the values after the first steep part, where runs differ by less than a line's
    width.
    """
    later: list[float] = []
    for number, (log_dir, records) in enumerate(vals.items()):
        points = [(r[key] / unit, r[measure]) for r in records if key in r]
        if points:
            name = f"{_short(log_dir)} (last {points[-1][1]:.4f})"
            axis.plot(*zip(*points), color=f"C{number}", marker="o", markersize=3, label=name)
            later += [loss for _, loss in points[math.ceil(SKIPPED_SHARE * len(points)) :]]
    axis.set_xlabel(label)
    axis.set_ylabel(MEASURES[measure])
    if axis.lines:
        axis.legend()
    if later:
        margin = 0.08 * (max(later) - min(later)) + 0.01
        axis.set_ylim(min(later) - margin, max(later) + margin)


def _draw_hellaswag(axis: "Axes", logs: dict[Path, dict]) -> None:
    """Draws one line per run that was evaluated, and the published accuracies."""
    for number, (log_dir, curves) in enumerate(logs.items()):
        if "hella" in curves:
            style = dict(color=f"C{number}", marker="o", markersize=3)
            axis.plot(*curves["hella"], label=_short(log_dir), **style)
    draw_hellaswag_references(axis)
    axis.set_xlabel("step")
    axis.legend(loc="lower right")


def _short(log_dir: Path) -> str:
    """A directory's name for a legend: of a long one the end, which is where names differ."""
    name = str(log_dir)
    name = name if len(name) <= LONGEST_LABEL else "..." + name[3 - LONGEST_LABEL :]
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")  # no font has surrogates; no formulas


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="-m utils.training.plotting", description="Draw the curves of several runs into one picture."
    )
    parser.add_argument("log_dirs", nargs="+", type=Path, metavar="LOG_DIR", help="log directory of a run")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture, a PNG")
    args = parser.parse_args(argv)
    print(plot_comparison(args.log_dirs, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
