"""What one looks at after a run: several runs in one picture, a report, and mirrors that cost nothing."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from tests.conftest import ROOT, run
from utils.errors import UserError
from utils.training import mirrors
from utils.training.mirrors import Mirrors, check_installed
from utils.training.plotting import main as plotting_main
from utils.training.plotting import plot_comparison, plot_run, read_log
from utils.training.report import write_report

SAMPLES = """--- step 20, sample 0
an older text
--- step 40, sample 0
Hello, I'm
--- no heading
--- step 40, sample 1
Hello ``` there
"""


def fake_run(log_dir: Path, hellaswag: bool = True, slower: float = 1.0, max_steps: int = 40) -> Path:
    """The files of a run of 40 steps of 1000 tokens, validated every ten."""
    log_dir.mkdir(parents=True)
    settings = {
        "preset": "tiny",
        "max_steps": max_steps,
        "total_batch_tokens": 1000,
        "sample_prompt": "a|b\nc",
    }
    head = dict(
        environment={"torch": "2.0.1", "device": "CPU"}, reasons={"data": "input.txt"}, parameters=12345
    )
    records, lines = [dict(kind="run", step=0, settings=settings, **head)], []
    for step in range(41):
        loss = 3 + 8 * 0.9**step
        if step % 10 == 0:
            lines.append(f"{step} val {loss:.4f}")
            seconds = 0.5 * slower * step
            records.append(dict(kind="val", step=step, loss=loss, tokens=1000 * step, seconds=seconds))
            if hellaswag:
                lines.append(f"{step} hella {0.25 + 0.001 * step:.4f}")
        if step < 40:
            lines.append(f"{step} train {loss:.6f}")
            took = dict(seconds=0.5 * slower, mfu=None, memory=2_000_000_000 + step)
            records.append(dict(kind="train", step=step, loss=loss, lr=1e-3, norm=1.0, **took))
    (log_dir / "log.txt").write_text("\n".join(lines) + "\n")
    (log_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (log_dir / "samples.txt").write_text(SAMPLES)
    return log_dir


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved while a test runs."""
    from utils.training import plotting

    figures, save = [], plotting.save_picture
    monkeypatch.setattr(plotting, "save_picture", lambda f, path: (figures.append(f), save(f, path))[1])
    return figures


def test_runs_are_compared_by_steps_tokens_time_and_hellaswag(tmp_path, drawn, capsys, monkeypatch):
    """Every panel has a line a run at the right values; GPT-2 and GPT-3 are dashed lines at theirs."""
    monkeypatch.chdir(tmp_path)
    fast, slow = fake_run(Path("a")), fake_run(Path("a_directory_with_a_very_long_name/log"), slower=3)
    out = tmp_path / "compare.png"
    assert plotting_main([str(fast), str(slow), "--out", str(out)]) == 0
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


def test_a_run_without_hellaswag_or_metrics_is_compared_by_what_it_has(tmp_path, drawn):
    """Three panels, and a log.txt alone still gives the curve against steps."""
    log_dir = fake_run(tmp_path / "a", hellaswag=False)
    (log_dir / "metrics.jsonl").unlink()
    plot_comparison([log_dir], tmp_path / "x.png")
    assert [len(panel.lines) for panel in drawn[0].axes] == [1, 0, 0]


def test_the_curves_of_a_run_show_what_it_is_measured_against(tmp_path, drawn):
    """The HellaSwag panel has the run's accuracies and both dashed lines; the picture is complete."""
    plot_run(fake_run(tmp_path / "a"))
    loss, _, hellaswag = drawn[0].axes
    assert len(loss.lines) == 3 and list(loss.lines[2].get_xdata()) == [0, 10, 20, 30, 40]
    assert [line.get_ydata()[-1] for line in hellaswag.lines] == [0.29, 0.2955, 0.337]
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("files", [{}, {"log.txt": ""}])
def test_what_is_no_log_directory_is_named(tmp_path, files):
    """An empty directory, an empty log: one error, and no picture."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="holds no log.txt of a run"):
        plot_comparison([tmp_path], tmp_path / "x.png")
    with pytest.raises(UserError, match="holds no run to report on"):
        write_report(tmp_path)
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "report.md").exists()


def test_a_picture_that_cannot_be_written_is_the_users_to_change(tmp_path):
    """A folder that does not exist: exit code 2, not a traceback."""
    with pytest.raises(UserError, match="cannot write"):
        plot_comparison([fake_run(tmp_path / "a")], tmp_path / "nowhere" / "x.png")


def test_the_report_has_what_the_run_reached_and_took(tmp_path):
    """Tokens, time, speed, memory, loss, perplexity, and HellaSwag with its standard error beside GPT-2's."""
    log_dir = fake_run(tmp_path / "a")
    plot_run(log_dir)
    text = write_report(log_dir).read_text(encoding="utf-8")
    for row in (
        *("parameters | 12,345", "steps | 40 |", "training tokens | 40,000", "time of updates | 20s"),
        *("speed | 2,000 tokens/s, 500 ms a step", "peak memory | 2.00 GB", "torch | 2.0.1"),
        *("val loss | 3.1182 nats", "val perplexity | 22.61", "data | input.txt"),
        "HellaSwag | 0.2900 ± 0.0045 on 10,042 examples after step 40 (published: GPT-2 124M 0.2955",
    ):
        assert f"| {row}" in text, row
    assert "](curves.png)" in text and "not complete" not in text and "MFU" not in text


def test_the_report_shows_the_last_samples_whatever_is_in_them(tmp_path):
    """Only those of the last time, in a fence that they cannot close; a bar in a setting breaks no table."""
    text = write_report(fake_run(tmp_path / "a")).read_text(encoding="utf-8")
    assert "Hello, I'm\n--- no heading\n--- step 40, sample 1\nHello ``` there\n````" in text
    assert "older text" not in text and "## Samples after step 40\n\n````text" in text
    assert "| sample prompt | a\\|b c |" in text and "](curves.png)" not in text


