"""Runs stopped by a signal or a kill, and a second run in the folder of a running one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import OFFLINE, ROOT
from tests.small_runs import RESUMABLE, assert_same_run, stop_by_signal_in, train
from utils.command_line import UserError

pytestmark = pytest.mark.usefixtures("no_pictures")


def start(text_file: Path, log_dir: Path, *flags: str) -> subprocess.Popen:
    """Starts the script as a process in a session of its own; its output is a pipe."""
    arguments = (*RESUMABLE, "--data", text_file, "--log-dir", log_dir, *flags)
    return subprocess.Popen(
        [sys.executable, ROOT / "train_gpt.py", *arguments],
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Reads the process's output up to a line that contains `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended before {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("name", "number", "at_call", "code"),
    [
        ("update", signal.SIGTERM, 6, 143),
        ("update", signal.SIGINT, 9, 130),
        ("update", signal.SIGUSR1, 17, 143),
        ("evaluate", signal.SIGTERM, 3, 143),
        ("evaluate", signal.SIGTERM, 6, 143),  # after the last update: only the last evaluation is left
        ("write_samples", signal.SIGTERM, 2, 143),
        ("save_checkpoint", signal.SIGTERM, 2, 143),
    ],
)
def test_a_run_stopped_by_a_signal_is_resumed_bitwise(
    name, number, at_call, code, short_text, undisturbed, tmp_path, monkeypatch, capsys
):
    """Wherever the signal arrives: the last completed step is saved, and no incomplete result is logged."""
    with monkeypatch.context() as patch:
        stop_by_signal_in(patch, name, number, at_call)
        assert train(short_text, tmp_path) == code
    assert "run it again with --resume to continue" in capsys.readouterr().out
    assert train(short_text, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_killed_process_is_resumed_bitwise(short_text, undisturbed, tmp_path):
    """SIGKILL of a real process at step 7, resumed by the same command."""
    process = start(short_text, tmp_path)
    wait_for(process, "step     7 |")
    process.kill()
    process.communicate()
    resumed = start(short_text, tmp_path, "--resume")
    out, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert "resumed" in out
    # Bitwise, because both processes use one thread.
    assert_same_run(tmp_path, undisturbed)


def test_ctrl_c_saves_and_a_second_one_exits_at_once(short_text, tmp_path):
    """The first ends the run with 130 after saving; one more, a second later, exits without saving."""
    process = start(short_text, tmp_path / "a", "--max-steps", "100000")
    wait_for(process, "step     5 |")
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "received SIGINT: saved" in out and "Traceback" not in error
    # A loop that never polls, like a long computation.
    code = (
        "import time, torch\n"
        "from utils.distributed import Distributed\n"
        "from utils.training.signals import StopSignals\n"
        "with StopSignals(Distributed(torch.device('cpu'))):\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_second_run_in_the_same_folder_is_refused(short_text, tmp_path, capsys):
    """The message names the process that holds the lock; when it is killed the lock is released."""
    process = start(short_text, tmp_path, "--max-steps", "100000")
    wait_for(process, "step     1 |")
    with pytest.raises(UserError, match=f"is in use by pid {process.pid} on host .* since 20"):
        train(short_text, tmp_path)
    process.kill()
    process.communicate()
    assert train(short_text, tmp_path) == 0


@pytest.mark.slow
def test_a_run_stopped_at_twenty_random_moments_is_resumed_bitwise(short_text, tmp_path):
    """By SIGKILL or SIGTERM: logs and weights are those of an uninterrupted run."""
    flags = "--max-steps 600 --checkpoint-every 4 --val-every 7 --sample-every 9 --seed 5".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(short_text, whole, *flags)
    assert undisturbed.communicate(timeout=300) and undisturbed.returncode == 0
    rng = random.Random(0)
    for number in range(20):
        process = start(short_text, killed, *flags, "--resume")
        for _ in range(rng.randrange(1, 40)):  # at least one line: the run has started
            process.stdout.readline()
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, f"complete after {number} kills: the run is too short for this test"
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        process.communicate(timeout=60)
    last = start(short_text, killed, *flags, "--resume")
    assert last.communicate(timeout=300) and last.returncode == 0
    assert_same_run(killed, whole, step=600)
