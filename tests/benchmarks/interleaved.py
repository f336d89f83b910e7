"""Several ways of doing the same work, each in a process of its own, one turn after the other.

A noisy machine slows them all alike, and the most memory that each has held can be told apart.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch

from utils.cpu_matmul import linear
from utils.errors import Unfinished
from utils.runtime import OutOfMemory, peak_memory_bytes


class Contender:
    """A process that prepares some work, and then does it each time it is told to.

    Args:
        name: in words, for the console.
        prepare: a function of a module, called in the process with `arguments`; returns (device, work).

    Attributes:
        results: what the work returned, of every turn.
        seconds: of the turns that count.
        memory: the most that the process has held, in bytes; once it has finished.
    """

    def __init__(self, name: str, prepare: Callable, *arguments):
        self.name = name
        self.results: list = []
        self.seconds: list[float] = []
        self.memory = 0
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> Contender:
        """Waits until it has prepared itself; several may be started before the first is waited for."""
        self._receive()
        return self

    def turn(self, *arguments, counts: bool = True) -> Any:
        """Does the work once and returns its result."""
        self.pipe.send(arguments)
        seconds, result = self._receive()
        self.results.append(result)
        if counts:
            self.seconds.append(seconds)
        return result

    def finish(self) -> None:
        """Ends the process."""
        self.pipe.send(None)
        self.memory = self._receive()
        self.process.join()

    def abandon(self) -> None:
        """Ends the process whatever it does."""
        self.process.kill()
        self.process.join()

    @property
    def median(self) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds)

    def _receive(self) -> Any:
        """The next answer of the process.

        Raises:
            OutOfMemory: its device has no room; the process has ended.
            Unfinished: it ended in another way.
        """
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            what = f"{self.name}: its process ended with exit code {self.process.exitcode}"
            raise Unfinished(
                what, "its own message is above; if memory ran out, ask for smaller sizes"
            ) from error
        if isinstance(answer, OutOfMemory):
            raise OutOfMemory(f"{self.name}: {answer}") from answer
        return answer


def _serve(pipe, prepare: Callable, arguments: tuple) -> None:
    with contextlib.suppress(EOFError):  # the one who asks is gone
        try:
            _take_turns(pipe, prepare, arguments)
        except OutOfMemory as error:
            pipe.send(OutOfMemory(str(error)))


def _take_turns(pipe, prepare: Callable, arguments: tuple) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a daemon may have no processes of its own
    device, work = prepare(*arguments)
    on_gpu = device.type == "cuda"
    forget_peak_memory(device)
    pipe.send(None)
    while (arguments := pipe.recv()) is not None:
        if on_gpu:
            work(*arguments)  # takes again the memory that it gave back for the others' turns
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        result = work(*arguments)
        if on_gpu:
            torch.cuda.synchronize(device)
        pipe.send((time.perf_counter() - started, result))
        if on_gpu:
            torch.cuda.empty_cache()
    pipe.send(peak_memory_bytes(device))


def forget_peak_memory(device: torch.device) -> None:
    """Lets the highest memory start from what is held now, where the system can: CUDA, and Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def in_pairs(ours: Contender, others: list[Contender], rounds: int, warm_up: int) -> list[float]:
    """Ours, another, ours, the next one, ...: `rounds` times after `warm_up` that do not count.

    Returns:
        For each of the others, how many times as long as ours it took: the median over the rounds, in which
        it is compared with the turn of ours just before.
    """
    ratios: list[list[float]] = [[] for _ in others]
    for number in range(warm_up + rounds):
        counts = number >= warm_up
        for other, found in zip(others, ratios):
            ours.turn(counts=counts)
            other.turn(counts=counts)
            if counts:
                found.append(other.seconds[-1] / ours.seconds[-1])
    return [statistics.median(found) for found in ratios]


def product_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large matrix product here and now: the limit that a step is measured against."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        linear(a, b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 29) -> float:
    """Bytes per second at which memory can be read here and now."""
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - started)
    return num_bytes / min(seconds)
