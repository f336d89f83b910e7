"""log/curves.png from log.txt and metrics.jsonl: losses, learning rate, HellaSwag."""

from __future__ import annotations

import json
import os
from pathlib import Path

GPT2_HELLASWAG = 0.2955  # acc_norm of OpenAI's 124M weights, completion style (build-nanogpt)


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average without a bias towards the start (Kingma & Ba 2015, section 3)."""
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = memory * average + (1 - memory) * value
        result.append(average / (1 - memory**count))
    return result


def plot_run(log_dir: Path) -> Path | None:
    """Draws `curves.png` in the log directory.

    Returns its path, or None where matplotlib is missing or nothing was logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
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
        axes[2].axhline(GPT2_HELLASWAG, color="gray", linestyle="--", linewidth=1)
        axes[2].annotate(
            "GPT-2 124M",
            (0.005, GPT2_HELLASWAG),
            xycoords=("axes fraction", "data"),
            va="bottom",
            color="gray",
        )
        axes[2].set_ylabel("HellaSwag")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    path = log_dir / "curves.png"
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # a viewer never sees half a picture
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, path)
    return path


def _draw_losses(axis, curves: dict) -> None:
    if "train" in curves:
        steps, losses = curves["train"]
        axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train")
        axis.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="train, smoothed")
    if "val" in curves:
        steps, losses = curves["val"]
        axis.plot(
            steps,
            losses,
            color="tab:orange",
            marker="o",
            markersize=4,
            linewidth=1.6,
            label=f"val (last {losses[-1]:.4f})",
        )
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


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
