"""Tokens per second that the data loader reads from shards in shuffled order, and its memory."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.command_line import ArgumentParser, positive_int
from utils.data_loader import WindowLoader
from utils.runtime import peak_memory_bytes
from utils.shards.format import shard_name, write_shard
from utils.shards.stream import ShardStream
from utils.tokenizer import GPT2_VOCAB_SIZE

CPU = torch.device("cpu")
MICRO_BATCH, SEQ_LEN = 64, 1024
BLOCK_TOKENS = 1 << 22  # tokens drawn at one time when the shards are written


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks loader`."""
    add = parser.add_argument
    add("--num-shards", type=positive_int, default=3, help="number of temporary shards")
    add("--shard-tokens", type=positive_int, default=100_000_000, help="number of tokens per shard")
    add("--batches", type=positive_int, default=2000, help=f"batches of {MICRO_BATCH} x {SEQ_LEN} tokens")
    add("--runs", type=positive_int, default=7, help="number of runs; the median is reported")


def measure(args: Namespace) -> dict[str, Any]:
    """Prints tokens per second, and resident memory before the first loader and at its peak.

    Returns the figures.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.RandomState(1337)
        for number in range(1, args.num_shards + 1):
            blocks = random_blocks(draw, args.shard_tokens)
            write_shard(folder / shard_name("train", number), blocks, args.shard_tokens)
        before = peak_memory_bytes(CPU) / 1e6
        speeds = [tokens_per_second(folder, args.batches) for _ in range(args.runs)]
        peak = peak_memory_bytes(CPU) / 1e6
    median, lowest = statistics.median(speeds), min(speeds)
    print(
        f"{args.num_shards} shards of {args.shard_tokens:,} tokens, shuffled windows of {SEQ_LEN}: "
        f"median {median:,.0f} tokens/s of {args.runs} runs (lowest {lowest:,.0f}); "
        f"memory {before:,.0f} MB before, {peak:,.0f} MB at its peak"
    )
    return {
        "tokens_per_second": median,
        "lowest_tokens_per_second": lowest,
        "megabytes_before": before,
        "peak_megabytes": peak,
        "agree": True,  # there is no other implementation to compare with
    }


def tokens_per_second(folder: Path, num_batches: int) -> float:
    """The speed of a new loader over `num_batches` batches."""
    stream = ShardStream(folder, "train", GPT2_VOCAB_SIZE, SEQ_LEN)
    loader = WindowLoader(stream, SEQ_LEN, MICRO_BATCH, seed=1)
    batches = loader.train_batches(0)
    next(batches)  # computes the epoch's permutation
    started = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    seconds = time.perf_counter() - started
    batches.close()
    return num_batches * MICRO_BATCH * SEQ_LEN / seconds


def random_blocks(draw: np.random.RandomState, num_tokens: int) -> Iterator[np.ndarray]:
    """Random tokens, `num_tokens` in total, in blocks of at most BLOCK_TOKENS."""
    for start in range(0, num_tokens, BLOCK_TOKENS):
        count = min(BLOCK_TOKENS, num_tokens - start)
        yield draw.randint(0, GPT2_VOCAB_SIZE, count).astype(np.uint16)
