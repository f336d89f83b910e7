"""Several runs in one picture: `python -m utils.training.plotting log other_run/log --out compare.png`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where utils is, also if started by its path
    from utils.start import begin_script

    begin_script()

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.command_line import ArgumentParser, UserError, run_script
from utils.training.curves import run_title, start_of
from utils.training.drawing import (
    HELLASWAG,
    after_steep_part,
    decimated,
    draw_hellaswag_references,
    drawable,
    drawable_file,
    lay_out,
    new_figure,
    save_picture,
    set_limits,
    smoothed,
    smoothing_window,
)
from utils.training.log_reader import read_log, read_metrics
from utils.training.resume import BEFORE, HARMLESS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKEN_UNITS = ((10**9, "billion training tokens"), (10**6, "million training tokens"), (1, "training tokens"))
TIME_UNITS = ((3600, "hours of updates"), (60, "minutes of updates"), (1, "seconds of updates"))
MEASURES = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
LONGEST_NAME, LONGEST_VALUE = 30, 16  # characters of a run's name and of a setting's value
# Settings that say most about why curves differ, in this order; the others follow as they are recorded.
TELLING = (
    *("preset", "recipe", "init_from", "data", "tokenizer", "n_layer", "n_embd", "seq_len", "optimizer"),
    *("schedule", "total_batch_tokens", "max_steps", "max_lr", "muon_lr", "warmup_steps", "dropout", "seed"),
)
NOT_TELLING = (*HARMLESS, "device", "sample_prompt", "micro_batch", "compile")
MOST_SETTINGS = 4  # that are shown
PANEL_HEIGHT, GAP = 2.6, 0.45  # inches


class LoggedRun(NamedTuple):
    """What a comparison needs of a run."""

    name: str
    curves: dict[str, tuple[list[int], list[float]]]  # log.txt
    records: list[dict[str, Any]]  # metrics.jsonl, without the updates
    vals: list[dict[str, Any]]  # the validations of log.txt, exact where metrics.jsonl has them
    settings: dict[str, Any]  # empty if they are not recorded


class Panel(NamedTuple):
    """One line per run, empty where its logs lack the values."""

    xlabel: str
    ylabel: str
    lines: list[tuple[Sequence[float], Sequence[float]]]
    marker: str = "o"


def plot_comparison(log_dirs: Sequence[Path], path: Path) -> Path:
    """Draws val and train losses of several runs, and their HellaSwag accuracies; returns the picture's path.

    Args:
        log_dirs: one per run, as train_gpt.py writes them.
        path: of the PNG.

    Raises:
        UserError: matplotlib is missing, a directory holds no log, or the picture cannot be written.
    """
    figure = comparison_figure(log_dirs)
    try:
        return save_picture(figure, path)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise UserError(what, "give --out a file you can write") from error


def comparison_figure(log_dirs: Sequence[Path]) -> "Figure":
    """The picture of several runs, with a panel for each kind of value in their logs.

    In bits per byte where tokens differ, otherwise in nats per token.
    """
    figure, runs = new_figure(), [_read(log_dir) for log_dir in dict.fromkeys(log_dirs)]
    measure = "bits_per_byte" if _tokens_differ(runs) else "loss"
    panels = [panel for panel in _panels(runs, measure) if any(len(xs) for xs, _ in panel.lines)]
    num_rows = (len(panels) + 1) // 2
    grid = figure.add_gridspec(num_rows, 2, hspace=GAP / PANEL_HEIGHT, wspace=0.21)
    for index, panel in enumerate(panels):
        row, column = divmod(index, 2)
        is_alone = index == len(panels) - 1 and column == 0
        _draw(figure.add_subplot(grid[row, :] if is_alone else grid[row, column]), panel)
    differing = settings_that_differ([run.settings for run in runs])
    labels = [_label(run, measure, differing[:MOST_SETTINGS]) for run in runs]
    legend = list(zip(figure.axes[0].lines, labels))
    body = num_rows * PANEL_HEIGHT + (num_rows - 1) * GAP
    lay_out(figure, _title(runs, differing), legend, columns=1, body=body)
    return figure


def _read(log_dir: Path) -> LoggedRun:
    """Reads the logs of a run. Raises UserError if there are none."""
    curves = read_log(log_dir / "log.txt")
    if not curves.keys() & {"train", "val", "hella"}:
        raise UserError(f"{log_dir} holds no log.txt of a run", "give log directories of train_gpt.py")
    records = read_metrics(log_dir / "metrics.jsonl", most_updates=1)  # log.txt has their losses
    # log.txt decides which validations there are: a resumed run cuts it back, and it is what people copy.
    known = {record["step"]: record for record in records if record["kind"] == "val"}
    steps, losses = curves.get("val", ((), ()))
    vals = [{"loss": loss, **known.get(step, {}), "step": step} for step, loss in zip(steps, losses)]
    settings = start_of(records)["settings"]
    name = drawable(log_dir, LONGEST_NAME)
    return LoggedRun(name, curves, records, vals, {**BEFORE, **settings} if settings else {})


def _tokens_differ(runs: list[LoggedRun]) -> bool:
    """Whether the tokens of the runs stand for different numbers of bytes; False if some run does not say."""
    records = [record for run in runs for record in run.vals]
    if not records or not all(record.get("bits_per_byte") for record in records):
        return False
    ratios = [record["loss"] / record["bits_per_byte"] for record in records]
    return max(ratios) > 1.001 * min(ratios)  # they also differ a little with --val-tokens


def settings_that_differ(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The names of settings that may explain why curves differ, the most telling first.

    Runs without settings, those of a log.txt alone, do not count.
    """
    known = [of_run for of_run in settings if of_run]
    names = [name for name in dict.fromkeys([*TELLING, *(known or [{}])[0]]) if name not in NOT_TELLING]
    in_all = [name for name in names if all(name in of_run for of_run in known)]
    return [name for name in in_all if len({_value(of_run[name]) for of_run in known}) > 1]


