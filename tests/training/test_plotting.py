"""Several runs in one picture: what is drawn of each, and how they differ."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import train_gpt
from tests.logged_runs import fake_run, labels_of
from utils.command_line import UserError
from utils.training import plotting
from utils.training.flags import settings_of
from utils.training.plotting import comparison_figure, plot_comparison, settings_that_differ
from utils.training.report import write_report

VAL, TRAIN = "val loss (nats per token)", "train loss, smoothed (nats per token)"


def panels_of(figure: Figure) -> dict[tuple[str, str], Axes]:
    """The panels by the labels of their axes."""
    return {(axis.get_xlabel(), axis.get_ylabel()): axis for axis in figure.axes}


def log_only(log_dir: Path, text: str) -> Path:
    """A folder with nothing but a log.txt."""
    log_dir.mkdir()
    (log_dir / "log.txt").write_text(text)
    return log_dir


def test_runs_are_compared_by_steps_tokens_time_and_hellaswag(tmp_path, capsys, monkeypatch):
    """Every panel has one line per run at the right values, and dashed lines for GPT-2 and GPT-3."""
    monkeypatch.chdir(tmp_path)
    fast, slow = fake_run(Path("a")), fake_run(Path("a_directory_with_a_very_long_name/log"), slower=3)
    out = tmp_path / "compare.png"
    assert plotting.main([str(fast), str(slow), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.strip() == str(out)
    figure = comparison_figure([fast, slow, fast])
    panels = panels_of(figure)
    x = {labels: [list(line.get_xdata()) for line in axis.lines] for labels, axis in panels.items()}
    assert x.pop(("step", VAL)) == [[0, 10, 20, 30, 40]] * 2
    assert x.pop(("step", TRAIN)) == [list(range(39))] * 2
    assert x.pop(("training tokens", VAL)) == [[0, 10000, 20000, 30000, 40000]] * 2
    assert [line[-1] for line in x.pop(("seconds of updates", VAL))] == [20.0, 60.0]
    ((labels, hellaswag),) = x.items()
    assert labels[1].startswith("HellaSwag") and hellaswag[:2] == [[0, 10, 20, 30, 40]] * 2
    assert [line.get_ydata()[0] for line in panels[labels].lines[2:]] == [0.2955, 0.337]
    assert labels_of(figure) == ["a, val 3.1182", "...y_with_a_very_long_name/log, val 3.1182"]
    assert all(axis.get_legend() is None for axis in figure.axes)  # one for all, outside of the data


def test_runs_with_other_tokens_are_compared_in_bits_per_byte(tmp_path):
    """Val and train losses; nats per token are drawn with equal tokens, or where a log does not say."""
    for name, bytes_per_token in (("a", 3.0), ("b", 3.0), ("c", 1.5), ("d", None)):
        log_only(tmp_path / name, "0 val 9.0001\n0 train 9.0\n1 train 6.0\n5 val 3.0001\n")
        records = [dict(kind="val", step=step, loss=loss) for step, loss in ((0, 9.00006), (5, 3.00006))]
        for record in records:
            if bytes_per_token:
                record["bits_per_byte"] = record["loss"] / bytes_per_token
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    for others, unit, last, train in (
        ("b", "nats per token", 3.0, [9.0, 6.0]),
        ("c", "bits per byte", 2.0, [6.0, 4.0]),
        ("cd", "nats", 3.0, [9.0, 6.0]),
    ):
        val, smoothed = comparison_figure([tmp_path / name for name in ("a", *others)]).axes[:2]
        assert unit in val.get_ylabel() and unit in smoothed.get_ylabel()
        assert val.lines[1].get_ydata()[-1] == pytest.approx(last, abs=1e-3)
        assert list(smoothed.lines[1].get_ydata()) == pytest.approx(train, abs=1e-3)


def test_a_comparison_needs_the_logs_only(tmp_path):
    """A log.txt alone gives the curves against steps, beside a run with metrics; its settings are unknown."""
    alone = fake_run(tmp_path / "a", hellaswag=False)
    (alone / "metrics.jsonl").unlink()
    figure = comparison_figure([alone])
    assert panels_of(figure).keys() == {("step", VAL), ("step", TRAIN)}
    assert figure.get_suptitle() == "40 steps" and labels_of(figure)[0].endswith("/a, val 3.1182")
    both = comparison_figure([alone, fake_run(tmp_path / "b")])
    assert [[len(line.get_xdata()) for line in axis.lines[:2]] for axis in both.axes] == [
        *([5, 5], [39, 39], [0, 5], [0, 5], [0, 5])
    ]
    assert both.get_suptitle() == "2 runs"


def test_eight_runs_are_told_apart(tmp_path):
    """Also those whose shortened names and losses are equal; the title of a single one is that of its run."""
    runs = [fake_run(tmp_path / str(number) / ("x" * 40)) for number in range(8)]
    figure = comparison_figure(runs)
    assert len(labels_of(figure)) == 8
    assert len({line.get_color() for line in figure.axes[0].lines}) == 8
    assert comparison_figure(runs[:1]).get_suptitle().startswith("preset tiny, 12,345 parameters\n")


def test_the_best_val_loss_is_named_if_it_is_not_the_last(tmp_path):
    """With its step."""
    log_only(tmp_path / "a", "0 val 4.0\n5 val 2.5\n10 val 3.0\n")
    assert labels_of(comparison_figure([tmp_path / "a"]))[0].endswith("val 3.0000, best 2.5000 at step 5")


def test_loss_axes_end_above_the_values_after_the_first_drop(tmp_path):
    """In all panels of losses."""
    steps = range(1000)
    kinds = {step: ("train", "val") if step % 50 == 0 else ("train",) for step in steps}
    text = "".join(f"{step} {kind} {10 if step < 20 else 5}\n" for step in steps for kind in kinds[step])
    for axis in comparison_figure([log_only(tmp_path / "a", text)]).axes:
        assert axis.get_ylim()[1] < 6 and max(axis.lines[0].get_ydata()) == 10


# ------------------------------------------------------------------------------------------------------------
# Settings


def settings(**changes: Any) -> dict[str, Any]:
    """The recorded settings of a run of the preset tiny."""
    return {**settings_of(train_gpt.read_arguments(["--preset", "tiny"])[0]), **changes}


def test_settings_that_differ_are_in_title_and_legend(tmp_path):
    """The most telling ones with their values, the rest as a number."""
    common = dict(seed=1, dropout=0.0, max_lr=8e-3, max_steps=40, recipe="faithful", grad_clip=1.0)
    runs = [fake_run(tmp_path / "a", **common)]
    figure = comparison_figure([*runs, fake_run(tmp_path / "b", **{**common, "max_lr": 2.7e-2})])
    assert figure.get_suptitle() == "2 runs, which differ in max_lr"
    assert labels_of(figure)[0].endswith("/a, val 3.1182, max_lr 0.008")
    changed = dict(seed=2, dropout=0.1, max_lr=2e-2, max_steps=12345, recipe="fast", grad_clip=0.5)
    figure = comparison_figure([*runs, fake_run(tmp_path / "c", **changed)])
    assert figure.get_suptitle() == "2 runs, which differ in recipe, max_steps, max_lr, dropout + 2 more"
    assert labels_of(figure)[1].endswith("recipe fast, max_steps 12,345, max_lr 0.02, dropout 0.1")


def test_the_settings_of_a_resumed_run_are_those_of_its_last_start(tmp_path):
    """They may have changed at the resume."""
    first, second = fake_run(tmp_path / "a", max_lr=1e-3), fake_run(tmp_path / "b", max_lr=1e-3)
    start = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])
    start["settings"]["max_lr"] = 5e-4
    with open(second / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**start, "step": 20}) + "\n")
    assert labels_of(comparison_figure([first, second]))[1].endswith("max_lr 0.0005")


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({}, []),
        ({"log_dir": "/x", "device": "cuda", "val_every": 7, "resume": "newest", "wandb": True}, []),
        ({"micro_batch": 3, "sample_prompt": "x", "cost_per_hour": 2.0, "compile": "on"}, []),
        ({"data": "/other/place/input.txt"}, []),
        ({"data": "book.txt"}, ["data"]),
        ({"dtype": "bfloat16", "max_lr": 1e-3, "recipe": "fast"}, ["recipe", "max_lr", "dtype"]),
        ({"a_later_setting": 1}, []),
    ],
)
def test_only_settings_that_may_change_a_curve_are_compared(changes, differing):
    """In order of what they tell; not where one of the runs does not know the setting."""
    usual = settings(data="/data/input.txt")
    assert settings_that_differ([usual, {}, {**usual, **changes}, usual]) == differing
    assert settings_that_differ([usual]) == settings_that_differ([]) == []


def test_settings_of_presets_and_recipes_are_all_declared():
    """A name that no flag has would never be compared."""
    assert set(plotting.TELLING) | set(plotting.NOT_TELLING) <= settings().keys()


# ------------------------------------------------------------------------------------------------------------
# Files and names


@pytest.mark.parametrize("files", [{}, {"log.txt": ""}, {"log.txt": "3 other 1.0\n"}])
def test_a_folder_without_a_run_is_an_error(tmp_path, files):
    """An empty folder, or a log with nothing to draw: neither a picture nor a report is written."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="holds no log.txt of a run"):
        plot_comparison([tmp_path], tmp_path / "x.png")
    with pytest.raises(UserError, match="holds no run to report on"):
        write_report(tmp_path)
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "report.md").exists()


