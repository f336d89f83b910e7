"""The picture of a run, log/curves.png: losses, gradient norm, learning rates and HellaSwag."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.schema import is_int, is_number
from utils.training.drawing import (
    after_steep_part,
    decimated,
    draw_hellaswag_references,
    draw_reference,
    drawable,
    drawable_file,
    lay_out,
    new_figure,
    save_picture,
    set_limits,
    smoothed,
    smoothing_window,
    typical,
)
from utils.training.log_reader import published_val_losses, read_log, read_metrics, tokens_trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_UPDATES = 20_000  # that are read from metrics.jsonl
SHORT = 50  # updates; of fewer the axes show every value
HEIGHTS = {"loss": 3.2, "norm": 1.1, "rates": 1.1, "hellaswag": 1.7}  # of the panels, in inches


def plot_run(log_dir: Path) -> Path | None:
    """Draws `curves.png`, returns its path, None for an empty log. Raises UserError without matplotlib."""
    figure = run_figure(log_dir)
    return figure and save_picture(figure, log_dir / "curves.png")


def run_figure(log_dir: Path) -> "Figure | None":
    """The picture of a run, with a panel for each kind of value in its logs; None for an empty log."""
    figure, curves = new_figure(), read_log(log_dir / "log.txt")
    if not curves:
        return None
    records = read_metrics(log_dir / "metrics.jsonl", most_updates=MOST_UPDATES)
    updates = [record for record in records if record["kind"] == "train"]
    norms = [(r["step"], r["norm"]) for r in updates if r.get("norm") is not None]
    present = {"loss": True, "norm": norms, "rates": updates, "hellaswag": "hella" in curves}
    heights = {name: height for name, height in HEIGHTS.items() if present[name]}
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    panels = dict(zip(heights, rows.flatten()))
    _draw_losses(panels["loss"], curves, records)
    if norms:
        grad_clip = start_of(records)["settings"].get("grad_clip")
        is_complete = len(updates) >= len(curves.get("train", ([],))[0])
        _draw_norms(panels["norm"], *zip(*norms), grad_clip, is_complete=is_complete)
    if updates:
        _draw_learning_rates(panels["rates"], updates)
    if "hella" in curves:
        panels["hellaswag"].plot(*curves["hella"], color="tab:red", marker="o", markersize=3)
        draw_hellaswag_references(panels["hellaswag"])
    _mark_resumes(list(panels.values()), records)
    rows[-1, 0].set_xlabel("step")  # for all panels, which share their axis
    legend = list(zip(*panels["loss"].get_legend_handles_labels()))
    if updates and "muon_lr" in updates[-1]:  # a single learning rate needs no name
        legend += zip(*panels["rates"].get_legend_handles_labels())
    lay_out(figure, run_title(records, curves), legend, columns=2, body=sum(heights.values()))
    return figure


def start_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the last start of a run; without settings if there is none."""
    return next((record for record in reversed(records) if record["kind"] == "run"), {"settings": {}})


def run_title(records: list[dict[str, Any]], curves: dict[str, tuple]) -> str:
    """Preset, recipe and model of a run, then its data and length, as far as they are recorded."""
    start = start_of(records)
    settings = start["settings"]
    sizes = {**settings, **start.get("model", {})}
    how = [f"{key} {drawable(settings[key], 16)}" for key in ("preset", "recipe") if settings.get(key)]
    if is_int(sizes.get("n_layer")) and is_int(sizes.get("n_embd")):
        how.append(f"{sizes['n_layer']} layers × {sizes['n_embd']} channels")
    if "parameters" in start:
        how.append(f"{start['parameters']:,} parameters")
    # Without --data the reason alone names what was found: "input.txt (why), tokenizer ...".
    data = settings.get("data") or str(start.get("reasons", {}).get("data", "")).split(" (")[0]
    what = [drawable_file(data, 24)] if data else []
    if settings.get("tokenizer"):
        what.append(f"tokenizer {drawable_file(settings['tokenizer'], 16)}")
    steps = max(curves.get("train", ([-1],))[0]) + 1
    tokens = tokens_trained(records, steps)
    if tokens is not None:
        what.append(f"{tokens:,} tokens")
    of = f" of {settings['max_steps']:,}" if is_int(settings.get("max_steps")) else ""
    what.append(f"{steps:,}{of} steps")
    return "\n".join(", ".join(parts) for parts in (how, what) if parts)


