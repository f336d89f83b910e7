"""A script's terminal: streams that vanish, Ctrl-C at any moment, control characters."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

from tests.conftest import OFFLINE, ROOT, run, run_in_terminal
from utils import console
from utils.console import CONTROLS, announced, printable, say, warn, wrapped

# A script that prints more than any buffer holds, and then finishes its work: a file.
SCRIPT = """
import sys
from utils.console import lost_streams
from utils.start import begin_script
begin_script()
from utils.command_line import UserError, run_script
def main():
    for number in range(20000):
        print("line", number)
        print("progress", number, file=sys.stderr)
    with open("work.txt", "w") as file:
        file.write(f"{file.fileno()} {sorted(lost_streams)}")
    if "fail" in sys.argv:
        raise UserError("wrong", "right")
sys.exit(run_script(main, result_is_stdout="result" in sys.argv))
"""


def run_with(folder: Path, stdout: str, stderr: str, *arguments: str) -> tuple[int, str, str]:
    """Runs SCRIPT with streams of the kinds "pipe", "closed", "full" or "broken" (a pipe without a reader).

    Returns the exit code, what the script wrote into its file, and what was printed to stderr.
    """
    reader, broken = os.pipe()
    os.close(reader)
    closing = [f"{number}>&-" for number, kind in ((1, stdout), (2, stderr)) if kind == "closed"]
    command = [
        "bash",
        "-c",
        f'exec "$@" {" ".join(closing)}',
        "bash",
        sys.executable,
        "-c",
        SCRIPT,
        *arguments,
    ]
    with open("/dev/full", "w") as full:
        kinds = {"pipe": subprocess.PIPE, "closed": subprocess.PIPE, "full": full, "broken": broken}
        streams = dict(stdout=kinds[stdout], stderr=kinds[stderr], text=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(command, cwd=folder, env=environment, **streams)
    os.close(broken)
    work = folder / "work.txt"
    return process.returncode, work.read_text() if work.exists() else "", process.stderr or ""


@pytest.mark.parametrize(
    ("stdout", "stderr", "lost"),
    [
        ("broken", "pipe", ["stdout"]),
        ("full", "pipe", ["stdout"]),
        ("pipe", "broken", ["stderr"]),
        ("full", "full", ["stderr", "stdout"]),
        ("closed", "closed", ["stderr", "stdout"]),
    ],
)
def test_a_stream_that_cannot_be_written_ends_nothing(stdout, stderr, lost, tmp_path):
    """The work is finished, exit code 0; the loss is known; no file takes the place of a closed stream."""
    code, work, error = run_with(tmp_path, stdout, stderr)
    descriptor, _, names = work.partition(" ")
    assert code == 0 and names == str(lost) and int(descriptor) > 2
    assert "Traceback" not in error and "Exception ignored" not in error


@pytest.mark.parametrize("stream", ["closed", "full", "broken"])
def test_an_error_of_the_user_keeps_its_exit_code(stream, tmp_path):
    """Even if nobody can read the message."""
    assert run_with(tmp_path, "pipe", stream, "fail")[0] == 2


def test_a_script_whose_result_nobody_reads_ends(tmp_path):
    """Quietly where the reader has closed the pipe, with exit code 1 and two lines where the disk is full."""
    assert run_with(tmp_path, "broken", "pipe", "result")[:2] == (0, "")
    code, work, error = run_with(tmp_path, "full", "pipe", "result")
    assert (code, work) == (1, "")
    assert "error: cannot write standard output: No space left on device\nhint: " in error


def interrupted(arguments: list[str | Path]) -> tuple[int, str]:
    """Exit code and output of a script that receives Ctrl-C while it imports PyTorch."""
    command = [sys.executable, *map(str, arguments)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    process = subprocess.Popen(command, env={**os.environ, **OFFLINE}, cwd=ROOT, **streams)
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=600), process.stdout.read()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc what a process has loaded")
@pytest.mark.parametrize("script", ["train_gpt.py", "generate.py", "eval_hellaswag.py"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script):
    """With 130, which tells a loop around the script not to start it again."""
    code, output = interrupted([script, "--help"])
    assert (code, output) == (130, "")


@pytest.mark.parametrize("register", ["atexit.register(interrupt)", "weakref.finalize(sys, interrupt)"])
def test_ctrl_c_after_the_work_ends_without_a_traceback(register):
    """While Python shuts down, which takes a while with PyTorch."""
    code = (
        "from utils.start import begin_script; begin_script()\n"
        "import atexit, os, signal, sys, weakref; from utils.command_line import run_script\n"
        f"interrupt = lambda: os.kill(os.getpid(), signal.SIGINT); {register}\n"
        "sys.exit(run_script(lambda: print('done')))\n"
    )
    process = run("-c", code)
    assert (process.returncode, process.stdout, process.stderr) == (130, "done\n", "")


def test_nothing_is_imported_before_ctrl_c_is_handled():
    """An interrupt during an import would end in a traceback."""
    code = (
        "import sys; loaded = set(sys.modules); import utils.start; print(*sorted({*sys.modules} - loaded))"
    )
    assert run("-c", code).stdout.split() == ["utils", "utils.start"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc what a process has loaded")
def test_an_ignored_ctrl_c_stays_ignored():
    """As a shell starts jobs in the background."""
    code = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += f"os.execv({sys.executable!r}, [{sys.executable!r}, 'generate.py', '--help'])"
    code, output = interrupted(["-c", code])
    assert code == 0 and output.startswith("usage: generate.py")


def test_a_second_ctrl_c_ends_a_native_call(tmp_path):
    """The first one waits for it, as Python's handlers do; the second one, a second later, does not."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hashlib\n"
        "from utils.command_line import run_script\n"
        "run_script(lambda: [print('ready', flush=True), hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.5)  # the native call has begun; it takes a minute
    started = time.monotonic()
    while process.poll() is None and time.monotonic() < started + 30:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=0) == 130 and time.monotonic() > started + console.SECOND_SIGINT_SECONDS


