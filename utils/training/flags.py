"""The flags of train_gpt.py: how they are declared, read and checked."""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from utils.command_line import (
    ArgumentParser,
    UserError,
    command_name,
    flag_of,
    positive_int,
    warn_not_used,
)
from utils.distributed import Distributed
from utils.files import sha256_of_code
from utils.help_text import HelpFormatter
from utils.suggestions import FORMER_FLAGS
from utils.training.data_source import choose_source
from utils.weights.checkpoint import newest_model_file

MOST_TIMES = 10**6  # that a run is evaluated or saved: the plan of a run lists them

T = TypeVar("T")


class Flags:
    """Declares a constant and its flag in one line.

    `MAX_LR = flag("--max-lr", 6e-4, positive_float, "peak")` sets MAX_LR, and the default of --max-lr.
    `doc` is the docstring of the script, for --help.
    """

    def __init__(self, doc: str = ""):
        self.parser = ArgumentParser(prog="train_gpt.py", doc=doc)
        self._groups: dict[str, Any] = {}

    def group(self, title: str) -> None:
        """Starts, or continues, a section of --help."""
        if title not in self._groups:
            self._groups[title] = self.parser.add_argument_group(title)
        self._group = self._groups[title]

    def __call__(self, name: str, default: T, type: Callable | tuple | str, help: str, **options: Any) -> T:
        """Declares a flag, with `options` of argparse's `add_argument`, and returns its default.

        `type` is a function that converts the value, a tuple of all values, the value (a text) of a flag that
        takes none, or `bool` for a flag that is True when given.
        """
        if type is bool:
            options["action"] = "store_true"
        elif isinstance(type, str):
            options.update(action="store_const", const=type)
        elif isinstance(type, tuple):
            options["choices"] = type
        else:
            options["type"] = type
        self._group.add_argument(name, default=default, help=help, **options)
        return default


