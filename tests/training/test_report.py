"""The report about a finished run."""

from __future__ import annotations

import json

import pytest

import train_gpt
from tests.conftest import ROOT, run
from tests.logged_runs import fake_run
from utils.training.curves import plot_run
from utils.training.log_reader import read_log
from utils.training.plotting import plot_comparison
from utils.training.report import write_report


def test_the_report_has_results_and_costs(tmp_path):
    """Tokens, time, speed, memory, loss, perplexity, and HellaSwag with its standard error beside GPT-2's."""
    log_dir = fake_run(tmp_path / "a")
    plot_run(log_dir)
    text = write_report(log_dir).read_text(encoding="utf-8")
    for row in (
        *("parameters | 12,345", "steps | 40 |", "training tokens | 40,000", "time of updates | 20s"),
        *("speed | 2,000 tokens/s, 500 ms a step", "peak memory | 2.00 GB", "torch | 2.0.1"),
        *(
            "val loss | 3.1182 nats",
            "val perplexity | 22.61",
            "val bits per byte | 1.0394",
            "data | input.txt",
        ),
        "HellaSwag | 0.2900 ± 0.0045 on 10,042 examples after step 40 (published: GPT-2 124M 0.2955",
    ):
        assert f"| {row}" in text, row
    assert "](curves.png)" in text and "not complete" not in text and "MFU" not in text


def test_the_report_shows_the_last_samples_and_escapes_all_texts(tmp_path):
    """Samples are in a fence that they cannot close; a bar or line break in a setting breaks no table."""
    text = write_report(fake_run(tmp_path / "a")).read_text(encoding="utf-8")
    assert "Hello, I'm\n--- no heading\n--- step 40, sample 1\nHello ``` there\n````" in text
    assert "older text" not in text and "## Samples after step 40\n\n````text" in text
    assert "| sample prompt | a\\|b c |" in text and "](curves.png)" not in text


def test_the_report_of_a_stopped_and_resumed_run(tmp_path):
    """It is called incomplete; versions that changed at a resume are listed in order."""
    log_dir = fake_run(tmp_path / "a", hellaswag=False, max_steps=100)
    with open(log_dir / "metrics.jsonl", "a") as file:
        start = json.loads((log_dir / "metrics.jsonl").read_text().splitlines()[0])
        file.write(json.dumps({**start, "step": 40, "environment": {"torch": "2.1.0"}}) + "\n")
        file.write('{"kind": "hella", "step": 40, "accuracy": 0.5, "exam')  # an incomplete line
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "| steps | 40 of 100: the run is not complete |" in text
    assert "| best val loss | 3.1182 nats per token after step 40 |" in text
    assert "| training tokens | 40,000 |" in text
    assert "| torch | 2.0.1, then 2.1.0 |" in text and "| starts | step 0, step 40 |" in text
    assert "HellaSwag" not in text


def test_the_report_and_the_picture_of_a_real_run(tmp_path, text_file):
    """From the files that train_gpt.py writes."""
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --micro-batch 2 --total-batch-tokens 32"
    flags = f"--preset char --device cpu {sizes} --max-steps 4 --val-every 2 --sample-every 2".split()
    assert train_gpt.main([*flags, "--data", str(text_file), "--log-dir", str(tmp_path / "log")]) == 0
    text = write_report(tmp_path / "log").read_text(encoding="utf-8")
    val = read_log(tmp_path / "log" / "log.txt")["val"][1][-1]
    assert f"| val loss | {val:.4f} nats per token after step 4 |" in text
    assert "| training tokens | 128 |" in text and "## Samples after step 4" in text
    assert plot_comparison([tmp_path / "log"], tmp_path / "x.png").exists()


@pytest.mark.slow
def test_the_commands_write_their_files(tmp_path):
    """`python -m utils.training.plotting` and `python -m utils.training.report`, as a user types them."""
    log_dir = fake_run(tmp_path / "log")
    for arguments in (
        ("utils.training.plotting", log_dir, "--out", tmp_path / "x.png"),
        ("utils.training.report", log_dir),
    ):
        process = run("-m", *arguments)
        assert process.returncode == 0 and process.stderr == "", process.stderr
    assert (tmp_path / "x.png").exists() and (log_dir / "report.md").exists()
    assert run("-m", "utils.training.report", tmp_path / "none", cwd=ROOT).returncode == 2
