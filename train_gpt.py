"""Trains a GPT-2: on a laptop, on one GPU, or on many.

    python train_gpt.py                                        whatever this machine can do
    python train_gpt.py --preset char --data input.txt         a character model in a minute
    torchrun --standalone --nproc_per_node=8 train_gpt.py      the GPT-2 124M run on FineWeb-Edu

The constants are the faithful run; every one is a flag, and a preset is a small table of overrides.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

from generate import sample_texts
from gpt_model import GPT, GPTConfig
from utils import distributed, plan, runtime
from utils.checkpoint import model_path, newest_model_file, save_model_file
from utils.command_line import (
    ArgumentParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from utils.data_loader import WindowLoader
from utils.datasets import choose_source, choose_tokenizer, fetch, open_streams
from utils.distributed import Distributed
from utils.errors import Diverged, UserError, run_script
from utils.run_dir import archive_earlier_run
from utils.run_log import RunLog, Speedometer, format_duration, perplexity, prepare_log_dir
from utils.settings import accumulation_steps, check_model_reads, check_training_settings

# ------------------------------------------------------------------------------------------------------------
# The faithful run: GPT-2 124M, 10 billion tokens (settings of GPT-3 Small, Brown et al. 2020, table 2.1)

N_LAYER, N_HEAD, N_EMBD = 12, 12, 768
SEQ_LEN = 1024  # T, also the block size
MICRO_BATCH = 64  # B, rows that go through the model at one time
TOTAL_BATCH_TOKENS = 524288  # 2**19 tokens an update, over all ranks and micro-steps
MAX_STEPS = 19073  # updates: 10e9 tokens / 2**19
WARMUP_STEPS = 715  # 375 million tokens
MAX_LR, MIN_LR = 6e-4, 6e-5
WEIGHT_DECAY, GRAD_CLIP = 0.1, 1.0
VAL_EVERY, VAL_TOKENS = 250, 10485760
SAMPLE_EVERY, SAMPLE_PROMPT, SAMPLE_TOKENS, NUM_SAMPLES = 250, "Hello, I'm a language model,", 32, 4
CHECKPOINT_EVERY = 1000
SEED = 1337
LOG_DIR = Path(__file__).resolve().parent / "log"

# fmt: off
PRESETS = {
    "gpt2": {},
    # Two CPU cores, a few minutes, a megabyte of text. Narrow: the projection to 50304 words is most of the
    # work.
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=96, seq_len=64, micro_batch=8, total_batch_tokens=512,
        max_steps=1000, warmup_steps=50, max_lr=5e-3, min_lr=5e-4,
        val_every=250, sample_every=500, checkpoint_every=500,
    ),
    # Characters instead of words: 65 of them make the output layer small.
    "char": dict(
        tokenizer="char", n_layer=4, n_head=4, n_embd=128, seq_len=64, micro_batch=12, total_batch_tokens=768,
        max_steps=2000, warmup_steps=100, max_lr=1e-3, min_lr=1e-4,
        val_every=500, sample_every=1000, checkpoint_every=1000,
    ),
}


def make_parser() -> ArgumentParser:
    """The flags; their defaults are the constants above."""
    parser = ArgumentParser(prog="train_gpt.py", description="Train a GPT-2. Defaults: the preset gpt2.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="auto", help="auto: gpt2 on CUDA with shards, else tiny")
    add("--data", help="folder of shards or text file; default: edu_fineweb10B/, input.txt, a download")
    add("--tokenizer", choices=("gpt2", "char"), default="gpt2", help="of a text file")
    add("--n-layer", type=positive_int, default=N_LAYER, help="layers")
    add("--n-head", type=positive_int, default=N_HEAD, help="attention heads")
    add("--n-embd", type=positive_int, default=N_EMBD, help="channels")
    add("--seq-len", type=positive_int, default=SEQ_LEN, help="tokens of a window, and the block size")
    add("--micro-batch", type=positive_int, default=MICRO_BATCH, help="windows in the model at a time")
    add("--total-batch-tokens", type=positive_int, default=TOTAL_BATCH_TOKENS, help="of an update, all ranks")
    add("--max-steps", type=positive_int, default=MAX_STEPS, help="updates")
    add("--warmup-steps", type=non_negative_int, default=WARMUP_STEPS, help="updates until the full rate")
    add("--max-lr", type=positive_float, default=MAX_LR, help="highest learning rate")
    add("--min-lr", type=non_negative_float, default=MIN_LR, help="learning rate at the end")
    add("--weight-decay", type=non_negative_float, default=WEIGHT_DECAY, help="of matrices")
    add("--grad-clip", type=positive_float, default=GRAD_CLIP, help="largest norm of the gradient")
    add("--val-every", type=non_negative_int, default=VAL_EVERY, help="steps between validations; 0: never")
    add("--val-tokens", type=positive_int, default=VAL_TOKENS, help="of a validation; at most the split")
    add("--sample-every", type=non_negative_int, default=SAMPLE_EVERY, help="steps between samples; 0: never")
    add("--sample-prompt", default=SAMPLE_PROMPT, help="what samples start with")
    add("--checkpoint-every", type=non_negative_int, default=CHECKPOINT_EVERY,
        help="steps between checkpoints; 0: only after the last")
    add("--log-dir", type=Path, default=LOG_DIR, help="where everything lands")
    add("--init-from", metavar="MODEL", help="start from gpt2[-medium|-large|-xl], checkpoint or folder")
    add("--eval-only", action="store_true", help="val loss of --init-from or the newest checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *runtime.DTYPES), default="auto", help="of matrix products")
    add("--compile", action="store_const", const="on", default="auto", help="also where it does not pay")
    add("--no-compile", dest="compile", action="store_const", const="off", help="no torch.compile")
    add("--deterministic", action="store_true", help="same bits in every run, where the device can")
    add("--seed", type=non_negative_int, default=SEED, help="of weights and data order")
    add("--shuffle", choices=("on", "off"), default="on", help="windows in random order, or as they come")
    return parser
# fmt: on


def read_arguments(argv: list[str] | None) -> tuple[Namespace, str]:
    """Settings: flags over the preset over the constants. Also returns why the preset was chosen."""
    parser = make_parser()
    constants, given = parser.parse_defaults_and_given(argv)
    reason = "--preset"
    if "preset" not in given:
        on_cuda = torch.cuda.is_available() and given.get("device", "auto").startswith(("auto", "cuda"))
        has_shards = choose_source(given.get("data")).kind == "shards"
        given["preset"] = "gpt2" if on_cuda and has_shards else "tiny"
        reason = f"{'CUDA' if on_cuda else 'no CUDA'}, {'shards' if has_shards else 'no shards'}"
    args = Namespace(**{**constants, **PRESETS[given["preset"]], **given})
    if args.eval_only and "seq_len" not in given:
        args.seq_len = None  # the block size of the model that is evaluated
    # A run that is shortened, or cooled down, by one flag alone stays a valid one.
    if "warmup_steps" not in given:
        args.warmup_steps = min(args.warmup_steps, args.max_steps // 10)
    if "min_lr" not in given:
        args.min_lr = min(args.min_lr, args.max_lr / 10)
    return args, reason


def learning_rate_for(
    step: int,
    max_lr: float = MAX_LR,
    min_lr: float = MIN_LR,
    warmup_steps: int = WARMUP_STEPS,
    max_steps: int = MAX_STEPS,
) -> float:
    """Learning rate of update `step`: linear warmup, half a cosine, and `min_lr` from `max_steps` on."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something happens now that happens every so many steps, and after the last; 0 is never."""
    return every > 0 and (step % every == 0 or last)


