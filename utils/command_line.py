"""The command line of every script: `-` and `_` alike, no abbreviations, errors in two lines."""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn, Sequence

from utils.errors import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help; where it is None, the help itself says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with flags that take `-` and `_`, defaults in `--help`, and errors raised as `UserError`."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        return super().parse_args(with_dashes(sys.argv[1:] if args is None else args), namespace)

    def parse_defaults_and_given(self, args: Sequence[str] | None = None) -> tuple[dict, dict]:
        """All defaults, and what was typed: a table of presets fits between the two."""
        defaults = {name: self.get_default(name) for name in vars(self.parse_args([]))}
        # argparse gives no default to a name that the namespace already holds.
        parsed = vars(self.parse_args(args, argparse.Namespace(**dict.fromkeys(defaults))))
        return defaults, {name: value for name, value in parsed.items() if value is not None}

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"python {self.prog} --help lists the flags and their defaults")


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """`--max_lr=3e-4` becomes `--max-lr=3e-4`; values stay as they are."""
    dashed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        dashed.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else argument)
    return dashed


def finite_float(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive_float(text: str) -> float:
    """A finite number above zero."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def non_negative_float(text: str) -> float:
    """A finite number, zero or above."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return value


def positive_int(text: str) -> int:
    """A whole number above zero; `1_000` is read as 1000."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def non_negative_int(text: str) -> int:
    """A whole number, zero or above."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return value