WORKER = "from utils.start import begin_script; begin_script(); print(1, flush=True); input()"
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"


@pytest.mark.parametrize(("variables", "ends"), [({"TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)])
def test_a_worker_ends_with_its_launcher(variables, ends):
    """Wherever it is, for example in its imports; a script started by hand survives its shell."""
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    command, environment = [sys.executable, "-c", LAUNCHER], {**os.environ, **variables}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **streams)
    assert process.stdout.readline() == b"1\n"
    process.kill()
    # The pipe is readable, and empty, when the last process that could write to it has ended.
    ended = select.select([process.stdout], [], [], 10 if ends else 1.5)[0] != []
    process.stdin.close()  # ends a worker that has survived
    process.wait()
    assert ended == ends and process.stdout.read() == b""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("title \x1b]0;owned\x07", "title \\x1b]0;owned\\x07"),
        ("\x9b31m red\x7f", "\\x9b31m red\\x7f"),
        ("a\rb\u202ec", "a\\rb\\u202ec"),
        ("naïve 日本\u3000\u00a0👩\u200d💻\n\tend", "naïve 日本\u3000\u00a0👩\u200d💻\n\tend"),
    ],
)
def test_a_terminal_receives_no_control_characters(text, shown, capsys):
    """They are shown as escapes; letters, emoji and spaces of every language stay as they are."""
    assert printable(text) == shown and not CONTROLS.search(shown)
    warn(text)
    assert capsys.readouterr() == ("", f"warning: {shown}\n")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "numerics: float32, because this CPU is old",
            ["numerics: float32,", "    because this CPU", "    is old"],
        ),
        (
            "in /a/path/that-is-not/broken/inside/: log.txt",
            ["in", "    /a/path/that-is-not/broken/inside/:", "    log.txt"],
        ),
        (
            "a  b\n\n  two  spaces stay where they are",
            ["a  b", "", "  two  spaces stay", "    where they are"],
        ),
        ("just as wide as it is", ["just as wide as it is"]),
    ],
)
def test_a_long_line_is_continued_with_an_indent(text, lines):
    """Broken at spaces only, so that paths stay whole; the lines of the text itself stay lines."""
    assert wrapped(text, 21).split("\n") == lines


SAYS = (
    "from utils.console import say, warn; text = 'word ' * 15 + 'end'\n"
    "say(text); say(text, wrap=False); warn(text)"
)


@pytest.mark.parametrize(("columns", "num_lines"), [(60, 4), (80, 3), (200, 3)])
def test_a_terminal_gets_lines_of_its_width(columns, num_lines):
    """Not the commands, which are copied, nor warnings: the terminal itself breaks these."""
    code, shown = run_in_terminal("-c", SAYS, columns=columns)
    lines = shown.splitlines()
    assert code == 0 and len(lines) == num_lines
    assert lines[-2:] == [f"{'word ' * 15}end", f"warning: {'word ' * 15}end"]
    assert lines[:-2] == wrapped(f"{'word ' * 15}end", columns).split("\n")


