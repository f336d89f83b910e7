"""Trains a GPT-2: on a laptop, on one GPU, or on many.

    python train_gpt.py                                        the preset that suits machine and data
    python train_gpt.py --preset char --data input.txt         a character model in a minute
    python train_gpt.py --recipe fast                          the same loss from fewer tokens
    torchrun --standalone --nproc_per_node=8 train_gpt.py      the GPT-2 124M run on FineWeb-Edu

The constants define the faithful GPT-2 124M run; each line declares a constant and the flag whose default it
is. A preset is a small table of other defaults, and so is a recipe.

Shapes: B micro-batch, T time (tokens of a window).
"""

from utils.start import begin_script

if __name__ == "__main__":
    begin_script()

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from eval_hellaswag import evaluate_hellaswag, examples_for_training
from generate import sample_texts
from gpt_model import GPT, GPTConfig
from utils import runtime
from utils.command_line import (
    Unfinished,
    fraction,
    non_negative_float,
    non_negative_int,
    path_text,
    positive_float,
    positive_int,
    run_script,
)
from utils.console import announced
from utils.data_loader import WindowLoader
from utils.distributed import Distributed, environment_local_rank, join_job
from utils.tokenizer_json import tokenizer_name
from utils.training.data_source import bytes_per_token
from utils.training.dry_run import Plan, dry_run
from utils.training.eval_only import report_loss
from utils.training.flags import (
    Flags,
    accumulation_steps,
    check_ranks_agree,
    check_training_settings,
    fitting_micro_batch,
    int_or_auto,
    read_flags,
    warn_of_unused,
)
from utils.training.guards import SpikeFilter, stop_on_divergence, stop_on_non_finite_val_loss
from utils.training.log_directory import reserved
from utils.training.micro_batch import (
    choose_micro_batch,
    decide_compile,
    explain_out_of_memory,
    forward_backward,
    seed_dropout,
)
from utils.training.model_source import ModelFactory, load_model_and_data
from utils.training.optimizers import make_optimizers
from utils.training.resume import (
    close_complete_run,
    find_checkpoint,
    identity_of,
    save_best,
    save_checkpoint,
    start_or_resume,
)
from utils.training.run_log import RunLog, Speedometer
from utils.training.session import Run, run_to_the_end
from utils.training.signals import StopSignals
from utils.training.state import TrainState
from utils.weights.checkpoint import Checkpoint

# ------------------------------------------------------------------------------------------------------------
# The faithful run: GPT-2 124M on 10 billion tokens, with the settings of GPT-3 Small (Brown et al. 2020,
# table 2.1). flag(name, default, type, help) declares a flag and returns its default, so a constant and its
# flag are one line and cannot drift apart; a new hyperparameter is one line more.

# fmt: off
flag = Flags(__doc__)

flag.group("model and data")
DATA = flag("--data", None, path_text, "file or folder: text, .json, .jsonl, .parquet, shards, .bin, .ds; "
            "default: edu_fineweb10B/, else input.txt")
TOKENIZER = flag("--tokenizer", None, tokenizer_name, "gpt2, char, bpe:N (N tokens, trained on the text) or "
                 "a tokenizer.json; default: that of the shards, gpt2 for a text")
SHUFFLE = flag("--shuffle", "on", ("on", "off"), "shuffle the windows by the seed, or keep the data's order")
INIT_FROM = flag("--init-from", None, path_text, "start from gpt2[-medium|-large|-xl], checkpoint, folder",
                 metavar="MODEL")
N_LAYER = flag("--n-layer", 12, positive_int, "number of layers")  # 12, 12, 768: GPT-2 124M
N_HEAD = flag("--n-head", 12, positive_int, "number of attention heads")
N_EMBD = flag("--n-embd", 768, positive_int, "number of channels")
SEQ_LEN = flag("--seq-len", 1024, positive_int, "T: tokens per window, and block size of a new model")

