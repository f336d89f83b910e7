"""The picture of one run: what is drawn, when, and from which logs."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

import train_gpt
from tests.logged_runs import fake_run, labels_of
from tests.small_runs import stop_by_signal_in, train
from utils.command_line import Diverged
from utils.training.curves import plot_run, run_figure
from utils.training.log_reader import read_log, read_metrics
from utils.training.report import write_report
from utils.training.state import TrainState


def line_of(axis: Axes, label: str) -> tuple[list[float], list[float]]:
    """The points of the line whose label starts so."""
    (line,) = [line for line in axis.lines if line.get_label().startswith(label)]
    return list(line.get_xdata()), list(line.get_ydata())


def texts_of(axis: Axes) -> list[str]:
    """The texts inside a panel."""
    return [text.get_text() for text in axis.texts]


def add_records(log_dir: Path, *records: dict[str, Any]) -> None:
    """Appends records to metrics.jsonl."""
    with open(log_dir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_picture_needs_the_log_only(tmp_path):
    """An incomplete last line is left out; what is not in the logs has no panel."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "train", "step": s, "lr": 0.1}) + "\n" for s in (0, 1)) + '{"kind": "tra'
    )
    (tmp_path / "log.txt").write_text("0 val 10.8\n0 train 10.8\n1 train 9.0\n2 val 8.5\n3 trai")
    assert read_log(tmp_path / "log.txt") == {"val": ([0, 2], [10.8, 8.5]), "train": ([0, 1], [10.8, 9.0])}
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert [axis.get_ylabel() for axis in run_figure(tmp_path).axes] == [
        "loss (nats per token)",
        "learning rate",
    ]
    with open(tmp_path / "log.txt", "w") as file:
        file.write("0 val 10.8\n0 hella 0.25\n0 train 10.8\n1 hella 0.26\n")
    assert len(run_figure(tmp_path).axes) == 3
    (tmp_path / "metrics.jsonl").unlink()
    assert len(run_figure(tmp_path).axes) == 2 and plot_run(tmp_path).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.txt"]
    (tmp_path / "log.txt").write_text("")
    assert run_figure(tmp_path) is None and plot_run(tmp_path) is None


def test_the_picture_of_a_run_shows_all_that_is_logged(tmp_path):
    """Raw and smoothed train losses, val losses with the best one, norms, rates, published accuracies."""
    figure = run_figure(fake_run(tmp_path / "a"))
    loss, norm, rates, hellaswag = figure.axes
    assert line_of(loss, "train, mean of 3 updates")[0] == list(range(39))
    assert line_of(loss, "val (last 3.1182)")[0] == [0, 10, 20, 30, 40]
    assert line_of(loss, "best val 3.1182 at step 40") == ([40], [3.1182])
    assert list(norm.lines[0].get_ydata()) == [1.0] * 40 and "highest 1)" in norm.get_ylabel()
    assert list(rates.lines[0].get_ydata()) == [1e-3] * 40
    assert [line.get_ydata()[-1] for line in hellaswag.lines] == [0.29, 0.2955, 0.337]
    assert texts_of(hellaswag) == ["GPT-2 124M 0.2955", "GPT-3 124M 0.3370"]
    assert not any("learning rate" in label for label in labels_of(figure))  # a single one needs no name
    assert all(axis.get_legend() is None for axis in figure.axes)  # it is outside of the data


def test_the_best_val_loss_is_marked_where_it_is(tmp_path):
    """Also if the loss rises again, and at the first of equal ones."""
    (tmp_path / "log.txt").write_text("0 val 4.0\n5 val 2.5\n10 val 2.5\n15 val 3.0\n")
    assert line_of(run_figure(tmp_path).axes[0], "best val 2.5000 at step 5") == ([5], [2.5])


def test_the_title_names_model_data_and_length(tmp_path):
    """As far as they are recorded, the sizes of the model before the settings; of a path the last part."""
    log_dir = fake_run(
        tmp_path / "a", data="/x/my $/input.txt", tokenizer="gpt2", recipe="fast", max_steps=90
    )
    assert run_figure(log_dir).get_suptitle() == (
        "preset tiny, recipe fast, 12,345 parameters\n"
        "input.txt, tokenizer gpt2, 40,000 tokens, 40 of 90 steps"
    )
    sizes = {"n_layer": 3, "n_embd": 48, "vocab_size": 65}
    start = read_metrics(log_dir / "metrics.jsonl")[0]
    settings = {"n_layer": 12, "n_embd": 768, "total_batch_tokens": 1000}
    add_records(log_dir, {**start, "step": 40, "model": sizes, "settings": settings})
    assert run_figure(log_dir).get_suptitle().splitlines()[0] == "3 layers × 48 channels, 12,345 parameters"
    assert run_figure(log_dir).get_suptitle().splitlines()[1] == "input.txt, 40,000 tokens, 40 steps"
    (log_dir / "metrics.jsonl").unlink()
    assert run_figure(log_dir).get_suptitle() == "40 steps"


