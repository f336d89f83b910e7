"""generate.py at a real terminal: history, and Ctrl-C and Ctrl-D wherever they are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from tests.conftest import OFFLINE, ROOT, tiny_model
from utils.weights.checkpoint import model_content, save_pair

CHARACTERS = {"name": "char", "characters": "\n abcdefghijklmnopqrstuvwxyz"}
PROMPT = "prompt (an empty line quits): "
CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"


class Terminal:
    """generate.py with its own terminal; what is typed and what is shown."""

    def __init__(self, *flags: str):
        self.keys, screen = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), "-d", "cpu", *flags],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env={**os.environ, **OFFLINE, "TERM": "dumb", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(screen)

    def type(self, text: str) -> None:
        """Presses keys, after what was shown so far has been read."""
        self.shown = ""
        os.write(self.keys, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Reads the screen until it matches; returns what was shown since the last keys."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown, re.S):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            if select.select([self.keys], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.keys, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # the other end is closed
                    break
        assert re.search(pattern, self.shown, re.S), self.shown[-2000:]
        return self.shown

    def exit_code(self, pattern: str = "") -> int:
        """Waits for the end, after which the screen must match."""
        code = self.process.wait(60)
        self.wait_for(pattern)
        return code


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts generate.py with a small character model, and returns its terminal at the first prompt."""
    model = tiny_model(vocab_size=len(CHARACTERS["characters"]))
    path = save_pair(tmp_path, 7, model_content(model, vars(model.config).copy(), 7, 1.5, CHARACTERS), {})
    terminals = []

    def start(*flags: str) -> Terminal:
        terminals.append(Terminal("-m", str(path), *flags))
        terminals[-1].wait_for(re.escape(PROMPT))
        return terminals[-1]

    yield start
    for terminal in terminals:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.keys)


def test_ctrl_c_ends_an_answer_and_not_the_program(start):
    """Any number of times, also more than a second apart; Ctrl-D at the prompt then ends it with 0."""
    terminal = start("--max-new-tokens", "100000000")
    for prompt in ("to be", "or not"):
        terminal.type(f"{prompt}\n")
        terminal.wait_for(f"{prompt}\n.{{20}}")
        time.sleep(1.1)  # a second Ctrl-C ends other scripts
        terminal.type(CTRL_C)
        shown = terminal.wait_for(re.escape(PROMPT))
        assert "Traceback" not in shown and "\n" in shown.split(PROMPT)[0]
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0 and "Traceback" not in terminal.shown


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_is_130_with_one_line(start):
    """On a line of its own, without a traceback; what was typed is dropped."""
    terminal = start()
    terminal.type("to b")
    terminal.wait_for("to b")
    time.sleep(0.5)  # a signal just before Python waits for a key is seen at the next key only
    terminal.type(CTRL_C)
    assert terminal.exit_code("\nstopped by Ctrl-C\n") == 130
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
def test_the_arrow_keys_edit_and_recall_a_prompt(start):
    """Left moves in the line, up brings back an earlier one: the same greedy continuation as when typed."""
    pytest.importorskip("readline")
    terminal = start("--temperature", "0", "--max-new-tokens", "5")
    terminal.type("to bx\n")
    terminal.wait_for("to bx\n.*" + re.escape(PROMPT))
    first = terminal.shown.split("\n", 1)[1]
    terminal.type(UP + "\n")
    assert terminal.wait_for("to bx.*\n.*" + re.escape(PROMPT)).split("\n", 1)[1] == first
    terminal.type("to x" + LEFT + "b\n")  # "to bx"
    assert terminal.wait_for("x.*\n.*" + re.escape(PROMPT)).split("\n", 1)[1] == first
    terminal.type("\n")
    assert terminal.exit_code() == 0
