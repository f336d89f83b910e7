"""The files and the console of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from utils.training import run_log
from utils.training.run_log import RunLog, Speed, Speedometer


def test_every_result_is_a_line_of_the_log_and_a_record(tmp_path, capsys):
    """log.txt has step, kind and value and no times; metrics.jsonl and the console have the rest."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {"seed": 1}}, tensorboard=False, wandb=False)
        log.log_validation(0, 10.98765, bytes_per_token=4.0, tokens=0, seconds=0.0)
        rates = {"lr": 6e-4, "muon_lr": 0.02}
        log.log_update(0, 10.9, 1.25, rates, Speed(0.5, 2000.0, 0.4, 130.0), num_skipped=3, memory=7)
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
    assert "step     0 | loss 10.9000 | lr 6.0e-04 | norm 1.25 | 500 ms | 2,000 tok/s | mfu 40.0% | " in out
    assert "| skipped 3 | eta 2m10s\n" in out
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
        log.log_update(0, 1.0, 1.0, {"lr": 1.0}, Speed(1.0, 1.0, None, 1.0), 0, 0)
        log.log_hellaswag(0, 1, 4)
        log.log_samples(0, ["x"])
        log.draw_curves()
        log.write_report()
        log.say_what_was_written(None, "x")
        log.sync()
    assert capsys.readouterr().out == "" and not (tmp_path / "log").exists()


def test_speed_is_tokens_over_seconds():
    """Tokens a second, share of the peak, and the time left at the mean speed so far."""
    speedometer = Speedometer(tokens_per_step=1000, max_steps=10, flops_per_step=2e9, peak_flops=1e10)
    assert speedometer.measure(0, 0.5) == (0.5, 2000.0, 0.4, 4.5)
    assert speedometer.measure(1, 1.5).eta == 8.0  # the mean of both
    assert Speedometer(1000, 10, 2e9, None).measure(0, 0.5).mfu is None


def test_the_eta_forgets_slow_first_steps():
    """It is a moving average, so after a while the speed of the start does not count."""
    speedometer = Speedometer(tokens_per_step=1, max_steps=200, flops_per_step=1, peak_flops=None)
    for step in range(150):
        speed = speedometer.measure(step, 9.0 if step < 5 else 1.0)
    assert speed.eta == pytest.approx(50.0, rel=0.02)