@pytest.mark.parametrize("broken", ["settings", "model"])
def test_a_title_survives_settings_of_other_kinds(broken, tmp_path):
    """As of a later version, or of another program."""
    odd = {"n_layer": "2", "n_embd": None, "max_steps": [1], "tokenizer": {"a": 1}, "vocab_size": -3}
    log_dir = fake_run(tmp_path / "a")
    start = read_metrics(log_dir / "metrics.jsonl")[0]
    add_records(log_dir, {**start, "step": 1, broken: {**odd, "data": 5, "grad_clip": "x", "preset": 7}})
    assert run_figure(log_dir).get_suptitle().endswith("40 steps")


def test_every_learning_rate_is_drawn_and_named(tmp_path):
    """That of Muon beside AdamW's."""
    (tmp_path / "log.txt").write_text("0 train 10.8\n1 train 9.0\n")
    add_records(tmp_path, *({"kind": "train", "step": s, "lr": 0.1, "muon_lr": 0.02} for s in (0, 1)))
    figure = run_figure(tmp_path)
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[0.1, 0.1], [0.02, 0.02]]
    assert labels_of(figure)[-2:] == ["learning rate of AdamW", "learning rate of Muon"]


def test_norms_show_where_they_are_clipped(tmp_path):
    """A norm that JSON has none for, of fp16, is left out; a single high one does not squeeze the others."""
    log_dir = fake_run(tmp_path / "a", grad_clip=0.9)
    add_records(log_dir, {"kind": "train", "step": 40, "lr": 0.1, "norm": None})
    for step in range(41, 1000):
        add_records(log_dir, {"kind": "train", "step": step, "lr": 0.1, "norm": 70.0 if step == 500 else 1.2})
    norm = run_figure(log_dir).axes[1]
    assert texts_of(norm) == ["clipped to 0.9"] and norm.get_ylim()[1] < 2
    assert len(norm.lines[0].get_xdata()) == 999 and "highest 70" in norm.get_ylabel()


def test_resumes_are_marked(tmp_path):
    """A dotted line in every panel for each step at which the run was resumed, one entry in the legend."""
    log_dir = fake_run(tmp_path / "a")
    unmarked = [len(axis.lines) for axis in run_figure(log_dir).axes]
    start = read_metrics(log_dir / "metrics.jsonl")[0]
    add_records(log_dir, *({**start, "step": step} for step in (20, 10, 20)))
    figure = run_figure(log_dir)
    assert [len(axis.lines) for axis in figure.axes] == [unmarked[0] + 3, *(n + 2 for n in unmarked[1:])]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines[-2:]] == [10, 20]
    assert "resumed at step 10, 20" in labels_of(figure)
    add_records(log_dir, *({**start, "step": step} for step in (30, 35)))
    assert "resumed at step 10, 20, 30, ..." in labels_of(run_figure(log_dir))


def write_losses(log_dir: Path, first: float, later: float, *, vocab_size: int) -> None:
    """A run of 200 updates whose loss falls from `first` in ten updates, and has two spikes later."""
    log_dir.mkdir()
    losses = [later + (first - later) * max(0, 10 - step) / 10 + 0.03 * (step % 2) for step in range(200)]
    losses[100] = losses[150] = max(later, first)
    (log_dir / "log.txt").write_text("".join(f"{step} train {loss}\n" for step, loss in enumerate(losses)))
    add_records(
        log_dir,
        dict(kind="run", settings={}, parameters=1, model={"vocab_size": vocab_size}),
    )


def test_the_loss_axis_shows_what_follows_the_first_drop(tmp_path):
    """What is cut off is said; the line of a uniform guess is drawn where it is within the axis."""
    write_losses(tmp_path / "a", 10.8, 5.0, vocab_size=50304)
    figure = run_figure(tmp_path / "a")
    assert figure.axes[0].get_ylim()[1] < 5.2 and texts_of(figure.axes[0]) == []
    assert "above the axis: losses up to 10.80" in labels_of(figure)
    write_losses(tmp_path / "b", 4.17, 4.17, vocab_size=65)
    figure = run_figure(tmp_path / "b")
    assert texts_of(figure.axes[0]) == ["uniform guess: ln 65 = 4.17"]
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(math.log(65))
    assert not any("above the axis" in label for label in labels_of(figure))


