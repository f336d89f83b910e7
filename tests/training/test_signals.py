"""Runs stopped by a signal or a kill, and a second run in the folder of a running one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import soak
from tests.conftest import OFFLINE, ROOT
from tests.small_runs import RESUMABLE, assert_same_run, stop_by_signal_in, train
from utils.command_line import UserError

pytestmark = pytest.mark.usefixtures("no_pictures")


def start(text_file: Path, log_dir: Path, *flags: str) -> subprocess.Popen:
    """Starts the script as a process in a session of its own; its output is a pipe."""
    arguments = (*RESUMABLE, "--log-every", "1", "--data", text_file, "--log-dir", log_dir, *flags)
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


@pytest.mark.slow
def test_a_killed_process_is_resumed_bitwise(short_text, undisturbed, tmp_path):
    """SIGKILL of a real process at step 7, resumed by the same command."""
    process = start(short_text, tmp_path)
    wait_for(process, "step     7 |")
    process.kill()
    process.communicate()
    resumed = start(short_text, tmp_path, "--resume")
    out, error = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, error
    assert "resumed" in out
    # Bitwise, because both processes use one thread.
    assert_same_run(tmp_path, undisturbed)


def test_ctrl_c_saves(short_text, tmp_path):
    """And ends the run with 130; sent to the whole process group, as by a terminal."""
    process = start(short_text, tmp_path / "a", "--max-steps", "100000")
    wait_for(process, "step     5 |")
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "received SIGINT: saved" in out and "Traceback" not in error


@pytest.mark.slow
def test_a_closed_terminal_saves_unless_it_is_ignored(short_text, tmp_path):
    """SIGHUP saves and exits with 143; under nohup, which ignores it, the run continues to its end."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a nohup around the tests ignores it
    process = start(short_text, tmp_path / "a", "--max-steps", "100000")
    wait_for(process, "step     5 |")
    process.send_signal(signal.SIGHUP)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 143 and "received SIGHUP: saved" in out, error
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(short_text, tmp_path / "b")
    signal.signal(signal.SIGHUP, earlier)
    wait_for(process, "step     1 |")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=300) == 0 and (tmp_path / "b" / "model_00020.pt").exists()


def test_a_stop_before_the_first_update_leaves_no_checkpoint(short_text, tmp_path, monkeypatch, capsys):
    """In the evaluation of the initial weights: nothing has been trained, so nothing is saved."""
    stop_by_signal_in(monkeypatch, "evaluate", signal.SIGTERM, 1)
    assert train(short_text, tmp_path) == 143
    assert "received SIGTERM before the first update: nothing to save" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_during_the_set_up_ends_the_process_at_once(number, code, tmp_path):
    """Also within a native call, such as the tokenizer's: there is nothing to save yet."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"word{i} " for i in range(4_000_000)))
    process = start(text, tmp_path / "log", "--tokenizer", "gpt2")
    while not (tmp_path / "log" / ".lock-holder").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    out, error = process.communicate(timeout=300)
    assert process.returncode == code and error.endswith("before the first step: nothing to save\n")
    assert not list((tmp_path / "log").glob("*.pt"))


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
def test_runs_interrupted_at_random_instants_are_resumed_bitwise(capsys):
    """By four signals, from the imports to the report. By hand, tests/soak.py runs longer and with ranks."""
    assert soak.main(["--minutes", "0.5", "--seed", "10"]) == 0
    summary = re.search(r"(\d+) runs, 0 with problems, (\d+) interruptions", capsys.readouterr().out)
    assert int(summary[1]) >= 1 and int(summary[2]) >= 2
