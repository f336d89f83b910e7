"""Interleaved benchmark of processes: implementations of the same work, each in a process of its own.

The processes work alternately, never at the same time, so that a disturbance of the machine slows all of them
alike. Separate processes also make the peak memory of each implementation known.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from utils.command_line import Unfinished
from utils.cpu_matmul import linear
from utils.runtime import peak_memory_bytes

Work = Callable[..., Any]
Prepare = Callable[..., tuple[torch.device, Work]]  # a module-level function, so that it can be pickled


class BenchmarkProcess:
    """A process that prepares an implementation once, and then executes its work on request.

    Args:
        name: of the implementation, for the console.
        prepare: called in the process with `arguments`; returns the device and the work.
        arguments: of `prepare`.

    Attributes:
        results: return values of all executions of the work.
        seconds: durations of the timed executions.
        peak_memory_bytes: peak memory after preparation; known once the process has been closed.
    """

    def __init__(self, name: str, prepare: Prepare, *arguments: Any):
        self.name = name
        self.prepare = prepare
        self.results: list[Any] = []
        self.seconds: list[float] = []
        self.peak_memory_bytes = 0
        self.start(*arguments)

    def start(self, *arguments: Any) -> None:
        """Starts the process; after `kill` a new one, which may have other arguments."""
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, self.prepare, arguments), daemon=True)
        self.process.start()
        child_end.close()

    def wait_until_ready(self) -> None:
        """Waits until the work is prepared; several processes may prepare theirs at the same time."""
        self._receive()

    def execute(self, *arguments: Any, timed: bool = True) -> Any:
        """Executes the work once and returns its result; its duration is recorded if `timed`."""
        self.pipe.send(arguments)
        seconds, result = self._receive()
        self.results.append(result)
        if timed:
            self.seconds.append(seconds)
        return result

    def close(self) -> None:
        """Ends the process and records its peak memory."""
        self.pipe.send(None)
        self.peak_memory_bytes = self._receive()
        self.process.join()

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.join()

    @property
    def median_seconds(self) -> float:
        """Median duration of the timed executions."""
        return statistics.median(self.seconds)

    def _receive(self) -> Any:
        """Returns the next answer of the process.

        Raises:
            torch.OutOfMemoryError: its device ran out of memory; the process has ended.
            Unfinished: the process ended for another reason.
        """
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            what = f"{self.name}: its process ended with exit code {self.process.exitcode}"
            hint = "see its message above; if memory ran out, use smaller sizes"
            raise Unfinished(what, hint) from error
        if isinstance(answer, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(f"{self.name}: {answer}") from answer
        return answer


def _serve(pipe: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(EOFError):  # the parent process has ended
        try:
            _answer_requests(pipe, prepare, arguments)
        except torch.OutOfMemoryError as error:
            pipe.send(torch.OutOfMemoryError(str(error)))


def _answer_requests(pipe: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    device, work = prepare(*arguments)
    on_gpu = device.type == "cuda"
    reset_peak_memory(device)
    pipe.send(None)
    released = False
    while (arguments := pipe.recv()) is not None:
        if released:
            work(*arguments)  # allocates again the memory that was released for the other processes
        pipe.send(time_once(partial(work, *arguments), device))
        if released := on_gpu:
            torch.cuda.empty_cache()
    pipe.send(peak_memory_bytes(device))


def reset_peak_memory(device: torch.device) -> None:
    """Sets the peak memory to what is in use now, where the system can: on CUDA, and on Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def compare_interleaved(
    ours: BenchmarkProcess, others: Sequence[BenchmarkProcess], rounds: int, warm_up: int
) -> list[float]:
    """Executes ours, another one, ours, the next one, and so on, in every round.

    Args:
        rounds: timed rounds, after `warm_up` untimed ones.

    Returns:
        For each of the others its time as a multiple of ours: the median of the ratios of all rounds, each to
        the execution of ours just before it.
    """
    ratios: list[list[float]] = [[] for _ in others]
    for number in range(warm_up + rounds):
        timed = number >= warm_up
        for other, ratios_of_other in zip(others, ratios, strict=True):
            ours.execute(timed=timed)
            other.execute(timed=timed)
            if timed:
                ratios_of_other.append(other.seconds[-1] / ours.seconds[-1])
    return [statistics.median(ratios_of_other) for ratios_of_other in ratios]


def time_once(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Executes work in this process; returns its duration in seconds and its result."""
    wait_for = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait_for(device)
    started = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - started, result


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large matmul on this machine at this moment: the limit for a training step."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        linear(a, b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 29) -> float:
    """Bytes per second at which memory can be read at this moment: the limit for sampling one text."""
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        buffer.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return num_bytes / min(seconds)
