"""Tokens per second that the loader hands over from shards, shuffled, and the memory that it takes."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from utils.command_line import positive_int
from utils.data_loader import WindowLoader
from utils.runtime import peak_memory_bytes
from utils.shards.format import shard_name, write_shard
from utils.shards.stream import ShardStream
from utils.tokenizer import GPT2Tokenizer

CPU = torch.device("cpu")
MICRO_BATCH, SEQ_LEN = 64, 1024
WINDOWS_PER_STEP = 512  # 524,288 tokens


def add_arguments(parser) -> None:
    """The flags of `python -m tests.benchmarks loader`."""
    parser.add_argument(
        "--num-shards", type=positive_int, default=3, help="written for the trial, then deleted"
    )
    parser.add_argument("--shard-tokens", type=positive_int, default=100_000_000, help="tokens in each")
    parser.add_argument(
        "--batches", type=positive_int, default=2000, help=f"of {MICRO_BATCH} x {SEQ_LEN} tokens"
    )
    parser.add_argument("--runs", type=positive_int, default=7, help="the median counts")


def run(args) -> dict:
    """Prints tokens per second, and resident memory before the loader was made and at its highest.

    Returns the figures.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.RandomState(1337)
        for number in range(args.num_shards):
            blocks = _random_blocks(draw, args.shard_tokens)
            write_shard(folder / shard_name("train", number + 1), blocks, args.shard_tokens)
        before = peak_memory_bytes(CPU) / 1e6
        speeds = sorted(_tokens_per_second(folder, args.batches) for _ in range(args.runs))
        median = speeds[len(speeds) // 2]
        print(
            f"{args.num_shards} shards of {args.shard_tokens:,} tokens, shuffled windows of {SEQ_LEN}: "
            f"median {median:,.0f} tokens/s of {args.runs} runs "
            f"(lowest {speeds[0]:,.0f}); "
            f"memory {before:,.0f} MB before, {peak_memory_bytes(CPU) / 1e6:,.0f} MB at most"
        )
    return {
        "tokens_per_second": median,
        "lowest_tokens_per_second": speeds[0],
        "megabytes_before": before,
        "peak_megabytes": peak_memory_bytes(CPU) / 1e6,
        "agree": True,  # it is compared with nothing
    }


def _tokens_per_second(folder: Path, num_batches: int) -> float:
    stream = ShardStream(folder, "train", GPT2Tokenizer.num_words, SEQ_LEN)
    loader = WindowLoader(stream, SEQ_LEN, MICRO_BATCH, seed=1)
    batches = loader.train_batches(0, WINDOWS_PER_STEP)
    next(batches)  # makes the epoch's order
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    seconds = time.perf_counter() - start
    batches.close()
    return num_batches * MICRO_BATCH * SEQ_LEN / seconds


def _random_blocks(draw: np.random.RandomState, num_tokens: int):
    for start in range(0, num_tokens, 1 << 22):
        yield draw.randint(0, GPT2Tokenizer.num_words, min(1 << 22, num_tokens - start)).astype(np.uint16)
