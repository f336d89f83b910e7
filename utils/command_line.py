"""The command line of every script: flags, errors in two lines, exit codes.

Exit codes: 0 the work is complete; 1 unexpected exception (with a traceback) or work that could not be
finished; 2 the user must change something (flag, file, device, missing resource); 3 training diverged;
130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils.console import guarded_streams, printable, second_interrupt_exits, watched_signals


class UserError(ValueError):
    """An error that only the user can fix: printed in two lines, without a traceback.

    Args:
        what: the `error:` line: what is wrong, the value, what was expected and what was found.
        hint: the `hint:` line: what to run or to change.
        one_rank_only: other ranks may not see the error, so this rank must report it itself.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str, *, one_rank_only: bool = False):
        super().__init__(what)
        self.hint = hint
        self.one_rank_only = one_rank_only


class Diverged(UserError):
    """Training diverged: a non-finite loss or gradient norm, or too many spikes."""

    exit_code = 3


class Unfinished(UserError):
    """The work could not be finished, through no fault of the user's; the same command may finish it."""

    exit_code = 1


class ResultLost(Exception):
    """Standard output, the only result of a script, cannot be written any more."""


def run_script(main: Callable[[], int | None], local_rank: int = 0, *, result_is_stdout: bool = False) -> int:
    """Runs a script's `main`, prints a UserError as two lines on stderr, and returns the exit code.

    An error that all ranks raise alike is printed on local rank 0 of each machine only. A script whose only
    result is its standard output (`result_is_stdout`) ends when that is gone; any other one continues.
    """

    def on_loss(error: OSError) -> None:
        if result_is_stdout:
            raise ResultLost(error.strerror) from error

    with guarded_streams(on_loss), watched_signals(second_interrupt_exits()):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # instead of begin_script's
        return _run(main, local_rank)


def _run(main: Callable[[], int | None], local_rank: int) -> int:
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        if local_rank == 0 or error.one_rank_only:
            sys.stdout.flush()
            lines = printable(f"error: {error}\nhint: {error.hint}")
            print(lines, file=sys.stderr, flush=True)
        code = error.exit_code
    except ResultLost as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 0  # whoever reads it, such as `head`, wants no more
        hint = "make room, or write it to another file"
        print(f"error: cannot write standard output: {error}\nhint: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    except Exception:
        if not _in_process_group():
            raise
        traceback.print_exc()
        code = 1
    if _in_process_group():
        # Other ranks may be waiting in a collective, and NCCL's teardown would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _in_process_group() -> bool:
    torch = sys.modules.get("torch")  # a script that has not imported torch is in no process group
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to the help of a flag; where it is None, the help itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `-` and `_` accepted alike, no abbreviations, and errors raised as `UserError`."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        # In flags only: `--run_name=a_b` becomes `--run-name=a_b`.
        args = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), text) for text in args]
        return super().parse_args(args, namespace)

    def parse_defaults_and_given(self, args: Sequence[str] | None = None) -> tuple[dict, dict]:
        """All defaults, and the flags that were typed: presets apply between the two."""
        defaults = vars(self.parse_args([]))
        # argparse sets no default for a name that the namespace already holds.
        parsed = vars(self.parse_args(args, argparse.Namespace(**dict.fromkeys(defaults))))
        return defaults, {name: value for name, value in parsed.items() if value is not None}

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"python {self.prog} --help lists the flags and their defaults")


def positive_float(text: str) -> float:
    """A finite number above zero."""
    return _checked(float(text), text, positive=True)


def non_negative_float(text: str) -> float:
    """A finite number, zero or above."""
    return _checked(float(text), text)


def fraction(text: str) -> float:
    """A number from 0 up to, but not including, 1."""
    if (value := non_negative_float(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def positive_int(text: str) -> int:
    """A whole number above zero; `1_000` is read as 1000."""
    return _checked(int(text), text, positive=True)


def non_negative_int(text: str) -> int:
    """A whole number, zero or above."""
    return _checked(int(text), text)


def _checked(value: Any, text: str, *, positive: bool = False) -> Any:
    if not abs(value) < math.inf:  # unlike math.isfinite, this accepts integers of any size
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    if value < 0 or (positive and value == 0):
        raise argparse.ArgumentTypeError(f"{text} is {'not above' if positive else 'below'} zero")
    return value


def format_duration(seconds: float) -> str:
    """`45s`, `2m10s`, `3h05m`, `2d04h`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def format_bytes(num_bytes: float) -> str:
    """`1.49 GB`, or `12.3 MB` below 0.1 GB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def perplexity(loss: float) -> str:
    """exp(loss): the number of equally likely tokens with the same loss, in nats."""
    return f"{math.exp(min(loss, 700)):,.2f}"