# ------------------------------------------------------------------------------------------------------------
# The parts of a pass


class Run(NamedTuple):
    """Everything the parts need."""

    args: Namespace
    dist: Distributed
    dtype: torch.dtype  # of matrix products, under autocast
    tokenizer: object
    model: GPT  # the raw module: evaluated, sampled from, saved
    trained_model: torch.nn.Module  # the same weights, compiled and wrapped: trained through
    optimizer: torch.optim.Optimizer
    train_loader: WindowLoader
    val_loader: WindowLoader
    micro_steps: int  # of an update


@torch.no_grad()
def evaluate(
    model: GPT, loader: WindowLoader, num_tokens: int, dist: Distributed, dtype: torch.dtype
) -> float:
    """Mean loss in nats on the first `num_tokens` val tokens: the same ones for any ranks and any micro-
    batch.
    """
    model.eval()
    loss_sum, count = 0.0, 0
    for batch in loader.val_batches(num_tokens):
        if batch is not None:  # this rank has one in this round
            with runtime.autocast(dist.device, dtype):
                _, loss = model(*batch, return_logits=False)
            loss_sum += loss.item() * batch[0].numel()
            count += batch[0].numel()
    model.train()
    loss_sum, count = dist.sum_numbers(loss_sum, count)
    return loss_sum / count


