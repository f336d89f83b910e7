"""What is checked about the settings before anything is loaded: all problems at once, with the numbers."""

from __future__ import annotations

from argparse import Namespace

from utils.errors import UserError


def accumulation_steps(total_batch_tokens: int, micro_batch: int, seq_len: int, world_size: int) -> int:
    """Micro-steps of an update, so that B * T * world_size * steps is exactly the batch.

    Raises:
        UserError: the batch is no multiple; names the nearest ones that are.
    """
    tokens_at_once = micro_batch * seq_len * world_size
    steps, rest = divmod(total_batch_tokens, tokens_at_once)
    if rest or steps == 0:
        nearest = ", ".join(str(n * tokens_at_once) for n in (steps, steps + 1) if n > 0)
        windows, rest = divmod(total_batch_tokens, seq_len * world_size)
        fitting = f" (or --micro-batch {windows})" if steps == 0 and windows and not rest else ""
        raise UserError(
            f"TOTAL_BATCH_TOKENS={total_batch_tokens} is not a multiple of B*T*world_size = "
            f"{micro_batch}*{seq_len}*{world_size} = {tokens_at_once}; nearest: {nearest}{fitting}",
            "change --total-batch-tokens, --micro-batch or --seq-len",
        )
    return steps


def check_training_settings(args: Namespace, world_size: int) -> None:
    """Raises one UserError that lists everything wrong with the flags of train_gpt.py."""
    problems = []
    if args.init_from is None and args.n_embd % args.n_head:
        problems.append(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    if args.warmup_steps > args.max_steps:
        problems.append(f"--warmup-steps {args.warmup_steps} is more than --max-steps {args.max_steps}")
    if args.seed >= 2**32:
        problems.append(f"--seed {args.seed} is not below 2**32")
    if args.min_lr > args.max_lr:
        problems.append(f"--min-lr {args.min_lr:g} is above --max-lr {args.max_lr:g}")
    try:
        micro_batch = 1 if args.micro_batch == "auto" else args.micro_batch
        accumulation_steps(args.total_batch_tokens, micro_batch, args.seq_len, world_size)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(
            "; ".join(problems), "change the flags named above; python train_gpt.py --help lists all"
        )


def check_model_reads(config, seq_len: int, num_words: int) -> None:
    """Raises UserError if a model cannot read such windows or such tokens.

    Args:
        config: the model's GPTConfig.
        seq_len: tokens of a window.
        num_words: ids the tokenizer makes.
    """
    problems, hints = [], []
    if seq_len > config.block_size:
        problems.append(f"--seq-len {seq_len} is more than the model's block size {config.block_size}")
        hints.append("use a smaller --seq-len")
    if num_words > config.vocab_size:
        problems.append(f"the tokenizer has {num_words} words, the model only {config.vocab_size}")
        hints.append("use the tokenizer the model was trained with")
    if problems:
        raise UserError("; ".join(problems), "; ".join(hints))
