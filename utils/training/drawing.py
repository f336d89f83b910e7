"""What the pictures of one run and of several share: smoothing, limits of axes, names, the file."""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.command_line import UserError
from utils.files import whole_file
from utils.training.log_reader import HELLASWAG_REFERENCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH, DPI = 9.0, 120  # inches, dots per inch: texts of 9 points are readable at the 800 pixels of a README
SMALL, LARGE = 9, 11  # font sizes, in points
LINE_HEIGHT, TITLE_HEIGHT = 0.19, 0.23  # of a line of legend and title, in inches
LEFT, RIGHT, FOOT, PADDING = 0.8, 0.3, 0.5, 0.1  # margins, in inches
STEEP_SHARE = 0.06  # of a curve, at its start: axes are scaled to the rest
WORTH_SHOWING = 1.3  # an axis is so much longer, in shares of itself, rather than that a value is cut off
SMOOTHED_SHARE = 0.04  # of a run's updates, over which its curves are smoothed
HELLASWAG = "HellaSwag\naccuracy"  # a label of an axis
FAST = {"compress_level": 3}  # of a PNG; zlib's default costs a tenth of the whole picture
MOST_POINTS = 2000  # of a line: more than the picture has columns

# ------------------------------------------------------------------------------------------------------------
# Curves


def smoothing_window(num_updates: int) -> int:
    """Updates over which the curves of a run are smoothed, an odd number."""
    return 2 * round(num_updates * SMOOTHED_SHARE / 2) + 1


def smoothed(xs: Sequence[float], ys: Sequence[float], window: int) -> tuple[Sequence[float], np.ndarray]:
    """Centred moving average: it does not lag, and leaves a straight line unchanged.

    The window shrinks towards the start, where a loss falls steeply; the line ends half a window early, since
    a mean of few values would end it with a hook.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(ys, dtype=float))])
    index = np.arange(len(ys) - window // 2)
    half = np.minimum(index, window // 2)
    return xs[: len(index)], (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def decimated(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The points of a line; of a long one the lowest and the highest among each few neighbours."""
    xs, ys = np.asarray(xs), np.asarray(ys, dtype=float)
    width = math.ceil(2 * len(ys) / MOST_POINTS)
    if len(ys) <= MOST_POINTS:
        return xs, ys
    blocks = np.concatenate([ys, np.repeat(ys[-1], -len(ys) % width)]).reshape(-1, width)
    starts = width * np.arange(len(blocks))
    places = np.unique([blocks.argmin(axis=1) + starts, blocks.argmax(axis=1) + starts])
    return xs[places], ys[places]


def after_steep_part(values: Sequence[float]) -> Sequence[float]:
    """A curve without its first values, which an axis need not show."""
    return values[math.ceil(STEEP_SHARE * len(values)) :]


def typical(values: Sequence[float]) -> list[float]:
    """The lowest value, and one that all but one in fifty do not exceed."""
    return [min(values), float(np.percentile(values, 98))] if len(values) else []


def set_limits(axis: "Axes", shown: Iterable[Sequence[float]], highest: float) -> bool:
    """Lets the vertical axis end around these values, or at `highest` if that costs little.

    Returns whether something lies above the axis.
    """
    values = [value for part in shown for value in part]
    if not values:
        return False
    low, high = min(values), max(values)
    if highest - low <= WORTH_SHOWING * (high - low):
        high = max(high, highest)
    margin = 0.06 * (high - low) + 0.01
    axis.set_ylim(low - margin, high + margin)
    return highest > high + margin


# ------------------------------------------------------------------------------------------------------------
# Pictures


def new_figure(**options: Any) -> "Figure":
    """An empty figure that needs no display. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed", "pip install matplotlib") from error
    return Figure(dpi=DPI, **options)


def save_picture(figure: "Figure", path: Path) -> Path:
    """Writes a PNG, which appears when it is complete, and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter in a name that the font lacks
        FigureCanvasAgg(figure).print_png(file, pil_kwargs=FAST)
    return path


def drawable(name: object, longest: int) -> str:
    """A name for a picture: of a long one the end, which is where names differ."""
    text = " ".join(str(name).split())
    text = text if len(text) <= longest else "..." + text[3 - longest :]
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")  # no font has surrogates; no formulas


def drawable_file(path: object, longest: int) -> str:
    """The last part of a path for a picture."""
    return drawable(Path(str(path)).name or path, longest)


def draw_reference(axis: "Axes", label: str, value: float, *, side: str, va: str) -> None:
    """Draws a dashed line, with its label at the "left" or "right" end; `va` "top" is below the line."""
    axis.axhline(value, color="gray", linestyle="--", linewidth=1)
    place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha=side, va=va)
    offset = (4 if side == "left" else -4, -2 if va == "top" else 1)
    axis.annotate(label, (float(side == "right"), value), offset, color="gray", fontsize=SMALL, **place)


def draw_hellaswag_references(axis: "Axes") -> None:
    """Draws dashed lines at the accuracies of GPT-2 and GPT-3."""
    for name, accuracy in HELLASWAG_REFERENCES.items():
        draw_reference(axis, f"{name} {accuracy:.4f}", accuracy, side="left", va="top")
    axis.set_ylabel(HELLASWAG)


def lay_out(
    figure: "Figure", title: str, legend: Sequence[tuple["Line2D", str]], *, columns: int, body: float
) -> None:
    """Places title, legend and panels one below another, and sets the size; `body` is the panels' height.

    All places follow from the number of lines of text: to measure texts, as matplotlib's own layouts do,
    takes as long as to draw the picture.
    """
    title_height = TITLE_HEIGHT * (title.count("\n") + 1) if title else 0.0
    height = PADDING + title_height + LINE_HEIGHT * math.ceil(len(legend) / columns) + PADDING + body + FOOT
    figure.set_size_inches(WIDTH, height)
    figure.suptitle(title, x=LEFT / WIDTH, y=1 - PADDING / height, ha="left", va="top", fontsize=LARGE)
    place = dict(loc="upper left", bbox_to_anchor=(LEFT / WIDTH, 1 - (PADDING + title_height) / height))
    style = dict(ncols=columns, fontsize=SMALL, frameon=False, borderaxespad=0, borderpad=0)
    lines, labels = [line for line, _ in legend], [f" {label}" for _, label in legend]
    figure.legend(lines, labels, **place, **style)  # " ": a label that starts with "_" would be left out
    figure.subplots_adjust(LEFT / WIDTH, FOOT / height, 1 - RIGHT / WIDTH, (FOOT + body) / height)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=SMALL)
        axis.locator_params(axis="x", nbins=6, integer=axis.get_xlabel() == "step")
        axis.xaxis.set_major_formatter("{x:,.10g}")
        for part in (axis.xaxis, axis.yaxis):
            part.label.set_size(SMALL)