def _value(value: object) -> str:
    """A setting's value for a legend: of a path the last part."""
    if isinstance(value, str):
        return drawable_file(value, LONGEST_VALUE)
    if type(value) in (int, float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return "none" if value is None else drawable(value, LONGEST_VALUE)


def _title(runs: list[LoggedRun], differing: list[str]) -> str:
    if len(runs) == 1:
        return run_title(runs[0].records, runs[0].curves)
    if not differing:
        return f"{len(runs)} runs"
    rest = len(differing) - MOST_SETTINGS
    more = f" + {rest} more" if rest > 0 else ""
    return f"{len(runs)} runs, which differ in {', '.join(differing[:MOST_SETTINGS])}{more}"


def _label(logged: LoggedRun, measure: str, names: Sequence[str]) -> str:
    """Name, val loss, and the values of these settings of a run, for the legend."""
    parts = [logged.name]
    if logged.vals:
        last, best = logged.vals[-1][measure], min(logged.vals, key=lambda record: record[measure])
        parts.append(f"val {last:.4f}")
        if best[measure] < last:
            parts.append(f"best {best[measure]:.4f} at step {best['step']:,}")
    return ", ".join(parts + [f"{name} {_value(logged.settings[name])}" for name in names if logged.settings])


def _panels(runs: list[LoggedRun], measure: str) -> list[Panel]:
    """All panels; what no run has in its logs is empty."""
    panels, unit_of_loss = [], MEASURES[measure]
    for key, units in (("step", ((1, "step"),)), ("tokens", TOKEN_UNITS), ("seconds", TIME_UNITS)):
        size, label = _unit(runs, key, units)
        points = [[(r[key] / size, r[measure]) for r in run.vals if key in r] for run in runs]
        lines = [tuple(zip(*of_run)) or ((), ()) for of_run in points]
        panels.append(Panel(label, f"val loss ({unit_of_loss})", lines))
    train = [_smoothed_train_loss(run, measure) for run in runs]
    label = f"train loss, smoothed ({unit_of_loss})"
    panels.insert(1, Panel("step", label, train, marker=""))
    hellaswag = [run.curves.get("hella", ((), ())) for run in runs]
    return [*panels, Panel("step", HELLASWAG, hellaswag)]


def _unit(runs: list[LoggedRun], key: str, units: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """The largest unit of which the longest run has at least two, and its name."""
    longest = max((record.get(key, 0) for run in runs for record in run.vals), default=0)
    return next((unit for unit in units if longest >= 2 * unit[0]), units[-1])


def _smoothed_train_loss(logged: LoggedRun, measure: str) -> tuple[Sequence[float], Sequence[float]]:
    """In bits per byte with the bytes per token of the val part: nothing records those of single updates."""
    steps, losses = logged.curves.get("train", ([], []))
    if not steps:
        return [], []
    steps, losses = decimated(*smoothed(steps, losses, smoothing_window(len(losses))))
    in_bits = measure == "bits_per_byte" and logged.vals
    return steps, losses * (logged.vals[-1][measure] / logged.vals[-1]["loss"] if in_bits else 1.0)


def _draw(axis: "Axes", panel: Panel) -> None:
    """Draws one line per run. The loss axis ends above the values after the first steep part, where runs
    differ by less than a line's width.
    """
    for number, (xs, ys) in enumerate(panel.lines):
        axis.plot(xs, ys, color=f"C{number}", marker=panel.marker, markersize=3, linewidth=1.4)
    if panel.ylabel == HELLASWAG:
        draw_hellaswag_references(axis)
    else:
        highest = max(max(ys) for _, ys in panel.lines if len(ys))
        set_limits(axis, [after_steep_part(ys) for _, ys in panel.lines], highest)
    axis.set_xlabel(panel.xlabel)
    axis.set_ylabel(panel.ylabel)


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