flag.group("recipe")
# B changes speed and memory only: an update sees TOTAL_BATCH_TOKENS for any B and any number of ranks.
MICRO_BATCH = flag("--micro-batch", 64, int_or_auto, "B: windows per forward pass; auto: as many as fit")
TOTAL_BATCH_TOKENS = flag("--total-batch-tokens", 2**19, positive_int, "tokens per update, over all ranks")
MAX_STEPS = flag("--max-steps", 19073, positive_int, "number of updates")  # 10e9 tokens / 2**19
WARMUP_STEPS = flag("--warmup-steps", 715, non_negative_int, "updates of linear warmup")  # 375M tokens
OPTIMIZER = flag("--optimizer", "adamw", ("adamw", "muon"), "for the blocks' matrices; AdamW for the rest")
SCHEDULE = flag("--schedule", "cosine", ("cosine", "linear"), "decay of the learning rates")
DECAY_FRACTION = flag("--decay-fraction", 0.8, positive_float, "share of the run that the linear decay takes")
MAX_LR = flag("--max-lr", 6e-4, positive_float, "peak learning rate")
MIN_LR = flag("--min-lr", 6e-5, non_negative_float, "final learning rate, cosine only")  # a tenth of the peak
MUON_LR = flag("--muon-lr", 0.02, positive_float, "peak learning rate of Muon")
WEIGHT_DECAY = flag("--weight-decay", 0.1, non_negative_float, "weight decay, applied by AdamW to matrices")
GRAD_CLIP = flag("--grad-clip", 1.0, positive_float, "maximum norm of the gradient")  # Pascanu et al. 2013
SKIP_SPIKES = flag("--skip-spikes", 0.0, non_negative_float, "skip updates whose gradient norm is this many "
                   "sigmas above the mean; 0: off")
DROPOUT = flag("--dropout", 0.0, fraction, "probability of zeroing an activation or attention weight")
SEED = flag("--seed", 1337, non_negative_int, "seed of initial weights, data order and dropout")

flag.group("evaluation (every N steps and after the last; 0: never)")
VAL_EVERY = flag("--val-every", 250, non_negative_int, "steps between validations")
VAL_TOKENS = flag("--val-tokens", 10485760, positive_int, "tokens per validation; at most the whole split")
HELLASWAG_EVERY = flag("--hellaswag-every", 250, non_negative_int, "steps between HellaSwag evaluations")
HELLASWAG_EXAMPLES = flag("--hellaswag-examples", None, positive_int, "the first N examples; default: all")
HELLASWAG_DIR = flag("--hellaswag-dir", None, Path, "folder of its data; default: $HELLASWAG_DIR, hellaswag/")
SAMPLE_EVERY = flag("--sample-every", 250, non_negative_int, "steps between samples")
SAMPLE_PROMPT = flag("--sample-prompt", "Hello, I'm a language model,", str, "prompt of the samples")
SAMPLE_TOKENS, NUM_SAMPLES = 32, 4  # per sample; samples each time
PATIENCE = flag("--patience", 0, non_negative_int, "stop after N validations without a new best; 0: never")
flag("--eval-only", False, bool, "print the val loss of --init-from or of the newest checkpoint, and stop")
flag("--eval-part", None, ("val", "train", "all"), "with --eval-only: score every token of this part")
flag("--stride", None, positive_int, "with --eval-part: tokens scored per window, the others are context")

flag.group("running")
LOG_DIR = flag("--log-dir", Path(__file__).resolve().parent / "log", Path, "folder of logs and checkpoints")
flag("--resume", None, path_text, "continue from the newest checkpoint, or PATH", nargs="?", const="newest")
LOG_EVERY = flag("--log-every", None, positive_int, "steps per console line; default: 100 to 250 lines")
CHECKPOINT_EVERY = flag("--checkpoint-every", 1000, non_negative_int, "steps between saves; 0: the last only")
KEEP_CHECKPOINTS = flag("--keep-checkpoints", 2, positive_int, "newest checkpoints to keep for resuming")
KEEP_EVERY = flag("--keep-every", 5000, non_negative_int, "also keep models of every N-th step; 0: last only")
MAX_HOURS = flag("--max-hours", None, positive_float, "save and stop after so many hours; default: never")
DEVICE = flag("--device", "auto", str, "auto, cpu, cuda, cuda:N or mps")
DTYPE = flag("--dtype", "auto", ("auto", *runtime.DTYPES), "dtype of matmuls")
COMPILE = flag("--compile", "auto", "on", "use torch.compile; auto: where it pays")
flag("--no-compile", None, "off", "do not use torch.compile", dest="compile")
flag("--recompute", False, bool, "recompute activations in the backward pass: less memory, more time")
flag("--deterministic", False, bool, "bitwise equal results in every run, where supported")
flag("--tensorboard", False, bool, "mirror the metrics to TensorBoard, in the log directory")
flag("--wandb", False, bool, "mirror the metrics to Weights & Biases")
flag("--dry-run", False, bool, "print the plan, measure a few steps, and train nothing")
flag("--cost-per-hour", None, positive_float, "price per hour of all machines, for --dry-run")
DIST_TIMEOUT = flag("--dist-timeout", 600, positive_float, "seconds after which a hanging rank ends the job")