def test_a_file_gets_whole_lines(capsys):
    """For grep: nothing is wrapped where standard output is no terminal."""
    say("word " * 50 + "end")
    assert capsys.readouterr() == ("word " * 50 + "end\n", "")


def test_long_work_is_announced_once(monkeypatch, capsys):
    """In one line, from a thread of its own, so that it appears during the work; also for work that fails."""
    monkeypatch.setattr(console, "LONG_SECONDS", 0.05)
    with pytest.raises(KeyError), announced("counting", 3) as advance:
        advance(1)
        shown = capsys.readouterr()
        while shown == ("", ""):
            time.sleep(0.01)
            shown = capsys.readouterr()
        assert shown == ("", "counting ...\n")
        raise KeyError
    with announced("on another rank", shown=False):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def started_timers(monkeypatch: pytest.MonkeyPatch) -> list[threading.Timer]:
    """Timers that are started from here on, which never run."""
    timers: list[threading.Timer] = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: timers.append(timer))
    return timers


def test_short_work_is_not_announced(monkeypatch, capsys):
    """Neither during the work nor after it, however often it is repeated."""
    timers = started_timers(monkeypatch)
    for _ in range(100):
        with announced("counting"):
            pass
    assert len(timers) == 100 and all(timer.finished.is_set() for timer in timers)
    assert capsys.readouterr() == ("", "")


def test_short_steps_that_add_up_are_announced_until_something_is_printed(monkeypatch, capsys):
    """The first line comes about two seconds after the start of a script, then after two seconds of work."""
    timers, clock = started_timers(monkeypatch), Namespace()
    monkeypatch.setattr(console, "has_spoken", threading.Event())
    monkeypatch.setattr(console, "LONG_SECONDS", 2.0)
    monkeypatch.setattr(console, "PROCESS_START", 0.0)
    monkeypatch.setattr(console, "time", clock)
    for now in (0.0, 1.5, 9.0):
        clock.monotonic = lambda now=now: now
        with announced("counting"):
            pass
    say("a line")
    with announced("sorting"):
        pass
    assert [timer.interval for timer in timers] == [2.0, 0.5, 0.25, 2.0]
    assert capsys.readouterr() == ("a line\n", "")


def test_a_timer_that_is_too_late_says_nothing(monkeypatch, capsys):
    """It may be over while the work ends, too late to be cancelled."""
    timers = started_timers(monkeypatch)
    with announced("counting"):
        pass
    timers[0].function()
    assert capsys.readouterr() == ("", "")


BAR = (
    "import sys, time; from utils import console; console.LONG_SECONDS = 0.5\n"
    "def bars(): return getattr(getattr(sys.modules.get('tqdm'), 'tqdm', None), '_instances', None)\n"
    "with console.announced('counting', 8, ' sheep') as advance:\n"
    "    advance(3)\n"
    "    while not bars(): time.sleep(0.01)\n"
    "    advance(3); console.say('a line')\n"
    "    time.sleep(0.2); advance(2)\n"
    "console.say('the end')"
)


def test_long_work_has_a_bar_on_a_terminal():
    """With what was done before it appeared; it vanishes when the work ends, and breaks no line."""
    code, shown = run_in_terminal("-c", BAR)
    assert code == 0
    assert "counting:  38%" in shown and "3/8 sheep" in shown and "6/8 sheep" in shown
    lines = [line.split("\r")[-1] for line in shown.split("\n")]
    assert [line for line in lines if line.strip()] == ["a line", "the end"]


IMPORTS = (
    "import sys, time; from utils import console; console.LONG_SECONDS = 1.0; sys.argv = ['dir/script.py']\n"
    "console.prepare_console(); time.sleep({}); from utils.command_line import run_script\n"
    "sys.exit(run_script(lambda: time.sleep({})))"
)


def test_slow_imports_are_announced_on_a_terminal():
    """Not imports that are fast, nor what follows them; and a file gets no such line."""
    assert run_in_terminal("-c", IMPORTS.format(1.5, 0)) == (0, "starting script.py ...\n")
    assert run_in_terminal("-c", IMPORTS.format(0, 1.5)) == (0, "")
    command = [sys.executable, "-c", IMPORTS.format(1.5, 0)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")
