"""The command line of every script: flags, errors in two lines, exit codes.

Exit codes: 0 the work is complete; 1 unexpected exception (with a traceback) or work that could not be
finished; 2 the user must change something (flag, file, device, missing resource); 3 training diverged;
130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import errno
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from utils.console import (
    guarded_streams,
    handle_interrupt,
    imports,
    launched_by_torchrun,
    printable,
    second_interrupt_exits,
    warn,
    watched_signals,
)
from utils.help_text import HelpFormatter
from utils.suggestions import flags_meant_by, similar

# Of flags and files: larger numbers overflow somewhere, and mean nothing in a training run.
LARGEST_INT = 10**15
LARGEST_NUMBER = 1e30
# In errors of PyTorch that are not OutOfMemoryErrors: of the CPU, of sizes above 2**63 bytes, of the CUDA
# driver, of cuBLAS.
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "Storage size calculation overflowed"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
RANK_0_SECONDS = 1.0  # to print an error of all ranks: torchrun ends it as soon as another rank has ended


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


def run_script(
    main: Callable[[], int | None],
    local_rank: Callable[[], int] = lambda: 0,
    *,
    result_is_stdout: bool = False,
) -> int:
    """Runs a script's `main`, prints a UserError as two lines on stderr, and returns the exit code.

    An error that all ranks raise alike is printed where `local_rank()` is 0 only. A script whose only
    result is its standard output (`result_is_stdout`) ends when that is gone; any other one continues.
    """

    def on_loss(error: OSError) -> None:
        if result_is_stdout:
            raise ResultLost(error.strerror) from error

    imports.close()
    with guarded_streams(on_loss), watched_signals(second_interrupt_exits()):
        earlier = handle_interrupt(signal.default_int_handler)
        try:
            return _run(main, local_rank)
        finally:
            handle_interrupt(earlier)  # begin_script's: Python's own end must print no traceback either


def _run(main: Callable[[], int | None], local_rank: Callable[[], int]) -> int:
    rank = 0
    try:
        rank = local_rank()
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        lines = printable(f"error: {error}\nhint: {error.hint}")
        tell_torchrun(lines)
        if rank == 0 or error.one_rank_only:
            sys.stdout.flush()
            print(lines, file=sys.stderr, flush=True)
        elif launched_by_torchrun():
            time.sleep(RANK_0_SECONDS)
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
    except Exception as error:
        if is_out_of_memory(error):
            reason = printable(str(error).split("\n")[0][:200]) or "Python's own"
            lines = f"error: out of memory: {reason}\nhint: use smaller numbers, or more memory"
            tell_torchrun(lines)
            print(lines, file=sys.stderr)
            code = 2
        else:
            tell_torchrun(traceback.format_exc())
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


def tell_torchrun(text: str) -> None:
    """Writes an error where torchrun looks for it, so that its last block names the cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        import json

        text = text.encode("utf-8", "backslashreplace").decode()  # torchrun could not print a surrogate
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": more}}, file)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine did not suffice. Needs no torch."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_torchs or any(text in str(error) for text in OUT_OF_MEMORY)


