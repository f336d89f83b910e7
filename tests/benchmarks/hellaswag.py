"""HellaSwag examples per second: prefix trees in batches, and the plain loop of four padded rows per example.

The weights are random, which costs as much as trained ones. Both forms run alternately in this process, on
the same model and examples (the padded one on a part of them, if asked), and their losses must agree.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval_hellaswag import (
    Example,
    completion_losses,
    make_example,
    render_multiple_choice_tensors,
    score_examples,
)
from gpt_model import GPT, GPTConfig
from utils.command_line import ArgumentParser, positive_int
from utils.distributed import Distributed
from utils.hellaswag.dataset import NUM_ENDINGS, choose_directory, find_or_download, read_rows
from utils.runtime import (
    DTYPES,
    autocast,
    choose_device,
    choose_dtype,
    choose_matmul,
    device_name,
    peak_memory_bytes,
)
from utils.tokenizer import PADDED_GPT2_VOCAB, GPT2Tokenizer, Tokenizer

# Largest differences of mean losses that rounding explains: in float32, and in bf16 or fp16.
MAX_DIFFERENCE, MAX_DIFFERENCE_LOW_PRECISION = 1e-4, 5e-2


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks hellaswag`."""
    add = parser.add_argument
    add("--examples", type=positive_int, default=32, help="number of validation examples, of all lengths")
    add("--padded-examples", type=positive_int, help="about how many of them as padded rows; default: all")
    add("--rounds", type=positive_int, default=7, help="number of interleaved rounds; the median is reported")
    add("--n-layer", type=positive_int, default=12, help="number of layers")
    add("--n-head", type=positive_int, default=12, help="number of attention heads")
    add("--n-embd", type=positive_int, default=768, help="number of channels")
    add("--block-size", type=positive_int, default=1024, help="longest row in tokens")
    add("--batch-tokens", type=positive_int, help="tokens per forward pass; default: by device")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the matmuls")
    add("--hellaswag-dir", type=Path, metavar="DIR", help="default: $HELLASWAG_DIR, else hellaswag/")


@torch.no_grad()
def score_padded_rows(
    model: GPT,
    rows: Sequence[dict[str, Any]],
    dtype: torch.dtype = torch.float32,
    style: str = "completion",
    tokenizer: Tokenizer | None = None,
) -> np.ndarray:
    """The reference: a forward pass over four padded rows, with all logits, for each example.

    Args:
        rows: rows of the data set; tokenized here, as this loop traditionally does.
        style, tokenizer: see `render_multiple_choice_tensors`.

    Returns:
        (len(rows), 4) summed loss of each ending in nats.
    """
    device = model.lm_head.weight.device
    tokenizer = tokenizer or GPT2Tokenizer()
    loss_sum = np.empty((len(rows), NUM_ENDINGS))
    for number, row in enumerate(rows):
        _, tokens, mask, _ = render_multiple_choice_tensors(row, tokenizer, model.config.block_size, style)
        tokens, mask = tokens.to(device), mask.to(device)  # (4, N)
        with autocast(device, dtype):
            logits, _ = model(tokens)  # (4, N, V)
        # Losses in float32 also where the logits are bf16: numpy has no bf16, and sums would lose digits.
        loss_sum[number] = completion_losses(tokens, mask, logits.float())[0].cpu().numpy()
    return loss_sum


