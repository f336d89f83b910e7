"""Trains a GPT-2: on a laptop, on one GPU, or on many.

    python train_gpt.py                                        whatever this machine can do
    python train_gpt.py --preset char --data input.txt         a character model in a minute
    torchrun --standalone --nproc_per_node=8 train_gpt.py      the GPT-2 124M run on FineWeb-Edu

The constants are the faithful run; every one is a flag, and a preset is a small table of overrides. `--help`
lists them all.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from generate import sample_texts
from gpt_model import GPT, GPTConfig
from utils import distributed, runtime
from utils.checkpoint import model_path, newest_model_file, save_model_file, versions
from utils.command_line import (
    ArgumentParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from utils.data_loader import TokenStream, WindowLoader
from utils.datasets import choose_source, choose_tokenizer, fetch, open_streams
from utils.distributed import Distributed
from utils.errors import Diverged, UserError, run_script
from utils.plotting import plot_run
from utils.run_dir import archive_earlier_run
from utils.run_log import RunLog, format_duration, format_step, prepare_log_dir
from utils.settings import accumulation_steps, check_model_fits, check_training_settings
from utils.tokenizer import tokenizer_from_state

# ------------------------------------------------------------------------------------------------------------
# ----------
# The faithful run: GPT-2 124M, 19,073 updates of 2**19 tokens, 10 billion in all (settings of GPT-3 Small,
# Brown et al. 2020)

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

PRESETS = {
    "gpt2": {},
    # Two CPU cores, a few minutes, a megabyte of text: narrow, because the projection to 50304 words is most
    # of the work.
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=96, seq_len=64, micro_batch=8, total_batch_tokens=512,
        max_steps=1000, warmup_steps=50, max_lr=5e-3, min_lr=5e-4, val_every=250, sample_every=500, checkpoint_every=500,
    ),
    # Characters instead of words: 65 of them make the output layer small, so the layers can be wider.
    "char": dict(
        tokenizer="char", n_layer=4, n_head=4, n_embd=128, seq_len=64, micro_batch=12, total_batch_tokens=768,
        max_steps=2000, warmup_steps=100, max_lr=1e-3, min_lr=1e-4, val_every=500, sample_every=1000, checkpoint_every=1000,
    ),
}  # fmt: skip


def make_parser() -> ArgumentParser:
    """The flags; their defaults are the constants above."""
    parser = ArgumentParser(
        prog="train_gpt.py", description="Train a GPT-2. Defaults are those of the preset gpt2."
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="auto", help="auto: gpt2 on CUDA with shards, else tiny")
    add("--data", help="folder of shards or text file; default: edu_fineweb10B/, input.txt, Tiny Shakespeare")
    add("--tokenizer", choices=("gpt2", "char"), default="gpt2", help="of a text file")
    add("--n-layer", type=positive_int, default=N_LAYER, help="layers")
    add("--n-head", type=positive_int, default=N_HEAD, help="attention heads")
    add("--n-embd", type=positive_int, default=N_EMBD, help="channels")
    add("--seq-len", type=positive_int, default=SEQ_LEN, help="tokens of a window, and the block size")
    add(
        "--micro-batch",
        type=positive_int,
        default=MICRO_BATCH,
        help="windows that go through the model at one time",
    )
    add(
        "--total-batch-tokens",
        type=positive_int,
        default=TOTAL_BATCH_TOKENS,
        help="tokens of an update, all ranks together",
    )
    add("--max-steps", type=positive_int, default=MAX_STEPS, help="updates")
    add(
        "--warmup-steps",
        type=non_negative_int,
        default=WARMUP_STEPS,
        help="updates until the full learning rate",
    )
    add("--max-lr", type=positive_float, default=MAX_LR, help="highest learning rate")
    add("--min-lr", type=non_negative_float, default=MIN_LR, help="learning rate at the end")
    add("--weight-decay", type=non_negative_float, default=WEIGHT_DECAY, help="of matrices")
    add("--grad-clip", type=positive_float, default=GRAD_CLIP, help="largest norm of the gradient")
    add("--val-every", type=non_negative_int, default=VAL_EVERY, help="steps between validations; 0: never")
    add(
        "--val-tokens",
        type=positive_int,
        default=VAL_TOKENS,
        help="tokens of a validation, or the whole split if shorter",
    )
    add("--sample-every", type=non_negative_int, default=SAMPLE_EVERY, help="steps between samples; 0: never")
    add("--sample-prompt", default=SAMPLE_PROMPT, help="what samples start with")
    add(
        "--checkpoint-every",
        type=non_negative_int,
        default=CHECKPOINT_EVERY,
        help="steps between checkpoints; 0: at the end only",
    )
    add("--log-dir", type=Path, default=LOG_DIR, help="where everything lands")
    add(
        "--init-from",
        metavar="MODEL",
        help="start from a GPT-2 size, a checkpoint or a folder; sizes are then the model's",
    )
    add(
        "--eval-only",
        action="store_true",
        help="val loss and perplexity of --init-from (or the newest checkpoint), then end",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *runtime.DTYPES), default="auto", help="of matrix products")
    add(
        "--compile",
        action="store_const",
        const="on",
        default="auto",
        help="use torch.compile; default: where it pays",
    )
    add("--no-compile", dest="compile", action="store_const", const="off", help="do not use torch.compile")
    add("--deterministic", action="store_true", help="same bits on every run, where the device can")
    add("--seed", type=non_negative_int, default=SEED, help="of weights and data order")
    add(
        "--shuffle",
        choices=("on", "off"),
        default="on",
        help="order of the windows: seeded permutation, or as they come",
    )
    return parser


def read_arguments(argv: list[str] | None) -> tuple[Namespace, str]:
    """Settings from the flags, over the preset, over the constants.

    Also returns why the preset was chosen.
    """
    parser = make_parser()
    constants = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    flags = vars(
        parser.parse_args(argv, Namespace(**dict.fromkeys(constants)))
    )  # what is preset to None keeps no default
    given = {name: value for name, value in flags.items() if value is not None}
    reason = "--preset"
    if "preset" not in given:
        on_cuda = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
        has_shards = choose_source(given.get("data")).kind == "shards"
        given["preset"] = "gpt2" if on_cuda and has_shards else "tiny"
        reason = f"{'CUDA' if on_cuda else 'no CUDA'}, {'shards' if has_shards else 'no shards'}"
    args = Namespace(**{**constants, **PRESETS[given["preset"]], **given})
    if "warmup_steps" not in given:
        args.warmup_steps = min(
            args.warmup_steps, args.max_steps // 10
        )  # a run shortened by --max-steps alone
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
    """Learning rate of update `step`: linear warmup, then a cosine down to `min_lr`, which holds from
    `max_steps` on.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and after the last, happens now; 0 is never."""
    return every > 0 and (step % every == 0 or last)


# ------------------------------------------------------------------------------------------------------------
# ----------
# What the loop calls


class Run(NamedTuple):
    """Everything an update or an evaluation needs.

    `model` is the raw module, `trained` the same, compiled and wrapped.
    """

    args: Namespace
    dist: Distributed
    dtype: torch.dtype
    tokenizer: object
    model: GPT
    trained: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train_loader: WindowLoader
    val_loader: WindowLoader
    micro_steps: int


@torch.no_grad()
def evaluate(
    model: GPT, loader: WindowLoader, num_tokens: int, dist: Distributed, dtype: torch.dtype
) -> float:
    """Mean loss in nats on the first `num_tokens` tokens of a split: the same tokens for any ranks and any
    micro-batch.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device="cpu" if dist.device.type == "mps" else dist.device)
    for batch in loader.val_batches(num_tokens):
        if batch is not None:
            with runtime.autocast(dist.device, dtype):
                _, loss = model(*batch, return_logits=False)
            tokens = batch[0].numel()
            total += torch.stack([loss.double() * tokens, torch.tensor(tokens).to(loss.device)]).to(
                total.device
            )
    model.train()
    loss_sum, count = dist.sum(total).tolist()
    return loss_sum / count