def _draw_losses(axis: "Axes", curves: dict[str, tuple], records: list[dict[str, Any]]) -> None:
    """Train and val losses, and what they are compared with, on an axis that the first losses may exceed."""
    (train_steps, train), (val_steps, val) = (curves.get(kind, ([], [])) for kind in ("train", "val"))
    if train:
        _draw_train_losses(axis, train_steps, train)
    if val:
        _draw_val_losses(axis, val_steps, val)
    reached = max(max(steps) for steps, _ in curves.values())
    if points := [(step, loss) for step, loss in published_val_losses(records).items() if step <= reached]:
        style = dict(color="black", marker="x", linestyle="none", zorder=3)
        axis.plot(*zip(*points), label="val published for this recipe on FineWeb-Edu", **style)
    highest = max([*train, *val], default=0.0)
    shown = [train, val] if reached < SHORT else [typical(after_steep_part(train)), after_steep_part(val)]
    if set_limits(axis, shown, highest):
        axis.plot([], [], linestyle="none", label=f"above the axis: losses up to {highest:.2f}")
    vocab_size = start_of(records).get("model", {}).get("vocab_size")
    if is_int(vocab_size, 2) and axis.get_ylim()[0] <= math.log(vocab_size) <= axis.get_ylim()[1]:
        label = f"uniform guess: ln {vocab_size:,} = {math.log(vocab_size):.2f}"
        draw_reference(axis, label, math.log(vocab_size), side="right", va="top")
    axis.set_ylabel("loss (nats per token)")


def _draw_train_losses(axis: "Axes", steps: Sequence[int], losses: Sequence[float]) -> None:
    window = smoothing_window(len(losses))
    faint = dict(alpha=0.3, linewidth=0.7) if window > 1 else dict(linewidth=1.6, marker=".")
    axis.plot(*decimated(steps, losses), color="tab:blue", label="train", **faint)
    if window > 1:
        label = f"train, mean of {window:,} updates around each"
        axis.plot(*decimated(*smoothed(steps, losses, window)), color="tab:blue", linewidth=1.6, label=label)


def _draw_val_losses(axis: "Axes", steps: Sequence[int], losses: Sequence[float]) -> None:
    style = dict(color="tab:orange", marker="o", markersize=3, linewidth=1.6)
    axis.plot(*decimated(steps, losses), label=f"val (last {losses[-1]:.4f})", **style)
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"best val {losses[best]:.4f} at step {steps[best]:,}"
    style = dict(color="tab:red", marker="*", markersize=11, linestyle="none", zorder=3)
    axis.plot(steps[best], losses[best], label=label, **style)


def _draw_norms(
    axis: "Axes", steps: Sequence[int], norms: Sequence[float], grad_clip: object, *, is_complete: bool
) -> None:
    """Gradient norms before clipping, the norm to which they are clipped, and the highest if all are here."""
    axis.plot(*decimated(steps, norms), color="tab:brown", linewidth=0.7)
    shown = norms if len(norms) < SHORT else typical(after_steep_part(norms))
    set_limits(axis, [shown, [0.0]], max(norms))
    if is_number(grad_clip) and grad_clip <= axis.get_ylim()[1]:
        va = "bottom" if grad_clip < 0.8 * axis.get_ylim()[1] else "top"
        draw_reference(axis, f"clipped to {grad_clip:g}", grad_clip, side="right", va=va)
    axis.set_ylabel("gradient norm" + (f"\n(highest {max(norms):.3g})" if is_complete else ""))


def _draw_learning_rates(axis: "Axes", updates: list[dict[str, Any]]) -> None:
    for name, optimizer, color in (("lr", "AdamW", "tab:green"), ("muon_lr", "Muon", "tab:purple")):
        if points := [(record["step"], record[name]) for record in updates if name in record]:
            axis.plot(*decimated(*zip(*points)), color=color, label=f"learning rate of {optimizer}")
    axis.set_ylabel("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _mark_resumes(panels: list["Axes"], records: list[dict[str, Any]]) -> None:
    """Dotted vertical lines where the run was resumed."""
    steps = sorted({r["step"] for r in records if r["kind"] == "run" and r.get("step")})
    for step in steps:
        for axis in panels:
            axis.axvline(step, color="black", linestyle=":", linewidth=1)
    if steps:
        listed = ", ".join(f"{step:,}" for step in steps[:3]) + (", ..." if len(steps) > 3 else "")
        panels[0].plot([], [], color="black", linestyle=":", linewidth=1, label=f"resumed at step {listed}")