def test_a_comparison_that_cannot_be_written_is_a_user_error(tmp_path):
    """In a folder that does not exist: exit code 2, not a traceback."""
    with pytest.raises(UserError, match="cannot write"):
        plot_comparison([fake_run(tmp_path / "a")], tmp_path / "nowhere" / "x.png")


@pytest.mark.parametrize("last", ["0.0", "-1.0"])
def test_odd_values_are_drawn(last, tmp_path):
    """A loss of zero, bits per byte that are no number or zero, a log with train losses or HellaSwag only."""
    runs = [log_only(tmp_path / "train", "0 train 3.0\n"), log_only(tmp_path / "hella", "0 hella 0.25\n")]
    runs.append(log_only(tmp_path / "zero", f"0 val {last}\n0 train 0.0\n"))
    record = dict(kind="val", step=0, loss=0.0, tokens=0, seconds=0.0, bits_per_byte="x")
    (runs[-1] / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    runs.append(log_only(tmp_path / "rounded", f"0 val 4.0\n2 val {last}\n2 train 1.0\n"))  # memorised
    records = [
        dict(record, loss=4.0, bits_per_byte=2.0),
        dict(record, step=2, loss=3e-5, bits_per_byte=1.5e-5),
    ]
    (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for chosen in (runs, *([run] for run in runs)):
        assert plot_comparison(chosen, tmp_path / "x.png").exists()
    assert all(math.isfinite(limit) for axis in comparison_figure(runs).axes for limit in axis.get_ylim())


def test_names_that_no_font_has_and_formulas_are_drawn(tmp_path, capsys):
    """A directory whose name is not UTF-8, and one that matplotlib would read as a formula."""
    for name in (os.fsdecode(b"caf\xe9"), "$x^$", "a$b", "_hidden"):
        assert plotting.main([str(fake_run(tmp_path / name)), "--out", str(tmp_path / "x.png")]) == 0
        text = write_report(tmp_path / name).read_text(encoding="utf-8")
        assert name.encode("utf-8", "backslashreplace").decode() in text


@pytest.mark.parametrize("target", ["elsewhere.png", "fifo"])
def test_a_picture_replaces_no_link(target, tmp_path):
    """--out may be a link: its target is written, be it a file or a pipe, and the link stays."""
    log_dir, out = fake_run(tmp_path / "a"), tmp_path / "x.png"
    out.symlink_to(target)
    reader, written = None, tmp_path / target
    if target == "fifo":
        os.mkfifo(tmp_path / target)
        written = tmp_path / "read.png"  # a second pipe could fill up before anyone reads it
        reader = subprocess.Popen(["dd", "status=none", f"if={tmp_path / target}", f"of={written}"])
    assert plotting.main([str(log_dir), "--out", str(out)]) == 0
    assert reader is None or reader.wait(timeout=300) == 0
    assert written.read_bytes().startswith(b"\x89PNG") and out.is_symlink()
