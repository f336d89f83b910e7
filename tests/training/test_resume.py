"""A run that is stopped at any point and resumed writes the same log and the same weights.

Signals are tested in test_signals.py, damaged files in test_resume_saves.py, changed settings in
test_resume_settings.py, several processes in test_distributed.py.
"""

from __future__ import annotations

import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.small_runs import (
    Killed,
    assert_same_losses,
    assert_same_run,
    differences,
    kill_in,
    kill_in_update,
    stop_by_signal_in,
    tensors_of,
    train,
)
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.training.resume import find_checkpoint
from utils.training.run_log import RunLog
from utils.training.state import Progress
from utils.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")

# A log directory written by the code before TrainState: RESUMABLE on the text of `short_text`, killed at
# step 11, without its older checkpoint.
CHECKPOINT_V1 = ROOT / "tests" / "fixtures" / "checkpoint_v1"


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 11, 15, 19])
def test_a_run_killed_in_an_update_is_resumed_bitwise(step, short_text, undisturbed, tmp_path, monkeypatch):
    """Before the first checkpoint, right after one, at an evaluation, and across the end of an epoch."""
    with monkeypatch.context() as patch:
        kill_in_update(patch, step)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["evaluate", "write_samples", "save_checkpoint"])
def test_a_run_killed_outside_an_update_is_resumed_bitwise(
    name, short_text, undisturbed, tmp_path, monkeypatch
):
    """In an evaluation, a sample or a save: no line of the logs is missing and none is duplicated."""
    calls = []
    with monkeypatch.context() as patch:
        kill_in(patch, name, lambda *arguments: calls.append(1) or len(calls) == 3)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_run_can_be_resumed_twice(short_text, undisturbed, tmp_path, monkeypatch):
    """A resumed run saves as complete a state as a fresh one."""
    for step in (5, 13):
        with monkeypatch.context() as patch:
            kill_in_update(patch, step)
            with pytest.raises(Killed):
                train(short_text, tmp_path, "--resume")
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)
    assert (tmp_path / "log.txt.stale").exists()


def test_a_checkpoint_of_the_code_before_train_state_is_resumed_bitwise(
    short_text, undisturbed, tmp_path, capsys
):
    """Without a warning about settings, and with the log and weights of an uninterrupted run.

    On another machine or version than the fixture's, equality to rounding is promised and tested.
    """
    shutil.copytree(CHECKPOINT_V1, tmp_path, dirs_exist_ok=True)
    assert train(short_text, tmp_path, "--resume") == 0
    out = capsys.readouterr().out
    assert "model_00009.pt at step 9" in out and "settings have changed" not in out
    assert_same_losses(tmp_path, undisturbed)
    if "results equal to rounding only" not in out:
        assert_same_run(tmp_path, undisturbed)


def flip_a_bit(tensor: torch.Tensor) -> None:
    """Changes the lowest bit of its first element."""
    tensor.view(-1).view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize(
    ("name", "tensor_of", "place"),
    [
        ("model", lambda content: content["model"]["transformer.ln_f.bias"], "model.transformer.ln_f.bias"),
        ("optimizer", lambda content: content["optimizer"]["state"][27]["exp_avg_sq"], "27.exp_avg_sq"),
        ("optimizer", lambda content: content["rng"]["cpu"][0], "rng.cpu.0"),
    ],
)
def test_a_single_bit_is_a_difference_between_runs(name, tensor_of, place, undisturbed, tmp_path):
    """In any tensor of the two files; the comparison that the tests of resuming rely on."""
    log_dir = shutil.copytree(undisturbed, tmp_path / "log")
    assert differences(log_dir, undisturbed, with_rng=True) == []
    path = log_dir / f"{name}_00020.pt"
    content = torch.load(path, weights_only=True)
    flip_a_bit(tensor_of(content))
    torch.save(content, path)
    found = differences(log_dir, undisturbed, with_rng=True)
    assert len(found) == 1 and found[0].endswith(place)