PRESETS = {
    "gpt2": {},
    # A minute or two on two CPU cores, for a megabyte of text. Narrow, because the 50,304-token output layer
    # dominates the cost.
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=64, seq_len=64, micro_batch=8, total_batch_tokens=512,
        max_steps=1000, warmup_steps=100, max_lr=8e-3, min_lr=4e-4,
        val_every=250, hellaswag_every=0, sample_every=500, checkpoint_every=500,
    ),
    # Less than a minute there. The vocabulary is small, and two wide layers learn faster than four narrow
    # ones.
    "char": dict(
        tokenizer="char", n_layer=2, n_head=5, n_embd=160, seq_len=64, micro_batch=12, total_batch_tokens=768,
        max_steps=1200, warmup_steps=100, max_lr=4e-3, min_lr=1e-4,
        val_every=400, hellaswag_every=0, sample_every=600, checkpoint_every=600,
    ),
    # The same two for one GPU, with the model of nanoGPT's shakespeare_char. Without dropout a megabyte of
    # text is overfitted after some epochs, so the runs are short. Not measured on a GPU yet.
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, seq_len=256, micro_batch=64, total_batch_tokens=16384,
        max_steps=300, warmup_steps=50, max_lr=1e-3, min_lr=1e-4,
        val_every=50, hellaswag_every=0, sample_every=150, checkpoint_every=150,
    ),
    "small-char": dict(
        tokenizer="char", n_layer=6, n_head=6, n_embd=384, seq_len=256, micro_batch=64,
        total_batch_tokens=16384, max_steps=2000, warmup_steps=100, max_lr=1e-3, min_lr=1e-4,
        val_every=250, hellaswag_every=0, sample_every=1000, checkpoint_every=1000,
    ),
}
# Without --preset, by device and data; characters are asked for by --tokenizer char.
PRESET_FOR = {
    ("CUDA", "shards"): "gpt2", ("CUDA", "a text"): "small", ("CUDA", "characters"): "small-char",
    ("no CUDA", "shards"): "tiny", ("no CUDA", "a text"): "tiny", ("no CUDA", "characters"): "char",
}

# What a recipe changes in each preset. "fast" needs fewer tokens for the same loss: Muon (Jordan et al. 2024)
# for the blocks' matrices, and higher learning rates that fall linearly to zero (Hägele et al. 2024). Rates
# were chosen on one seed; those of gpt2, small and small-char have not been measured on a GPU.
MUON = dict(optimizer="muon", schedule="linear", muon_lr=0.02, decay_fraction=0.8)
RECIPES = {
    "faithful": dict.fromkeys(PRESETS, {}),
    "fast": {
        "gpt2": dict(MUON, max_steps=9536, warmup_steps=256, max_lr=1.8e-3),
        "tiny": dict(MUON, max_steps=420, warmup_steps=40, max_lr=2.7e-2),
        "char": dict(MUON, max_steps=650, warmup_steps=50, max_lr=8e-3),
        "small": dict(MUON, max_steps=150, warmup_steps=15, max_lr=3e-3),
        "small-char": dict(MUON, max_steps=1000, warmup_steps=100, max_lr=3e-3),
    },
}
flag.group("recipe")
flag("--recipe", "faithful", tuple(RECIPES), "faithful: as published; fast: the same loss from fewer tokens")
flag.group("model and data")
flag("--preset", None, tuple(PRESETS), "settings for a device and data; default: what suits both")
# fmt: on


def read_arguments(argv: list[str] | None = None) -> tuple[Namespace, str]:
    """Settings: flags over recipe, preset, and constants above. Also returns why the preset was chosen."""
    return read_flags(flag, argv, PRESETS, PRESET_FOR, RECIPES)