def update(run: Run, batches, step: int, lr: float) -> tuple[float, float]:
    """One optimizer step on `micro_steps` batches. Returns the mean loss of its tokens and the gradient norm
    before clipping.

    Raises:
        Diverged: either is not finite; the weights are untouched.
    """
    loss_sum = torch.zeros((), device=run.dist.device)
    for micro_step in range(run.micro_steps):
        x, y = next(batches)
        with run.dist.exchange_gradients(run.trained, now=micro_step == run.micro_steps - 1):
            with runtime.autocast(run.dist.device, run.dtype):
                _, loss = run.trained(x, y, return_logits=False)
            (loss / run.micro_steps).backward()
        loss_sum += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.grad_clip)
    loss_mean = run.dist.mean(loss_sum / run.micro_steps)
    loss, norm = torch.stack([loss_mean, norm]).tolist()  # the step's one synchronisation with the device
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"non-finite {'gradient norm' if math.isfinite(loss) else 'loss'} at step {step}: loss {loss}, norm {norm}",
            "use a lower --max-lr, a longer --warmup-steps or --dtype float32",
        )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def write_samples(run: Run, log: RunLog, step: int) -> None:
    """Lets the model continue the prompt, on rank 0; the other ranks have nothing to wait for."""
    if not run.dist.is_master:
        return
    run.model.eval()
    try:
        with runtime.autocast(run.dist.device, run.dtype):
            prompt, seed = run.args.sample_prompt, 42 + run.dist.rank
            texts = sample_texts(
                run.model, run.tokenizer, prompt, NUM_SAMPLES, SAMPLE_TOKENS, seed, log.say, top_k=50
            )
        log.sample(step, texts)
    except FloatingPointError as error:
        log.say(f"generation skipped: {error}")
    run.model.train()


