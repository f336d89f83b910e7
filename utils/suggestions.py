"""What a mistyped flag, value or file name probably meant, and what other programs call our flags."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# Settings of nanoGPT and build-nanogpt, and the flags that do their work here. Where scripts have different
# flags, each suggests the first that it has; the rest of the text says what else differs.
FORMER_FLAGS: dict[str, tuple[str, ...]] = {
    "batch_size": ("--micro-batch", "--batch-tokens (in tokens)"),
    "gradient_accumulation_steps": ("--total-batch-tokens (of an update, in tokens: the steps follow)",),
    "block_size": ("--seq-len",),
    "max_iters": ("--max-steps",),
    "warmup_iters": ("--warmup-steps",),
    "lr_decay_iters": ("--max-steps (the decay ends with the run)",),
    "learning_rate": ("--max-lr",),
    "lr": ("--max-lr",),
    "eval_interval": ("--val-every",),
    "log_interval": ("--log-every",),
    "eval_iters": ("--val-tokens (in tokens)",),
    "always_save_checkpoint": ("--checkpoint-every (in steps)",),
    "out_dir": ("--log-dir", "--model-name (a folder is its newest checkpoint)"),
    "dataset": ("--data (a file or a folder)",),
    "init_from=resume": ("--resume",),
    "init_from": ("--model-name",),
    "model_type": ("--model-name", "--init-from"),
    "start": ("--prompt",),
    "wandb_log=False": ("--wandb (left out: it is off by default)",),
    "wandb_log": ("--wandb (without a value)",),
    "config/*.py": ("--preset (with flags: there are no configuration files)",),
}
MOST_NAMES = 10_000  # of a folder that are compared


def similar(word: str, choices: Iterable[str]) -> str | None:
    """The choice that begins with a word, is written most like it, or is its beginning; None without one.

    Upper and lower case are alike.
    """
    import difflib

    word, by_lower = word.lower(), {choice.lower(): choice for choice in choices}
    longer = [choice for choice in by_lower if len(word) > 2 and choice.startswith(word)]
    # As gpt2 of gpt2-small: up to the end of a part of the name.
    shorter = [choice for choice in by_lower if len(choice) > 2 and re.match(rf"{re.escape(choice)}\W", word)]
    close, closest = (difflib.get_close_matches(word, by_lower, n=1, cutoff=cutoff) for cutoff in (0.7, 0.8))
    found = [*sorted(longer, key=len), *closest, *sorted(shorter, key=len, reverse=True), *close]
    return by_lower[found[0]] if found else None


def similar_file(path: Path) -> Path | None:
    """What exists and is written most like a path that does not: its name, or the name of its folder."""
    if not os.path.isdir(path.parent):  # Path.is_dir raises where a folder may not be read
        folder = similar_file(path.parent) if path.parent != path else None
        return folder / path.name if folder and os.path.exists(folder / path.name) else None
    try:
        names = os.listdir(path.parent)[:MOST_NAMES]
    except OSError:
        return None
    names = [name for name in names if name != path.name]  # a broken link is listed
    name = similar(path.name, names)
    return path.parent / name if name else None


def flags_meant_by(unknown: list[str], known: Iterable[str]) -> str | None:
    """The `known` flags that unknown arguments were probably meant to be; None if unclear."""
    flags, previous = [flag for flag in known if flag.startswith("--")], ""
    meant: dict[str, str] = {}
    for argument in unknown:
        is_value = previous.startswith("-") and "=" not in previous and not argument.startswith("-")
        previous, name = argument, argument.partition("=")[0]
        if argument.startswith("-") or "=" in argument:
            meant[name] = _flag_like(argument.lstrip("-"), flags) or ""
        elif not is_value:
            meant[name] = _flag_for(argument, flags) or ""
    found = {name: text for name, text in meant.items() if text}
    if len(meant) == 1:
        return next(iter(found.values()), None)
    return ", ".join(f"{text} for {name}" for name, text in found.items()) or None


def _flag_like(setting: str, flags: list[str]) -> str | None:
    """The flag for "name" or "name=value", and what differs: one that replaces it, or one written like it."""
    name, equals, value = setting.partition("=")
    former = name.replace("-", "_")
    texts = [*FORMER_FLAGS.get(f"{former}{equals}{value}", ()), *FORMER_FLAGS.get(former, ())]
    if known := _first_known(texts, flags):
        return known
    meant = {flag[2:]: flag for flag in flags}
    for theirs, ours in FORMER_FLAGS.items():
        if theirs.isidentifier() and (known := _first_known(ours, flags)):
            meant.setdefault(theirs.replace("_", "-"), known)
    close = similar(name.replace("_", "-"), meant)
    return close and meant[close]


def _first_known(texts: Iterable[str], flags: list[str]) -> str | None:
    """The first of some texts of FORMER_FLAGS whose flag exists."""
    return next((text for text in texts if text.split()[0] in flags), None)


def _flag_for(value: str, flags: list[str]) -> str | None:
    """The flag that takes such a value."""
    if value.endswith(".py"):
        return _first_known(FORMER_FLAGS["config/*.py"], flags)
    takes = ("--prompt",)
    if value.endswith(".pt") or value.startswith("gpt2"):
        takes = ("--model-name", "--init-from")
    elif os.path.isdir(value):
        takes = ("--model-name", "--data", "--input")
    elif "." in value or os.path.exists(value):
        takes = ("--data", "--input", "--prompt")
    return next((f"{flag} {shlex.quote(value)}" for flag in takes if flag in flags), None)
