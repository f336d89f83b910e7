"""Which model to train: a new one, that of `--init-from`, or that of the checkpoint to resume."""

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.command_line import UserError, format_bytes
from utils.console import announced
from utils.distributed import Distributed
from utils.runtime import memory_bytes
from utils.tokenizer import Tokenizer, check_vocab_size, tokenizer_from_state
from utils.training.data_source import Data, fetch, open_data
from utils.training.flags import flag_of
from utils.training.optimizers import state_bytes
from utils.training.tokenizing import fits_request, recorded_tokenizer, requested_tokenizer
from utils.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from gpt_model import GPT, GPTConfig


class ModelFactory(NamedTuple):
    """How models come into being: utils does not know the class."""

    new: Callable[..., "GPT"]  # from the fields of a GPTConfig, with random weights
    load: Callable[[str], "GPT"]  # from whatever `--init-from` may name


def load_model(
    factory: ModelFactory, args: Namespace, dist: Distributed, checkpoint: Checkpoint | None
) -> "GPT | None":
    """The model of `--init-from`, None where the flags decide; a resumed run does not read it again.

    It gets a model with the sizes of its own checkpoint, whose weights follow with the rest of its state.
    What the model decides replaces defaults in `args`. Raises UserError if flags on the command line
    contradict the model.
    """
    if checkpoint and (init_from := checkpoint.state["train_args"].get("init_from")):
        args.init_from = init_from  # its own checkpoints must say so too: they may be resumed in turn
        model = factory.new(**checkpoint.model["config"])
        model.tokenizer_state, source = checkpoint.model["tokenizer"], checkpoint.path
    elif args.init_from and not checkpoint:
        source = args.init_from
        with announced(f"loading {source}", shown=dist.is_master):
            model = factory.load(source)
    else:
        return None
    sizes = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd")}
    found = dict(sizes)
    is_recorded = recorded_tokenizer(args.tokenizer, checkpoint) is not None
    if args.tokenizer and not is_recorded and not fits_request(args.tokenizer, model.tokenizer_state):
        found["tokenizer"] = request_for(model.tokenizer_state)
    check_typed(args, found, source)
    vars(args).update(sizes)
    return model.to(dist.device)


def load_model_and_data(
    factory: ModelFactory, args: Namespace, dist: Distributed, checkpoint: Checkpoint | None = None
) -> tuple["GPT", Data]:
    """Loads or initialises the model, and opens the data with its tokenizer; UserError if they do not fit."""
    model = load_model(factory, args, dist, checkpoint)
    args.seq_len = args.seq_len or model.config.block_size
    tokenizer = model.tokenizer_state if model else requested_tokenizer(args.tokenizer, checkpoint, dist)
    shortest = 0 if args.eval_only and args.eval_part else args.seq_len  # a part may be shorter than a window
    data = open_data(fetch(args.data, dist), tokenizer, shortest, dist)
    if "tokenizer" not in args.typed:
        args.tokenizer = request_for(data.tokenizer.state())
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.seq_len)
    sizes.update(vocab_size=data.tokenizer.padded_vocab_size)
    # Too large a model is an error before anything is allocated; a dry run reports it.
    outline = outline_if_too_large(lambda: factory.new(**vars(model.config) if model else sizes), args, dist)
    with announced("initialising the weights", shown=dist.is_master):
        model = outline or model or factory.new(**sizes).to(dist.device)
    check_model_reads(model.config, args.seq_len, data.tokenizer)
    model.config.dropout = args.dropout  # also of loaded weights, whatever they were trained with
    return model, data


def request_for(tokenizer_state: dict[str, Any]) -> str:
    """What to record as `--tokenizer`: the kind of a tokenizer, and the size of a BPE."""
    name = tokenizer_state["name"]
    return f"bpe:{tokenizer_from_state(tokenizer_state).vocab_size}" if name == "bpe" else name


def check_typed(args: Namespace, found: dict[str, Any], source: str) -> None:
    """Raises UserError if a flag on the command line contradicts the model that is loaded from `source`."""
    wrong = [
        f"{flag_of(name)} {getattr(args, name)} (found {value})"
        for name, value in found.items()
        if name in args.typed and getattr(args, name) != value
    ]
    if wrong:
        what = f"{source} contradicts {', '.join(wrong)}"
        raise UserError(what, "leave these flags out: a loaded model has its own sizes and tokenizer")


def check_model_reads(config: "GPTConfig", seq_len: int, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model cannot read windows of this length, or ids of this tokenizer."""
    if seq_len > config.block_size:
        what = f"--seq-len {seq_len} is more than the model's block size {config.block_size}"
        raise UserError(what, "use a smaller --seq-len")
    check_vocab_size(tokenizer, config.vocab_size)


def outline_if_too_large(build: Callable[[], "GPT"], args: Namespace, dist: Distributed) -> "GPT | None":
    """None unless `least_bytes` exceeds the memory; allocates nothing of the model's size.

    If it does, a dry run gets the model on the meta device, to report it; otherwise UserError is raised.
    """
    with torch.device("meta"):
        outline = build()
    needed, memory = least_bytes(outline, args), memory_bytes(dist.device)
    too_large = memory is not None and needed > memory
    if not dist.max_number(int(too_large)):  # on all ranks alike
        return None
    if not args.dry_run:
        has = f"{dist.device} has {format_bytes(memory)}" if too_large else "another rank has less"
        what = f"{outline.num_parameters():,} parameters with --micro-batch {args.micro_batch} need at least"
        hint = "use a smaller model (--n-layer, --n-embd) or --micro-batch"
        raise UserError(f"{what} {format_bytes(needed)} of memory, {has}", hint)
    return outline


def least_bytes(model: "GPT", args: Namespace) -> int:
    """Bytes without which no micro-batch can be computed: parameters, their state, one activation a layer."""
    tokens = args.seq_len * (1 if args.micro_batch == "auto" else args.micro_batch)
    if args.eval_only:
        return 4 * model.num_parameters() + 8 * tokens
    activations = tokens * model.config.n_layer * model.config.n_embd
    return state_bytes(model, args.optimizer) + 4 * activations
