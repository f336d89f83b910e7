"""The curves of one run and of several, the report, and the mirrors of the metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import train_gpt
from tests.conftest import ROOT, run
from utils.command_line import UserError, run_script
from utils.training import flags, plotting, report
from utils.training.log_directory import LOGS
from utils.training.plotting import plot_comparison
from utils.training.report import (
    plot_run,
    published_val_losses,
    read_log,
    read_metrics,
    smoothed,
    write_report,
)
from utils.training.run_log import RunLog

SAMPLES = """--- step 20, sample 0
an older text
--- step 40, sample 0
Hello, I'm
--- no heading
--- step 40, sample 1
Hello ``` there
"""


def fake_run(log_dir: Path, *, hellaswag: bool = True, slower: float = 1.0, **settings: Any) -> Path:
    """Writes the files of a run of 40 steps of 1000 tokens, validated every ten; returns its directory."""
    log_dir.mkdir(parents=True)
    usual = {"preset": "tiny", "max_steps": 40, "total_batch_tokens": 1000, "sample_prompt": "a|b\nc"}
    settings = {**usual, **settings}
    head = dict(
        environment={"torch": "2.0.1", "device": "CPU"}, reasons={"data": "input.txt"}, parameters=12345
    )
    records, lines = [dict(kind="run", step=0, settings=settings, **head)], []
    for step in range(41):
        loss = 3 + 8 * 0.9**step
        if step % 10 == 0:
            lines.append(f"{step} val {loss:.4f}")
            seconds = 0.5 * slower * step
            records.append(
                dict(
                    kind="val",
                    step=step,
                    loss=loss,
                    tokens=1000 * step,
                    seconds=seconds,
                    bits_per_byte=loss / 3,
                )
            )
            if hellaswag:
                accuracy = 0.25 + 0.001 * step
                lines.append(f"{step} hella {accuracy:.4f}")
                records.append(dict(kind="hella", step=step, accuracy=accuracy, examples=10042))
        if step < 40:
            lines.append(f"{step} train {loss:.6f}")
            took = dict(seconds=0.5 * slower, mfu=None, memory=2_000_000_000 + step)
            records.append(dict(kind="train", step=step, loss=loss, lr=1e-3, norm=1.0, **took))
    (log_dir / "log.txt").write_text("\n".join(lines) + "\n")
    (log_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (log_dir / "samples.txt").write_text(SAMPLES)
    return log_dir


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved during a test."""
    figures, save = [], report.save_picture

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    for module in (report, plotting):
        monkeypatch.setattr(module, "save_picture", keep)
    return figures


# ------------------------------------------------------------------------------------------------------------
# Pictures


def test_a_plot_needs_the_log_only(tmp_path):
    """Losses, and with HellaSwag lines a third panel; an incomplete last line is left out."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "train", "step": s, "lr": 0.1}) + "\n" for s in (0, 1)) + '{"kind": "tra'
    )
    (tmp_path / "log.txt").write_text("0 val 10.8\n0 train 10.8\n1 train 9.0\n2 val 8.5\n3 trai")
    assert read_log(tmp_path / "log.txt") == {"val": ([0, 2], [10.8, 8.5]), "train": ([0, 1], [10.8, 9.0])}
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    without = plot_run(tmp_path).read_bytes()
    with open(tmp_path / "log.txt", "w") as file:
        file.write("0 val 10.8\n0 hella 0.25\n0 train 10.8\n1 hella 0.26\n")
    assert plot_run(tmp_path).read_bytes() != without
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.txt", "metrics.jsonl"]
    (tmp_path / "metrics.jsonl").unlink()
    assert plot_run(tmp_path).exists() and read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_plot_shows_every_learning_rate(tmp_path, drawn):
    """That of Muon beside AdamW's, with a legend; a single one needs none."""
    for muon in ({}, {"muon_lr": 0.02}):
        folder = tmp_path / f"with{len(muon)}"
        folder.mkdir()
        (folder / "log.txt").write_text("0 train 10.8\n1 train 9.0\n")
        records = [{"kind": "train", "step": step, "lr": 0.1, **muon} for step in (0, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        plot_run(folder)
    one, two = (figure.axes[1] for figure in drawn)
    assert [list(line.get_ydata()) for line in one.lines] == [[0.1, 0.1]] and one.get_legend() is None
    assert [list(line.get_ydata()) for line in two.lines] == [[0.1, 0.1], [0.02, 0.02]]
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["AdamW", "Muon"]


def test_smoothing_is_unbiased_at_the_start():
    """A constant is unchanged from the first value on, and a step is approached from below."""
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([0.0, 1.0], memory=0.5) == pytest.approx([0.0, 2 / 3])


def test_runs_are_compared_by_steps_tokens_time_and_hellaswag(tmp_path, drawn, capsys, monkeypatch):
    """Every panel has one line per run at the right values, and dashed lines for GPT-2 and GPT-3."""
    monkeypatch.chdir(tmp_path)
    fast, slow = fake_run(Path("a")), fake_run(Path("a_directory_with_a_very_long_name/log"), slower=3)
    out = tmp_path / "compare.png"
    assert plotting.main([str(fast), str(slow), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.strip() == str(out)
    panels = drawn[0].axes
    steps, tokens, seconds, hellaswag = [[list(line.get_xdata()) for line in panel.lines] for panel in panels]
    assert steps == [[0, 10, 20, 30, 40]] * 2
    assert panels[1].get_xlabel() == "training tokens" and tokens[0] == [0, 10000, 20000, 30000, 40000]
    assert panels[2].get_xlabel() == "seconds of updates"
    assert (seconds[0][-1], seconds[1][-1]) == (20.0, 60.0)
    assert hellaswag[:2] == [[0, 10, 20, 30, 40]] * 2
    assert [line.get_ydata()[0] for line in panels[3].lines[2:]] == [0.2955, 0.337]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == ["a (last 3.1182)", "...y_with_a_very_long_name/log (last 3.1182)"]


def test_runs_with_other_tokens_are_compared_in_bits_per_byte(tmp_path, drawn):
    """Nats per token mean nothing then; with equal tokens, or where a log does not say, they are drawn."""
    for name, bytes_per_token in (("a", 3.0), ("b", 3.0), ("c", 1.5), ("d", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("0 val 9.0001\n5 val 3.0001\n")
        records = [dict(kind="val", step=step, loss=loss) for step, loss in ((0, 9.00006), (5, 3.00006))]
        for record in records:
            if bytes_per_token:
                record["bits_per_byte"] = record["loss"] / bytes_per_token
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    for others, unit, last in (
        ("b", "nats per token", 3.0),
        ("c", "bits per byte", 2.0),
        ("cd", "nats", 3.0),
    ):
        plot_comparison([tmp_path / name for name in ("a", *others)], tmp_path / "x.png")
        panel = drawn[-1].axes[0]
        assert unit in panel.get_ylabel()
        assert panel.lines[1].get_ydata()[-1] == pytest.approx(last, abs=1e-3)


def test_a_comparison_needs_the_logs_only(tmp_path, drawn):
    """Three panels without HellaSwag, and a log.txt alone still gives the curve against steps."""
    log_dir = fake_run(tmp_path / "a", hellaswag=False)
    (log_dir / "metrics.jsonl").unlink()
    plot_comparison([log_dir], tmp_path / "x.png")
    assert [len(panel.lines) for panel in drawn[0].axes] == [1, 0, 0]


def test_the_curves_of_a_run_include_the_published_accuracies(tmp_path, drawn):
    """The HellaSwag panel has the run's line and those of GPT-2 and GPT-3; no temporary file remains."""
    plot_run(fake_run(tmp_path / "a"))
    loss, _, hellaswag = drawn[0].axes
    assert len(loss.lines) == 3 and list(loss.lines[2].get_xdata()) == [0, 10, 20, 30, 40]
    assert [line.get_ydata()[-1] for line in hellaswag.lines] == [0.29, 0.2955, 0.337]
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("files", [{}, {"log.txt": ""}])
def test_a_folder_without_a_run_is_an_error(tmp_path, files):
    """An empty folder or an empty log: neither a picture nor a report is written."""
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


# ------------------------------------------------------------------------------------------------------------
# Report


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


# ------------------------------------------------------------------------------------------------------------
# Damaged logs

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


def test_names_that_no_font_has_and_formulas_are_drawn(tmp_path, capsys):
    """A directory whose name is not UTF-8, and one that matplotlib would read as a formula."""
    for name in (os.fsdecode(b"caf\xe9"), "$x^$", "a$b"):
        assert plotting.main([str(fake_run(tmp_path / name)), "--out", str(tmp_path / "x.png")]) == 0
        text = write_report(tmp_path / name).read_text(encoding="utf-8")
        assert name.encode("utf-8", "backslashreplace").decode() in text


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


@pytest.mark.parametrize("target", ["elsewhere.png", "fifo"])
def test_a_picture_replaces_no_link(target, tmp_path):
    """--out may be a link: its target is written, be it a file or a pipe, and the link stays."""
    log_dir, out = fake_run(tmp_path / "a"), tmp_path / "x.png"
    out.symlink_to(target)
    reader = None
    if target == "fifo":
        os.mkfifo(tmp_path / target)
        reader = subprocess.Popen(["cat", tmp_path / target], stdout=subprocess.PIPE)
    assert plotting.main([str(log_dir), "--out", str(out)]) == 0
    data = reader.communicate()[0] if reader else (tmp_path / target).read_bytes()
    assert data.startswith(b"\x89PNG") and out.is_symlink()


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


def test_report_and_plot_show_the_published_val_losses_of_the_recipe(tmp_path, drawn):
    """The report beside the last val loss if one was published for its step; the plot up to the last step."""
    recipe = {name: value for name, value in GPT2_SETTINGS.items() if not isinstance(value, Path)}
    log_dir = fake_run(tmp_path / "a", **recipe)
    plot_run(log_dir)
    assert len(drawn[0].axes[0].lines) == 3  # no published step has been reached
    assert "published for this recipe" not in write_report(log_dir).read_text(encoding="utf-8")
    for step, loss in ((250, 6.2), (1000, 4.2)):
        with open(log_dir / "log.txt", "a") as file:
            file.write(f"{step} val {loss}\n")
    plot_run(log_dir)
    points = drawn[1].axes[0].lines[3]
    assert list(points.get_xdata()) == [250, 1000] and list(points.get_ydata()) == [6.163, 4.153]
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "after step 1,000 (published for this recipe on FineWeb-Edu: 4.153) |" in text


def test_report_and_plot_of_another_recipe_show_no_published_val_losses(tmp_path, drawn):
    """At the same step."""
    log_dir = fake_run(tmp_path / "a")
    with open(log_dir / "log.txt", "a") as file:
        file.write("1000 val 4.2\n")
    plot_run(log_dir)
    assert len(drawn[0].axes[0].lines) == 3
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "after step 1,000 |" in text and "FineWeb-Edu" not in text


# ------------------------------------------------------------------------------------------------------------
# Mirrors


class FakeWriter:
    """The methods of TensorBoard's SummaryWriter that are used; with `broken` every write fails."""

    broken = False
    last: FakeWriter

    def __init__(self, log_dir: str, purge_step: int | None = None):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        FakeWriter.last = self

    def add_text(self, *arguments: object) -> None:
        """Ignored."""

    def add_scalar(self, *arguments: object) -> None:
        if FakeWriter.broken:
            raise ConnectionError("no route to host\nand more")
        self.scalars.append(arguments)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch) -> type[FakeWriter]:
    """Replaces torch.utils.tensorboard."""
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter)
    )
    monkeypatch.setattr(FakeWriter, "broken", False)
    return FakeWriter


def test_a_mirror_receives_every_number_at_its_step(tmp_path, tensorboard):
    """Numbers only, as kind/name; after a resume, events beyond the checkpoint are hidden."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 7, "settings": {"max_lr": 1}}, tensorboard=True, wandb=False)
        log.add_record("train", step=7, loss=1.5, mfu=None, note="x", flag=True)
        log.add_record("run", parameters="5")
    assert tensorboard.last.scalars == [("train/loss", 1.5, 7)] and tensorboard.last.closed
    assert tensorboard.last.purge_step == 7 and tensorboard.last.log_dir == str(tmp_path / "tensorboard")


def test_a_service_that_fails_is_one_warning(tmp_path, tensorboard, capsys):
    """At the first failed write; then the mirror is left alone, and the caller sees no exception."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {}}, tensorboard=True, wandb=False)
        tensorboard.broken = True
        for step in range(5):
            log.add_record("train", step=step, loss=1.0)
    warning = "warning: TensorBoard failed: no route to host; continuing without it\n"
    assert capsys.readouterr().err == warning and log.mirrors == []


def test_wandb_continues_the_same_run_after_a_resume(tmp_path, monkeypatch, capsys):
    """With the id of the first start; a start without a network is one warning."""
    calls, logged = [], []

    def init(**options: Any) -> types.SimpleNamespace:
        calls.append(options)
        if len(calls) == 3:
            raise TimeoutError("cannot reach api.wandb.ai")
        return types.SimpleNamespace(id="abc123", log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start_step in (0, 10, 10):
        with RunLog(tmp_path, is_master=True) as log:
            log.log_start({"step": start_step, "settings": {"seed": 1}}, tensorboard=False, wandb=True)
            log.add_record("val", step=start_step, loss=2.0)
    assert [call["id"] for call in calls] == [None, "abc123", "abc123"]
    assert logged == [{"val/loss": 2.0, "step": 0}, {"val/loss": 2.0, "step": 10}]
    warning = "warning: wandb failed: cannot reach api.wandb.ai; continuing without it\n"
    assert capsys.readouterr().err == warning


def test_a_run_writes_to_its_mirrors(text_file, tmp_path, tensorboard, monkeypatch):
    """With --tensorboard every update and every validation arrives."""
    monkeypatch.setattr(flags, "find_spec", lambda name: True)
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --micro-batch 2 --total-batch-tokens 32"
    argv = f"--preset char --device cpu {sizes} --max-steps 2 --val-every 2 --sample-every 0".split()
    argv += ["--data", str(text_file), "--log-dir", str(tmp_path / "log"), "--tensorboard"]
    assert train_gpt.main(argv) == 0
    steps = {(name, step) for name, _, step in tensorboard.last.scalars}
    assert {("train/loss", 0), ("train/loss", 1), ("val/loss", 0), ("val/loss", 2)} <= steps
    assert tensorboard.last.closed


def test_a_missing_package_is_an_error_before_anything_starts(monkeypatch):
    """The hint names what to install; without the flags no package is looked for."""
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    flags.check_training_settings(train_gpt.read_arguments(["--preset", "tiny"])[0], 1)
    for name in ("tensorboard", "wandb"):
        args, _ = train_gpt.read_arguments(["--preset", "tiny", f"--{name}"])
        with pytest.raises(UserError, match=f"--{name} needs the package {name}") as caught:
            flags.check_training_settings(args, 1)
        assert caught.value.hint == f"pip install {name}"


def test_without_flags_there_is_no_mirror(tmp_path):
    """No package is imported and no file appears beside the logs."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {}}, tensorboard=False, wandb=False)
        log.add_record("train", step=0, loss=1.0)
    assert log.mirrors == [] and {path.name for path in tmp_path.iterdir()} == set(LOGS)