def _in_process_group() -> bool:
    torch = sys.modules.get("torch")  # a script that has not imported torch is in no process group
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `-` and `_` accepted alike, no abbreviations, and errors raised as `UserError`.

    Unknown flags and values are compared with the known ones. `doc` is the docstring of a script, from which
    --help takes the first line and the examples, which are indented.
    """

    def __init__(self, prog: str, doc: str | None = None, **kwargs: Any):
        if doc:
            kwargs["description"] = doc.split("\n")[0]
            kwargs["epilog"] = "\n".join(["examples:", *re.findall(r"^    \S.*", doc, re.M)])
            kwargs.setdefault("usage", "%(prog)s [flags]")
        super().__init__(prog=command_name(prog), allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.register("type", Path, lambda text: Path(path_text(text)))

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else args
        # In flags only: `--run_name=a_b` becomes `--run-name=a_b`.
        args = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), text) for text in args]
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            meant = flags_meant_by(unknown, self._option_string_actions)
            self._refuse(f"unrecognized arguments: {' '.join(unknown)}", meant)
        return found

    def parse_defaults_and_given(
        self, args: Sequence[str] | None = None, *, unknown_too: bool = False
    ) -> tuple[dict, dict]:
        """All defaults, and the flags that were typed: presets apply between the two.

        Unknown flags are an error, or ignored (`unknown_too`).
        """
        defaults = vars(self.parse_args([]))
        # argparse sets no default for a name that the namespace already holds.
        empty = argparse.Namespace(**dict.fromkeys(defaults))
        parsed = self.parse_known_args(args, empty)[0] if unknown_too else self.parse_args(args, empty)
        return defaults, {name: value for name, value in vars(parsed).items() if value is not None}

    def warn_of_others(self, args: Sequence[str] | None, used: Collection[str], reason: str) -> None:
        """Warns of flags on the command line that are not `used`, for a `reason` such as "with --verify"."""
        given = self.parse_defaults_and_given(args)[1]
        warn_not_used({name: reason for name in given if name not in used})

    def error(self, message: str) -> NoReturn:
        meant = None
        if found := re.search(r"argument (\S+): ignored explicit argument '(.*)'", message):
            flag, value = found.groups()
            opposite = flag.replace("--", "--no-", 1)
            meant = f"{flag}, without a value"
            if value.lower() in ("false", "off", "0"):
                has_opposite = opposite in self._option_string_actions
                meant = f"{opposite}, without a value" if has_opposite else f"to leave out {flag}"
        self._refuse(message, meant)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = similar(str(value), map(str, action.choices or ()))
            self._refuse(str(error), meant and " ".join([*action.option_strings[-1:], meant]))

    def _refuse(self, message: str, meant: str | None) -> NoReturn:
        lists = f"python {self.prog} --help lists the flags and their defaults"
        raise UserError(message, f"did you mean {meant}? {lists}" if meant else lists)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def warn_not_used(unused: Mapping[str, str]) -> None:
    """Warns of settings on the command line that do nothing, each with the reason."""
    if unused:
        warn("not used: " + ", ".join(f"{flag_of(name)} ({reason})" for name, reason in unused.items()))


def command_name(prog: str) -> str:
    """`prog`, or the path of its file, where that was started by its path, or is beside the one that was.

    A printed command is then true in any folder.
    """
    if getattr(sys.modules["__main__"], "__spec__", None) is not None:  # python -m
        return prog
    if Path(sys.argv[0]).stem == prog.removesuffix(".py").rpartition(".")[2]:
        return shlex.quote(sys.argv[0])
    beside = Path(sys.argv[0]).parent / prog
    return shlex.quote(str(beside)) if beside.exists() else prog


def path_text(text: str) -> str:
    """A path, or a name such as gpt2; `~` is the home folder, also after `=`, where the shell leaves it.

    Blank text, a NUL character and a name too long for the system are refused.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a path; is it a variable of the shell that is not set?"
        )
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a NUL character, which no file name has")
    path = os.path.expanduser(text)
    try:
        os.stat(path)
    except OSError as error:  # of any other kind: whoever uses the path knows what it is for
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{shown(text)}: {error.strerror}") from error
    return path


def positive_float(text: str) -> float:
    """A number above zero, from 1e-30 to 1e30."""
    return _checked(float, text, positive=True)


def non_negative_float(text: str) -> float:
    """Zero, or a number from 1e-30 to 1e30."""
    return _checked(float, text)


def fraction(text: str) -> float:
    """A number from 0 up to, but not including, 1."""
    if (value := non_negative_float(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def positive_int(text: str) -> int:
    """A whole number above zero; `1_000` is read as 1000."""
    return _checked(int, text, positive=True)


def non_negative_int(text: str) -> int:
    """A whole number, zero or above."""
    return _checked(int, text)


def _checked(kind: type[int] | type[float], text: str, *, positive: bool = False) -> Any:
    given = text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"
    largest = LARGEST_INT if kind is int else LARGEST_NUMBER
    try:
        value = kind(text)
    except ValueError:  # also for more digits than Python converts
        value = math.nan
    if not abs(value) <= largest:  # also true for NaN
        name = "whole number" if kind is int else "finite number"
        raise argparse.ArgumentTypeError(f"{given} is not a {name} (expected at most {largest:,})")
    if value < 0 or (positive and value == 0):
        raise argparse.ArgumentTypeError(f"{given} is {'not above' if positive else 'below'} zero")
    if 0 < value < 1 / LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{given} is too close to zero (expected at least 1e-30)")
    return value


def environment_int(name: str, default: int, lowest: int = 0, largest: int = 2**31 - 1) -> int:
    """A whole number from an environment variable. Raises UserError, with its name, for anything else."""
    text = os.environ.get(name)
    if text is None:
        return default
    # Not by int(): it reads "1_0" and has a limit of digits.
    if not (re.fullmatch("[0-9]{1,18}", text) and lowest <= int(text) <= largest):
        what = (
            f"environment variable {name}={shown(text)} (expected a whole number from {lowest} to {largest})"
        )
        raise UserError(what, f"correct it, or remove it: unset {name}", one_rank_only=True)
    return int(text)


def shown(value: Any) -> str:
    """A value of any kind for a message, in one short line."""
    if isinstance(value, int) and value.bit_length() > 100:  # str() refuses more than 4300 digits
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, bytes, int, float)):
        text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= 60 else f"{text[:40]}... ({len(value):,} characters)"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    size = f" of {len(value):,}" if hasattr(value, "__len__") else ""
    return f"a {'dict' if isinstance(value, dict) else type(value).__name__}{size}"


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


def format_count(count: int, noun: str) -> str:
    """`1 step`, `12 steps`, `2 processes`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


def format_bytes(num_bytes: float) -> str:
    """`1.49 GB`, or `12.3 MB` below 0.1 GB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def perplexity(loss: float) -> str:
    """exp(loss): the number of equally likely tokens with the same loss, in nats."""
    return f"{math.exp(min(loss, 700)):,.2f}"


def bits_per_byte(loss: float, bytes_per_token: float) -> float | None:
    """A loss in nats per token as bits per byte of text, which compares tokenizers; None without bytes."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
