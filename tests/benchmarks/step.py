"""A training step: this project, plain eager PyTorch, and Hugging Face, from the same weights and batches.

Each implementation runs in a process of its own; the processes work alternately, with equally many threads,
on random tokens. The losses of the first step must agree.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_model import GPT, GPTConfig
from tests.benchmarks.interleaved import BenchmarkProcess, compare_interleaved, matmul_flops_per_second
from tests.benchmarks.plain_gpt2 import plain_adamw, plain_step, plain_twin
from utils.command_line import ArgumentParser, UserError, positive_int
from utils.distributed import Distributed
from utils.runtime import (
    DTYPES,
    autocast,
    choose_device,
    choose_dtype,
    choose_matmul,
    device_name,
    find_triton,
    keep_freed_memory,
    make_scaler,
    peak_flops,
    set_numerics,
)
from utils.tokenizer import PADDED_GPT2_VOCAB
from utils.training.guards import SpikeFilter
from utils.training.state import TrainState

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

# Largest differences of first losses that rounding explains: float32 near 10.8 has steps of 1e-6; on a GPU,
# or in bf16, matmuls round their inputs to 8 (bf16) to 11 (TF32) significant bits.
MAX_DIFFERENCE, MAX_DIFFERENCE_LOW_PRECISION = 1e-5, 1e-2
# Untimed rounds after the first step of each; on CUDA every timed step has an untimed one just before it.
WARM_UP = {"cpu": 1, "cuda": 0}
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 6e-4, 0.1, 1.0

Step = Callable[[], float]  # makes an update and returns its loss


class Size(NamedTuple):
    """Sizes of a model and of one update."""

    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int  # T
    micro_batch: int  # B
    micro_steps: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of an update."""
        return self.seq_len * self.micro_batch * self.micro_steps


