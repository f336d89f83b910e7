"""What the pictures share: smoothing, thinning, limits of axes, names."""

from __future__ import annotations

import math
import os
import warnings

import pytest

from utils.training.drawing import (
    MOST_POINTS,
    after_steep_part,
    decimated,
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


@pytest.mark.parametrize("num_updates", [1, 2, 30, 1000, 19073])
def test_smoothing_leaves_constants_and_straight_lines_unchanged(num_updates):
    """From the first value on, at its own step: the mean lags neither at the start nor in the middle."""
    steps = list(range(num_updates))
    window = smoothing_window(num_updates)
    for values in ([3.0] * num_updates, [10.0 - 0.5 * step for step in steps]):
        xs, ys = smoothed(steps, values, window)
        assert list(xs) == steps[: num_updates - window // 2]
        assert list(ys) == pytest.approx([values[step] for step in xs])


def test_smoothing_is_symmetric():
    """A sudden step becomes a ramp around it, the same when it is read backwards."""
    values = [0.0] * 50 + [1.0] * 50
    xs, ys = smoothed(range(100), values, 11)
    inner = dict(zip(xs, ys))
    assert [step for step in xs if 0 < inner[step] < 1] == list(range(45, 55))
    assert all(inner[50 + k] == pytest.approx(1 - inner[49 - k]) for k in range(40))


def test_smoothing_averages_the_noise_and_widens_from_the_start():
    """The first value is kept; then the window grows to its full width, which is odd."""
    assert list(smoothed([0, 1, 2, 3, 4], [9.0, 3.0, 0.0, 3.0, 0.0], 3)[1]) == [9.0, 4.0, 2.0, 1.0]
    assert [smoothing_window(n) for n in (0, 1, 20, 1000)] == [1, 1, 1, 41]
    ys = smoothed(range(1000), [(-1.0) ** step for step in range(1000)], 41)[1]
    assert max(map(abs, ys[20:])) < 0.03


@pytest.mark.parametrize("num_points", [0, 1, MOST_POINTS, MOST_POINTS + 1, 19073, 100_000])
def test_a_long_line_is_thinned_without_losing_its_extremes(num_points):
    """Points in order, at most so many, with the highest and the lowest; a short line is complete."""
    ys = [math.sin(0.01 * i) for i in range(num_points)]
    for place, value in ((num_points // 3, 5.0), (num_points // 2, -5.0)):
        ys[place : place + 1] = [value] if num_points else []
    xs, thin = decimated(range(num_points), ys)
    assert len(xs) == len(thin) <= MOST_POINTS and list(xs) == sorted(set(xs))
    assert all(ys[x] == y for x, y in zip(xs, thin))
    if num_points <= MOST_POINTS:
        assert list(thin) == ys
    else:
        assert min(thin) == -5.0 and max(thin) == 5.0 and len(thin) > MOST_POINTS / 3


def test_an_axis_ends_above_what_follows_the_steep_start():
    """And above single outliers; whether something is cut off is returned."""
    losses = [10.0 - step for step in range(6)] + [3.0 + 0.001 * step for step in range(94)]
    axis = new_figure().subplots()
    assert set_limits(axis, [after_steep_part(losses)], max(losses))
    assert 2.9 < axis.get_ylim()[0] < 3.0 and 3.09 < axis.get_ylim()[1] < 3.2
    losses += [3.1] * 500 + [9.0]
    assert set_limits(axis, [typical(after_steep_part(losses))], max(losses)) and axis.get_ylim()[1] < 3.2


def test_an_axis_shows_everything_where_that_costs_little():
    """No value is cut off to make an axis a little shorter; one value or none is no error."""
    axis = new_figure().subplots()
    assert not set_limits(axis, [[3.0, 4.0]], 4.2)
    assert axis.get_ylim()[1] > 4.2
    assert not set_limits(axis, [[], [3.0]], 3.0)
    before = axis.get_ylim()
    assert not set_limits(axis, [[], typical([])], 9.0) and axis.get_ylim() == before


def test_names_are_short_and_drawable():
    """The end of a long name; neither a formula nor what no font has; the last part of a path."""
    assert drawable("a" * 50 + "end", 10) == "..." + "a" * 4 + "end"
    assert drawable("$x^$", 9) == r"\$x^\$"
    assert drawable(os.fsdecode(b"caf\xe9 \n au"), 20) == "caf? au"
    assert drawable_file("/data/my texts/a.txt", 20) == "a.txt"
    assert drawable_file(".", 20) == "."


def test_letters_that_the_font_lacks_are_no_warning(tmp_path):
    """They are drawn as boxes."""
    figure = new_figure()
    figure.subplots().plot([0, 1])
    lay_out(figure, "\u6570\u636e.txt", [(figure.axes[0].lines[0], "_\u6570")], columns=1, body=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_picture(figure, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.legends[0].get_texts()) == 1  # matplotlib leaves out labels that start with "_"
