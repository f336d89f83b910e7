"""Activation recomputation (`--recompute`): what an update holds in memory, and its time, with and without.

Both forms run in processes of their own, in turn, and make `train_gpt.update`. What each holds at its peak
beyond parameters, gradients and moments is its activations: a vocabulary of 512 leaves little else. The
losses must be equal, on a CPU bit for bit.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.benchmarks.interleaved import BenchmarkProcess, compare_interleaved, reset_peak_memory
from tests.benchmarks.step import MAX_DIFFERENCE_LOW_PRECISION, WARM_UP, Size, fresh_model, prepare_ours
from utils.command_line import ArgumentParser, positive_int
from utils.runtime import DTYPES, choose_device, choose_dtype, device_name, peak_memory_bytes

SIZE = Size(n_layer=24, n_head=8, n_embd=512, seq_len=512, micro_batch=4)
GRADIENT_AND_MOMENTS_BYTES = 12  # per parameter, all float32


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks recompute`."""
    add = parser.add_argument
    for name, value in SIZE._asdict().items():
        add(
            f"--{name.replace('_', '-')}",
            type=positive_int,
            default=value,
            help="of the model and its update",
        )
    add("--vocab-size", type=positive_int, default=512, help="vocabulary size")
    add("--rounds", type=positive_int, default=3, help="number of timed rounds")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the matmuls")


def prepare(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype, *, recompute: bool
) -> tuple[torch.device, Callable[[], tuple[float, int]]]:
    """`prepare_ours` with a step that returns its loss, and the peak memory so far beyond the parameters."""
    device, step = prepare_ours(size, vocab_size, device, dtype, recompute=recompute)
    reset_peak_memory(device)
    before = peak_memory_bytes(device)  # Python, PyTorch and the parameters
    return device, lambda: (step(), peak_memory_bytes(device) - before)


def measure(args: Namespace) -> dict[str, Any]:
    """Prints a line for each form, and whether their losses are equal. Returns all figures."""
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    size = Size(*(getattr(args, name) for name in Size._fields))
    num_parameters = fresh_model(size, args.vocab_size, torch.device("cpu")).num_parameters()
    processes = [
        BenchmarkProcess(name, partial(prepare, recompute=recompute), size, args.vocab_size, device, dtype)
        for name, recompute in (("plain", False), ("recompute", True))
    ]
    for process in processes:
        process.wait_until_ready()
        process.execute(timed=False)  # allocates the moments
    plain, recompute = processes
    (time_ratio,) = compare_interleaved(plain, [recompute], args.rounds, WARM_UP.get(device.type, 1))
    for process in processes:
        process.close()
    figures = {
        **dict(size._asdict(), vocab_size=args.vocab_size, parameters=num_parameters),
        **dict(device=device_name(device), dtype=str(dtype)[len("torch.") :], time_ratio=time_ratio),
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items() if name != "time_ratio"))
    for process in processes:
        held = process.results[-1][1] - GRADIENT_AND_MOMENTS_BYTES * num_parameters
        figures[process.name] = {"seconds": process.median_seconds, "activation_bytes": held}
        print(
            f"{process.name:10}{1e3 * process.median_seconds:10,.1f} ms{held / 1e6:10,.1f} MB of activations"
        )
    ratio = figures["plain"]["activation_bytes"] / figures["recompute"]["activation_bytes"]
    print(f"recompute holds {ratio:.2f} times less, and takes {time_ratio:.2f} times as long")
    return {**figures, "memory_ratio": ratio, **compare_losses(plain, recompute, exact=device.type == "cpu")}


def compare_losses(plain: BenchmarkProcess, recompute: BenchmarkProcess, *, exact: bool) -> dict[str, Any]:
    """Compares the losses of all updates, which must be equal if `exact`, prints a line, and returns both."""
    differences = [abs(a - b) for (a, _), (b, _) in zip(plain.results, recompute.results, strict=True)]
    limit = 0 if exact else MAX_DIFFERENCE_LOW_PRECISION
    agree = all(difference <= limit for difference in differences)  # False for NaN
    print(f"losses {'agree' if agree else 'DISAGREE'}: apart by {max(differences):g} (limit {limit:g})")
    return {"losses_apart": max(differences), "agree": agree}
