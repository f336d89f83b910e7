"""Logs read back: damaged ones, thinned ones, and the published results beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import train_gpt
from tests.logged_runs import fake_run
from utils.command_line import UserError, run_script
from utils.training import plotting, report
from utils.training.log_reader import published_val_losses, read_log, read_metrics, tokens_trained
from utils.training.report import write_report

BAD_LOG_LINES = {
    "another word": b"nonsense",
    "no step": b"ten val 3.0",
    "no number": b"10 val x",
    "NaN": b"10 val nan",
    "infinite": b"10 val 1e999",
    "a step of 5000 digits": b"9" * 5000 + b" val 3.0",
    "a negative step": b"-1 val 3.0",
    "a huge value": b"10 val 1e300",
    "an accuracy of 3": b"10 hella 3.0",
    "binary": b"\x00\xff\xfe 1 2",
    "a fourth word": b"10 val 3.0 3.0",
}
BAD_RECORDS = {
    "no JSON": b"{'kind': 1}",
    "a list": b"[1, 2]",
    "no kind": b'{"step": 1}',
    "another kind of kind": b'{"kind": 5}',
    "a text as step": b'{"kind": "val", "step": "1", "loss": 3.0}',
    "NaN": b'{"kind": "val", "step": 1, "loss": NaN}',
    "no lr": b'{"kind": "train", "step": 3}',
    "5000 digits": b'{"kind": "train", "lr": 1, "step": ' + b"9" * 5000 + b"}",
    "1e999 seconds": b'{"kind": "train", "step": 1, "lr": 1.0, "seconds": 1e999}',
    "a null": b'{"kind": "hella", "step": 1, "accuracy": null, "examples": 10}',
    "no examples": b'{"kind": "hella", "step": 1, "accuracy": 0.3, "examples": 0}',
    "settings that are none": b'{"kind": "run", "step": 0, "settings": [1], "parameters": 5}',
    "deep": b'{"kind": "val", "x": ' + b"[" * 100_000,
    "binary": b"\x00\xff\xfe",
}


@pytest.mark.parametrize(
    ("name", "line"),
    [("log.txt", line) for line in BAD_LOG_LINES.values()]
    + [("metrics.jsonl", line) for line in BAD_RECORDS.values()],
    ids=[f"log {key}" for key in BAD_LOG_LINES] + [f"metrics {key}" for key in BAD_RECORDS],
)
def test_a_damaged_line_is_left_out_with_one_warning(name, line, tmp_path, capsys):
    """Everything else is read as before; file, line and number are named once, also if it is read again."""
    log_dir = fake_run(tmp_path / "a")
    curves, records = read_log(log_dir / "log.txt"), read_metrics(log_dir / "metrics.jsonl")
    lines = (log_dir / name).read_bytes().split(b"\n")
    (log_dir / name).write_bytes(b"\n".join([*lines[:3], line, line, *lines[3:]]))
    for _ in range(2):
        assert (read_log(log_dir / "log.txt"), read_metrics(log_dir / "metrics.jsonl")) == (curves, records)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {log_dir / name}:4: ") and warning.count("\n") == 1
    assert f"; 2 of {len(lines) + 1:,} lines are left out" in warning
    assert report.main([str(log_dir)]) == 0
    assert plotting.main([str(log_dir), "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize("damage", [bytes(1000), b"\xff\xfe0\x00 \x00v\x00", b"{}\n" * 5])
def test_logs_without_a_valid_line_are_an_error_in_two_lines(damage, tmp_path, capsys):
    """By both commands: exit code 2, after a warning that says what was left out."""
    log_dir = fake_run(tmp_path / "a")
    for name in ("log.txt", "metrics.jsonl", "samples.txt"):
        (log_dir / name).write_bytes(damage + b"\n")
    for main, arguments in ((report.main, []), (plotting.main, ["--out", str(tmp_path / "x.png")])):
        assert run_script(lambda main=main, rest=arguments: main([str(log_dir), *rest])) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"]


def test_a_log_that_cannot_be_read_or_written_is_an_error_in_two_lines(tmp_path):
    """A folder in place of log.txt, or of report.md."""
    log_dir = fake_run(tmp_path / "a")
    (log_dir / "report.md").mkdir()
    with pytest.raises(UserError, match="cannot write .*report.md: Is a directory"):
        write_report(log_dir)
    (log_dir / "log.txt").unlink()
    (log_dir / "log.txt").mkdir()
    with pytest.raises(UserError, match="cannot read .*log.txt: Is a directory"):
        write_report(log_dir)


def test_a_run_continues_over_damaged_logs(text_file, tmp_path, capsys):
    """A run that is resumed draws its curves and writes its report, and ends with exit code 0."""
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --micro-batch 2 --total-batch-tokens 32"
    flags = f"--preset char --device cpu {sizes} --val-every 2 --sample-every 0 --checkpoint-every 2".split()
    flags += ["--data", str(text_file), "--log-dir", str(tmp_path / "log")]
    assert train_gpt.main([*flags, "--max-steps", "2"]) == 0
    for name in ("log.txt", "metrics.jsonl"):
        path = tmp_path / "log" / name
        data = path.read_bytes()
        path.write_bytes(b"\xff" * 8 + data[8:])  # of the same size, so that nothing is cut off
    assert train_gpt.main([*flags, "--max-steps", "4", "--resume"]) == 0
    warnings = capsys.readouterr().err
    assert warnings.count("log.txt:1: 'utf-8' codec") == warnings.count("metrics.jsonl:1: 'utf-8'") == 1
    assert (tmp_path / "log" / "curves.png").exists()


def test_thinned_records_of_updates_are_evenly_spread(tmp_path):
    """All others are complete, and a file that is short enough is, too."""
    lines = [json.dumps({"kind": "train", "step": step, "lr": 1.0}) for step in range(1000)]
    lines += [json.dumps({"kind": "val", "step": step, "loss": 1.0}) for step in range(0, 1000, 100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = read_metrics(tmp_path / "metrics.jsonl", most_updates=120)
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert len(steps) == 1000 // 9 and {b - a for a, b in zip(steps, steps[1:])} == {9}
    assert len(records) == len(steps) + 10
    assert len(read_metrics(tmp_path / "metrics.jsonl", most_updates=1010)) == 1010


def test_tokens_are_those_that_validations_have_counted(tmp_path):
    """The batch may have changed at a resume; after the last validation it is that of the last start."""
    batches = {0: 10, 20: 30}
    starts = [dict(kind="run", step=s, settings={"total_batch_tokens": n}) for s, n in batches.items()]
    vals = [dict(kind="val", step=20, tokens=200), dict(kind="val", step=25, tokens=350)]
    assert tokens_trained([*starts, *vals], 27) == 350 + 2 * 30
    assert tokens_trained([*starts, *vals], 20) == 200
    assert tokens_trained(starts[1:], 25) == 150  # resumed from another log directory
    assert tokens_trained(vals, 25) is None


# ------------------------------------------------------------------------------------------------------------
# Published val losses

GPT2_SETTINGS = vars(train_gpt.read_arguments(["--preset", "gpt2"])[0])
PUBLISHED = {250: 6.163, 1000: 4.153, 1250: 3.952, 19073: 3.04}


def published_for(**changes: Any) -> dict[int, float]:
    """The published losses for the preset gpt2 with these settings changed."""
    return published_val_losses([{"kind": "run", "settings": {**GPT2_SETTINGS, **changes}}, {"kind": "val"}])


def test_the_preset_gpt2_has_published_val_losses():
    """Its constants are the recipe; what does not change the curve, or by rounding only, does not matter."""
    assert published_for() == PUBLISHED
    assert published_for(micro_batch=8, dtype="float32", seed=7, val_every=100, data="shards") == PUBLISHED


@pytest.mark.parametrize(
    "changes",
    [
        *({"max_lr": 1e-3}, {"max_steps": 5000}, {"warmup_steps": 0}, {"total_batch_tokens": 65536}),
        *(
            {"weight_decay": 0.0},
            {"grad_clip": 0.5},
            {"min_lr": 0.0},
            {"init_from": "gpt2"},
            {"dropout": 0.1},
        ),
        *({"n_layer": 24, "n_head": 16, "n_embd": 1024}, {"seq_len": 512}, {"tokenizer": "char"}),
        *({"optimizer": "muon"}, {"schedule": "linear"}),
        vars(train_gpt.read_arguments(["--preset", "tiny"])[0]),
    ],
)
def test_another_recipe_has_no_published_val_losses(changes):
    """Each of these settings changes the curve."""
    assert published_for(**changes) == {}


def test_without_a_record_of_the_settings_nothing_is_published():
    """As for a log.txt alone, or a metrics.jsonl of another program."""
    assert published_val_losses([]) == published_val_losses([{"kind": "val"}]) == {}
    assert published_val_losses([{"kind": "run", "settings": {}}]) == {}
