"""Proves on a GPU, in at most eight minutes, that the CUDA code is right, fast and lean.

Each part is a command in a process of its own, with a time limit; one that fails is reported, and the next
one runs. The file of --json is rewritten after every part. The exit code is 1 if results were not proven
right; missed bars do not change it, nor do parts that only measure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks.figures import header, write_json
from utils.command_line import ArgumentParser, Unfinished, UserError
from utils.hellaswag.dataset import choose_directory
from utils.runtime import choose_device, device_name

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 480  # seconds, of all parts together
OUTPUT_LINES = 40  # of each part are shown and kept
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "numpy")
TOY_MODEL = "--n-layer 2 --n-head 2 --n-embd 32"

Figures = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------
# The bars. Each function takes its value from the figures of a part; LookupError where it is missing.


def kernel_error(figures: Figures, name: str) -> float:
    """An error of our loss with its kernel."""
    return figures["forms"]["ours, kernel"][name]


def kernel_time(figures: Figures) -> float:
    """Time per row of our loss with its kernel, as a multiple of that of compiled full logits."""
    ours, full = (figures["forms"][name] for name in ("ours, kernel", "full logits, compiled"))
    return (ours["milliseconds"] / ours["rows"]) / (full["milliseconds"] / full["rows"])


def step_speed(figures: Figures) -> float:
    """Speed of our training step, as a multiple of that with compiled full logits."""
    [size] = figures["sizes"].values()
    return size["contenders"]["ours, full logits"]["time_ratio"]


def step_memory(figures: Figures) -> float:
    """Peak memory of our training step in GB; missing unless B = 64."""
    [size] = figures["sizes"].values()
    ours = size["contenders"]["ours"]
    return {ours["micro_batch"]: ours["peak_memory_bytes"] / 1e9}[64]


def sampling_speed(figures: Figures, num_texts: int) -> float:
    """Tokens per second of all texts together, with graphs, in bf16."""
    speeds = {(row["form"], row["dtype"], row["texts"]): row["tokens_per_second"] for row in figures["rows"]}
    return speeds["ours, graphs", "bfloat16", num_texts]


def hellaswag_seconds(figures: Figures) -> float:
    """Seconds for all examples."""
    return figures["examples"] / figures["examples_per_second"]


def share_of_tokens(figures: Figures) -> float:
    """Tokens of the fast recipe for the loss of the faithful one, as a share of its tokens."""
    if (shares := figures["share_of_tokens"]) is None:
        raise LookupError("a seed has not reached the loss")
    return shares["highest"]


class Bar(NamedTuple):
    """A goal for a figure."""

    name: str
    value: Callable[[Figures], float]
    bound: str  # "at least" or "at most"
    bar: float


def compare(bar: Bar, figures: Figures) -> Figures:
    """The bar beside its value, which is None if it was not measured, and whether it is met."""
    try:
        value = bar.value(figures)
        met = value >= bar.bar if bar.bound == "at least" else value <= bar.bar
    except LookupError:
        value, met = None, False
    return {"name": bar.name, "value": value, "bound": bar.bound, "bar": bar.bar, "met": met}


def print_bars(bars: Sequence[Figures]) -> None:
    """Prints a line for each result of `compare`."""
    for row in bars:
        value = "not measured" if row["value"] is None else f"{row['value']:,.4g}"
        met = "" if row["value"] is None else "met" if row["met"] else "NOT MET"
        print(f"    {row['name']:34}{value:>14}   {row['bound']:8} {row['bar']:8,.4g}   {met}".rstrip())


# ------------------------------------------------------------------------------------------------------------
# The parts


class Part(NamedTuple):
    """What follows `python -m`, on a GPU and at toy size, and what is expected of it."""

    command: str
    flags: str
    toy_flags: str
    seconds: int  # at most
    proves: bool  # that results are right: it must run to its end
    bars: Sequence[Bar] = ()


# Correctness first: where time runs out, speeds are missing.
PARTS = {
    "tests": Part("pytest tests/test_cuda.py -q -p no:cacheprovider --durations 8", "", "", 210, proves=True),
    "loss": Part(
        command="tests.benchmarks loss",
        flags="",
        toy_flags="--rows 48 --channels 32 --vocab-size 1000 --rounds 1",
        seconds=90,
        proves=True,
        bars=[
            Bar("error of the loss in float32", partial(kernel_error, name="loss_error"), "at most", 1e-5),
            Bar("error of gradients in bf16", partial(kernel_error, name="gradient_error"), "at most", 1e-2),
            Bar("time / compiled full logits", kernel_time, "at most", 1.0),
        ],
    ),
    "step": Part(
        command="tests.benchmarks step",
        flags="--size 124M --rounds 2",
        toy_flags=f"{TOY_MODEL} --seq-len 16 --micro-batch 2 --micro-steps 2 --vocab-size 300 --rounds 1",
        seconds=170,
        proves=False,
        bars=[
            Bar("speed / compiled full logits", step_speed, "at least", 1.0),
            Bar("peak memory at B64 in GB", step_memory, "at most", 27.4),
        ],
    ),
    "generate": Part(
        command="tests.benchmarks decode",
        flags="--rounds 2",
        toy_flags=f"{TOY_MODEL} --max-new-tokens 24 --rounds 1",
        seconds=100,
        proves=True,
        bars=[
            Bar("tokens/s of one text, bf16", partial(sampling_speed, num_texts=1), "at least", 1500),
            Bar("tokens/s of 8 texts, bf16", partial(sampling_speed, num_texts=8), "at least", 8000),
        ],
    ),
    "hellaswag": Part(
        command="tests.benchmarks hellaswag",
        flags="--examples 1000000 --padded-examples 64 --rounds 1",
        toy_flags=f"{TOY_MODEL} --examples 3 --padded-examples 2 --block-size 256 --rounds 1",
        seconds=40,
        proves=False,
        bars=[Bar("seconds for all examples", hellaswag_seconds, "at most", 5.0)],
    ),
    "recipe": Part(
        command="tests.benchmarks recipe",
        flags="--part 124M --seeds 1337",
        toy_flags="--part 124M --seeds 1337 --toy",
        seconds=TIME_LIMIT,
        proves=False,
        bars=[Bar("tokens / faithful, to its loss", share_of_tokens, "at most", 0.5)],
    ),
}
DEFAULT_PARTS = [name for name in PARTS if name != "recipe"]  # which takes the whole time limit


def run_limited(command: list[str], limit: float, log_path: Path, **environment: str) -> int | None:
    """Runs a command and ends all processes that it started. Returns its exit code, None at the limit."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also at Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_part(part: Part, limit: float, args: Namespace) -> Figures:
    """Runs a part, and prints the end of its output and its bars. Returns its entry of the file."""
    folder = choose_directory(args.hellaswag_dir).resolve()
    if part.command.endswith("hellaswag") and not (folder / "hellaswag_val.jsonl").is_file():
        return {"status": f"skipped: no hellaswag_val.jsonl in {folder}", "right": True, "bars": []}
    command = [
        sys.executable,
        "-m",
        *part.command.split(),
        *(part.toy_flags if args.toy else part.flags).split(),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        json_path, log_path = Path(scratch) / "figures.json", Path(scratch) / "log.txt"
        if part.command.startswith("tests.benchmarks"):
            command += ["--json", str(json_path)]
        started = time.monotonic()
        code = run_limited(command, limit, log_path, HELLASWAG_DIR=str(folder))
        seconds = time.monotonic() - started
        figures = json.loads(json_path.read_text()) if json_path.is_file() else {}
        output = log_path.read_text(errors="replace").rstrip().split("\n")[-OUTPUT_LINES:]
    outcome = "TIMED OUT" if code is None else "done" if code == 0 else f"FAILED (exit code {code})"
    bars = [compare(bar, figures) for bar in part.bars]
    print("\n".join(output))
    print_bars(bars)
    return {
        "status": f"{outcome} after {seconds:.0f} s: {output[-1]}",
        "seconds": seconds,
        "right": code == 0 or not part.proves and figures.get("agree", True),
        "bars": bars,
        "figures": figures,
        "output": output,
    }


# ------------------------------------------------------------------------------------------------------------
# The command


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks cuda`."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS, help="parts to run")
    help = "run the part recipe alone: the fast recipe against the faithful one, 124M"
    add(
        "--recipe", dest="parts", action="store_const", const=["recipe"], default=argparse.SUPPRESS, help=help
    )
    add("--toy", action="store_true", help="tiny sizes, which a CPU can run as well: proves the command only")
    add("--hellaswag-dir", type=Path, metavar="DIR", help="default: $HELLASWAG_DIR, else hellaswag/")
    add("--commit", help="commit that is measured; default: that of git")


def commit_of_git() -> str | None:
    """The commit of the working tree, "-dirty" if files were changed; None where git does not know it."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    with suppress(OSError):  # git is not installed
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    return None


def installed_versions() -> dict[str, str | None]:
    """Versions of CUDA and of the packages used; None for one that is not installed."""
    versions = {"cuda": torch.version.cuda, **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def measure(args: Namespace) -> Figures:
    """Runs the parts, prints a summary and returns all figures.

    Raises:
        UserError: there is no GPU, and --toy is missing.
        Unfinished: results were not proven right.
    """
    device, started = choose_device("auto").value, time.monotonic()
    if device.type != "cuda" and not args.toy:
        raise UserError("no CUDA device found", "try the command on a CPU with --toy")
    figures = {**header("cuda"), "device": device_name(device), "versions": installed_versions()}
    figures |= {"commit": args.commit or commit_of_git(), "toy": args.toy, "parts": {}, "agree": True}
    parts = figures["parts"]
    write_json(args.json, figures)  # fails at once where it cannot be written
    for name in sorted(args.parts, key=list(PARTS).index):
        limit = min(PARTS[name].seconds, TIME_LIMIT - (time.monotonic() - started))
        if limit < 1:
            parts[name] = {"status": "not run: no time left", "right": not PARTS[name].proves, "bars": []}
        else:
            print(f"\n== {name}, at most {limit:.0f} s", flush=True)
            parts[name] = run_part(PARTS[name], limit, args)
        figures["agree"] &= parts[name]["right"]
        write_json(args.json, figures)
    print(f"\n== {figures['device']}, {time.monotonic() - started:.0f} s in all")
    for name, row in parts.items():
        print(f"{name}: {row['status']}")
        print_bars(row["bars"])
    if wrong := [name for name, row in parts.items() if not row["right"]]:
        raise Unfinished(f"not proven right: {', '.join(wrong)}", "find the cause in the output above")
    return figures