@pytest.mark.parametrize("name", ["log.txt", "samples.txt", "metrics.jsonl", "model_00020.pt"])
def test_a_missing_line_or_file_is_a_difference_between_runs(name, undisturbed, tmp_path):
    """In each file that is compared."""
    log_dir = shutil.copytree(undisturbed, tmp_path / "log")
    lines = (log_dir / name).read_bytes().splitlines(keepends=True)
    (log_dir / name).write_bytes(b"".join(lines[:-2]))
    if name.endswith(".pt"):
        (log_dir / name).unlink()
    (found,) = differences(log_dir, undisturbed)
    assert name in found


def test_resuming_a_complete_run_changes_nothing(short_text, undisturbed, capsys):
    """At MAX_STEPS a message and exit code 0; every file stays as it was."""
    before = {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()}
    assert train(short_text, undisturbed, "--resume") == 0
    model = undisturbed / "model_00020.pt"
    assert f"already complete: step 20 of 20, the model is {model}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()} == before


@pytest.mark.parametrize("earlier_report", [None, "of the first 10 steps"])
def test_a_run_killed_after_its_last_save_gets_its_report(earlier_report, short_text, tmp_path, monkeypatch):
    """Resuming it trains nothing, but writes the report, also over that of a shorter run."""

    def killed(log: RunLog) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write_report", killed)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    report = tmp_path / "report.md"
    if earlier_report:
        report.write_text(earlier_report)
    assert train(short_text, tmp_path, "--resume") == 0
    assert "| steps | 20 |" in report.read_text(encoding="utf-8")


