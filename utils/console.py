"""The terminal of a script: streams that may vanish, Ctrl-C at any moment, warnings.

Standard output holds results only; warnings and progress go to standard error. Nothing here is slow to
import: a script calls `begin_script` of utils/start.py before its other imports.
"""

import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, TextIO

from utils.installation import require_packages

PROCESS_START = time.monotonic()  # nearly: this module is the first that a script imports
SECOND_SIGINT_SECONDS = 1.0  # a launcher may deliver one Ctrl-C twice within a second
LONG_SECONDS = 2.0  # work that takes longer says what it is
NARROWEST = 40  # columns; lines are not wrapped to fewer
# All control characters but line feed and tab, and those that reverse the direction of a text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

lost_streams: dict[str, str] = {}  # name -> why nothing more can be written to it
imports = ExitStack()  # closed when the imports of a script are done
has_spoken = threading.Event()  # whether anything has been printed


def prepare_console() -> None:
    """What a script needs before its imports; called by `begin_script`.

    A worker of torchrun receives SIGTERM when its launcher has died. A Python without the packages that every
    script imports ends with two lines and exit code 2. On a terminal, slow imports are announced.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: without this, the next file that is opened would become standard output
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    require_packages("torch", "numpy")
    if launched_by_torchrun():
        threading.Thread(target=terminate_when_orphaned, args=(os.getppid(),), daemon=True).start()
    elif sys.stderr is not None and sys.stderr.isatty():
        imports.enter_context(announced(f"starting {os.path.basename(sys.argv[0])}"))


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def terminate_when_orphaned(parent: int) -> None:
    """Sends this process SIGTERM when it has another parent: workers survive a torchrun that is killed.

    They would wait for it, or continue to write. A script started by hand must survive its shell.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def handle_interrupt(handler: Any) -> Any:
    """Installs a handler of Ctrl-C, unless the signal was ignored when the process started.

    Returns the earlier one.
    """
    is_main = threading.current_thread() is threading.main_thread()  # only it can handle signals
    earlier = signal.getsignal(signal.SIGINT)
    if is_main and earlier != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    return earlier


class GuardedStream:
    """A standard stream whose failure ends nothing: a closed pipe, a full disk, a vanished terminal.

    After the first failure its descriptor leads to /dev/null, `lost_streams` says why, and `on_loss` is
    called: where standard output is the only result, that ends the script.
    """

    def __init__(self, stream: TextIO, name: str, on_loss: Callable[[OSError], None]):
        self._stream, self._name, self._on_loss = stream, name, on_loss

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            lost_streams.setdefault(self._name, error.strerror or str(error))
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._on_loss(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_streams(on_loss: Callable[[OSError], None] = lambda error: None) -> Iterator[None]:
    """Standard output and error as `GuardedStream`; neither fails on a character that it cannot encode."""
    earlier = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            setattr(sys, name, open(os.devnull, "w"))
            lost_streams[name] = "closed"
        elif stream is getattr(sys, f"__{name}__"):  # not replaced, as by a notebook
            stream.reconfigure(errors="replace")
            call = on_loss if name == "stdout" else lambda error: None
            setattr(sys, name, GuardedStream(stream, name, call))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = earlier


@contextmanager
def watched_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Calls `on_signal` with the number of every signal that has a Python handler, in a thread of its own.

    A handler of Python runs only when the current native call returns; the thread also runs during a long
    one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reader, 16):
            for number in numbers:
                if earlier >= 0:
                    os.write(earlier, bytes([number]))  # watchers may be nested
                on_signal(number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


def second_interrupt_exits() -> Callable[[int], None]:
    """For `watched_signals`: the second Ctrl-C ends the process at once, wherever it is.

    Not under torchrun, which passes its own Ctrl-C on to processes that have already received one.
    """
    received: list[float] = []

    def on_signal(number: int) -> None:
        if number == signal.SIGINT:
            received.append(time.monotonic())
            is_second = received[-1] - received[0] > SECOND_SIGINT_SECONDS
            if is_second and not launched_by_torchrun():
                os._exit(130)

    return on_signal


@contextmanager
def no_second_interrupt() -> Iterator[None]:
    """Suspends `watched_signals`: Ctrl-C may be pressed any number of times. For the main thread only."""
    earlier = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)


def printable(text: str) -> str:
    """A text from a file, for a terminal: control characters, which could command it, as `\\x1b`."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str, *, stream: str = "stdout", wrap: bool = True) -> None:
    """Prints a text, above progress bars where there are any; `stream` is an attribute of sys.

    On a terminal, lines are wrapped at spaces to its width; `wrap=False` is for commands, which are copied.
    """
    file, text = getattr(sys, stream), printable(text)
    text = wrapped(text, line_width(file)) if wrap else text
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # None also while another thread imports it
    if bars:
        bars.write(text, file=file)
    else:
        print(text, file=file)
    file.flush()
    has_spoken.set()


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    say(f"warning: {text}", stream="stderr", wrap=False)


def line_width(file: TextIO) -> float:
    """Columns of the terminal, or $COLUMNS; infinite for a stream that is no terminal."""
    from shutil import get_terminal_size  # here: it is slow to import

    return max(NARROWEST, get_terminal_size().columns) if file.isatty() else float("inf")


def wrapped(text: str, width: float) -> str:
    """A text in lines of at most `width` characters, continued with an indent; words stay whole."""
    options = dict(replace_whitespace=False, expand_tabs=False, break_on_hyphens=False)
    fill = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, **options).fill
    return "\n".join(line if len(line) <= width else fill(line) for line in text.split("\n"))


@contextmanager
def announced(
    activity: str, total: int | None = None, unit: str = "", *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Says on standard error what the block does, if that takes longer than two seconds.

    Sooner where nothing has been printed since the start of the process: short steps add up.
    A line, or on a terminal a progress bar where `total` is known. Yields a function that counts how many of
    the `total` units are done. `shown` is False on ranks other than 0.
    """
    if not shown:
        yield lambda count: None
        return
    done, bar, lock = 0, None, threading.Lock()

    def appear() -> None:
        nonlocal bar
        with lock:
            if timer.finished.is_set():
                return
            if total and sys.stderr.isatty() and find_spec("tqdm"):
                from tqdm import tqdm

                form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left"
                numbers = dict(total=total, initial=done, unit=unit, unit_scale=total > 9999)
                bar = tqdm(
                    desc=printable(activity), leave=False, dynamic_ncols=True, bar_format=form, **numbers
                )
            else:
                say(f"{activity} ...", stream="stderr")

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if bar is not None:
                bar.update(count)

    silent = 0.0 if has_spoken.is_set() else time.monotonic() - PROCESS_START
    timer = threading.Timer(max(LONG_SECONDS - silent, LONG_SECONDS / 8), appear)
    timer.daemon = True
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        with lock:
            if bar is not None:
                bar.close()
