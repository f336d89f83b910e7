"""Stopping on a signal: handlers only set a flag, the loop polls it, all ranks agree before any leaves."""

from __future__ import annotations

import os
import signal
import time

from utils.distributed import Distributed, launched_by_torchrun

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells count
if hasattr(signal, "SIGUSR1"):  # what batch systems send before the time is up; not on Windows
    EXIT_CODES[signal.SIGUSR1] = 143
SECOND_SIGINT_SECONDS = 1.0  # a launcher may forward one Ctrl-C a second time; a person takes longer


class Stopped(Exception):
    """All ranks have agreed to stop. `name` is the signal's, `exit_code` the process's."""

    def __init__(self, signal_number: int):
        self.name = signal.Signals(signal_number).name
        self.exit_code = EXIT_CODES[signal_number]
        super().__init__(self.name)


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is entered.

    Args:
        dist: the ranks that must agree.
    """

    def __init__(self, dist: Distributed):
        self.dist = dist
        self.received = 0
        self.received_at = 0.0
        self.parent = os.getppid()

    def __enter__(self) -> StopSignals:
        self.earlier = {number: signal.signal(number, self._remember) for number in EXIT_CODES}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        waited = time.monotonic() - self.received_at
        if (
            number == signal.SIGINT == self.received
            and waited > SECOND_SIGINT_SECONDS
            and not launched_by_torchrun()
        ):
            os._exit(EXIT_CODES[signal.SIGINT])  # the second Ctrl-C: at once, and nothing is saved
        if not self.received:
            self.received, self.received_at = number, time.monotonic()

    def poll(self) -> None:
        """Raises Stopped on every rank if any rank was told to stop, or has lost its launcher.

        Every rank must call it equally often: it is a collective, over the control group.
        """
        # Killed, torchrun leaves its workers behind, and they would go on writing. A process started by hand
        # keeps on when its shell goes: that is what nohup is for.
        if launched_by_torchrun() and os.getppid() != self.parent and not self.received:
            self.received = signal.SIGTERM
        agreed = int(self.dist.max_number(self.received))
        if agreed:
            raise Stopped(agreed)