def learning_rate_for(
    step: int, max_lr: float = MAX_LR, min_lr: float = MIN_LR, warmup_steps: int = WARMUP_STEPS,
    max_steps: int = MAX_STEPS, schedule: str = SCHEDULE, decay_fraction: float = DECAY_FRACTION,
) -> float:  # fmt: skip
    """Learning rate of update `step`: linear warmup, half a cosine (Loshchilov & Hutter 2017), `min_lr`.

    With the schedule "linear": warmup, constant, linearly to zero in the last `decay_fraction` of the run.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps  # step + 1: the first update is not wasted on a rate of 0
    if step >= max_steps:
        return min_lr if schedule == "cosine" else 0.0
    if schedule == "linear":
        decay_steps = min(decay_fraction * max_steps, max_steps - warmup_steps)
        return max_lr * min(1.0, (max_steps - step) / decay_steps)
    progress = (step - warmup_steps) / (max_steps - warmup_steps)  # 0 after warmup, 1 at the end
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


# ------------------------------------------------------------------------------------------------------------
# The parts of a step


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor] | None], dist: Distributed, dtype: torch.dtype,
    poll: Callable[[], None] = lambda: None, num_windows: int | None = None,
) -> float:  # fmt: skip
    """Mean loss in nats on the batches of all ranks; equal for any number of ranks and any micro-batch.

    `poll` is called before every batch, equally often on all ranks; its exceptions end the evaluation.
    `num_windows`, of all ranks, is for a progress bar.
    """
    loss_sum, count = 0.0, 0
    bar = announced("evaluating", num_windows, " windows", shown=dist.is_master)
    with runtime.eval_mode(model), bar as advance:
        for batch in batches:
            poll()  # may raise Stopped: an evaluation takes minutes, a batch system waits for seconds
            if batch is not None:  # None: only other ranks have a batch left in this round
                with runtime.autocast(dist.device, dtype):
                    _, loss = model(*batch, return_logits=False)
                # Weighted by tokens: the last batch may have fewer rows, and targets of -100 do not count.
                scored = int((batch[1] >= 0).sum())
                loss_sum += loss.item() * scored
                count += scored
                advance(len(batch[0]) * dist.world_size)
    # Sums and counts are reduced, not means: ranks may have evaluated different numbers of tokens.
    loss_sum, count = dist.sum_numbers(loss_sum, count)
    return loss_sum / count


def update(
    state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], lr: float, grad_clip: float,
    micro_steps: int, dist: Distributed, dtype: torch.dtype, poll: Callable[[], None] = lambda: None,
    seed: int = SEED, describe_batch: Callable[[int], str] = "micro-batch {}".format,
) -> tuple[float, float]:  # fmt: skip
    """One update: `micro_steps` micro-batches forward and backward, then a step of the optimizers.

    Args:
        batches: those of this rank: (idx, targets), each (B, T).
        poll: called before every micro-step; if it raises, the weights are unchanged.
        seed: of the dropout masks.
        describe_batch: where micro-step i's batch comes from, for the message of a non-finite loss.

    Returns the mean loss of all tokens of the update in nats, and the norm of the gradient before clipping.
    Raises Diverged, with the weights unchanged, if the loss is not finite on some rank, if the norm is not
    (except in fp16), or if too many spikes were skipped.
    """
    losses, model = [], state.trained_model
    for micro_step in range(micro_steps):
        poll()
        idx, targets = next(batches)
        if state.model.config.dropout:
            seed_dropout(seed, state.progress.step, micro_step, dist.rank)
        # Gradients are exchanged once per update, in the last micro-step. DDP has to know that before its
        # forward pass, so the context covers both passes.
        with dist.exchange_gradients(model, now=micro_step == micro_steps - 1):
            losses.append(forward_backward(model, idx, targets, dtype, state.scaler, micro_steps))
    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)  # fp16: clip and report the true gradient, not the scaled one
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
    # Each rank has seen equally many tokens, so the mean of the ranks' means is the mean over all tokens.
    loss = dist.mean(torch.stack(losses).mean())
    loss, norm = torch.stack([loss, norm]).tolist()  # the only synchronisation with the device in a step
    # Checked before the optimizer's step: a non-finite gradient would destroy the weights.
    step, last_good = state.progress.step, state.newest_checkpoint
    stop_on_divergence(step, loss, norm, losses, state.scaler, dist, describe_batch, last_good)
    accepted = state.spikes.accepts(norm)
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if accepted:
            state.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)  # frees the memory instead of writing zeros
    state.scaler.update()  # the scale for the next update: halved after an overflow
    return loss, norm


def write_samples(run: Run, log: RunLog) -> None:
    """Samples continuations of the prompt, on rank 0."""
    if not run.dist.is_master:
        return
    model, tokenizer, prompt = run.state.model, run.data.tokenizer, run.args.sample_prompt
    try:
        with runtime.autocast(run.dist.device, run.dtype), announced("sampling"):
            # A fixed seed of a generator of its own: sampling changes no other random number of the run.
            texts = sample_texts(model, tokenizer, prompt, NUM_SAMPLES, SAMPLE_TOKENS, seed=42, top_k=50)
        log.log_samples(run.state.progress.step, texts)
    except FloatingPointError as error:
        log.say(f"generation skipped: {error}")


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, log: RunLog) -> None:
    """Trains until `--max-steps` or `--patience` ends the run; then one more pass evaluates and saves."""
    args, dist, state, poll = run.args, run.dist, run.state, run.stop.poll
    progress = state.progress
    windows_per_step = args.total_batch_tokens // args.seq_len
    # The position in the data is a count of windows, not of steps: the batch size may change when resuming.
    batches = run.train_loader.train_batches(progress.windows)
    flops = state.model.flops_per_token(args.seq_len) * args.total_batch_tokens
    peak = runtime.peak_flops(dist.device, dist.world_size)
    speedometer = Speedometer(args.total_batch_tokens, args.max_steps, flops, peak)
    while True:  # pass `step` evaluates the weights after `step` updates, then makes the next one
        last = progress.ends(args)
        # Evaluations use the raw module, which shares the weights: no recompilation, no DDP hooks. `done`
        # goes into the checkpoint, so a run that is stopped in between repeats none and omits none.
        if progress.is_due("val", args.val_every, last=last):
            val_batches = run.val_loader.val_batches(args.val_tokens)
            loss = evaluate(state.model, val_batches, dist, run.dtype, poll, run.num_val_windows)
            stop_on_non_finite_val_loss(loss, progress.step, state.newest_checkpoint)  # before it is logged
            tokens = progress.windows * args.seq_len
            log.log_validation(progress.step, loss, run.val_bytes_per_token, tokens, progress.seconds)
            if progress.note_val_loss(loss):
                save_best(state, run.identity, args, log, dist)
            progress.done.append("val")
            last = progress.ends(args)  # also when there is no new best for too long
        if run.hellaswag and progress.is_due("hella", args.hellaswag_every, last=last):
            result = evaluate_hellaswag(state.model, run.hellaswag, dist, run.dtype, poll=poll)
            log.log_hellaswag(progress.step, result.num_correct_norm, result.num_total)
            progress.done.append("hella")
        if progress.step > 0 and progress.is_due("samples", args.sample_every, last=last):
            write_samples(run, log)
            progress.done.append("samples")
        if last or (progress.step > 0 and progress.is_due("checkpoint", args.checkpoint_every, last=last)):
            # After the evaluations, so that the checkpoint knows its val loss.
            saved = save_checkpoint(state, run.identity, args, log, dist)
        if progress.step > 0 and (last or progress.is_due("plot", args.val_every, last=last)):
            log.draw_curves()
        if last:
            break  # the log ends with an evaluation of the final weights, and they are saved
        lr = learning_rate_for(
            progress.step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps, args.schedule,
            args.decay_fraction,
        )  # fmt: skip
        started = time.perf_counter()  # the clock covers the update and nothing else
        loss, norm = update(
            state, batches, lr, args.grad_clip, run.micro_steps, dist, run.dtype, poll, args.seed,
            lambda i: run.train_loader.describe_batch(progress.windows, i, run.data.tokenizer.decode),
        )  # fmt: skip
        speed = speedometer.measure(progress.step, time.perf_counter() - started)
        memory = runtime.peak_memory_bytes(dist.device)
        rates, skipped = state.learning_rates(), state.spikes.num_skipped
        log.log_update(progress.step, loss, norm, rates, speed, skipped, memory)
        progress.complete_update(windows_per_step, speed.seconds)
    if not saved:
        raise Unfinished("the final checkpoint could not be saved", "make room on the disk, then --resume")


# ------------------------------------------------------------------------------------------------------------
# Before and after the loop


MODELS = ModelFactory(new=lambda **sizes: GPT(GPTConfig(**sizes)), load=lambda source: GPT.load(source))


def set_up(
    args: Namespace, dist: Distributed, stop: StopSignals, reasons: dict[str, str],
    checkpoint: Checkpoint | None,
) -> Run:  # fmt: skip
    """Decides, checks and builds all that the loop needs; `reasons` collects the decisions as text."""
    # Each decision comes with its reason, which the start lines print.
    dtype = runtime.choose_dtype(args.dtype, dist.device)
    numerics = runtime.set_numerics(args.seed, deterministic=args.deterministic)
    dist.check_equal({"the dtype": dtype.value}, "give --dtype a value that all devices support")
    model, data = load_model_and_data(MODELS, args, dist, checkpoint)
    model.train().recompute = args.recompute
    matmul = runtime.choose_matmul(model)
    torch.manual_seed(args.seed + dist.rank)  # weights are equal on all ranks, later draws are not
    if args.micro_batch == "auto":
        default = PRESETS[args.preset].get("micro_batch", MICRO_BATCH)
        args.micro_batch, reasons["micro-batch"] = choose_micro_batch(args, model, dist, dtype.value, default)
    micro_steps = accumulation_steps(args.total_batch_tokens, args.micro_batch, args.seq_len, dist.world_size)
    compiles = decide_compile(args, model, args.max_steps * micro_steps, dtype.value, dist)
    # The compiled and wrapped module shares its weights with `model`, which evaluations and checkpoints use:
    # its parameter names carry no prefix.
    trained_model = torch.compile(model) if compiles.value else model
    if not model.lm_head.weight.is_meta:
        trained_model = dist.wrap(trained_model)
    optimizers = make_optimizers(args, model, dist)
    scaler = runtime.make_scaler(dist.device, dtype.value)
    place = (args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    # Only training is shuffled: validation reads the same tokens every time.
    train_loader = WindowLoader(data.train, *place, seed=args.seed if args.shuffle == "on" else None)
    val_loader = WindowLoader(data.val, *place)
    which = (args.hellaswag_dir, args.hellaswag_examples, data.tokenizer, model.config.block_size)
    hellaswag = examples_for_training(*which, dist) if args.hellaswag_every else []
    reasons["data"] = f"{data.train.name} ({data.reason}), tokenizer {data.tokenizer.name}"
    reasons["data"] += f" of {data.tokenizer.vocab_size:,} tokens"
    compile_reason = reasons.pop("compile", compiles.reason)  # of find_checkpoint, where it decided
    reasons["numerics"] = (
        f"{str(dtype.value)[len('torch.') :]} ({dtype.reason}); {matmul}; {numerics}; "
        f"compile {'on' if compiles.value else 'off'} ({compile_reason})"
    )
    state = TrainState(model, trained_model, optimizers, scaler, SpikeFilter(args.skip_spikes))
    plan = Plan(args, model, train_loader, val_loader, micro_steps, dist, reasons)
    identity = identity_of(args, model, data, dist, dtype.value, compiled=compiles.value)
    loaders = (train_loader, val_loader)
    windows, is_logged = val_loader.num_val_windows(args.val_tokens), dist.is_master and args.val_every
    val_bytes = bytes_per_token(val_loader, windows * args.seq_len, data.tokenizer) if is_logged else 0.0
    rest = (windows, val_bytes, hellaswag, micro_steps, plan, identity)
    return Run(args, dist, stop, dtype.value, state, data, *loaders, *rest)


def main(argv: list[str] | None = None) -> int:
    args, preset_reason = read_arguments(argv)
    device = runtime.choose_device(args.device, environment_local_rank())
    if device.value.type == "cpu":
        runtime.keep_freed_memory()
    with join_job(device.value, args.dist_timeout) as dist, explain_out_of_memory(args):
        check_ranks_agree(args, dist)
        if dist.is_master:
            warn_of_unused(args)
        if args.eval_only:
            return report_loss(args, dist, MODELS, evaluate)
        if "micro_batch" not in args.typed:  # the preset's is for one process
            args.micro_batch = fitting_micro_batch(args, args.micro_batch, dist.world_size)
        check_training_settings(args, dist.world_size)
        reasons = {"preset": f"{args.preset} ({preset_reason}), recipe {args.recipe}"}
        reasons["device"] = f"{dist.device} ({device.reason}): {runtime.device_name(dist.device)}"
        if args.dry_run:
            checkpoint = find_checkpoint(args, dist, reasons)
            run = set_up(args, dist, StopSignals(dist), reasons, checkpoint)
            return dry_run(run.plan, run.state, run.dtype)
        # Signals are caught, and the log directory is locked, before anything is read or changed.
        with StopSignals(dist, args.max_hours) as stop, reserved(args.log_dir, dist):
            checkpoint = find_checkpoint(args, dist, reasons)
            run = set_up(args, dist, stop, reasons, checkpoint)
            lines = start_or_resume(run.state, run.identity, checkpoint, args, dist)
            del checkpoint  # a second copy of weights and moments
            if run.state.progress.is_complete(args, with_hellaswag=bool(run.hellaswag)):
                stop.defer()  # a signal must not end it within a file
                close_complete_run(run.state, args, dist)
                return 0
            return run_to_the_end(run, lines, train)


if __name__ == "__main__":
    sys.exit(run_script(main, environment_local_rank))
