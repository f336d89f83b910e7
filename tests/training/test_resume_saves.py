"""What a torn, failed or damaged save does to a run and to the one that resumes it."""

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
from utils.errors import Unfinished, UserError
from utils.training import log_directory as run_dir
from utils.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")  # drawing takes longer than the run


def test_leftovers_of_a_torn_save_are_swept(short_text, tmp_path, capsys):
    """A temporary file of a killed save is removed with one line."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / ".model_00010.pt.tmp-123").write_bytes(b"half")
    assert train(short_text, tmp_path, "--max-steps", "2") == 0
    assert "removed .model_00010.pt.tmp-123" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_saving_a_step_again_keeps_the_pair_together(short_text, stopped_run, monkeypatch):
    """When the second file cannot be written, neither is replaced, and the old pair still resumes."""
    real, calls = torch.save, []

    def second_fails(content, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", second_fails)
    model, state = checkpoint.load_pair(stopped_run / "model_00009.pt")
    with pytest.raises(OSError):
        checkpoint.save_pair(stopped_run, 9, model, state)
    path, again, _ = checkpoint.newest_complete(stopped_run)
    assert path.name == "model_00009.pt" and again["save_id"] == model["save_id"]
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
    """A process saves over its own files and is killed, twelve times: every file is old or new."""
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
    run_dir.sweep(tmp_path)
    assert all(path.suffix == ".pt" and not path.name.startswith(".") for path in tmp_path.iterdir())


def test_the_twin_is_no_model(stopped_run, short_text):
    """An optimizer file given as a model is an error of the user's, for --resume as well."""
    for call in (
        lambda: checkpoint.load_model_file(stopped_run / "optimizer_00009.pt"),
        lambda: train(short_text, stopped_run, "--resume", str(stopped_run / "optimizer_00009.pt")),
    ):
        with pytest.raises(UserError, match="not a checkpoint"):
            call()


def damage(path: Path, how: str) -> None:
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
def test_a_damaged_checkpoint_is_passed_over(name, how, stopped_run, short_text, undisturbed, capsys):
    """--resume warns and takes the one before, the run is the same; by name it is exit 2."""
    damage(stopped_run / name, how)
    with pytest.raises(UserError, match="damaged|saved together"):
        train(short_text, stopped_run, "--resume", str(stopped_run / "model_00009.pt"))
    assert train(short_text, stopped_run, "--resume") == 0
    out = capsys.readouterr().out
    assert "trying the one before" in out and "model_00006.pt at step 6" in out
    assert_same_run(stopped_run, undisturbed)


def test_only_the_newest_checkpoints_and_milestones_stay(undisturbed):
    """Two pairs to resume from, models at multiples of --keep-every, and the last one."""
    names = sorted(path.name for path in undisturbed.glob("*.pt"))
    assert names == [
        *("model_00006.pt", "model_00012.pt", "model_00018.pt", "model_00020.pt"),
        *("optimizer_00018.pt", "optimizer_00020.pt"),
    ]


def test_a_full_disk_ends_no_run_but_a_failed_last_save_does(short_text, tmp_path, monkeypatch, capsys):
    """A warning with free and needed space, tried again at the next save; exit 1 only after the last."""
    real, calls = checkpoint.save_atomically, []

    def full(contents):
        calls.append(contents)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        real(contents)

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Namespace(free=1000))
    assert train(short_text, tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "warning: checkpoints: " in out.split("step ")[0]
    assert out.count("warning: could not save") == 2 and "No space left on device (free " in out

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
        (OSError("model_00003.pt came back damaged from the disk (data/1)"), "came back damaged"),
        (RuntimeError("an illegal memory access\nmore"), "an illegal memory access (free "),
        (RuntimeError("[enforce fail] . unexpected pos 640 vs 534"), "the file was not written whole (free "),
    ],
)
def test_a_failed_save_says_why(error, reason, short_text, tmp_path, monkeypatch, capsys):
    """What the disk, the device or torch said, in one line; of torch's words on a full disk the meaning."""

    def fails(contents):
        raise error

    monkeypatch.setattr(checkpoint, "save_atomically", fails)
    with pytest.raises(Unfinished):
        train(short_text, tmp_path, "--max-steps", "2", "--val-every", "0")
    warning = capsys.readouterr().out.split("warning: could not save step 2: ")[1].split("\n")[0]
    assert reason in warning


def test_a_file_size_limit_is_a_full_disk(short_text, tmp_path):
    """A file that may not grow is an error of torch.save's own kind: said as such, no traceback."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt; from utils.errors import run_script\n"
        "sys.exit(run_script(train_gpt.main))"
    )
    flags = ("--data", short_text, "--log-dir", tmp_path, "--max-steps", "4", "--val-every", "0")
    process = run("-c", code, *RESUMABLE, *flags)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "warning: could not save step 3" in process.stdout
    assert process.stderr.startswith("error: the final checkpoint could not be saved")
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.tmp-*"))
