"""The flags of train_gpt.py.

Their defaults are the constants of that script, found by name: MAX_LR is --max-lr's.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, Mapping

import torch

from utils.command_line import (
    ArgumentParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from utils.runtime import DTYPES
from utils.training.data_source import choose_source


def make_parser(constants: Mapping[str, Any], presets: Mapping[str, dict]) -> ArgumentParser:
    """A parser whose defaults are the UPPER_CASE entries of `constants`."""
    parser = ArgumentParser(
        prog="train_gpt.py", description="Train a GPT-2. Defaults are those of the preset gpt2."
    )
    _add_model_and_data(parser, presets)
    _add_recipe(parser)
    _add_evaluation(parser)
    _add_running(parser)
    flags = vars(parser.parse_args([]))
    defaults = {name.lower(): value for name, value in constants.items() if name.isupper()}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in flags})
    return parser


def read_arguments(
    argv: list[str] | None, constants: Mapping[str, Any], presets: Mapping[str, dict]
) -> tuple[Namespace, str]:
    """Settings: flags over the preset over the constants. Also returns why the preset was chosen."""
    parser = make_parser(constants, presets)
    defaults, given = parser.parse_defaults_and_given(argv)
    reason = "--preset"
    if "preset" not in given:
        on_cuda = torch.cuda.is_available() and given.get("device", "auto").startswith(("auto", "cuda"))
        has_shards = choose_source(given.get("data")).kind == "shards"
        given["preset"] = "gpt2" if on_cuda and has_shards else "tiny"
        reason = f"{'CUDA' if on_cuda else 'no CUDA'}, {'shards' if has_shards else 'no shards'}"
    args = Namespace(**{**defaults, **presets[given["preset"]], **given})
    if args.eval_only and "seq_len" not in given:
        args.seq_len = None  # the block size of the model that is evaluated
    # A run that is shortened, or cooled down, by one flag alone stays a valid one.
    if "warmup_steps" not in given:
        args.warmup_steps = min(args.warmup_steps, args.max_steps // 10)
    if "min_lr" not in given:
        args.min_lr = min(args.min_lr, args.max_lr / 10)
    return args, reason


def positive_int_or_auto(text: str) -> int | str:
    """A whole number above zero, or "auto"."""
    return text if text == "auto" else positive_int(text)


def _add_model_and_data(parser: ArgumentParser, presets: Mapping[str, dict]) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--preset", choices=presets, default="auto", help="auto: gpt2 on CUDA with shards, else tiny")
    add("--data", help="folder of shards or text file; default: edu_fineweb10B/, input.txt, a download")
    add("--tokenizer", choices=("gpt2", "char"), help="of a text file")
    add("--shuffle", choices=("on", "off"), help="windows in a seeded random order, or as they come")
    add("--init-from", metavar="MODEL", help="start from gpt2[-medium|-large|-xl], a checkpoint or a folder")
    add("--n-layer", type=positive_int, help="layers")
    add("--n-head", type=positive_int, help="attention heads")
    add("--n-embd", type=positive_int, help="channels")
    add("--seq-len", type=positive_int, help="tokens of a window, and the block size of a fresh model")


def _add_recipe(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("recipe").add_argument
    add("--micro-batch", type=positive_int_or_auto, help="windows in the model at one time; auto: what fits")
    add("--total-batch-tokens", type=positive_int, help="tokens of an update, over all ranks and micro-steps")
    add("--max-steps", type=positive_int, help="updates")
    add("--warmup-steps", type=non_negative_int, help="updates until the highest learning rate")
    add("--max-lr", type=positive_float, help="highest learning rate")
    add("--min-lr", type=non_negative_float, help="learning rate at the end")
    add("--weight-decay", type=non_negative_float, help="of matrices")
    add("--grad-clip", type=positive_float, help="largest norm of the gradient")
    add(
        "--skip-spikes",
        type=non_negative_float,
        metavar="Z",
        help="skip norms Z sigmas above the mean; 0: none",
    )
    add("--seed", type=non_negative_int, help="of weights and data order")


def _add_evaluation(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation (every N steps and after the last; 0: never)").add_argument
    add("--val-every", type=non_negative_int, help="steps between validations")
    add("--val-tokens", type=positive_int, help="tokens of a validation; at most the whole split")
    add("--hellaswag-every", type=non_negative_int, help="steps between HellaSwag evaluations")
    add("--hellaswag-examples", type=positive_int, metavar="N", help="the first N of them; default: all")
    add(
        "--hellaswag-dir",
        type=Path,
        help="folder of hellaswag_val.jsonl; default: hellaswag/, $HELLASWAG_DIR",
    )
    add("--sample-every", type=non_negative_int, help="steps between samples")
    add("--sample-prompt", help="what samples start with")
    add("--eval-only", action="store_true", help="val loss of --init-from or the newest checkpoint, then end")


def _add_running(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("running").add_argument
    add("--log-dir", type=Path, help="where everything lands")
    add(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="go on from the newest, or from this one",
    )
    add(
        "--checkpoint-every",
        type=non_negative_int,
        help="steps between checkpoints; 0: the last only",
    )
    add("--keep-checkpoints", type=positive_int, help="newest checkpoints that can be resumed from")
    add("--keep-every", type=non_negative_int, help="models of these steps stay; 0: only the last")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix products")
    add(
        "--compile",
        action="store_const",
        const="on",
        default="auto",
        help="torch.compile (auto: where it pays)",
    )
    add("--no-compile", dest="compile", action="store_const", const="off", help="no torch.compile")
    add("--deterministic", action="store_true", help="same bits in every run, where the device can")
    add("--tensorboard", action="store_true", help="mirror the metrics to TensorBoard, in the log directory")
    add("--wandb", action="store_true", help="mirror the metrics to Weights & Biases")
    add("--dry-run", action="store_true", help="say what the run would be and take, then end")
    add("--cost-per-hour", type=positive_float, help="of all machines together; --dry-run adds the money")
    add("--dist-timeout", type=positive_float, help="seconds after which a hung rank ends the job")
