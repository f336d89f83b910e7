"""Interrupted, failed and damaged saves, and the runs that resume after them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run
from tests.small_runs import RESUMABLE, assert_same_run, train
from utils.command_line import Unfinished, UserError
from utils.files import remove_temporary_files
from utils.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_temporary_file_of_a_killed_save_is_removed(short_text, tmp_path, capsys):
    """By the next run, which names it in one line."""
    (tmp_path / ".model_00010.pt.tmp-123").write_bytes(b"half")
    assert train(short_text, tmp_path, "--max-steps", "2") == 0
    assert "removed .model_00010.pt.tmp-123" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_a_failed_second_save_of_a_step_leaves_the_first_pair(stopped_run, monkeypatch):
    """When the second of its two files cannot be written, neither is replaced, and both still load."""
    real, calls = torch.save, []

    def second_fails(content, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", second_fails)
    before = checkpoint.load_pair(stopped_run / "model_00009.pt")
    with pytest.raises(OSError):
        checkpoint.save_pair(stopped_run, 9, before.model, before.state)
    after = checkpoint.newest_complete(stopped_run)
    assert after.path.name == "model_00009.pt" and after.model["save_id"] == before.model["save_id"]
    assert not list(stopped_run.glob(".*.tmp-*"))


CHILD_SAVES = """
import sys, torch
from pathlib import Path
from utils.weights.checkpoint import save_pair
step = 0
while True:
    save_pair(Path(sys.argv[1]), step, {"model": {"w": torch.full((300_000,), float(step))}}, {"step": step})
    print(step, flush=True)
    step = (step + 1) % 3
"""


@pytest.mark.slow
def test_a_save_killed_at_any_moment_leaves_whole_files(tmp_path):
    """A process that overwrites its own files is killed twelve times: each file is the old or the new one."""
    for kill in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD_SAVES, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.02 + 0.015 * kill)
        process.kill()
        process.wait()
        for path in tmp_path.glob("*.pt"):
            assert isinstance(checkpoint.load_checked(path), dict)
    remove_temporary_files(tmp_path)
    assert all(path.suffix == ".pt" and not path.name.startswith(".") for path in tmp_path.iterdir())


def test_an_optimizer_file_is_refused_as_a_model(stopped_run, short_text):
    """With a UserError, by the loading function and by --resume."""
    for call in (
        lambda: checkpoint.load_model_file(stopped_run / "optimizer_00009.pt"),
        lambda: train(short_text, stopped_run, "--resume", str(stopped_run / "optimizer_00009.pt")),
    ):
        with pytest.raises(UserError, match="optimizer_00009.pt is an optimizer file, not a checkpoint's"):
            call()


def damage(path: Path, how: str) -> None:
    """Flips a bit, replaces the content or the save's id, or truncates the file to a share of its bytes."""
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "html":
        path.write_bytes(b"<html>not found</html>")
    elif how == "other pair":
        content = torch.load(path, weights_only=True)
        torch.save({**content, "save_id": "0"}, path)
    else:
        path.write_bytes(data[: int(len(data) * float(how))])


@pytest.mark.parametrize("how", ["0", "0.1", "0.5", "0.99", "flip", "html", "other pair"])
@pytest.mark.parametrize("name", ["model_00009.pt", "optimizer_00009.pt"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    name, how, stopped_run, short_text, undisturbed, capsys
):
    """--resume uses the one before and gives the same run; naming the damaged one is an error."""
    damage(stopped_run / name, how)
    with pytest.raises(UserError, match="damaged|saved together|is an HTML page"):
        train(short_text, stopped_run, "--resume", str(stopped_run / "model_00009.pt"))
    assert train(short_text, stopped_run, "--resume") == 0
    out, warnings = capsys.readouterr()
    assert "trying the one before" in warnings and "model_00006.pt at step 6" in out
    assert_same_run(stopped_run, undisturbed)


def test_a_run_keeps_the_newest_checkpoints_and_the_milestones(undisturbed):
    """Two pairs to resume from, the models of multiples of --keep-every, the last model, and the best one."""
    names = sorted(path.name for path in undisturbed.glob("*.pt"))
    assert names == [
        *("model_00006.pt", "model_00012.pt", "model_00018.pt", "model_00020.pt"),
        *("model_best.pt", "optimizer_00018.pt", "optimizer_00020.pt"),
    ]


def test_a_full_disk_ends_a_run_only_if_the_last_save_fails(short_text, tmp_path, monkeypatch, capsys):
    """A failed save is a warning with free and needed space; exit code 1 if the final one failed."""
    real, calls = checkpoint.save_atomically, []

    def full(contents):
        calls.append(contents)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        real(contents)

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Namespace(free=1000))
    assert train(short_text, tmp_path / "a") == 0
    err = capsys.readouterr().err
    assert "warning: checkpoints: " in err.split("could not")[0]
    assert err.count("warning: could not save") == 2 and "No space left on device (free " in err

    def always(contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_atomically", always)
    with pytest.raises(Unfinished, match="final checkpoint could not be saved") as caught:
        train(short_text, tmp_path / "b")
    assert caught.value.exit_code == 1
    assert (tmp_path / "b" / "log.txt").read_bytes() == (tmp_path / "a" / "log.txt").read_bytes()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError("model_00003.pt was not written correctly: checksum mismatch in data/1"),
            "checksum mismatch",
        ),
        (RuntimeError("an illegal memory access\nmore"), "an illegal memory access (free "),
        (
            RuntimeError("[enforce fail] . unexpected pos 640 vs 534"),
            "the file could not be written completely (free ",
        ),
    ],
)
def test_the_warning_of_a_failed_save_has_the_reason(
    error, reason, short_text, tmp_path, monkeypatch, capsys
):
    """The first line of the error; what torch.save reports of a full disk is translated."""

    def fails(contents):
        raise error

    monkeypatch.setattr(checkpoint, "save_atomically", fails)
    with pytest.raises(Unfinished):
        train(short_text, tmp_path, "--max-steps", "2", "--val-every", "0")
    warning = capsys.readouterr().err.split("warning: could not save step 2: ")[1].split("\n")[0]
    assert reason in warning


@pytest.mark.slow
def test_a_file_size_limit_is_reported_like_a_full_disk(short_text, tmp_path):
    """torch.save raises an error of its own kind: a warning, exit code 1, no traceback, no file left."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt; from utils.command_line import run_script\n"
        "sys.exit(run_script(train_gpt.main))"
    )
    flags = ("--data", short_text, "--log-dir", tmp_path, "--max-steps", "4", "--val-every", "0")
    process = run("-c", code, *RESUMABLE, *flags)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "warning: could not save step 3" in process.stderr
    assert "\nerror: the final checkpoint could not be saved" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.tmp-*"))


def test_a_renamed_model_file_cannot_be_resumed_from(stopped_run, short_text, tmp_path):
    """It is not taken for its own optimizer file: an error that says how both must be named."""
    (stopped_run / "model_00009.pt").rename(tmp_path / "best.pt")
    with pytest.raises(UserError, match="best.pt is not named model_") as caught:
        train(short_text, stopped_run, "--resume", str(tmp_path / "best.pt"))
    assert caught.value.hint.startswith("if it has one, ") and "optimizer_STEP.pt" in caught.value.hint
    assert caught.value.hint.endswith(f"--init-from {tmp_path / 'best.pt'}")