def test_the_report_says_what_is_missing_and_where_it_resumed(tmp_path):
    """A stopped run is called incomplete; other versions after a resume stand beside the first ones."""
    log_dir = fake_run(tmp_path / "a", hellaswag=False, max_steps=100)
    with open(log_dir / "metrics.jsonl", "a") as file:
        start = json.loads((log_dir / "metrics.jsonl").read_text().splitlines()[0])
        file.write(json.dumps({**start, "step": 40, "environment": {"torch": "2.1.0"}}) + "\n")
        file.write('{"kind": "hella", "step": 40, "accuracy": 0.5, "exam')  # torn
    text = write_report(log_dir).read_text(encoding="utf-8")
    assert "| steps | 40 of 100: the run is not complete |" in text
    assert "| training tokens | 40,000 |" in text
    assert "| torch | 2.0.1, then 2.1.0 |" in text and "| starts | step 0, step 40 |" in text
    assert "HellaSwag" not in text


def test_the_report_and_the_picture_of_a_real_run(tmp_path, text_file):
    """The files that train_gpt.py writes today are the files that are read here."""
    import train_gpt

    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --micro-batch 2 --total-batch-tokens 32"
    flags = f"--preset char --device cpu {sizes} --max-steps 4 --val-every 2 --sample-every 2".split()
    assert train_gpt.main([*flags, "--data", str(text_file), "--log-dir", str(tmp_path / "log")]) == 0
    text = write_report(tmp_path / "log").read_text(encoding="utf-8")
    val = read_log(tmp_path / "log" / "log.txt")["val"][1][-1]
    assert f"| val loss | {val:.4f} nats per token after step 4 |" in text
    assert "| training tokens | 128 |" in text and "## Samples after step 4" in text
    assert plot_comparison([tmp_path / "log"], tmp_path / "x.png").exists()


def test_the_commands_run(tmp_path):
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


class FakeWriter:
    """TensorBoard's SummaryWriter, as far as it is used; `broken` makes every write fail."""

    broken = False

    def __init__(self, log_dir, purge_step=None):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        FakeWriter.last = self

    def add_text(self, *arguments):
        pass

    def add_scalar(self, *arguments):
        if FakeWriter.broken:
            raise ConnectionError("no route to host\nand more")
        self.scalars.append(arguments)

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    """torch.utils.tensorboard with a writer that keeps what it is given."""
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter)
    )
    monkeypatch.setattr(FakeWriter, "broken", False)
    return FakeWriter


def test_a_mirror_shows_every_number_at_its_step(tmp_path, tensorboard):
    """Numbers alone, under kind/name; after a resume, what was written beyond the checkpoint is hidden."""
    mirror = Mirrors(True, False, tmp_path, {"max_lr": 1}, start_step=7)
    mirror.record("train", {"step": 7, "loss": 1.5, "mfu": None, "note": "x", "flag": True})
    mirror.record("run", {"parameters": 5})
    mirror.close()
    assert tensorboard.last.scalars == [("train/loss", 1.5, 7)] and tensorboard.last.closed
    assert tensorboard.last.purge_step == 7 and tensorboard.last.log_dir == str(tmp_path / "tensorboard")


def test_a_service_that_fails_costs_one_warning(tmp_path, tensorboard):
    """At a write: said once, then left alone; the caller sees no exception."""
    said: list[str] = []
    mirror = Mirrors(True, False, tmp_path, {}, say=said.append)
    tensorboard.broken = True
    for step in range(5):
        mirror.record("train", {"step": step, "loss": 1.0})
    mirror.close()
    assert said == ["warning: TensorBoard does not answer (no route to host); training goes on without it"]


def test_wandb_goes_on_in_the_same_run_after_a_resume_and_may_be_out_of_reach(tmp_path, monkeypatch):
    """The id of the first start is given back to wandb; a start without a network is one warning."""
    calls, logged, said = [], [], []

    def init(**options):
        calls.append(options)
        if len(calls) == 3:
            raise TimeoutError("cannot reach api.wandb.ai")
        return types.SimpleNamespace(id="abc123", log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start_step in (0, 10, 10):
        mirror = Mirrors(False, True, tmp_path, {"seed": 1}, start_step, said.append)
        mirror.record("val", {"step": start_step, "loss": 2.0})
        mirror.close()
    assert [call["id"] for call in calls] == [None, "abc123", "abc123"]
    assert logged == [{"val/loss": 2.0, "step": 0}, {"val/loss": 2.0, "step": 10}]
    assert said == ["warning: wandb does not answer (cannot reach api.wandb.ai); training goes on without it"]


def test_a_missing_package_is_said_before_anything_starts(monkeypatch):
    """The hint names what to install; without the flags nothing is looked for."""
    monkeypatch.setattr(mirrors, "find_spec", lambda name: None)
    check_installed(False, False)
    for flags, name in (((True, False), "tensorboard"), ((False, True), "wandb")):
        with pytest.raises(UserError, match=f"--{name} asked, but {name} is not installed") as caught:
            check_installed(*flags)
        assert caught.value.hint == f"pip install {name}"


def test_without_flags_there_is_no_mirror(tmp_path):
    """No package is imported and no file appears."""
    mirror = Mirrors(False, False, tmp_path, {})
    mirror.record("train", {"step": 0, "loss": 1.0})
    mirror.close()
    assert mirror.open == [] and list(tmp_path.iterdir()) == []
