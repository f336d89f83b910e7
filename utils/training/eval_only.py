"""`--eval-only`: the loss of a model on a text, without training."""

import math
from argparse import Namespace
from collections.abc import Callable

from utils.command_line import UserError, bits_per_byte, format_count, perplexity
from utils.console import say
from utils.data_loader import WindowLoader
from utils.distributed import Distributed
from utils.runtime import choose_dtype, choose_matmul
from utils.training.data_source import bytes_per_token, part_of
from utils.training.model_source import ModelFactory, load_model_and_data


def report_loss(
    args: Namespace, dist: Distributed, models: ModelFactory, evaluate: Callable[..., float]
) -> int:
    """Prints loss, perplexity and bits per byte of a model. Returns the exit code.

    With `--eval-part`, every token of that part but the first is scored once, else whole windows of val.
    `evaluate` is the one of train_gpt.py. Raises UserError where there is nothing to evaluate.
    """
    dtype = choose_dtype(args.dtype, dist.device).value
    args.micro_batch = 8 if args.micro_batch == "auto" else args.micro_batch  # no gradients: little to gain
    model, data = load_model_and_data(models, args, dist)
    choose_matmul(model)
    stream = part_of(data, args.eval_part or "val")
    if stream.num_tokens < 2:
        what = f"{stream.name} has {format_count(stream.num_tokens, 'token')}"
        raise UserError(what, "evaluate at least two tokens")
    loader = WindowLoader(stream, args.seq_len, args.micro_batch, dist.rank, dist.world_size, dist.device)
    num_windows = None  # they overlap
    if args.eval_part:
        if args.stride and args.stride > args.seq_len:
            what = f"--stride {args.stride} is more than the {args.seq_len} tokens of a window"
            raise UserError(what, "give at most the window's length: --seq-len, or the model's block size")
        batches, num_targets = loader.sliding_batches(args.stride or args.seq_len), stream.num_tokens - 1
    else:
        batches = loader.val_batches(args.val_tokens)
        num_windows = loader.num_val_windows(args.val_tokens)
        num_targets = num_windows * args.seq_len
    loss = evaluate(model, batches, dist, dtype, num_windows=num_windows)
    if not math.isfinite(loss):
        raise UserError(f"{args.init_from}: val loss {loss}", "use --dtype float32, or other weights")
    if dist.is_master:
        bits = bits_per_byte(loss, bytes_per_token(loader, num_targets, data.tokenizer))
        result = f"{args.eval_part or 'val'} loss {loss:.4f} | perplexity {perplexity(loss)}"
        result += f" | {bits:.4f} bits per byte" if bits is not None else ""
        say(f"{args.init_from}: {result} | {num_targets:,} tokens of {stream.name}")
    return 0
