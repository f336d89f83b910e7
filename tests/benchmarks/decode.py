"""Sampling with a static cache and CUDA graphs, and without: one text and several together, float32 and bf16.

Greedy decoding with random weights, all in this process. In float32 every token must be the likeliest one of
a pass over the whole text, without a cache. On a CPU the static decoder repeats its step without a graph. The
forms without graphs attend without cuDNN.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gpt_model
from gpt_model import GPT
from tests.benchmarks.generate import model_for
from tests.benchmarks.interleaved import read_bandwidth, time_once
from tests.benchmarks.step import hugging_face_twin
from utils.command_line import ArgumentParser, positive_int
from utils.runtime import DTYPES, choose_device, device_name

# Logits, of which the largest is about 2, that differ by less are equal up to rounding in float32.
MAX_DIFFERENCE = 1e-3

Sampler = Callable[[Tensor, int], Tensor]  # continues prompts (B, 1) by a number of tokens


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks decode`."""
    add = parser.add_argument
    add("--n-layer", type=positive_int, default=12, help="number of layers")
    add("--n-head", type=positive_int, default=12, help="number of attention heads")
    add("--n-embd", type=positive_int, default=768, help="number of channels")
    add("--max-new-tokens", type=positive_int, default=512, help="length of a text in tokens")
    add("--texts", type=positive_int, default=8, help="number of texts sampled together, besides one alone")
    add("--rounds", type=positive_int, default=3, help="number of timed executions; the median is reported")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def sharp_model(args: Namespace, device: torch.device) -> GPT:
    """A model whose tokens depend on all earlier ones; a newly initialised one repeats its last token."""
    model = model_for(args, device)
    with torch.no_grad():
        for name, weight in model.transformer.h.named_parameters():
            if name.endswith("weight") and weight.dim() == 2:
                weight.mul_(5)
    return model


def ours(model: GPT, prompt: Tensor, num_tokens: int, *, graphs: bool) -> Tensor:
    """`GPT.generate` with the static decoder or without it, whatever the device."""
    with mock.patch.object(gpt_model, "graph_pays", lambda device, max_new_tokens: graphs):
        return model.generate(prompt, num_tokens, temperature=0)


def hugging_face(twin: Any, prompt: Tensor, num_tokens: int) -> Tensor:
    """transformers' `generate` with its cache."""
    length = dict(min_new_tokens=num_tokens, max_new_tokens=num_tokens)
    mask = torch.ones_like(prompt)
    return twin.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def without_cudnn(sampler: Sampler, prompt: Tensor, num_tokens: int) -> Tensor:
    """For texts that grow by a token at a time: cuDNN would plan its attention anew for each length."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return sampler(prompt, num_tokens)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@torch.inference_mode()
def compare_with_one_pass(model: GPT, text: Tensor) -> dict[str, float]:
    """The share of tokens (B, T) that a pass without a cache finds likeliest, and the largest deficit."""
    logits = model(text[:, :-1])[0].float()  # (B, T - 1, V)
    lower = logits.amax(dim=-1) - logits.gather(-1, text[:, 1:].unsqueeze(-1)).squeeze(-1)  # (B, T - 1)
    return {"likeliest_tokens": (lower == 0).float().mean().item(), "largest_difference": lower.max().item()}


def measure(args: Namespace) -> dict[str, Any]:
    """Prints a line for each form, and whether the tokens in float32 are right. Returns all figures."""
    device = choose_device(args.device).value
    model = sharp_model(args, device)
    twin = hugging_face_twin(model).eval().to(torch.bfloat16)
    bandwidth, num_weights = read_bandwidth(device), model.num_parameters(count_positions=False)
    print(
        f"{model.num_parameters() / 1e6:.1f}M parameters, {args.max_new_tokens} tokens after a prompt of one"
    )
    print(f"{'dtype':10}{'texts':>6}  {'':14}{'tokens/s':>10}{'of limit':>10}{'likeliest':>11}{'off by':>9}")
    rows = []
    for dtype, num_texts in product(("float32", "bfloat16"), (1, args.texts)):
        model = model.to(DTYPES[dtype])
        forms = {
            "ours, graphs": partial(ours, model, graphs=True),
            "ours, eager": partial(without_cudnn, partial(ours, model, graphs=False)),
        }
        if dtype == "bfloat16":
            forms["Hugging Face"] = partial(without_cudnn, partial(hugging_face, twin))
        # The weights are read once for a token of all texts.
        limit = num_texts * bandwidth / (DTYPES[dtype].itemsize * num_weights)
        for name, sampler in forms.items():
            speed, text = measure_speed(sampler, num_texts, args, device)
            row = {"form": name, "dtype": dtype, "texts": num_texts, "tokens_per_second": speed}
            row |= {"share_of_limit": speed / limit, **compare_with_one_pass(model, text)}
            rows.append(row)
            print(
                f"{dtype:10}{num_texts:6}  {name:14}{speed:10,.0f}{speed / limit:10.0%}"
                f"{row['likeliest_tokens']:11.1%}{row['largest_difference']:9.0e}",
                flush=True,
            )
    exact = all(row["largest_difference"] < MAX_DIFFERENCE for row in rows if row["dtype"] == "float32")
    print(f"tokens in float32 {'are' if exact else 'ARE NOT'} the likeliest (limit {MAX_DIFFERENCE:g})")
    setting = {"device": device_name(device), "new_tokens": args.max_new_tokens}
    return {**setting, "rows": rows, "agree": exact}


def measure_speed(
    sampler: Sampler, num_texts: int, args: Namespace, device: torch.device
) -> tuple[float, Tensor]:
    """Median tokens per second of all texts together, and the texts (B, T)."""
    prompt = torch.arange(num_texts, device=device).unsqueeze(1)  # (B, 1)
    sampler(prompt, args.max_new_tokens)  # loads the kernels of all lengths
    work = partial(sampler, prompt, args.max_new_tokens)
    results = [time_once(work, device) for _ in range(args.rounds)]
    seconds = statistics.median(duration for duration, _ in results)
    return num_texts * args.max_new_tokens / seconds, results[0][1]
