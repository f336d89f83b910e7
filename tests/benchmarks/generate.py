"""Sampling one text: ours beside Hugging Face with its cache, and beside plain PyTorch without one.

Greedy and in float32, from random weights, which cost as much as any: all must write the same tokens.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from tests.benchmarks.interleaved import Contender, read_bandwidth
from tests.benchmarks.plain_gpt2 import plain_greedy, plain_twin
from tests.benchmarks.step import Size, fresh_model, hugging_face_twin
from utils.command_line import positive_int
from utils.runtime import choose_device, device_name
from utils.tokenizer import PADDED_GPT2_VOCAB

PROMPT = [[50256]]  # <|endoftext|>


def add_arguments(parser) -> None:
    """The flags of `python -m tests.benchmarks generate`."""
    add = parser.add_argument
    add("--n-layer", type=positive_int, default=12, help="layers")
    add("--n-head", type=positive_int, default=12, help="attention heads")
    add("--n-embd", type=positive_int, default=768, help="channels")
    add("--max-new-tokens", type=positive_int, default=512, help="of the text")
    add("--rounds", type=positive_int, default=8, help="in each the text, and a part of it without a cache")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def model_for(args, device: torch.device):
    """Random weights, and a block that holds the whole text."""
    sizes = Size(args.n_layer, args.n_head, args.n_embd, len(PROMPT[0]) + args.max_new_tokens, 1)
    return fresh_model(sizes, PADDED_GPT2_VOCAB, device).eval()


def prepare_ours(args, device: torch.device):
    """`GPT.generate`: the tokens of the text, prompt included."""
    model, prompt = model_for(args, device), torch.tensor(PROMPT, device=device)
    return device, lambda: model.generate(prompt, args.max_new_tokens, temperature=0)[0].tolist()


def prepare_hugging_face(args, device: torch.device):
    """transformers' `generate` with its cache."""
    model, prompt = hugging_face_twin(model_for(args, device)).eval(), torch.tensor(PROMPT, device=device)
    length = dict(min_new_tokens=args.max_new_tokens, max_new_tokens=args.max_new_tokens)
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)
    return device, lambda: model.generate(prompt, **options)[0].tolist()


def prepare_plain(args, device: torch.device):
    """All of the text through the model for every token: `work(ids so far, number of tokens)`."""
    model = plain_twin(model_for(args, device))

    def work(ids: list[int], count: int) -> list[int]:
        return plain_greedy(model, torch.tensor([ids], device=device), count)[0].tolist()

    return device, work


def run(args) -> dict[str, Any]:
    """Prints a table of the three, and whether they wrote the same. Returns all figures."""
    device, total = choose_device(args.device).value, args.max_new_tokens
    ours = Contender("ours", prepare_ours, args, device)
    theirs = Contender("Hugging Face", prepare_hugging_face, args, device)
    plain = Contender("no cache", prepare_plain, args, device)
    contenders = [contender.ready() for contender in (ours, theirs, plain)]
    text = ours.turn(counts=False)
    agree = theirs.turn(counts=False) == text
    plain.turn(text[:1], 1, counts=False)
    ratios = []
    for number in range(args.rounds):
        ours.turn()
        theirs.turn()
        ratios.append(theirs.seconds[-1] / ours.seconds[-1])
        # Without a cache the whole text takes minutes: every round adds the part that follows.
        start, end = (len(PROMPT[0]) + n * total // args.rounds for n in (number, number + 1))
        agree = plain.turn(text[:start], end - start) == text[:end] and agree
    agree = agree and all(other == text for other in ours.results + theirs.results)
    for contender in contenders:
        contender.finish()

    model = model_for(args, torch.device("cpu"))
    # Every token reads all of the weights but the other tokens' positions: 4 bytes each.
    limit = read_bandwidth(device) / (4 * model.num_parameters(count_positions=False))
    figures = {
        "device": device_name(device),
        "parameters": model.num_parameters(),
        "new_tokens": total,
        "rounds": args.rounds,
        "limit_tokens_per_second": limit,
        "agree": agree,
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    print(f"{'':14}{'tokens/s':>10}{'of limit':>10}{'memory':>11}{'time':>8}")
    for contender in contenders:
        seconds = sum(plain.seconds) if contender is plain else contender.median
        ratio = statistics.median(ratios) if contender is theirs else seconds / ours.median
        figures[contender.name] = {
            "tokens_per_second": total / seconds,
            "share_of_limit": total / seconds / limit,
            "peak_memory_bytes": contender.memory,
            "time_ratio": ratio,
        }
        print(
            f"{contender.name:14}{total / seconds:10,.1f}{total / seconds / limit:10.0%}"
            f"{contender.memory / 1e9:8.2f} GB{ratio:7.2f}x"
        )
    print("all wrote the same tokens" if agree else "they DISAGREE about the tokens")
    return figures
