"""HellaSwag examples per second: prefix trees in batches, beside the plain loop of four padded rows.

Random weights do: the work is the same. Both run in this process, in turns, on the same examples, and their
losses are compared.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from eval_hellaswag import completion_losses, render_multiple_choice_tensors, score_examples
from gpt_model import GPT, GPTConfig
from utils.command_line import positive_int
from utils.distributed import Distributed
from utils.hellaswag.dataset import NUM_ENDINGS, choose_directory, find_or_download, read_rows
from utils.hellaswag.examples import Example, make_example
from utils.runtime import DTYPES, autocast, choose_device, choose_dtype, device_name, peak_memory_bytes
from utils.tokenizer import PADDED_GPT2_VOCAB, GPT2Tokenizer

# Largest differences of a mean loss that are rounding, in float32 and in a dtype of 8 to 11 bits.
AGREE, AGREE_LOW = 1e-4, 5e-2


def add_arguments(parser) -> None:
    """The flags of `python -m tests.benchmarks hellaswag`."""
    add = parser.add_argument
    add("--examples", type=positive_int, default=32, help="spread over the lengths of the validation set")
    add("--rounds", type=positive_int, default=7, help="of each, in turns; the median counts")
    add("--n-layer", type=positive_int, default=12, help="layers")
    add("--n-head", type=positive_int, default=12, help="attention heads")
    add("--n-embd", type=positive_int, default=768, help="channels")
    add("--block-size", type=positive_int, default=1024, help="longest row in tokens")
    add("--batch-tokens", type=positive_int, help="positions at one time; default: by device")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix products")
    add("--hellaswag-dir", type=Path, metavar="DIR", help="default: HELLASWAG_DIR, or hellaswag/")


@torch.no_grad()
def score_padded_rows(
    model: GPT,
    rows: Sequence[dict[str, Any]],
    dtype: torch.dtype = torch.float32,
    style: str = "completion",
    tokenizer=None,
) -> np.ndarray:
    """The reference: summed losses (len(rows), 4), by a forward pass of four padded rows and all logits each.

    Args:
        rows: of the data set, not tokenized yet: this loop has always done that as it goes.
    """
    device = model.lm_head.weight.device
    tokenizer = tokenizer or GPT2Tokenizer()
    loss_sum = np.empty((len(rows), NUM_ENDINGS))
    for number, row in enumerate(rows):
        _, tokens, mask, _ = render_multiple_choice_tensors(row, tokenizer, model.config.block_size, style)
        tokens, mask = tokens.to(device), mask.to(device)
        with autocast(device, dtype):
            logits, _ = model(tokens)
        loss_sum[number] = completion_losses(tokens, mask, logits)[0].cpu().numpy()
    return loss_sum


def score_trees(
    model: GPT,
    examples: Sequence[Example],
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """The same numbers, (len(examples), 4), as the evaluation gets them; example i must have index i."""
    dist = Distributed(model.lm_head.weight.device)
    loss_sum = np.empty((len(examples), NUM_ENDINGS))
    for batch, losses in score_examples(model, examples, dtype, batch_tokens, dist):
        loss_sum[[example.index for example in batch]] = losses
    return loss_sum


def choose_rows(rows: Sequence[dict[str, Any]], count: int, group: int = 8) -> list[dict[str, Any]]:
    """Rows that stand for all: neighbours in length, in groups at equal distances in the order of length.

    Every so many rows would have the same lengths, but lie so far apart that batches of similar length were
    mostly padding, which the whole set, fifty times as dense, is not.
    """
    by_length = sorted(rows, key=lambda row: len(row["ctx"]) + sum(map(len, row["endings"])))
    count = min(count, len(rows))
    num_groups = -(-count // group)
    chosen = []
    for number in range(num_groups):
        middle = (2 * number + 1) * len(rows) // (2 * num_groups)
        size = (number + 1) * count // num_groups - number * count // num_groups
        start = min(max(0, middle - size // 2), len(rows) - size)
        chosen += by_length[start : start + size]
    return chosen


def measure_in_turns(model: GPT, rows, examples, dtype: torch.dtype, args) -> dict[str, Any]:
    """Runs both `args.rounds` times. Returns medians, memory, and how far their losses are apart."""

    def measure(score, *arguments) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        loss_sum = score(model, *arguments)  # numbers on the CPU: the device has finished
        return len(rows) / (time.perf_counter() - started), loss_sum

    measure(score_trees, examples, dtype, args.batch_tokens)
    # Before the padded loop runs: of a process on a CPU only the highest memory so far is known.
    memory = peak_memory_bytes(model.lm_head.weight.device)
    score_padded_rows(model, rows[:1], dtype)
    padded, trees = [], []
    for number in range(args.rounds):
        speed, expected = measure(score_padded_rows, rows, dtype)
        padded.append(speed)
        speed, found = measure(score_trees, examples, dtype, args.batch_tokens)
        trees.append(speed)
        print(
            f"round {number + 1}: padded {padded[-1]:.2f} examples/s, trees {trees[-1]:.2f}, "
            f"{trees[-1] / padded[-1]:.2f}x",
            flush=True,
        )
    divisors = np.stack([example.divisors for example in examples])
    expected, found = expected / divisors, found / divisors
    return {
        "padded_examples_per_second": statistics.median(padded),
        "examples_per_second": statistics.median(trees),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(trees, padded)),
        "peak_memory_bytes": memory,
        "largest_difference": float(np.abs(expected - found).max()),
        "same_predictions": int((expected.argmin(axis=1) == found.argmin(axis=1)).sum()),
    }


def run(args) -> dict[str, Any]:
    """Prints a line a round, then medians, ratio, memory, and whether the losses agree. Returns them all."""
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    path = find_or_download(choose_directory(args.hellaswag_dir), "val")
    rows = choose_rows(read_rows(path, "val"), args.examples)
    examples = [make_example(row, i, GPT2Tokenizer(), args.block_size) for i, row in enumerate(rows)]
    torch.manual_seed(1337)
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size)
    model = GPT(GPTConfig(vocab_size=PADDED_GPT2_VOCAB, **sizes)).to(device).eval()
    setting = {
        "parameters": model.num_parameters(),
        "examples": len(rows),
        "rounds": args.rounds,
        "dtype": str(dtype)[6:],
        "device": device_name(device),
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    figures = measure_in_turns(model, rows, examples, dtype, args)
    limit = AGREE if dtype == torch.float32 else AGREE_LOW
    agree = figures["largest_difference"] < limit
    print(
        f"medians: padded {figures['padded_examples_per_second']:.2f} examples/s, trees "
        f"{figures['examples_per_second']:.2f}, ratio {figures['ratio']:.2f}; peak memory of trees "
        f"{figures['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    print(
        f"mean losses {'agree' if agree else 'DISAGREE'}: largest difference "
        f"{figures['largest_difference']:.1e} (limit {limit:g}), same prediction on "
        f"{figures['same_predictions']} of {len(rows)}"
    )
    return {**setting, **figures, "agree": agree}