def score_trees(
    model: GPT,
    examples: Sequence[Example],
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """The same losses, (len(examples), 4), as the evaluation computes them; example i must have index i."""
    dist = Distributed(model.lm_head.weight.device)
    loss_sum = np.empty((len(examples), NUM_ENDINGS))
    for batch, losses in score_examples(model, examples, dtype, batch_tokens, dist):
        loss_sum[[example.index for example in batch]] = losses
    return loss_sum


def choose_rows(rows: Sequence[dict[str, Any]], count: int, group: int = 8) -> list[dict[str, Any]]:
    """Chooses rows of all lengths: groups of neighbours in the order of length, at equal distances.

    Single rows at equal distances would have the same lengths, but neighbours so different that batches of
    similar length would be mostly padding. In the whole set, fifty times as dense, they are not.
    """
    by_length = sorted(rows, key=lambda row: len(row["ctx"]) + sum(map(len, row["endings"])))
    if count >= len(rows):
        return list(rows)
    num_groups = -(-count // group)
    chosen = []
    for number in range(num_groups):
        middle = (2 * number + 1) * len(rows) // (2 * num_groups)
        size = (number + 1) * count // num_groups - number * count // num_groups
        start = min(max(0, middle - size // 2), len(rows) - size)
        chosen += by_length[start : start + size]
    return chosen


def score_interleaved(
    model: GPT,
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    dtype: torch.dtype,
    rounds: int,
    batch_tokens: int | None,
    padded_examples: int | None = None,
) -> dict[str, Any]:
    """Scores with both forms alternately, `rounds` times after a warm-up, and prints a line for each round.

    The padded form gets about `padded_examples` of the rows, at equal distances. Returns the figures: median
    speeds, memory, and the differences of the losses.
    """
    part = slice(None, None, -(-len(rows) // (padded_examples or len(rows))))

    def timed(
        score: Callable[..., np.ndarray], chosen: Sequence, *arguments: Any
    ) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        loss_sum = score(model, chosen, *arguments)  # an array on the CPU, so the device has finished
        return len(chosen) / (time.perf_counter() - started), loss_sum

    timed(score_trees, examples, dtype, batch_tokens)
    # Read before the padded form runs: on a CPU only the peak of the whole process is known.
    memory = peak_memory_bytes(model.lm_head.weight.device)
    score_padded_rows(model, rows[:1], dtype)
    padded_speeds, tree_speeds = [], []
    for number in range(rounds):
        padded_speed, padded_losses = timed(score_padded_rows, rows[part], dtype)
        tree_speed, tree_losses = timed(score_trees, examples, dtype, batch_tokens)
        padded_speeds.append(padded_speed)
        tree_speeds.append(tree_speed)
        print(
            f"round {number + 1}: padded {padded_speed:.2f} examples/s, trees {tree_speed:.2f}, "
            f"{tree_speed / padded_speed:.2f}x",
            flush=True,
        )
    divisors = np.stack([example.divisors for example in examples])  # (number of examples, 4)
    expected, found = padded_losses / divisors[part], (tree_losses / divisors)[part]
    ratios = [tree / padded for tree, padded in zip(tree_speeds, padded_speeds, strict=True)]
    return {
        "padded_examples_per_second": statistics.median(padded_speeds),
        "examples_per_second": statistics.median(tree_speeds),
        "ratio": statistics.median(ratios),
        "padded_examples": len(expected),
        "peak_memory_bytes": memory,
        "largest_difference": float(np.abs(expected - found).max()),
        "same_predictions": int((expected.argmin(axis=1) == found.argmin(axis=1)).sum()),
    }


def measure(args: Namespace) -> dict[str, Any]:
    """Prints a line per round, the medians, and whether the losses agree. Returns all figures."""
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    path = find_or_download(choose_directory(args.hellaswag_dir), "val")
    rows = choose_rows(read_rows(path, "val"), args.examples)
    examples = [make_example(row, i, GPT2Tokenizer(), args.block_size) for i, row in enumerate(rows)]
    torch.manual_seed(1337)
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size)
    model = GPT(GPTConfig(vocab_size=PADDED_GPT2_VOCAB, **sizes)).to(device).eval()
    choose_matmul(model)
    setting = {
        "parameters": model.num_parameters(),
        "examples": len(rows),
        "rounds": args.rounds,
        "dtype": str(dtype)[len("torch.") :],
        "device": device_name(device),
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    chosen = (args.rounds, args.batch_tokens, args.padded_examples)
    figures = score_interleaved(model, rows, examples, dtype, *chosen)
    limit = MAX_DIFFERENCE if dtype == torch.float32 else MAX_DIFFERENCE_LOW_PRECISION
    agree = figures["largest_difference"] < limit  # False for NaN
    print(
        f"medians: padded {figures['padded_examples_per_second']:.2f} examples/s, trees "
        f"{figures['examples_per_second']:.2f}, ratio {figures['ratio']:.2f}; peak memory of trees "
        f"{figures['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    print(
        f"mean losses {'agree' if agree else 'DISAGREE'}: largest difference "
        f"{figures['largest_difference']:.1e} (limit {limit:g}), same prediction for "
        f"{figures['same_predictions']} of {figures['padded_examples']}"
    )
    return {**setting, **figures, "agree": agree}