def default_sizes(device_type: str) -> dict[str, Size]:
    """The sizes that are measured by default on this type of device, by name."""
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


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks step`."""
    add = parser.add_argument
    add("--size", help="6x384, 124M or tiny on a CPU, 124M on CUDA; default: all of them")
    add("--n-layer", type=positive_int, help="instead of that of the size: number of layers")
    add("--n-head", type=positive_int, help="number of attention heads")
    add("--n-embd", type=positive_int, help="number of channels")
    add("--seq-len", type=positive_int, help="T: tokens per row")
    add("--micro-batch", type=positive_int, help="B: rows per forward pass")
    add("--micro-steps", type=positive_int, help="number of micro-batches per update")
    add("--vocab-size", type=positive_int, default=PADDED_GPT2_VOCAB, help="vocabulary size")
    add("--rounds", type=positive_int, default=7, help="number of timed rounds")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the matmuls")


# ------------------------------------------------------------------------------------------------------------
# The implementations. Each `prepare` function runs in a process of its own; returns (device, step).


def fresh_model(size: Size, vocab_size: int, device: torch.device) -> GPT:
    """The model from whose weights all implementations start."""
    torch.manual_seed(1337)
    config = GPTConfig(size.seq_len, vocab_size, size.n_layer, size.n_head, size.n_embd)
    return GPT(config).to(device)


def random_batches(size: Size, vocab_size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of every update: (idx, targets), each (B, T); the same tokens for every B."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, size.micro_batch * size.micro_steps, size.seq_len)
    idx, targets = torch.randint(vocab_size, shape, generator=generator).to(device)
    return list(zip(idx.split(size.micro_batch), targets.split(size.micro_batch), strict=True))


class FullLogits(nn.Module):
    """Computes the loss of a model from all its logits at once, instead of in chunks."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor, *, return_logits: bool) -> tuple[None, Tensor]:
        return None, self.model(idx, targets)[1]


def prepare_ours(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype, *, full_logits: bool = False,
    recompute: bool = False,
) -> tuple[torch.device, Step]:  # fmt: skip
    """The training script's own `update`; with `full_logits`, without the chunked loss."""
    from train_gpt import update

    if device.type == "cpu":
        keep_freed_memory()
    set_numerics(seed=1337, deterministic=False)
    model = fresh_model(size, vocab_size, device)
    model.recompute = recompute
    choose_matmul(model)
    trained_model = FullLogits(model) if full_logits else model
    if device.type == "cuda" and find_triton(device).value:
        trained_model = torch.compile(trained_model)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, device.type, is_master_process=False)
    scaler = make_scaler(device, dtype)
    state = TrainState(model, trained_model, {"optimizer": optimizer}, scaler, SpikeFilter(0.0))
    batches, dist = itertools.cycle(random_batches(size, vocab_size, device)), Distributed(device)

    def step() -> float:
        return update(state, batches, LEARNING_RATE, GRAD_CLIP, size.micro_steps, dist, dtype)[0]

    return device, step


def prepare_ours_with_full_logits(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, Step]:
    """The training script's `update` without the chunked loss."""
    return prepare_ours(size, vocab_size, device, dtype, full_logits=True)


def prepare_plain(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, Step]:
    """Plain eager PyTorch."""
    set_numerics(seed=1337, deterministic=False)
    model = plain_twin(fresh_model(size, vocab_size, device))
    return device, _reference_step(model, model, size, vocab_size, device, dtype)


def prepare_hugging_face(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, Step]:
    """transformers' GPT2LMHeadModel in the plain step; like the others without dropout."""
    set_numerics(seed=1337, deterministic=False)
    model = hugging_face_twin(fresh_model(size, vocab_size, device)).train()

    def logits_of(idx: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return model(idx, use_cache=False).logits

    return device, _reference_step(model, logits_of, size, vocab_size, device, dtype)


def _reference_step(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    size: Size,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Step:
    optimizer = plain_adamw(model, WEIGHT_DECAY, LEARNING_RATE)
    batches = random_batches(size, vocab_size, device)
    context, scaler = autocast(device, dtype), make_scaler(device, dtype)
    return lambda: plain_step(logits_of, optimizer, scaler, batches, context, GRAD_CLIP)


def hugging_face_twin(model: GPT) -> GPT2LMHeadModel:
    """transformers' GPT2LMHeadModel with the weights of `model`, on its device."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from utils.weights.export import hugging_face_config, hugging_face_weights

    vocab_size = model.config.vocab_size
    twin = GPT2LMHeadModel(GPT2Config.from_dict(hugging_face_config(model, vocab_size, end_of_text=None)))
    twin.load_state_dict(hugging_face_weights(model, vocab_size), strict=False)  # lm_head is tied to wte
    return twin.to(model.lm_head.weight.device)


# ------------------------------------------------------------------------------------------------------------
# The measurement


def measure(args: Namespace) -> dict[str, Any]:
    """Measures every requested size and prints a table for each. Returns all figures."""
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    set_numerics(seed=1337, deterministic=False)  # the limit is measured with the numerics of the steps
    figures = {
        "device": device_name(device),
        "dtype": str(dtype)[len("torch.") :],
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    figures["sizes"] = {
        name: measure_size(name, size, args.vocab_size, device, dtype, args.rounds)
        for name, size in chosen_sizes(args, device.type).items()
    }
    figures["agree"] = all(size["losses_agree"] for size in figures["sizes"].values())
    return figures


def chosen_sizes(args: Namespace, device_type: str) -> dict[str, Size]:
    """The requested sizes by name; single flags change the named size, or the first one.

    Raises:
        UserError: there is no size of this name.
    """
    known = default_sizes(device_type)
    given = {name: getattr(args, name) for name in Size._fields if getattr(args, name)}
    if args.size is not None and args.size not in known:
        raise UserError(f"--size {args.size!r} (expected {', '.join(known)})", "omit it to measure all")
    if given:
        return {"custom": known[args.size or next(iter(known))]._replace(**given)}
    return known if args.size is None else {args.size: known[args.size]}


def measure_size(
    name: str, size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Makes steps of one size with all implementations, prints a table, and returns its content.

    An implementation that does not fit the device's memory uses smaller micro-batches than the others.

    Raises:
        UserError: even its smallest micro-batch does not fit.
    """
    ours, *others = processes = start_processes(size, vocab_size, device, dtype)
    try:
        sizes = [fit_micro_batch(process, size, vocab_size, device, dtype) for process in processes]
        limit = matmul_flops_per_second(device, dtype)
        ratios = compare_interleaved(ours, others, rounds, WARM_UP.get(device.type, 1))
        limit = max(limit, matmul_flops_per_second(device, dtype))  # the first may have been disturbed
    except BaseException:
        for process in processes:
            process.kill()
        raise
    for process in processes:
        process.close()

    model = fresh_model(size, vocab_size, torch.device("cpu"))
    print(
        f"\n{name}: {model.num_parameters() / 1e6:.1f}M parameters, {size.n_layer} x {size.n_embd}, "
        f"V {vocab_size}, B{size.micro_batch} x T{size.seq_len} x {size.micro_steps}; "
        f"limit: a large matmul at {limit / 1e9:,.0f} GFLOP/s"
    )
    flops = model.flops_per_token(size.seq_len) * size.tokens
    peak = peak_flops(device)
    table = {
        process.name: {
            "micro_batch": own_size.micro_batch,
            "seconds": process.median_seconds,
            "tokens_per_second": size.tokens / process.median_seconds,
            "share_of_products": flops / process.median_seconds / limit,  # of matmuls; as in cpu_1/
            "mfu": flops / process.median_seconds / peak if peak else None,
            "peak_memory_bytes": process.peak_memory_bytes,
            "time_ratio": ratio,
            "memory_ratio": process.peak_memory_bytes / ours.peak_memory_bytes,
        }
        for process, own_size, ratio in zip(processes, sizes, (1.0, *ratios), strict=True)
    }
    print_table(table)
    exact = dtype == torch.float32 and device.type == "cpu"
    return {
        **size._asdict(),
        "vocab_size": vocab_size,
        "parameters": model.num_parameters(),
        "product_flops_per_second": limit,
        "contenders": table,
        **compare_losses(ours, others, MAX_DIFFERENCE if exact else MAX_DIFFERENCE_LOW_PRECISION),
    }


def start_processes(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> list[BenchmarkProcess]:
    """Starts a process for each implementation, ours first."""
    prepare_functions = {
        "ours": prepare_ours,
        "plain eager": prepare_plain,
        "Hugging Face": prepare_hugging_face,
    }
    if device.type == "cuda":  # shows what the chunked loss costs or gains where the rest is compiled
        prepare_functions["ours, full logits"] = prepare_ours_with_full_logits
    return [
        BenchmarkProcess(name, prepare, size, vocab_size, device, dtype)
        for name, prepare in prepare_functions.items()
    ]


def fit_micro_batch(process: BenchmarkProcess, size: Size, *arguments: Any) -> Size:
    """Makes a first step, and returns the size with which it fits the device's memory.

    Where it does not, a new process tries half the rows and twice the micro-steps: the same update.

    Raises:
        UserError: the number of rows cannot be halved any more.
    """
    while True:
        try:
            process.wait_until_ready()
            process.execute(timed=False)
            return size
        except torch.OutOfMemoryError as error:
            process.kill()
            if size.micro_batch % 2:
                what = f"{process.name}: out of memory with a micro-batch of {size.micro_batch}"
                raise UserError(what, "measure a smaller model, or give --micro-batch") from error
            size = size._replace(micro_batch=size.micro_batch // 2, micro_steps=2 * size.micro_steps)
            reason = str(error).split("\n")[0]
            print(f"{reason}; retrying with B{size.micro_batch} x {size.micro_steps}", flush=True)
            process.start(size, *arguments)


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """Prints a line for each implementation."""
    columns = f"{'ms':>9}{'tokens/s':>10}{'of limit':>10}{'MFU':>8}{'memory':>10}{'time':>8}{'memory':>8}"
    print(f"{'':17}{'B':>5}{columns}")
    for name, row in table.items():
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{name:17}{row['micro_batch']:5}{1e3 * row['seconds']:9,.1f}{row['tokens_per_second']:10,.0f}"
            f"{row['share_of_products']:10.0%}{mfu:>8}{row['peak_memory_bytes'] / 1e9:7.2f} GB"
            f"{row['time_ratio']:7.2f}x{row['memory_ratio']:7.2f}x"
        )


def compare_losses(
    ours: BenchmarkProcess, others: Sequence[BenchmarkProcess], max_difference: float
) -> dict[str, Any]:
    """Compares the losses of all steps with ours, prints a line, and returns the figures.

    Only the first step decides whether they agree: later ones start from weights that rounding has changed.
    """
    differences = []
    for other in others:  # ours has made more steps: one before each step of each of the others
        pairs = zip(other.results, ours.results, strict=False)
        differences.append([abs(loss - our_loss) for loss, our_loss in pairs])
    first, largest = max(steps[0] for steps in differences), max(map(max, differences))
    agree = all(steps[0] < max_difference for steps in differences)  # False for NaN
    print(
        f"losses {'agree' if agree else 'DISAGREE'}: they differ by {first:.1e} in the first step "
        f"(limit {max_difference:g}), by {largest:.1e} in any step",
        flush=True,
    )
    return {"first_losses_apart": first, "losses_apart": largest, "losses_agree": agree}