def read_flags(
    flags: Flags, argv: list[str] | None, presets: dict[str, dict], preset_for: dict[tuple[str, str], str],
    recipes: dict[str, dict[str, dict]],
) -> tuple[Namespace, str]:  # fmt: skip
    """Settings: flags over the recipe over the preset over the constants; also why the preset was chosen.

    `typed` of the settings holds the names of those on the command line. `preset_for` names the preset for
    each pair of device ("CUDA", "no CUDA") and data ("shards", "a text", "characters"). `recipes` holds what
    each recipe changes in each preset.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    argv = [text for text in argv if text not in ("-h", "--help")]
    defaults, given = flags.parser.parse_defaults_and_given(argv, unknown_too=wants_help)
    typed = sorted(given)
    name, reason = choose_preset(given, preset_for)
    given["preset"], recipe = name, given.get("recipe", defaults["recipe"])
    preset = presets[name] | recipes[recipe][name]
    assert preset.keys() <= defaults.keys(), f"preset {name} sets a flag that does not exist"
    if wants_help:
        settings = {**preset, "preset": name, "recipe": recipe}
        print_help(flags.parser, settings, f"Defaults: preset {name} ({reason}), recipe {recipe}.")
    check_former_values(given)
    args = Namespace(**{**defaults, **preset, **given}, typed=typed)
    if args.eval_only:
        args.init_from = args.init_from or newest_model_file(args.log_dir)
        if args.init_from is None:
            raise UserError(f"no checkpoint in {args.log_dir} to evaluate", "name one with --init-from")
        if "seq_len" not in given:
            args.seq_len = None  # the block size of the evaluated model
    # A run that is shortened, or given a lower learning rate, by one flag alone stays valid.
    if "warmup_steps" not in given:
        args.warmup_steps = min(args.warmup_steps, args.max_steps // 10)
    if "min_lr" not in given:
        args.min_lr = min(args.min_lr, args.max_lr / 10)
    return args, reason


def choose_preset(given: dict[str, Any], preset_for: dict[tuple[str, str], str]) -> tuple[str, str]:
    """The preset that `given` flags, the device and the data decide, and the reason."""
    if "preset" in given:
        return given["preset"], "--preset"
    on_cuda = torch.cuda.is_available() and given.get("device", "auto").startswith(("auto", "cuda"))
    has_shards = choose_source(given.get("data")).kind == "shards"
    text = "characters" if given.get("tokenizer") == "char" else "a text"
    chosen_by = ("CUDA" if on_cuda else "no CUDA", "shards" if has_shards else text)
    return preset_for[chosen_by], ", ".join(chosen_by)


def print_help(parser: ArgumentParser, defaults: dict[str, Any], note: str) -> NoReturn:
    """Prints --help with other defaults and a line about them, and exits."""
    shown = copy.copy(parser)
    shown.formatter_class = partial(HelpFormatter, defaults=defaults)
    shown.description = f"{parser.description}\n{note}"
    shown.print_help()
    raise SystemExit(0)


def check_former_values(given: dict[str, Any]) -> None:
    """Raises UserError for values that mean something to nanoGPT only, such as `--init-from resume`."""
    for name, value in given.items():
        former = FORMER_FLAGS.get(f"{name}={value}")
        if former and not Path(value).exists():
            raise UserError(f"{flag_of(name)} {value} names no model", f"did you mean {former[0]}?")


def settings_of(args: Namespace) -> dict[str, Any]:
    """All flags as plain values, for files and comparisons."""
    values = {name: value for name, value in vars(args).items() if name != "typed"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


EVALUATION_FLAGS = {
    *("eval_only", "eval_part", "stride", "init_from", "data", "tokenizer", "seq_len", "micro_batch"),
    *("val_tokens", "device", "dtype", "log_dir", "dist_timeout", "preset"),
}


def unused_flags(args: Namespace) -> dict[str, str]:
    """Settings that mean nothing together with others, and why."""
    unused = {}
    if not args.val_every and not args.eval_only:
        unused.update(dict.fromkeys(("val_tokens", "patience"), "with --val-every 0"))
    if not args.sample_every:
        unused["sample_prompt"] = "with --sample-every 0"
    if not args.hellaswag_every:
        unused.update(dict.fromkeys(("hellaswag_examples", "hellaswag_dir"), "with --hellaswag-every 0"))
    if not args.dry_run:
        unused["cost_per_hour"] = "without --dry-run"
    if args.optimizer == "adamw":
        unused["muon_lr"] = "with --optimizer adamw"
    name = "min_lr" if args.schedule == "linear" else "decay_fraction"
    unused[name] = f"with --schedule {args.schedule}"
    if not args.eval_only:
        unused.update(dict.fromkeys(("eval_part", "stride"), "without --eval-only"))
    elif args.eval_part:
        unused["val_tokens"] = "with --eval-part"
    else:
        unused["stride"] = "without --eval-part"
    if args.eval_only:
        others = settings_of(args).keys() - EVALUATION_FLAGS
        unused.update(dict.fromkeys(others, "with --eval-only"))
    return unused


def warn_of_unused(args: Namespace) -> None:
    """Warns of flags on the command line that this run does not use."""
    unused = unused_flags(args)
    warn_not_used({name: unused[name] for name in args.typed if name in unused})


def check_ranks_agree(args: Namespace, dist: Distributed) -> None:
    """Raises UserError, with flags, ranks and values, unless all ranks run the same code and settings."""
    if dist.is_alone:
        return
    own = ("device", "log_dir", "hellaswag_dir", "data")  # may differ: the content of the data is compared
    settings = {flag_of(name): value for name, value in settings_of(args).items() if name not in own}
    settings.update({"torch's version": torch.__version__, "the code's SHA-256": sha256_of_code()[:12]})
    dist.check_equal(settings, "start every rank with the same command, code and version of torch")


def int_or_auto(text: str) -> int | str:
    """A whole number above zero, or "auto"."""
    return text if text == "auto" else positive_int(text)


def accumulation_steps(total_batch_tokens: int, micro_batch: int, seq_len: int, world_size: int) -> int:
    """Micro-steps of an update: B * T * world_size * steps is exactly the batch, or UserError is raised."""
    tokens_at_once = micro_batch * seq_len * world_size
    steps, rest = divmod(total_batch_tokens, tokens_at_once)
    if rest or steps == 0:
        nearest = ", ".join(str(n * tokens_at_once) for n in (steps, steps + 1) if n > 0)
        windows, rest = divmod(total_batch_tokens, seq_len * world_size)
        fitting = f" (or --micro-batch {windows})" if steps == 0 and windows and not rest else ""
        what = f"--total-batch-tokens {total_batch_tokens} is not a multiple of --micro-batch * --seq-len * "
        what += f"ranks = {micro_batch}*{seq_len}*{world_size} = {tokens_at_once}; "
        what += f"nearest: {nearest}{fitting}"
        raise UserError(what, "change --total-batch-tokens, --micro-batch or --seq-len")
    return steps


def fitting_micro_batch(args: Namespace, micro_batch: int, world_size: int) -> int:
    """The largest micro-batch up to this one that divides the batch over all ranks; this one if none does."""
    windows, rest = divmod(args.total_batch_tokens, args.seq_len * world_size)
    sizes = range(min(micro_batch, windows), 0, -1) if not rest else ()
    return next((size for size in sizes if windows % size == 0), micro_batch)


def check_training_settings(args: Namespace, world_size: int) -> None:
    """Raises one UserError that lists everything wrong with the flags of train_gpt.py."""
    for name in ("tensorboard", "wandb"):
        if getattr(args, name) and find_spec(name) is None:
            raise UserError(f"--{name} needs the package {name}", f"pip install {name}")
    problems = []
    if args.init_from is None and args.n_embd % args.n_head:
        problems.append(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    if args.warmup_steps > args.max_steps:
        problems.append(f"--warmup-steps {args.warmup_steps} is more than --max-steps {args.max_steps}")
    if args.seed >= 2**32:
        problems.append(f"--seed {args.seed} is not below 2**32")
    for name in ("val_every", "hellaswag_every", "sample_every", "checkpoint_every"):
        every = getattr(args, name)
        if every and args.max_steps // every > MOST_TIMES:
            times = f"{args.max_steps // every:,}"
            problems.append(f"{flag_of(name)} {every} in --max-steps {args.max_steps} is {times} times")
    if args.min_lr > args.max_lr:
        problems.append(f"--min-lr {args.min_lr:g} is above --max-lr {args.max_lr:g}")
    if args.decay_fraction > 1:
        problems.append(f"--decay-fraction {args.decay_fraction:g} is above 1")
    try:
        micro_batch = 1 if args.micro_batch == "auto" else args.micro_batch
        accumulation_steps(args.total_batch_tokens, micro_batch, args.seq_len, world_size)
    except UserError as error:
        problems.append(str(error))
    if problems:
        hint = f"change the flags named above; python {command_name('train_gpt.py')} --help lists all"
        raise UserError("; ".join(problems), hint)
