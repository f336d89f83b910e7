"""The files and the console of a run."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest

from tests.conftest import run_in_terminal
from tests.small_runs import assert_same_run, small_args, train
from utils.training import run_log
from utils.training.run_log import RunLog, Speed, Speedometer, interval_of_lines


def test_every_result_is_a_line_of_the_log_and_a_record(tmp_path, capsys):
    """log.txt has step, kind and value and no times; metrics.jsonl and the console have the rest."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {"seed": 1}}, tensorboard=False, wandb=False)
        log.log_validation(0, 10.98765, bytes_per_token=4.0, tokens=0, seconds=0.0)
        rates = {"lr": 6e-4, "muon_lr": 0.02}
        log.log_update(0, 10.9, 1.25, rates, Speed(0.5, 0.4, 2000.0, 0.3, 130.0), num_skipped=3, memory=7)
        log.log_hellaswag(1, 1, 4)
        log.log_samples(1, ["one\ntwo", "three"])
    assert (tmp_path / "log.txt").read_text() == "0 val 10.9877\n0 train 10.900000\n1 hella 0.2500\n"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"kind": "run", "step": 0, "settings": {"seed": 1}},
        dict(
            kind="val",
            step=0,
            loss=10.98765,
            bits_per_byte=10.98765 / math.log(2) / 4,
            tokens=0,
            seconds=0.0,
        ),
        dict(
            **dict(kind="train", step=0, loss=10.9, lr=6e-4, muon_lr=0.02, norm=1.25, skipped=3),
            **dict(seconds=0.5, mfu=0.4, memory=7),
        ),
        {"kind": "hella", "step": 1, "accuracy": 0.25, "correct": 1, "examples": 4},
    ]
    assert (tmp_path / "samples.txt").read_text() == (
        "--- step 1, sample 0\none\ntwo\n--- step 1, sample 1\nthree\n"
    )
    out = capsys.readouterr().out
    assert "step     0 | val loss 10.9877 | perplexity 59,1" in out and " | 3.9630 bits per byte\n" in out
    assert "step     0 | loss 10.9000 | norm 1.25 | 2,000 tok/s | skipped 3 | eta 2m10s\n" in out
    assert "step     1 | hellaswag 0.2500 (1 of 4 examples)\n" in out and "sample 1: three\n" in out


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    """A full disk ends the log, not the run."""
    with RunLog(tmp_path, is_master=True) as log:
        log.files["log.txt"].close()
        log.files["log.txt"] = open("/dev/full", "w", buffering=1)
        for step in range(3):
            log.log_validation(step, 1.0, 0.0, 0, 0.0)
    warning = f"warning: cannot write the logs in {tmp_path}: No space left on device; continuing"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path, capsys, monkeypatch):
    """With its reason, once in a run, and separately from that of the report."""

    def fail(log_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log, "plot_run", fail)
    monkeypatch.setattr(run_log, "write_report", fail)
    with RunLog(tmp_path, is_master=True) as log:
        for _ in range(3):
            log.draw_curves()
        log.write_report()
    err = capsys.readouterr().err
    assert err.count("warning: no curves.png: No space left on device; continuing without it\n") == 1
    assert err.count("warning: no report.md: No space left on device; continuing without it\n") == 1


def test_other_ranks_write_nothing(tmp_path, capsys):
    """Only rank 0 has files and a console."""
    with RunLog(tmp_path / "log", is_master=False) as log:
        log.say("x")
        log.log_start({"step": 0, "settings": {}}, tensorboard=True, wandb=True)
        log.log_validation(0, 1.0, 0.0, 0, 0.0)
        log.log_update(0, 1.0, 1.0, {"lr": 1.0}, Speed(1.0, None, 1.0, None, 1.0), 0, 0)
        log.log_hellaswag(0, 1, 4)
        log.log_samples(0, ["x"])
        log.draw_curves()
        log.write_report()
        log.say_what_was_written(None, "x")
        log.sync()
    assert capsys.readouterr().out == "" and not (tmp_path / "log").exists()


def test_speed_is_tokens_over_seconds():
    """Share of the peak of this update; tokens a second, share and time left at the mean speed so far."""
    speedometer = Speedometer(tokens_per_step=1000, max_steps=10, flops_per_step=2e9, peak_flops=1e10)
    assert speedometer.measure(0, 0.5) == (0.5, 0.4, 2000.0, 0.4, 4.5)
    second = speedometer.measure(1, 1.5)
    assert second == (1.5, pytest.approx(2 / 15), 1000.0, 0.2, 8.0)
    assert Speedometer(1000, 10, 2e9, None).measure(0, 0.5)[1::2] == (None, None)


def test_the_eta_includes_what_happens_between_updates():
    """Evaluations and checkpoints, with the share that they have had so far; not what precedes the first."""
    speedometer = Speedometer(tokens_per_step=1, max_steps=12, flops_per_step=1, peak_flops=None)
    time.sleep(0.05)
    assert speedometer.measure(0, 0.001).eta == pytest.approx(0.011)
    time.sleep(0.1)
    eta = speedometer.measure(1, 0.001).eta
    assert speedometer.between >= 0.099 and eta == pytest.approx(10 * (0.001 + speedometer.between / 2))


