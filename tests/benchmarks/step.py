"""A training step: ours beside plain eager PyTorch and Hugging Face, same weights, batch and threads.

Each runs in a process of its own, in turns, on one batch of random tokens. The first losses must be equal.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

from gpt_model import GPT, GPTConfig
from tests.benchmarks.interleaved import Contender, in_pairs, product_flops
from tests.benchmarks.plain_gpt2 import plain_adamw, plain_step, plain_twin
from utils.command_line import positive_int
from utils.errors import UserError
from utils.runtime import (
    DTYPES,
    OutOfMemory,
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    keep_freed_memory,
    make_scaler,
    peak_flops,
    set_numerics,
)
from utils.tokenizer import PADDED_GPT2_VOCAB

# Largest differences of the first losses that are rounding: near 10.8, float32 has numbers every 1e-6. On a
# GPU, products are made of numbers of 8 (bf16) to 10 bits (TF32).
AGREE, AGREE_ON_GPU = 1e-5, 1e-2
WARM_UP = 2  # rounds that do not count
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 6e-4, 0.1, 1.0


class Size(NamedTuple):
    """Of a model and of one update."""

    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int  # T
    micro_batch: int  # B
    micro_steps: int = 1

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch * self.micro_steps


def sizes(device_type: str) -> dict[str, Size]:
    """What is measured by default on a kind of device, by name."""
    from train_gpt import MICRO_BATCH, N_EMBD, N_HEAD, N_LAYER, PRESETS, SEQ_LEN, TOTAL_BATCH_TOKENS

    if device_type == "cuda":
        micro_steps = TOTAL_BATCH_TOKENS // (MICRO_BATCH * SEQ_LEN)
        return {"124M": Size(N_LAYER, N_HEAD, N_EMBD, SEQ_LEN, MICRO_BATCH, micro_steps)}
    tiny = PRESETS["tiny"]
    names = ("n_layer", "n_head", "n_embd", "seq_len", "micro_batch")
    return {
        "6x384": Size(6, 6, 384, 256, 8),
        "124M": Size(N_LAYER, N_HEAD, N_EMBD, 512, 4),
        "tiny": Size(*(tiny[name] for name in names)),
    }


def add_arguments(parser) -> None:
    """The flags of `python -m tests.benchmarks step`."""
    add = parser.add_argument
    add("--size", help="6x384, 124M or tiny on a CPU, 124M on CUDA; default: all of them")
    add("--n-layer", type=positive_int, help="another size: layers")
    add("--n-head", type=positive_int, help="attention heads")
    add("--n-embd", type=positive_int, help="channels")
    add("--seq-len", type=positive_int, help="tokens of a row")
    add("--micro-batch", type=positive_int, help="rows in the model at one time")
    add("--micro-steps", type=positive_int, help="micro-batches of an update")
    add("--vocab-size", type=positive_int, default=PADDED_GPT2_VOCAB, help="words")
    add("--rounds", type=positive_int, default=7, help=f"that count, after {WARM_UP} that do not")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix products")


# ------------------------------------------------------------------------------------------------------------
# The contenders. Each function runs in a process of its own; returns (device, a step that returns its loss).


def fresh_model(size: Size, vocab_size: int, device: torch.device) -> GPT:
    """The weights that all start from."""
    torch.manual_seed(1337)
    config = GPTConfig(size.seq_len, vocab_size, size.n_layer, size.n_head, size.n_embd)
    return GPT(config).to(device)


def random_batches(size: Size, vocab_size: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """The micro-batches of every update: (idx, targets), each (B, T)."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, size.micro_batch, size.seq_len)
    return [
        tuple(torch.randint(vocab_size, shape, generator=draw).to(device)) for _ in range(size.micro_steps)
    ]