def save(run: Run, log: RunLog, step: int, val_loss: float | None) -> None:
    """Writes the checkpoint of `step` completed updates, on rank 0."""
    if run.dist.is_master:
        path = model_path(run.args.log_dir, step)
        save_model_file(path, run.model, vars(run.model.config).copy(), step, val_loss, run.tokenizer.state())
        log.say(f"checkpoint: {path}")
    run.dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# ----------
# Setting up


def build_model(args: Namespace, tokenizer, device: torch.device) -> GPT:
    """A fresh model of the flags' sizes, or the one that --init-from names."""
    if args.init_from is None:
        sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        return GPT(GPTConfig(block_size=args.seq_len, vocab_size=tokenizer.vocab_size, **sizes)).to(device)
    model = GPT.load(args.init_from, device)
    check_model_fits(
        args.seq_len,
        model.config.block_size,
        tokenizer.num_words,
        model.config.vocab_size,
        str(args.init_from),
    )
    return model


def describe(run: Run, train: TokenStream, val: TokenStream, reasons: dict[str, str], log: RunLog) -> None:
    """Says what the run will be, with the arithmetic, and writes it as the first record of metrics.jsonl."""
    args, dist, say = run.args, run.dist, log.say
    windows = run.train_loader.windows_per_epoch
    left_out = train.num_tokens - 1 - windows * args.seq_len
    steps_per_epoch = windows * args.seq_len / args.total_batch_tokens
    for name, reason in reasons.items():
        say(f"{name}: {reason}")
    c = run.model.config
    say(
        f"model: {run.model.num_parameters():,} parameters ({c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
        f"block {c.block_size}, vocabulary {c.vocab_size})"
    )
    say(
        f"train: {train.num_tokens:,} tokens = {windows:,} windows of {args.seq_len} ({left_out} tokens left out), "
        f"{steps_per_epoch:,.1f} steps an epoch, {args.max_steps / steps_per_epoch:.2f} epochs in {args.max_steps} steps"
    )
    say(
        f"val: {run.val_loader.num_val_windows(args.val_tokens):,} windows of {args.seq_len}, of {val.num_tokens:,} tokens"
    )
    say(
        f"batch: {args.total_batch_tokens} tokens = {args.micro_batch} rows x {args.seq_len} tokens x "
        f"{dist.world_size} process(es) x {run.micro_steps} micro-step(s)"
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    environment = dict(versions(), device=runtime.device_name(dist.device), world_size=dist.world_size)
    log.record(
        "run",
        settings=settings,
        environment=environment,
        reasons=reasons,
        parameters=run.model.num_parameters(),
    )


def set_up(args: Namespace, preset_reason: str, dist: Distributed, device_reason: str):
    """Decides, checks and builds everything before the first step.

    Returns (run, train stream, val stream, reasons).
    """
    dtype = runtime.choose_dtype(args.dtype, dist.device)
    compiled = runtime.choose_compile(args.compile, dist.device)
    numerics = runtime.set_numerics(args.seed, args.deterministic)
    if args.eval_only and args.init_from is None:
        args.init_from = newest_model_file(args.log_dir)
        if args.init_from is None:
            raise UserError(
                f"no checkpoint in {args.log_dir} to evaluate", "name a model: --eval-only --init-from gpt2"
            )
    source = fetch(choose_source(args.data), dist)
    tokenizer, train, val = open_streams(source, choose_tokenizer(args.tokenizer), args.seq_len, dist)
    model = build_model(args, tokenizer, dist.device)
    if args.init_from is not None and model.tokenizer_state["name"] == "char":
        tokenizer = tokenizer_from_state(model.tokenizer_state)
    shuffle_seed = args.seed if args.shuffle == "on" else None
    loader_args = (args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    optimizer = model.configure_optimizers(args.weight_decay, args.max_lr, dist.device.type, False)
    run = Run(
        args, dist, dtype.value, tokenizer, model,
        dist.wrap(torch.compile(model) if compiled.value else model), optimizer,
        WindowLoader(train, *loader_args, seed=shuffle_seed), WindowLoader(val, *loader_args),
        accumulation_steps(args.total_batch_tokens, args.micro_batch, args.seq_len, dist.world_size),
    )  # fmt: skip
    reasons = {
        "preset": f"{args.preset} ({preset_reason}); data: {train.name} ({source.reason}); tokenizer: {tokenizer.name}",
        "device": f"{dist.device} ({device_reason}): {runtime.device_name(dist.device)}",
        "numerics": f"{str(dtype.value)[6:]} ({dtype.reason}); {numerics}; "
        f"compile {'on' if compiled.value else 'off'} ({compiled.reason})",
    }
    return run, train, val, reasons


def train(run: Run, log: RunLog) -> None:
    """The training loop: MAX_STEPS updates, and one more pass for the last evaluation and checkpoint."""
    args, dist = run.args, run.dist
    flops_per_token = run.model.flops_per_token(args.seq_len)
    peak = runtime.peak_flops(dist.device)
    batches = run.train_loader.train_batches(0, args.total_batch_tokens // args.seq_len)
    val_loss, update_seconds = None, 0.0
    for step in range(args.max_steps + 1):
        last = step == args.max_steps
        if is_due(step, args.val_every, last):
            val_loss = evaluate(run.model, run.val_loader, args.val_tokens, dist, run.dtype)
            log.result(step, "val", val_loss)
            log.record(
                "val", step=step, loss=val_loss, tokens=step * args.total_batch_tokens, seconds=update_seconds
            )
            log.say(f"step {step:5d} | val loss {val_loss:.4f} | perplexity {math.exp(val_loss):,.2f}")
        if step > 0 and is_due(step, args.sample_every, last):
            write_samples(run, log, step)
        if last or (step > 0 and is_due(step, args.checkpoint_every, last)):
            save(run, log, step, val_loss)
        if step > 0 and is_due(step, args.val_every, last) and dist.is_master:
            plot_run(args.log_dir)
        if last:
            break
        started = time.perf_counter()
        lr = learning_rate_for(step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
        loss, norm = update(run, batches, step, lr)
        seconds = time.perf_counter() - started
        update_seconds += seconds
        log.advance()
        log.result(step, "train", loss)
        mfu = flops_per_token * args.total_batch_tokens / seconds / (peak * dist.world_size) if peak else None
        log.record("train", step=step, loss=loss, lr=lr, norm=norm, seconds=seconds, mfu=mfu,
                   memory=runtime.peak_memory_bytes(dist.device))  # fmt: skip
        eta = (args.max_steps - step - 1) * update_seconds / (step + 1)
        log.say(format_step(step, loss, lr, norm, seconds, args.total_batch_tokens, eta, mfu))


def main(argv: list[str] | None = None) -> int:
    args, preset_reason = read_arguments(argv)
    device = runtime.choose_device(args.device, distributed.environment_local_rank())
    with distributed.start(device.value) as dist:
        check_training_settings(args, dist.world_size)
        started = time.perf_counter()
        if dist.is_master and not args.eval_only:
            prepare_log_dir(args.log_dir)
        run, train_stream, val_stream, reasons = set_up(args, preset_reason, dist, device.reason)
        if args.eval_only:
            loss = evaluate(run.model, run.val_loader, args.val_tokens, dist, run.dtype)
            if dist.is_master:
                print(
                    f"{args.init_from}: val loss {loss:.4f} | perplexity {math.exp(loss):,.2f} | {val_stream.name}"
                )
            return 0
        if dist.is_master:
            archive = archive_earlier_run(args.log_dir)
            if archive is not None:
                print(f"an earlier run's files were moved to {archive}")
        with RunLog(args.log_dir, dist.is_master, args.max_steps) as log:
            describe(run, train_stream, val_stream, reasons, log)
            train(run, log)
            memory = runtime.peak_memory_bytes(dist.device) / 1e9
            log.say(f"done in {format_duration(time.perf_counter() - started)}, peak memory {memory:.2f} GB")
            log.say(
                f"everything is in {args.log_dir}/: log.txt, metrics.jsonl, samples.txt, curves.png, model_*.pt"
            )
            log.say(
                f'sample from it: python generate.py -m {model_path(args.log_dir, args.max_steps)} -p "{args.sample_prompt}"'
            )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, distributed.environment_rank()))