@pytest.mark.parametrize("loss", [0.5, 10.8217, 123456.7])
@pytest.mark.parametrize("norm", [0.25, 123.45, 1e9, math.inf])
@pytest.mark.parametrize("mfu", [None, 0.394])
@pytest.mark.parametrize("num_skipped", [0, 12])
def test_no_line_of_a_result_is_too_long(loss, norm, mfu, num_skipped, tmp_path, capsys):
    """At most 80 characters; step, loss and skipped updates stay, and all but the rate where it is usual."""
    speed = Speed(100.0, mfu, 1_234_567.0, mfu, 187_200.0)
    with RunLog(tmp_path, is_master=True) as log:
        log.log_update(19072, loss, norm, {"lr": 1.3e-4}, speed, num_skipped, memory=7)
        log.log_validation(19073, 10 * loss, bytes_per_token=4.123, tokens=1, seconds=1.0)
        log.log_hellaswag(19073, 10042, 10042)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"step 19072 | loss {loss:.4f}")
    assert (" | skipped 12" in lines[0]) == bool(num_skipped)
    if loss < 10 and norm < 10 and not num_skipped:
        shown = "norm 0.25 | 1,234,567 tok/s"
        shown = f"lr 1.3e-04 | {shown}" if mfu is None else f"{shown} | mfu 39.4%"
        assert lines[0].endswith(f" | {shown} | eta 2d04h")


@pytest.mark.parametrize(
    ("max_steps", "every"),
    [
        (1, 1),
        (199, 1),
        (200, 2),
        (499, 2),
        (1000, 10),
        (1200, 10),
        (2000, 20),
        (19073, 100),
        (10**15, 10**13),
    ],
)
def test_a_run_has_some_hundred_lines(max_steps, every):
    """100 to 250, or one for each update of a short run."""
    assert interval_of_lines(max_steps) == every
    assert max_steps < 100 or 100 <= max_steps // every <= 250


def shown_steps(log_dir: Path, capsys, steps: range, **flags: int | None) -> list[int]:
    """The steps of which the console has a line, of a run that starts at the first of `steps`."""
    with RunLog(log_dir, is_master=True, max_steps=steps.stop, start_step=steps.start, **flags) as log:
        for step in steps:
            log.log_update(step, 1.0, 1.0, {"lr": 1.0}, Speed(1.0, None, 1.0, None, 1.0), 0, 0)
    return [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("log_every", [None, 100, 7])
def test_the_console_has_lines_of_some_updates_and_the_files_of_all(log_every, tmp_path, capsys):
    """Every N steps, the first three after each start and the last; the same ones in a resumed run."""
    every = log_every or 5
    for start in (0, 301):
        expected = {start, start + 1, start + 2, *range(0, 600, every), 599}
        found = shown_steps(tmp_path / f"{start}", capsys, range(start, 600), log_every=log_every)
        assert found == sorted(step for step in expected if step >= start)
        assert len((tmp_path / f"{start}" / "log.txt").read_text().splitlines()) == 600 - start


@pytest.mark.parametrize(("log_every", "found"), [(None, range(10)), (5, [0, 1, 2, 5, 9])])
def test_slow_updates_all_have_a_line_unless_the_interval_was_given(
    log_every, found, tmp_path, capsys, monkeypatch
):
    """Nobody waits for hours for the next line of a run whose updates take minutes."""
    monkeypatch.setattr(run_log, "LONGEST_SILENCE", -1.0)
    assert shown_steps(tmp_path, capsys, range(990, 1000), log_every=log_every) == [990 + i for i in found]


def test_log_every_changes_nothing_but_the_console(short_text, undisturbed, tmp_path, capsys, no_pictures):
    """The same files as without it."""
    assert train(short_text, tmp_path, "--log-every", "6") == 0
    lines = re.findall(r"^step +(\d+) \| loss .* tok/s \| eta \d+s$", capsys.readouterr().out, re.MULTILINE)
    assert [*map(int, lines)] == [0, 1, 2, 6, 12, 18, 19]
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("columns", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_a_terminal_shows_no_line_that_is_too_long(columns, text_file, tmp_path):
    """Start lines are continued with an indent, results are shortened; the bar counts all updates."""
    flags = ("--max-steps", "12", "--sample-every", "0")
    args = small_args(text_file, tmp_path / "log", *flags)
    code, shown = run_in_terminal("train_gpt.py", *args, columns=columns)
    assert code == 0, shown
    lines = [re.sub(r"\x1b\[[A-Z]", "", line.split("\r")[-1]).rstrip() for line in shown.split("\n")]
    whole = [line for line in lines if line.startswith(("sample from it: ", "checkpoint: "))]
    assert len(whole) == 3 and str(tmp_path / "log" / "model_00012.pt") in whole[-1]
    assert max(len(line) for line in lines if line not in whole and str(tmp_path) not in line) <= columns
    assert max(len(line) for line in lines if line.startswith("step ")) <= min(columns, 80)
    assert sum(line.startswith("step ") and " | loss " in line for line in lines) == 12
    assert any(line.startswith("    ") for line in lines) == (columns == 60)
    assert "12/12" in shown


def test_the_eta_forgets_slow_first_steps():
    """It is a moving average, so after a while the speed of the start does not count."""
    speedometer = Speedometer(tokens_per_step=1, max_steps=200, flops_per_step=1, peak_flops=None)
    for step in range(150):
        speed = speedometer.measure(step, 9.0 if step < 5 else 1.0)
    assert speed.eta == pytest.approx(50.0, rel=0.02)