def prepare_ours(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype, full_logits: bool = False
) -> tuple[torch.device, Callable[[], float]]:
    """The training script's own `update`; `full_logits` takes the chunked loss out."""
    from train_gpt import Run, update
    from utils.distributed import Distributed
    from utils.training.guards import SpikeFilter
    from utils.training.resume import Progress
    from utils.training.signals import StopSignals

    if device.type == "cpu":
        keep_freed_memory()
    set_numerics(seed=1337, deterministic=False)
    model = fresh_model(size, vocab_size, device)
    trained = (lambda x, y, return_logits: (None, model(x, y)[1])) if full_logits else model
    dist = Distributed(device)
    steady = dict(max_lr=LEARNING_RATE, min_lr=LEARNING_RATE, warmup_steps=0, max_steps=10**9)
    run = Run(
        args=Namespace(grad_clip=GRAD_CLIP, log_dir=Path("log"), **steady),
        dist=dist,
        stop=StopSignals(dist),
        dtype=dtype,
        tokenizer=None,
        model=model,
        trained_model=torch.compile(trained) if choose_compile("auto", device).value else trained,
        optimizer=model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, device.type, False),
        scaler=make_scaler(device, dtype),
        spikes=SpikeFilter(0.0),
        train_loader=None,
        val_loader=None,
        hellaswag=[],
        micro_steps=size.micro_steps,
    )
    batches, progress = itertools.cycle(random_batches(size, vocab_size, device)), Progress()
    return device, lambda: update(run, batches, progress)[0]


def prepare_plain(size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype):
    """Plain eager PyTorch."""
    set_numerics(seed=1337, deterministic=False)
    model = plain_twin(fresh_model(size, vocab_size, device))
    return device, _plain_work(model, model, size, vocab_size, device, dtype)


def prepare_hugging_face(size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype):
    """GPT2LMHeadModel, without dropout as all of them, in the same plain step."""
    set_numerics(seed=1337, deterministic=False)
    model = hugging_face_twin(fresh_model(size, vocab_size, device)).train()
    return device, _plain_work(
        model, lambda idx: model(idx, use_cache=False).logits, size, vocab_size, device, dtype
    )


def _plain_work(model, logits_of, size: Size, vocab_size: int, device, dtype) -> Callable[[], float]:
    optimizer = plain_adamw(model, WEIGHT_DECAY, LEARNING_RATE)
    batches = random_batches(size, vocab_size, device)
    context, scaler = autocast(device, dtype), make_scaler(device, dtype)
    return lambda: plain_step(logits_of, optimizer, scaler, batches, context, GRAD_CLIP)


