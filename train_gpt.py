"""Trains a GPT-2: on a laptop, on one GPU, or on many.

    python train_gpt.py                                        whatever this machine can do
    python train_gpt.py --preset char --data input.txt         a character model in a minute
    torchrun --standalone --nproc_per_node=8 train_gpt.py      the GPT-2 124M run on FineWeb-Edu

The constants are the faithful run and the defaults of the flags; a preset is a small table of overrides.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch

from eval_hellaswag import evaluate_hellaswag
from generate import sample_texts
from gpt_model import GPT, GPTConfig
from utils import cpu_matmul as products
from utils import distributed, runtime
from utils.data_loader import WindowLoader
from utils.distributed import Distributed
from utils.errors import Unfinished, UserError, run_script
from utils.hellaswag.examples import examples_for_training
from utils.training import dry_run as plan
from utils.training import flags as train_flags
from utils.training import log_directory as run_dir
from utils.training import micro_batch, on_track, resume
from utils.training.data_source import choose_source, choose_tokenizer, fetch, open_streams
from utils.training.guards import SpikeFilter, stop_if_diverged, stop_if_not_finite
from utils.training.mirrors import Mirrors, check_installed
from utils.training.report import write_report
from utils.training.resume import Progress
from utils.training.run_log import RunLog, Speedometer, format_duration, perplexity
from utils.training.settings import accumulation_steps, check_model_reads, check_training_settings
from utils.training.signals import Stopped, StopSignals
from utils.weights.checkpoint import newest_model_file

# ------------------------------------------------------------------------------------------------------------
# The faithful run: GPT-2 124M, 10 billion tokens (settings of GPT-3 Small, Brown et al. 2020, table 2.1).
# A constant that has a flag of its name is that flag's default.

N_LAYER, N_HEAD, N_EMBD = 12, 12, 768
SEQ_LEN = 1024  # T, also the block size
MICRO_BATCH = 64  # B, rows that go through the model at one time
TOTAL_BATCH_TOKENS = 524288  # 2**19 tokens an update, over all ranks and micro-steps
MAX_STEPS = 19073  # updates: 10e9 tokens / 2**19
WARMUP_STEPS = 715  # 375 million tokens
MAX_LR, MIN_LR = 6e-4, 6e-5
WEIGHT_DECAY, GRAD_CLIP = 0.1, 1.0
SKIP_SPIKES = 0.0  # sigmas; off
VAL_EVERY, VAL_TOKENS = 250, 10485760
HELLASWAG_EVERY, HELLASWAG_EXAMPLES, HELLASWAG_DIR = 250, None, None  # all of hellaswag/hellaswag_val.jsonl
SAMPLE_EVERY, SAMPLE_PROMPT, SAMPLE_TOKENS, NUM_SAMPLES = 250, "Hello, I'm a language model,", 32, 4
CHECKPOINT_EVERY, KEEP_CHECKPOINTS, KEEP_EVERY = 1000, 2, 5000
TOKENIZER, SHUFFLE, SEED = "gpt2", "on", 1337
DIST_TIMEOUT = 600  # seconds
LOG_DIR = Path(__file__).resolve().parent / "log"

# fmt: off
PRESETS = {
    "gpt2": {},
    # Two CPU cores, a few minutes, a megabyte of text. Narrow: the 50304 words are most of the work.
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=64, seq_len=64, micro_batch=8, total_batch_tokens=512,
        max_steps=1000, warmup_steps=100, max_lr=8e-3, min_lr=4e-4,
        val_every=250, hellaswag_every=0, sample_every=500, checkpoint_every=500,
    ),
    # Characters instead of words, in less than a minute. Two wide layers learn faster than four narrow ones.
    "char": dict(
        tokenizer="char", n_layer=2, n_head=5, n_embd=160, seq_len=64, micro_batch=12, total_batch_tokens=768,
        max_steps=1200, warmup_steps=100, max_lr=4e-3, min_lr=1e-4,
        val_every=400, hellaswag_every=0, sample_every=600, checkpoint_every=600,
    ),
}

# fmt: on


def read_arguments(argv: list[str] | None = None) -> tuple[Namespace, str]:
    """Settings: flags over the preset over the constants above. Also returns why the preset was chosen."""
    return train_flags.read_arguments(argv, globals(), PRESETS)


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


# ------------------------------------------------------------------------------------------------------------
# The parts of a pass


class Run(NamedTuple):
    """Everything the parts need."""

    args: Namespace
    dist: Distributed
    stop: StopSignals
    dtype: torch.dtype  # of matrix products, under autocast
    tokenizer: Any
    model: GPT  # the raw module: evaluated, sampled from, saved
    trained_model: torch.nn.Module  # the same weights, compiled and wrapped: trained through
    optimizer: torch.optim.Optimizer
    scaler: Any  # of the loss, in fp16
    spikes: SpikeFilter
    train_loader: WindowLoader
    val_loader: WindowLoader
    hellaswag: list  # examples; empty where it is off
    micro_steps: int  # of an update


@torch.no_grad()
def evaluate(
    model: GPT,
    loader: WindowLoader,
    num_tokens: int,
    dist: Distributed,
    dtype: torch.dtype,
    poll=lambda: None,
) -> float:
    """Mean loss in nats on the first `num_tokens` val tokens, the same for any ranks and any micro-batch.

    `poll` is called before every batch, equally often on all ranks; what it raises ends the evaluation.
    """
    model.eval()
    loss_sum, count = 0.0, 0
    for batch in loader.val_batches(num_tokens):
        poll()
        if batch is not None:  # this rank has one in this round
            with runtime.autocast(dist.device, dtype):
                _, loss = model(*batch, return_logits=False)
            loss_sum += loss.item() * batch[0].numel()
            count += batch[0].numel()
    model.train()
    loss_sum, count = dist.sum_numbers(loss_sum, count)
    return loss_sum / count


def update(run: Run, batches: Iterator, progress: Progress) -> tuple[float, float, float]:
    """One step of the optimizer. Returns the mean loss of its tokens, the gradient's norm, the learning rate.

    Raises:
        Diverged: the loss, or but for fp16 the norm, is not finite on some rank, and the weights are as they
            were; or too many spikes have been skipped.
        Stopped: a signal came; the step has not happened.
    """
    args, dist, losses = run.args, run.dist, []
    for micro_step in range(run.micro_steps):
        run.stop.poll()
        x, y = next(batches)
        # Gradients are exchanged in the last micro-step only; DDP wants to know before its forward pass.
        with dist.exchange_gradients(run.trained_model, now=micro_step == run.micro_steps - 1):
            with runtime.autocast(dist.device, run.dtype):
                _, loss = run.trained_model(x, y, return_logits=False)
            run.scaler.scale(loss / run.micro_steps).backward()
        losses.append(loss.detach())
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip)
    loss = dist.mean(torch.stack(losses).mean())
    loss, norm = torch.stack([loss, norm]).tolist()  # the step's one synchronisation with the device
    stop_if_diverged(run, progress.step, progress.windows, loss, norm, losses)
    lr = learning_rate_for(progress.step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if run.spikes.accepts(norm):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm, lr


def write_samples(run: Run, log: RunLog, step: int) -> None:
    """Lets the model continue the prompt, on rank 0."""
    if not run.dist.is_master:
        return
    run.model.eval()
    try:
        with runtime.autocast(run.dist.device, run.dtype):
            prompt = run.args.sample_prompt
            texts = sample_texts(
                run.model, run.tokenizer, prompt, NUM_SAMPLES, SAMPLE_TOKENS, seed=42, top_k=50
            )
        log.sample(step, texts)
    except FloatingPointError as error:
        log.say(f"generation skipped: {error}")
    run.model.train()


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, log: RunLog, progress: Progress) -> None:
    """MAX_STEPS updates, and one more pass for the last evaluation and the last checkpoint."""
    args, dist, poll = run.args, run.dist, run.stop.poll
    windows_per_step = args.total_batch_tokens // args.seq_len
    batches = run.train_loader.train_batches(progress.windows, windows_per_step)
    flops = run.model.flops_per_token(args.seq_len) * args.total_batch_tokens
    peak = runtime.peak_flops(dist.device, dist.world_size)
    speedometer = Speedometer(args.total_batch_tokens, args.max_steps, flops, peak)
    faithful = on_track.is_faithful_recipe(args, run.model.config, run.train_loader.stream.fingerprint())
    while True:
        last = progress.step == args.max_steps
        if progress.is_due("val", args.val_every, last):
            progress.val_loss = evaluate(run.model, run.val_loader, args.val_tokens, dist, run.dtype, poll)
            stop_if_not_finite(progress.val_loss, progress.step, args.log_dir)
            tokens = progress.windows * args.seq_len
            verdict = on_track.verdict(progress.step, progress.val_loss, faithful)
            log.validation(progress.step, progress.val_loss, tokens, progress.seconds, verdict)
            progress.done.append("val")
        if run.hellaswag and progress.is_due("hella", args.hellaswag_every, last):
            result = evaluate_hellaswag(run.model, run.hellaswag, dist, run.dtype, poll=poll)
            log.hellaswag(progress.step, result.num_correct_norm, result.num_total)
            progress.done.append("hella")
        if progress.is_due("samples", args.sample_every, last) and progress.step > 0:
            write_samples(run, log, progress.step)
            progress.done.append("samples")
        if last or (progress.is_due("checkpoint", args.checkpoint_every, last) and progress.step > 0):
            saved = resume.save(run, log, progress)
        if progress.is_due("plot", args.val_every, last) and progress.step > 0:
            log.plot()
        if last:
            break
        started = time.perf_counter()  # the clock covers the update and nothing else
        loss, norm, lr = update(run, batches, progress)
        speed = speedometer.measure(progress.step, time.perf_counter() - started)
        memory = runtime.peak_memory_bytes(dist.device)
        log.update(progress.step, loss, norm, lr, speed, run.spikes.num_skipped, memory)
        progress.updated(windows_per_step, speed.seconds)
    if not saved:
        raise Unfinished("the final checkpoint could not be saved", "make room on the disk, then --resume")


def load_model_and_data(args: Namespace, dist: Distributed):
    """The model, fresh or loaded, its tokenizer, and the data as it reads it.

    Returns:
        (model, tokenizer, train stream, val stream, why this data).
    """
    model = GPT.load(args.init_from, dist.device) if args.init_from else None
    tokenizer_state = model.tokenizer_state if model else {"name": choose_tokenizer(args.tokenizer, dist)}
    args.seq_len = args.seq_len or model.config.block_size
    source = fetch(choose_source(args.data), dist)
    tokenizer, train_stream, val_stream = open_streams(source, tokenizer_state, args.seq_len, dist)
    if model is None:
        sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        model = GPT(GPTConfig(args.seq_len, tokenizer.vocab_size, **sizes)).to(dist.device)
    check_model_reads(model.config, args.seq_len, tokenizer.num_words)
    return model, tokenizer, train_stream, val_stream, source.reason


def set_up(args: Namespace, dist: Distributed, stop: StopSignals, reasons: dict[str, str]) -> Run:
    """Decides, checks and builds all that the loop needs; `reasons` collects the decisions in words."""
    dtype = runtime.choose_dtype(args.dtype, dist.device)
    compiles = runtime.choose_compile(args.compile, dist.device)
    numerics = runtime.set_numerics(args.seed, args.deterministic)
    if dist.device.type == "cpu" and dtype.value == torch.float32 and not compiles.value:
        numerics = f"{products.described()}; {numerics}"
    model, tokenizer, train_stream, val_stream, why = load_model_and_data(args, dist)
    torch.manual_seed(args.seed + dist.rank)  # weights are alike on all ranks, later draws are not
    if args.micro_batch == "auto":
        usual = PRESETS[args.preset].get("micro_batch", MICRO_BATCH)
        args.micro_batch, reasons["micro-batch"] = micro_batch.choose(args, model, dist, dtype.value, usual)
    trained_model = dist.wrap(torch.compile(model) if compiles.value else model)
    optimizer = model.configure_optimizers(args.weight_decay, args.max_lr, dist.device.type, dist.is_master)
    micro_steps = accumulation_steps(args.total_batch_tokens, args.micro_batch, args.seq_len, dist.world_size)
    place = (args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    reasons["data"] = f"{train_stream.name} ({why}), tokenizer {tokenizer.name}"
    reasons["numerics"] = (
        f"{str(dtype.value)[len('torch.') :]} ({dtype.reason}); {numerics}; "
        f"compile {'on' if compiles.value else 'off'} ({compiles.reason})"
    )
    return Run(
        args=args,
        dist=dist,
        stop=stop,
        dtype=dtype.value,
        tokenizer=tokenizer,
        model=model,
        trained_model=trained_model,
        optimizer=optimizer,
        scaler=runtime.make_scaler(dist.device, dtype.value),
        spikes=SpikeFilter(args.skip_spikes),
        train_loader=WindowLoader(train_stream, *place, seed=args.seed if args.shuffle == "on" else None),
        val_loader=WindowLoader(val_stream, *place),
        hellaswag=examples_for_training(args, tokenizer, model.config.block_size, dist),
        micro_steps=micro_steps,
    )


def run_to_the_end(run: Run, reasons: dict[str, str]) -> int:
    """Resumes or starts, trains, and says where everything is. Returns the exit code."""
    args, dist, started = run.args, run.dist, time.perf_counter()
    progress = Progress()
    warnings = resume.begin(run, progress)
    if progress.is_complete(args, bool(run.hellaswag)):
        if dist.is_master:
            model = progress.resumed_from or args.resume
            print(f"already complete: step {progress.step} of {args.max_steps}, the model is {model}")
        return 0
    with RunLog(args.log_dir, dist.is_master, args.max_steps, progress.step) as log:
        for line in plan.describe(run, reasons) + plan.space_warning(run) + warnings:
            log.say(line)
        if dist.is_master and (args.tensorboard or args.wandb):
            settings = plan.record(run, reasons)["settings"]
            log.mirrors = Mirrors(
                args.tensorboard, args.wandb, args.log_dir, settings, progress.step, log.say
            )
        log.record("run", step=progress.step, **plan.record(run, reasons))
        try:
            autocast = runtime.autocast(dist.device, run.dtype)
            dist.settle_gradient_buckets(run.trained_model, args.micro_batch, args.seq_len, autocast)
            train(run, log, progress)
        except Stopped as stop:
            if not resume.save(run, log, progress):
                hint = "make room on the disk; --resume goes on from the checkpoint before"
                raise Unfinished(f"received {stop.name}, but could not save", hint) from stop
            where = f"saved {args.log_dir} at step {progress.step}"
            log.say(f"received {stop.name}: {where}; run it again with --resume to continue")
            return stop.exit_code
        except Exception as error:
            # The other ranks fail with this one: the messages must tell which was the first, and where.
            if not (dist.is_alone or isinstance(error, UserError)):
                print(f"rank {dist.rank} failed at step {progress.step}:", file=sys.stderr, flush=True)
            raise
        log.try_to("report.md", write_report)
        memory = runtime.peak_memory_bytes(dist.device) / 1e9
        log.say(f"done in {format_duration(time.perf_counter() - started)}, peak memory {memory:.2f} GB")
        log.say(f"in {args.log_dir}/: {', '.join(run_dir.written(args.log_dir))}")
        newest = newest_model_file(args.log_dir)
        log.say(f'sample from it: python generate.py -m {newest} -p "{args.sample_prompt}"')
    return 0


def main(argv: list[str] | None = None) -> int:
    args, preset_reason = read_arguments(argv)
    device = runtime.choose_device(args.device, distributed.environment_local_rank())
    if device.value.type == "cpu":
        runtime.keep_freed_memory()
    job = distributed.start(device.value, args.dist_timeout)
    with job as dist, micro_batch.explains_out_of_memory(args):
        if args.eval_only:
            return report_val_loss(args, dist)
        check_training_settings(args, dist.world_size)
        check_installed(args.tensorboard, args.wandb)
        reasons = {
            "preset": f"{args.preset} ({preset_reason})",
            "device": f"{dist.device} ({device.reason}): {runtime.device_name(dist.device)}",
        }
        if args.dry_run:
            return plan.dry_run(set_up(args, dist, StopSignals(dist), reasons), reasons)
        with StopSignals(dist) as stop, run_dir.reserved(args.log_dir, dist):
            return run_to_the_end(set_up(args, dist, stop, reasons), reasons)


def report_val_loss(args: Namespace, dist: Distributed) -> int:
    """`--eval-only`: prints val loss and perplexity of --init-from, or of the newest checkpoint."""
    args.init_from = args.init_from or newest_model_file(args.log_dir)
    if args.init_from is None:
        raise UserError(f"no checkpoint in {args.log_dir} to evaluate", "name one with --init-from", True)
    dtype = runtime.choose_dtype(args.dtype, dist.device).value
    args.micro_batch = 8 if args.micro_batch == "auto" else args.micro_batch  # no gradients: little to gain
    model, _, _, val_stream, _ = load_model_and_data(args, dist)
    loader = WindowLoader(val_stream, args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    loss = evaluate(model, loader, args.val_tokens, dist, dtype)
    if not math.isfinite(loss):
        raise UserError(f"{args.init_from}: val loss {loss}", "use --dtype float32, or other weights")
    if dist.is_master:
        tokens = loader.num_val_windows(args.val_tokens) * args.seq_len
        print(
            f"{args.init_from}: val loss {loss:.4f} | perplexity {perplexity(loss)} | "
            f"{tokens:,} tokens of {val_stream.name}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, distributed.environment_local_rank()))
