"""Samples one text: this project, Hugging Face with its cache, and plain PyTorch without a cache.

Greedy decoding in float32. The weights are random, which costs as much as trained ones. All must produce the
same tokens.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from gpt_model import GPT
from tests.benchmarks.interleaved import BenchmarkProcess, read_bandwidth
from tests.benchmarks.plain_gpt2 import plain_greedy, plain_twin
from tests.benchmarks.step import Size, fresh_model, hugging_face_twin
from utils.command_line import ArgumentParser, positive_int
from utils.runtime import choose_device, choose_matmul, device_name
from utils.tokenizer import END_OF_TEXT_ID, PADDED_GPT2_VOCAB

PROMPT = [[END_OF_TEXT_ID]]  # (1, 1)


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks generate`."""
    add = parser.add_argument
    add("--n-layer", type=positive_int, default=12, help="number of layers")
    add("--n-head", type=positive_int, default=12, help="number of attention heads")
    add("--n-embd", type=positive_int, default=768, help="number of channels")
    add("--max-new-tokens", type=positive_int, default=512, help="length of the text in tokens")
    add("--rounds", type=positive_int, default=8, help="number of texts; without a cache, a part of one each")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


# ------------------------------------------------------------------------------------------------------------
# The implementations. Each function runs in a process of its own; returns (device, work).


def model_for(args: Namespace, device: torch.device) -> GPT:
    """A model with random weights whose block holds the whole text."""
    size = Size(args.n_layer, args.n_head, args.n_embd, len(PROMPT[0]) + args.max_new_tokens, 1)
    return fresh_model(size, PADDED_GPT2_VOCAB, device).eval()


def prepare_ours(args: Namespace, device: torch.device) -> tuple[torch.device, Callable[[], list[int]]]:
    """`GPT.generate`; the work returns the ids of the text, prompt included."""
    model, prompt = model_for(args, device), torch.tensor(PROMPT, device=device)
    choose_matmul(model)
    return device, lambda: model.generate(prompt, args.max_new_tokens, temperature=0)[0].tolist()


def prepare_hugging_face(
    args: Namespace, device: torch.device
) -> tuple[torch.device, Callable[[], list[int]]]:
    """transformers' `generate` with its cache; the work returns the ids of the text."""
    model, prompt = hugging_face_twin(model_for(args, device)).eval(), torch.tensor(PROMPT, device=device)
    length = dict(min_new_tokens=args.max_new_tokens, max_new_tokens=args.max_new_tokens)
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)
    return device, lambda: model.generate(prompt, **options)[0].tolist()


def prepare_plain(
    args: Namespace, device: torch.device
) -> tuple[torch.device, Callable[[list[int], int], list[int]]]:
    """Plain PyTorch; the work continues given ids by a number of tokens and returns all ids."""
    model = plain_twin(model_for(args, device))

    def work(ids: list[int], num_tokens: int) -> list[int]:
        return plain_greedy(model, torch.tensor([ids], device=device), num_tokens)[0].tolist()

    return device, work


# ------------------------------------------------------------------------------------------------------------
# The measurement


def measure(args: Namespace) -> dict[str, Any]:
    """Prints a table of the three implementations and whether their tokens agree. Returns all figures."""
    device, num_tokens = choose_device(args.device).value, args.max_new_tokens
    ours = BenchmarkProcess("ours", prepare_ours, args, device)
    hugging_face = BenchmarkProcess("Hugging Face", prepare_hugging_face, args, device)
    plain = BenchmarkProcess("no cache", prepare_plain, args, device)
    ratio, agree = sample_interleaved(ours, hugging_face, plain, args.rounds, num_tokens)
    model = model_for(args, torch.device("cpu"))
    # Each token reads all float32 weights once, except the embeddings of the other positions.
    limit = read_bandwidth(device) / (4 * model.num_parameters(count_positions=False))
    figures = {
        "device": device_name(device),
        "parameters": model.num_parameters(),
        "new_tokens": num_tokens,
        "rounds": args.rounds,
        "limit_tokens_per_second": limit,
        "agree": agree,
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    print(f"{'':14}{'tokens/s':>10}{'of limit':>10}{'memory':>11}{'time':>8}")
    plain_seconds = sum(plain.seconds)  # its rounds together are one text
    for process, seconds, time_ratio in (
        (ours, ours.median_seconds, 1.0),
        (hugging_face, hugging_face.median_seconds, ratio),
        (plain, plain_seconds, plain_seconds / ours.median_seconds),
    ):
        speed = num_tokens / seconds
        figures[process.name] = {
            "tokens_per_second": speed,
            "share_of_limit": speed / limit,
            "peak_memory_bytes": process.peak_memory_bytes,
            "time_ratio": time_ratio,
        }
        memory = process.peak_memory_bytes / 1e9
        print(f"{process.name:14}{speed:10,.1f}{speed / limit:10.0%}{memory:8.2f} GB{time_ratio:7.2f}x")
    print("all produced the same tokens" if agree else "the tokens DISAGREE")
    return figures


def sample_interleaved(
    ours: BenchmarkProcess,
    hugging_face: BenchmarkProcess,
    plain: BenchmarkProcess,
    rounds: int,
    num_tokens: int,
) -> tuple[float, bool]:
    """Samples the text in all processes, `rounds` times after a warm-up, and closes them.

    Returns:
        The median ratio of Hugging Face's time to ours, and whether all texts were the same.
    """
    processes = (ours, hugging_face, plain)
    for process in processes:
        process.wait_until_ready()
    text = ours.execute(timed=False)
    agree = hugging_face.execute(timed=False) == text
    plain.execute(text[:1], 1, timed=False)
    ratios = []
    for number in range(rounds):
        ours.execute()
        hugging_face.execute()
        ratios.append(hugging_face.seconds[-1] / ours.seconds[-1])
        # Without a cache the whole text takes minutes, so every round adds the next part of it.
        start, end = (len(PROMPT[0]) + n * num_tokens // rounds for n in (number, number + 1))
        agree = plain.execute(text[:start], end - start) == text[:end] and agree
    for process in processes:
        process.close()
    agree = agree and all(other == text for other in ours.results + hugging_face.results)
    return statistics.median(ratios), agree