@pytest.mark.parametrize("num_updates", [1, 2, 12])
def test_a_short_run_is_shown_whole(num_updates, tmp_path):
    """Its first values are most of it, and there is nothing to smooth."""
    (tmp_path / "log.txt").write_text("".join(f"{s} train {9.0 - s / 2}\n" for s in range(num_updates)))
    add_records(tmp_path, *(dict(kind="train", step=s, lr=1.0, norm=9.0 - s) for s in range(num_updates)))
    figure = run_figure(tmp_path)
    loss, norm, _ = figure.axes
    assert labels_of(figure) == ["train"] and line_of(loss, "train")[0] == list(range(num_updates))
    assert loss.get_ylim()[0] < 9.0 - (num_updates - 1) / 2 and loss.get_ylim()[1] > 9.0 < norm.get_ylim()[1]


def test_a_long_run_is_drawn_in_about_a_second(tmp_path):
    """Neither a line of 100,000 points is drawn nor as many records are parsed; val losses are complete."""
    steps = range(100_000)
    (tmp_path / "log.txt").write_text(
        "".join(f"{s} train {3 + (s * 7919 % 100) / 100}\n" for s in steps) + "100000 val 3.2\n"
    )
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"kind": "train", "step": {s}, "lr": 0.1, "norm": 0.5}}\n' for s in steps)
        file.write('{"kind": "val", "step": 100000, "loss": 3.2}\n')
    started = time.process_time()
    plot_run(tmp_path)
    assert time.process_time() - started < 5  # about 0.5 on an idle core
    records = read_metrics(tmp_path / "metrics.jsonl", most_updates=20_000)
    assert 10_000 < len(records) <= 20_001 and records[-1]["kind"] == "val"


# ------------------------------------------------------------------------------------------------------------
# When it is drawn


def test_a_stopped_run_has_its_picture(short_text, tmp_path, monkeypatch):
    """Although no validation was due; the picture of a finished run is no more than that either."""
    stop_by_signal_in(monkeypatch, "update", signal.SIGTERM, 6)
    assert train(short_text, tmp_path, "--val-every", "0") == 143
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    title = run_figure(tmp_path).get_suptitle()
    assert "2 layers × 16 channels" in title and "5 of 20 steps" in title


def test_a_stop_within_the_first_update_leaves_no_picture(short_text, tmp_path, monkeypatch):
    """There is nothing to see."""
    stop_by_signal_in(monkeypatch, "update", signal.SIGTERM, 1)
    assert train(short_text, tmp_path) == 143
    assert not (tmp_path / "curves.png").exists()


def test_a_stop_does_not_need_matplotlib(short_text, tmp_path, monkeypatch, capsys):
    """Without it there is one warning more, and the same exit code and checkpoint."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stop_by_signal_in(monkeypatch, "update", signal.SIGINT, 6)
    assert train(short_text, tmp_path, "--val-every", "0") == 130
    console = capsys.readouterr()
    assert "run it again with --resume to continue" in console.out and (tmp_path / "model_00005.pt").exists()
    assert console.err.count("warning: no curves.png: matplotlib is not installed") == 1


def test_a_diverged_run_has_its_picture(short_text, tmp_path, monkeypatch):
    """Up to the last finite loss; the error is raised as without it."""
    real = train_gpt.update

    def poisoned(state: TrainState, *rest: Any) -> tuple[float, float]:
        if state.progress.step == 3:
            state.model.transformer.ln_f.bias.data[0] = float("nan")
        return real(state, *rest)

    monkeypatch.setattr(train_gpt, "update", poisoned)
    with pytest.raises(Diverged, match="non-finite loss at step 3"):
        train(short_text, tmp_path, "--val-every", "0")
    assert (tmp_path / "curves.png").exists() and "3 of 20 steps" in run_figure(tmp_path).get_suptitle()


# ------------------------------------------------------------------------------------------------------------
# Published val losses


def test_report_and_picture_show_the_published_val_losses_of_the_recipe(tmp_path):
    """The report beside the last val loss if one was published for its step; the picture up to the end."""
    recipe = vars(train_gpt.read_arguments(["--preset", "gpt2"])[0])
    recipe = {name: value for name, value in recipe.items() if not isinstance(value, Path)}
    log_dir = fake_run(tmp_path / "a", **recipe)
    assert not any("published" in label for label in labels_of(run_figure(log_dir)))
    assert "published for this recipe" not in write_report(log_dir).read_text(encoding="utf-8")
    for step, loss in ((250, 6.2), (1000, 4.2)):
        with open(log_dir / "log.txt", "a") as file:
            file.write(f"{step} val {loss}\n")
    assert line_of(run_figure(log_dir).axes[0], "val published") == ([250, 1000], [6.163, 4.153])
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "after step 1,000 (published for this recipe on FineWeb-Edu: 4.153) |" in text


def test_report_and_picture_of_another_recipe_show_no_published_val_losses(tmp_path):
    """At the same step."""
    log_dir = fake_run(tmp_path / "a")
    with open(log_dir / "log.txt", "a") as file:
        file.write("1000 val 4.2\n")
    assert not any("published" in label for label in labels_of(run_figure(log_dir)))
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "after step 1,000 |" in text and "FineWeb-Edu" not in text