def hugging_face_twin(model: GPT):
    """transformers' GPT2LMHeadModel with the weights of `model`, on its device."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from utils.weights.export import hugging_face_config, hugging_face_weights

    vocab_size = model.config.vocab_size
    twin = GPT2LMHeadModel(GPT2Config.from_dict(hugging_face_config(model, vocab_size, end_of_text=None)))
    twin.load_state_dict(hugging_face_weights(model, vocab_size), strict=False)  # the projection is tied
    return twin.to(model.lm_head.weight.device)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def run(args) -> dict[str, Any]:
    """Measures every size that is asked for. Prints a table each; returns all figures."""
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    set_numerics(seed=1337, deterministic=False)  # the limit is measured as the contenders compute
    figures = {
        "device": device_name(device),
        "dtype": str(dtype)[len("torch.") :],
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    figures["sizes"] = {
        name: measure_what_fits(name, size, args.vocab_size, device, dtype, args.rounds)
        for name, size in chosen_sizes(args, device.type).items()
    }
    figures["agree"] = all(size["losses_agree"] for size in figures["sizes"].values())
    return figures


def chosen_sizes(args, device_type: str) -> dict[str, Size]:
    """By name; flags over the named size, or over the first.

    Raises:
        UserError: there is no size of this name.
    """
    known = sizes(device_type)
    given = {name: getattr(args, name) for name in Size._fields if getattr(args, name)}
    if args.size is not None and args.size not in known:
        raise UserError(f"--size {args.size!r} (expected {', '.join(known)})", "leave it out for all")
    if given:
        return {"custom": known[args.size or next(iter(known))]._replace(**given)}
    return known if args.size is None else {args.size: known[args.size]}


def measure_what_fits(name: str, size: Size, *arguments) -> dict[str, Any]:
    """`measure` with the largest micro-batch for which all contenders have memory; the update stays as large.

    Raises:
        UserError: the memory does not suffice for the smallest.
    """
    while True:
        try:
            return measure(name, size, *arguments)
        except OutOfMemory as error:
            if size.micro_batch % 2:
                what = f"{name}: out of memory with a micro-batch of {size.micro_batch}"
                raise UserError(what, "measure a smaller model, or give --micro-batch") from error
            size = size._replace(micro_batch=size.micro_batch // 2, micro_steps=2 * size.micro_steps)
            reason = str(error).split("\n")[0]
            print(f"{name}: {reason}; all go on with B{size.micro_batch} x {size.micro_steps}", flush=True)


def measure(
    name: str, size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Lets all contenders make steps of one size, prints a table, and returns what is in it.

    Raises:
        OutOfMemory: a contender's device has no room for the micro-batch.
    """
    arguments = (size, vocab_size, device, dtype)
    ours = Contender("ours", prepare_ours, *arguments)
    others = [Contender("plain eager", prepare_plain, *arguments)]
    others.append(Contender("Hugging Face", prepare_hugging_face, *arguments))
    if device.type == "cuda":  # what the chunked loss brings where the rest is compiled
        others.append(Contender("ours, full logits", prepare_ours, *arguments, True))
    contenders = [ours, *others]
    try:
        for contender in contenders:
            contender.ready()
        limit = product_flops(device, dtype)
        ratios = dict(zip(others, in_pairs(ours, others, rounds, WARM_UP)))
        limit = max(limit, product_flops(device, dtype))  # other work may have disturbed the first
    except OutOfMemory:
        for contender in contenders:
            contender.abandon()
        raise
    for contender in contenders:
        contender.finish()

    model = fresh_model(size, vocab_size, torch.device("cpu"))
    flops = model.flops_per_token(size.seq_len) * size.tokens
    print(
        f"\n{name}: {model.num_parameters() / 1e6:.1f}M parameters, {size.n_layer} x {size.n_embd}, "
        f"V {vocab_size}, B{size.micro_batch} x T{size.seq_len} x {size.micro_steps}; "
        f"products run at {limit / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':18}{'ms':>9}{'tokens/s':>10}{'of limit':>10}{'MFU':>8}{'memory':>10}{'time':>8}{'memory':>8}")
    rows = {
        contender.name: row(contender, ours, ratios.get(contender, 1.0), size.tokens, flops, limit, device)
        for contender in contenders
    }
    differences = [[abs(a - b) for a, b in zip(other.results, ours.results)] for other in others]
    first, later = max(steps[0] for steps in differences), max(map(max, differences))
    exact = dtype == torch.float32 and device.type == "cpu"
    limit_apart = AGREE if exact else AGREE_ON_GPU
    agree = all(steps[0] < limit_apart for steps in differences)  # not so where one is NaN
    print(
        f"losses {'agree' if agree else 'DISAGREE'}: {first:.1e} apart at the first step "
        f"(limit {limit_apart:g}), {later:.1e} over all {WARM_UP + rounds}",
        flush=True,
    )
    return {
        **size._asdict(),
        "vocab_size": vocab_size,
        "parameters": model.num_parameters(),
        "product_flops_per_second": limit,
        "contenders": rows,
        "first_losses_apart": first,
        "losses_apart": later,
        "losses_agree": agree,
    }


def row(
    contender: Contender,
    ours: Contender,
    ratio: float,
    tokens: int,
    flops: float,
    limit: float,
    device: torch.device,
) -> dict[str, Any]:
    """Prints a line of the table and returns its figures. Ratios say how many times ours it needs."""
    data_sheet = peak_flops(device)
    figures = {
        "seconds": contender.median,
        "tokens_per_second": tokens / contender.median,
        "share_of_products": flops / contender.median / limit,
        "mfu": flops / contender.median / data_sheet if data_sheet else None,
        "peak_memory_bytes": contender.memory,
        "time_ratio": ratio,
        "memory_ratio": contender.memory / ours.memory,
    }
    mfu = "n/a" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    print(
        f"{contender.name:18}{1e3 * figures['seconds']:9,.1f}{figures['tokens_per_second']:10,.0f}"
        f"{figures['share_of_products']:10.0%}{mfu:>8}{figures['peak_memory_bytes'] / 1e9:7.2f} GB"
        f"{ratio:7.2f}x{figures['memory_ratio']:7.2f}x"
    )
    return figures