def update(run: Run, batches: Iterator, step: int) -> tuple[float, float, float]:
    """One step of the optimizer. Returns the mean loss of its tokens, the gradient's norm, the learning rate.

    Raises:
        Diverged: loss or norm is not finite, on any rank; the weights are as they were.
    """
    args, dist = run.args, run.dist
    loss_sum = torch.zeros((), device=dist.device)
    for micro_step in range(run.micro_steps):
        x, y = next(batches)
        # Gradients are exchanged in the last micro-step only; DDP wants to know before its forward pass.
        with dist.exchange_gradients(run.trained_model, now=micro_step == run.micro_steps - 1):
            with runtime.autocast(dist.device, run.dtype):
                _, loss = run.trained_model(x, y, return_logits=False)
            (loss / run.micro_steps).backward()
        loss_sum += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip)
    loss = dist.mean(loss_sum / run.micro_steps)
    loss, norm = torch.stack([loss, norm]).tolist()  # the step's one synchronisation with the device
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"non-finite {'gradient norm' if math.isfinite(loss) else 'loss'} at step {step} "
            f"(loss {loss}, norm {norm})",
            "lower --max-lr, lengthen --warmup-steps, or use --dtype float32",
        )
    lr = learning_rate_for(step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm, lr


def write_samples(run: Run, log: RunLog, step: int) -> None:
    """Lets the model continue the prompt, on rank 0."""
    if not run.dist.is_master:
        return
    run.model.eval()
    try:
        with runtime.autocast(run.dist.device, run.dtype):
            texts = sample_texts(
                run.model,
                run.tokenizer,
                run.args.sample_prompt,
                NUM_SAMPLES,
                SAMPLE_TOKENS,
                seed=42,
                top_k=50,
            )
        log.sample(step, texts)
    except FloatingPointError as error:
        log.say(f"generation skipped: {error}")
    run.model.train()


def save(run: Run, log: RunLog, step: int, val_loss: float | None) -> None:
    """Writes the checkpoint of `step` completed updates, on rank 0; the others wait."""
    if run.dist.is_master:
        path = model_path(run.args.log_dir, step)
        save_model_file(path, run.model, vars(run.model.config).copy(), step, val_loss, run.tokenizer.state())
        log.say(f"checkpoint: {path}")
    run.dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, log: RunLog) -> None:
    """MAX_STEPS updates, and one more pass for the last evaluation and the last checkpoint."""
    args = run.args
    flops = run.model.flops_per_token(args.seq_len) * args.total_batch_tokens
    peak = runtime.peak_flops(run.dist.device)
    speedometer = Speedometer(
        args.total_batch_tokens, args.max_steps, flops, peak and peak * run.dist.world_size
    )
    batches = run.train_loader.train_batches(0, args.total_batch_tokens // args.seq_len)
    val_loss = None
    for step in range(args.max_steps + 1):
        last = step == args.max_steps
        if is_due(step, args.val_every, last):
            val_loss = evaluate(run.model, run.val_loader, args.val_tokens, run.dist, run.dtype)
            log.validation(
                step, val_loss, tokens=step * args.total_batch_tokens, seconds=speedometer.total_seconds
            )
        if step > 0 and is_due(step, args.sample_every, last):
            write_samples(run, log, step)
        if last or (step > 0 and is_due(step, args.checkpoint_every, last)):
            save(run, log, step, val_loss)
        if step > 0 and is_due(step, args.val_every, last):
            log.plot()
        if last:
            break
        started = time.perf_counter()  # the clock covers the update and nothing else
        loss, norm, lr = update(run, batches, step)
        speed = speedometer.measure(step, time.perf_counter() - started)
        log.update(step, loss, norm, lr, speed, runtime.peak_memory_bytes(run.dist.device))


def load_model_and_data(args: Namespace, dist: Distributed):
    """The model, fresh or loaded, its tokenizer, and the data as it reads it.

    Returns:
        (model, tokenizer, train stream, val stream, why this data).
    """
    model = GPT.load(args.init_from, dist.device) if args.init_from else None
    tokenizer_state = model.tokenizer_state if model else {"name": choose_tokenizer(args.tokenizer)}
    args.seq_len = args.seq_len or model.config.block_size
    source = fetch(choose_source(args.data), dist)
    tokenizer, train_stream, val_stream = open_streams(source, tokenizer_state, args.seq_len, dist)
    if model is None:
        sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        model = GPT(GPTConfig(args.seq_len, tokenizer.vocab_size, **sizes)).to(dist.device)
    check_model_reads(model.config, args.seq_len, tokenizer.num_words)
    return model, tokenizer, train_stream, val_stream, source.reason


def set_up(args: Namespace, dist: Distributed, reasons: dict[str, str]) -> Run:
    """Decides, checks and builds all that the loop needs; `reasons` collects the decisions in words."""
    dtype = runtime.choose_dtype(args.dtype, dist.device)
    compiles = runtime.choose_compile(args.compile, dist.device)
    numerics = runtime.set_numerics(args.seed, args.deterministic)
    model, tokenizer, train_stream, val_stream, why = load_model_and_data(args, dist)
    trained_model = dist.wrap(torch.compile(model) if compiles.value else model)
    optimizer = model.configure_optimizers(args.weight_decay, args.max_lr, dist.device.type, dist.is_master)
    place = (args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    train_loader = WindowLoader(train_stream, *place, seed=args.seed if args.shuffle == "on" else None)
    val_loader = WindowLoader(val_stream, *place)
    micro_steps = accumulation_steps(args.total_batch_tokens, args.micro_batch, args.seq_len, dist.world_size)
    reasons["data"] = f"{train_stream.name} ({why}), tokenizer {tokenizer.name}"
    reasons["numerics"] = (
        f"{str(dtype.value)[len('torch.') :]} ({dtype.reason}); {numerics}; "
        f"compile {'on' if compiles.value else 'off'} ({compiles.reason})"
    )
    return Run(
        args,
        dist,
        dtype.value,
        tokenizer,
        model,
        trained_model,
        optimizer,
        train_loader,
        val_loader,
        micro_steps,
    )


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    args, preset_reason = read_arguments(argv)
    device = runtime.choose_device(args.device, distributed.environment_local_rank())
    with distributed.start(device.value) as dist:
        if args.eval_only:
            return report_val_loss(args, dist)
        check_training_settings(args, dist.world_size)
        reasons = {
            "preset": f"{args.preset} ({preset_reason})",
            "device": f"{dist.device} ({device.reason}): {runtime.device_name(dist.device)}",
        }
        if dist.is_master:
            prepare_log_dir(args.log_dir)
        run = set_up(args, dist, reasons)
        if dist.is_master:
            archive_earlier_run(args.log_dir)
        with RunLog(args.log_dir, dist.is_master, args.max_steps) as log:
            for line in plan.describe(run, reasons):
                log.say(line)
            log.record("run", **plan.record(run, reasons))
            train(run, log)
            memory = runtime.peak_memory_bytes(dist.device) / 1e9
            log.say(f"done in {format_duration(time.perf_counter() - started)}, peak memory {memory:.2f} GB")
            log.say(f"in {args.log_dir}/: log.txt, metrics.jsonl, samples.txt, curves.png, model_*.pt")
            newest = model_path(args.log_dir, args.max_steps)
            log.say(f'sample from it: python generate.py -m {newest} -p "{args.sample_prompt}"')
    return 0


def report_val_loss(args: Namespace, dist: Distributed) -> int:
    """`--eval-only`: prints val loss and perplexity of --init-from, or of the newest checkpoint."""
    args.init_from = args.init_from or newest_model_file(args.log_dir)
    if args.init_from is None:
        raise UserError(
            f"no checkpoint in {args.log_dir} to evaluate", "name one: --eval-only --init-from gpt2"
        )
    dtype = runtime.choose_dtype(args.dtype, dist.device).value
    model, _, _, val_stream, _ = load_model_and_data(args, dist)
    loader = WindowLoader(val_stream, args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    loss = evaluate(model, loader, args.val_tokens, dist, dtype)
    if dist.is_master:
        tokens = loader.num_val_windows(args.val_tokens) * args.seq_len
        print(
            f"{args.init_from}: val loss {loss:.4f} | perplexity {perplexity(loss)} | "
            f"{tokens:,} tokens of {val_stream.name}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, distributed.environment_rank()))
