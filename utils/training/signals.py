"""Stopping on a signal: the handler sets a flag, the loop polls it, and all ranks agree before any stops."""

import os
import signal
import time

from utils.distributed import Distributed, launched_by_torchrun

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells count
if hasattr(signal, "SIGUSR1"):  # sent by batch systems before the time limit; not on Windows
    EXIT_CODES[signal.SIGUSR1] = 143
SECOND_SIGINT_SECONDS = 1.0  # a launcher may deliver one Ctrl-C twice within a second


class Stopped(Exception):
    """Raised when all ranks have agreed to stop; has the signal's `name` and the process's `exit_code`."""

    def __init__(self, signal_number: int):
        self.name = signal.Signals(signal_number).name
        self.exit_code = EXIT_CODES[signal_number]
        super().__init__(self.name)


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGUSR1 inside its `with` block; the ranks of `dist` must agree to stop."""

    def __init__(self, dist: Distributed):
        self.dist, self.parent = dist, os.getppid()
        self.received, self.received_at = 0, 0.0  # the number of the signal, and when it came

    def __enter__(self) -> "StopSignals":
        self.earlier = {number: signal.signal(number, self._remember) for number in EXIT_CODES}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        waited = time.monotonic() - self.received_at
        is_second = number == signal.SIGINT == self.received and waited > SECOND_SIGINT_SECONDS
        if is_second and not launched_by_torchrun():
            os._exit(EXIT_CODES[signal.SIGINT])  # the second Ctrl-C: stop at once, without saving
        if not self.received:
            self.received, self.received_at = number, time.monotonic()

    def poll(self) -> None:
        """Raises Stopped on all ranks if one was signalled or orphaned; all must call it equally often."""
        # When torchrun is killed its workers survive, and would keep writing. A process started by hand must
        # continue when its shell ends (as under nohup).
        if launched_by_torchrun() and os.getppid() != self.parent and not self.received:
            self.received = signal.SIGTERM
        agreed = int(self.dist.max_number(self.received))
        if agreed:
            raise Stopped(agreed)
