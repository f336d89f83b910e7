"""Stopping on a signal: the handler sets a flag, the loop polls it, and all ranks agree before any stops."""

import math
import os
import signal
import time
from contextlib import ExitStack

from utils.console import PROCESS_START, watched_signals
from utils.distributed import Distributed

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells count
for name in ("SIGHUP", "SIGUSR1"):  # a closed terminal; a batch system before its time limit; not on Windows
    if hasattr(signal, name):
        EXIT_CODES[getattr(signal, name)] = 143


TIME_LIMIT = 1000  # no signal has this number


class Stopped(Exception):
    """Raised when all ranks have agreed to stop; its text is the reason, `exit_code` the process's."""

    def __init__(self, number: int):
        is_signal = number != TIME_LIMIT
        self.exit_code = EXIT_CODES[number if is_signal else signal.SIGTERM]
        super().__init__(f"received {signal.Signals(number).name}" if is_signal else "reached --max-hours")


class StopSignals:
    """Catches the signals of EXIT_CODES inside its `with` block; the ranks of `dist` must agree to stop.

    `max_hours` after the start of the process it stops as well. As long as there is nothing to save, until
    `defer`, a signal ends the process at once. One that was ignored when the process started, as SIGHUP is
    under nohup, remains ignored.
    """

    def __init__(self, dist: Distributed, max_hours: float | None = None):
        self.dist = dist
        self.end = math.inf if max_hours is None else PROCESS_START + 3600 * max_hours
        self.received = 0  # the number of the first signal
        self.deferred = False

    def __enter__(self) -> "StopSignals":
        with ExitStack() as stack:
            for number in EXIT_CODES:
                if signal.getsignal(number) != signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, self._remember))
            stack.enter_context(watched_signals(self._end_if_nothing_to_save))
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore.close()

    def defer(self) -> None:
        """From here on, signals wait for `poll`: there will be something to save."""
        self.deferred = True

    def _remember(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def _end_if_nothing_to_save(self, number: int) -> None:
        if not self.deferred and number in EXIT_CODES:
            name = signal.Signals(number).name
            os.write(2, f"received {name} before the first step: nothing to save\n".encode())
            os._exit(EXIT_CODES[number])

    def poll(self) -> None:
        """Raises Stopped on all ranks if one was signalled; all must call it equally often."""
        if time.monotonic() > self.end:
            self.received = self.received or TIME_LIMIT
        agreed = int(self.dist.max_number(self.received))
        if agreed:
            raise Stopped(agreed)