def test_resuming_without_a_checkpoint_is_a_fresh_start(short_text, undisturbed, tmp_path):
    """The same command, in a loop, starts a run and continues it."""
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_resuming_without_a_usable_checkpoint_is_an_error(stopped_run, short_text):
    """If all checkpoints are damaged, the run is not silently started again from step 0."""
    names = {path.name for path in stopped_run.iterdir()}
    for path in stopped_run.glob("optimizer_*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"none of the \d model files .* can be resumed from"):
        train(short_text, stopped_run, "--resume")
    assert {path.name for path in stopped_run.iterdir()} >= names


def test_resuming_from_an_older_checkpoint_archives_the_newer_ones(stopped_run, short_text, undisturbed):
    """After resuming step 6 while step 9 exists, no later resume can continue from the abandoned step 9."""
    older = str(stopped_run / "model_00006.pt")
    assert train(short_text, stopped_run, "--resume", older, "--max-steps", "20") == 0
    (archive,) = (stopped_run / "archive").iterdir()
    names = ["model_00009.pt", "model_best.pt", "optimizer_00009.pt"]  # the best one is of step 8
    assert sorted(path.name for path in archive.iterdir()) == names
    assert_same_run(stopped_run, undisturbed)


def test_a_checkpoint_from_another_folder_starts_a_new_log(
    stopped_run, short_text, undisturbed, tmp_path_factory
):
    """The other folder is unchanged, and the final weights are those of an uninterrupted run."""
    new = tmp_path_factory.mktemp("new")
    before = sorted(path.name for path in stopped_run.iterdir())
    assert train(short_text, new, "--resume", str(stopped_run / "model_00009.pt")) == 0
    assert sorted(path.name for path in stopped_run.iterdir()) == before
    assert (new / "log.txt").read_text() in (undisturbed / "log.txt").read_text()
    assert (new / "log.txt").read_text().startswith("9 train")
    ours, theirs = (tensors_of(folder / "model_00020.pt") for folder in (new, undisturbed))
    assert all(torch.equal(ours[place], theirs[place]) for place in theirs)


@pytest.mark.parametrize("key", ["optimizer", "step", "windows", "log", "done"])
def test_the_comparison_detects_the_loss_of_any_part_of_the_state(
    key, short_text, undisturbed, tmp_path, monkeypatch
):
    """Negative controls: with one part of the checkpoint reset, `assert_same_run` fails."""
    with monkeypatch.context() as patch:  # stopped in step 12, whose validation is in the log already
        stop_by_signal_in(patch, "update", signal.SIGTERM, 13)
        assert train(short_text, tmp_path) == 143
    path = tmp_path / "optimizer_00012.pt"
    content = torch.load(path, weights_only=True)
    if key == "optimizer":
        for entry in content["optimizer"]["state"].values():
            entry["exp_avg"].zero_()
    else:
        content[key] = {"step": 11, "windows": 0, "log": {}, "done": []}[key]
    torch.save(content, path)
    model = torch.load(tmp_path / "model_00012.pt", weights_only=True)
    torch.save({**model, "step": content["step"]}, tmp_path / "model_00012.pt")  # else the pair is refused
    train(short_text, tmp_path, "--resume")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_same_run(tmp_path, undisturbed)


def test_the_last_val_loss_is_restored(stopped_run, short_text):
    """A resumed run that evaluates no more saves the earlier val loss with its last model."""
    before = torch.load(stopped_run / "model_00009.pt", weights_only=True)["val_loss"]
    assert before is not None and train(short_text, stopped_run, "--resume", "--val-every", "0") == 0
    assert torch.load(stopped_run / "model_00020.pt", weights_only=True)["val_loss"] == before


@pytest.mark.parametrize("micro_batch", ["2", "auto"])
def test_resuming_reads_each_file_once(micro_batch, stopped_run, short_text, monkeypatch):
    """The optimizer file is large; --micro-batch auto, which needs a setting from it, adds no read."""
    read: list[str] = []
    real = checkpoint.load_checked

    def counting(path: Path) -> object:
        read.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(checkpoint, "load_checked", counting)
    assert train(short_text, stopped_run, "--resume", "--micro-batch", micro_batch) == 0
    assert read == ["model_00009.pt", "optimizer_00009.pt"]


def test_an_evaluation_is_due_once_a_pass():
    """Every N steps and after the last step, never for 0, and not again once it is in the log."""
    progress = Progress(step=10)
    assert progress.is_due("val", 5, last=False) and progress.is_due("val", 7, last=True)
    assert not progress.is_due("val", 3, last=False) and not progress.is_due("val", 0, last=True)
    progress.done.append("val")
    assert not progress.is_due("val", 5, last=False)
    progress.complete_update(4, 0.5)
    assert (progress.step, progress.windows, progress.done) == (11, 4, [])


@pytest.mark.parametrize("compiled", [True, False])
def test_a_resumed_run_is_compiled_as_the_run_it_continues(compiled, stopped_run):
    """Not by a new estimate for what is left of it; on another device, or if asked, it is decided anew."""
    path = stopped_run / "optimizer_00009.pt"
    content = torch.load(path, weights_only=True)
    content["environment"]["compiled"] = compiled
    torch.save(content, path)
    reasons: dict[str, str] = {}
    flags = dict(micro_batch=2, compile="auto", deterministic=False)
    args = Namespace(resume="newest", log_dir=stopped_run, init_from=None, **flags)
    assert find_checkpoint(args, Distributed(torch.device("cpu")), reasons).path.name == "model_00009.pt"
    assert args.compile == ("on" if compiled else "off") and reasons == {"compile": "as in the resumed run"}
    args.compile = "off"
    find_checkpoint(args, Distributed(torch.device("cpu")), {})
    assert args.compile == "off"
    args.compile, args.deterministic = "auto", True  # decided by that flag, which rules compilation out
    find_checkpoint(args, Distributed(torch.device("cpu")), {})
    assert args.compile == "auto"
    args.deterministic = False
    content["environment"]["device"] = "another"
    torch.save(content, path)
    args.compile, reasons = "auto", {}
    find_checkpoint(args, Distributed(torch.device("cpu")), reasons)
    assert args.compile == "auto" and reasons == {}


def test_an_older_checkpoint_does_not_say_whether_it_was_compiled(stopped_run):
    """Then it is decided anew, and the comparison of the environment stays silent about it."""
    path = stopped_run / "optimizer_00009.pt"
    content = torch.load(path, weights_only=True)
    assert content["environment"].pop("compiled") is False
    torch.save(content, path)
    flags = dict(micro_batch=2, compile="auto", deterministic=False)
    args = Namespace(resume="newest", log_dir=stopped_run, init_from=None, **flags)
    find_checkpoint(args, Distributed(torch.device("cpu")), {})
    assert args.compile == "auto"
