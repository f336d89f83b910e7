"""Tokens that `--recipe fast` needs for the final loss of the faithful recipe, on the same network and data.

Every run is a command of `train_gpt.py` with its own full schedule. Runs of one seed start from the same
weights and read the same windows in the same order. The faithful recipe uses the best of the part's rates on
the first seed; the rates of the fast one were chosen on seed 1337. Val losses are of the whole val split, or
of the first --val-tokens of it where a part sets them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_model import GPT, GPTConfig
from tests.benchmarks.python_text import write_python_text
from utils.command_line import (
    ArgumentParser,
    Unfinished,
    UserError,
    format_count,
    non_negative_int,
    positive_int,
)
from utils.distributed import Distributed
from utils.runtime import choose_device, choose_matmul, device_name
from utils.tokenizer import PADDED_GPT2_VOCAB
from utils.training.data_source import choose_source
from utils.training.drawing import new_figure, save_picture
from utils.training.log_reader import read_metrics
from utils.training.optimizers import make_optimizers

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"faithful": "tab:blue", "fast": "tab:orange"}
VALIDATIONS = 8  # of each run, for the picture

Figures = dict[str, Any]


class Part(NamedTuple):
    """A network, its data, and the runs of both recipes."""

    flags: str  # of all runs
    data: str  # "text": --data; "python": a text of Python's documentation and sources; "shards" of it
    megabytes: int  # of Python's text
    faithful_rates: Sequence[float]  # the best one counts; none: that of the preset
    fast: str  # flags of the fast recipe alone
    faithful_steps: int
    fast_steps: Sequence[int]


# Warmup and decay are those of the presets; the warmup of a shorter run is a tenth of it.
PARTS = {
    "quick-start": Part("--preset tiny", "text", 0, (), "", 1000, (300, 350, 400, 450)),
    "char": Part("--preset char", "text", 0, (), "", 1200, (450, 500, 550, 600)),
    "larger": Part(
        flags="--preset tiny --n-embd 256 --seq-len 128 --micro-batch 16 --total-batch-tokens 2048 "
        "--val-tokens 65536",
        data="python",
        megabytes=10,
        faithful_rates=(6e-4, 1e-3, 2e-3),
        fast="--max-lr 8e-3",
        faithful_steps=400,
        fast_steps=(120, 133, 160),
    ),
    # 80M tokens, or 40M and 32M; on one H100 five minutes.
    "124M": Part(
        flags="--preset gpt2 --total-batch-tokens 131072 --val-tokens 1048576",
        data="shards",
        megabytes=200,
        faithful_rates=(),
        fast="",
        faithful_steps=610,
        fast_steps=(305,),
    ),
}
TOY = (
    "--n-layer 1 --n-head 1 --n-embd 16 --seq-len 16 --micro-batch 2 --total-batch-tokens 32 --val-tokens 64"
)
TOY_PART = dict(megabytes=1, faithful_steps=8, fast_steps=(2, 4))


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks recipe`."""
    add = parser.add_argument
    add("--part", choices=PARTS, default="quick-start", help="network and data")
    add("--seeds", type=non_negative_int, nargs="+", default=[1337, 1, 2], help="of weights and data order")
    add("--fast-steps", type=positive_int, nargs="+", help="lengths of the fast runs; default: the part's")
    add("--data", help="text of quick-start and char; default: that of train_gpt.py")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--picture", type=Path, metavar="FILE", help="also draw the curves of all runs, a PNG")
    add("--toy", action="store_true", help="tiny sizes: proves the command only")


def measure(args: Namespace) -> Figures:
    """Makes the runs of a part, prints a line for each, then the tokens to the loss. Returns all figures."""
    part, device = PARTS[args.part], choose_device(args.device).value
    if args.toy:
        part = part._replace(flags=f"{part.flags} {TOY}", **TOY_PART)
    part = part._replace(fast_steps=sorted(args.fast_steps or part.fast_steps))
    figures = {"name": args.part, "device": device_name(device)}
    print(", ".join(map(str, figures.values())))
    with tempfile.TemporaryDirectory() as name:
        data = prepare_data(part, args.data, Path(name))
        flags = [*part.flags.split(), "--device", args.device, "--data", data]
        if device.type == "cuda" and not args.toy:
            flags.append("--compile")  # both recipes: "auto" decides by a run's length
        figures["optimizer_milliseconds"] = {
            recipe: optimizer_milliseconds([*flags, "--recipe", recipe], device) for recipe in COLORS
        }
        faithful = [*flags, "--recipe", "faithful"]
        trials = try_rates(part, faithful, args.seeds[0], Path(name))
        targets = {}
        figures["trials"] = {str(rate): trial["val_loss"] for rate, trial in trials.items()}
        if trials:
            rate = min(trials, key=lambda rate: trials[rate]["val_loss"])
            faithful += ["--max-lr", str(rate)]
            targets[args.seeds[0]] = trials[rate]
        fast = [*flags, "--recipe", "fast", *part.fast.split()]
        figures["flags"] = {
            recipe: " ".join(words).replace(data, Path(data).name)  # where it was does not matter
            for recipe, words in (("faithful", faithful), ("fast", fast))
        }
        figures["seeds"] = {
            str(seed): measure_seed(part, targets.get(seed), faithful, fast, seed, Path(name))
            for seed in args.seeds
        }
    figures["share_of_tokens"] = spread([row["share_of_tokens"] for row in figures["seeds"].values()])
    print_summary(figures)
    if args.picture is not None:
        draw(figures, args.picture)
    return {**figures, "agree": True}


def prepare_data(part: Part, data: str | None, folder: Path) -> str:
    """The value of --data for all runs of a part."""
    if part.data == "text":
        source = choose_source(data)
        if source.path is None or not Path(source.path).is_file():
            raise UserError("no text to train on", "give one with --data, such as Tiny Shakespeare")
        return str(source.path)
    text = write_python_text(folder / "python.txt", part.megabytes * 1_000_000)
    if part.data == "python":
        return str(text)
    command = [ROOT / "build_fineweb_edu_shards.py", "--input", text, "--output-dir", folder / "shards"]
    execute([str(word) for word in command])
    return str(folder / "shards")


def execute(command: list[str]) -> None:
    """Runs a script of this project. Raises Unfinished, with the end of its output, if it fails."""
    process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        output = "\n".join(process.stderr.strip().split("\n")[-5:])
        raise Unfinished(f"{' '.join(command)} ended with exit code {process.returncode}", output)


# ------------------------------------------------------------------------------------------------------------
# The runs


def run(flags: list[str], steps: int, seed: int, folder: Path) -> Figures:
    """Trains for so many steps; returns tokens, val loss and seconds of its end, and the curve."""
    with tempfile.TemporaryDirectory(dir=folder) as log_dir:
        every = -(-steps // VALIDATIONS)
        intervals = f"--val-every {every} --hellaswag-every 0 --sample-every 0 --checkpoint-every 0"
        length = ["--max-steps", str(steps), "--seed", str(seed), "--log-dir", log_dir]
        execute(["train_gpt.py", *flags, *length, *intervals.split()])
        records = read_metrics(Path(log_dir) / "metrics.jsonl")
    curve = [(r["tokens"], r["loss"], r["seconds"]) for r in records if r["kind"] == "val"]
    tokens, loss, seconds = curve[-1]
    recipe = flags[flags.index("--recipe") + 1]
    print(
        f"seed {seed}  {recipe:8}  {steps:6,} steps  {tokens:11,} tokens  val loss {loss:.4f}"
        f"  {seconds:7.1f} s",
        flush=True,
    )
    return dict(steps=steps, tokens=tokens, val_loss=loss, seconds=seconds, curve=[c[:2] for c in curve])


def try_rates(part: Part, flags: list[str], seed: int, folder: Path) -> dict[float, Figures]:
    """A run of the faithful recipe with each of the part's rates; empty if there is no choice."""
    trials = {}
    for rate in part.faithful_rates:
        print(f"faithful with --max-lr {rate:g}:")
        trials[rate] = run([*flags, "--max-lr", str(rate)], part.faithful_steps, seed, folder)
    return trials


def measure_seed(
    part: Part, target: Figures | None, faithful: list[str], fast: list[str], seed: int, folder: Path
) -> Figures:
    """All runs of a seed, and the share of the faithful run's tokens that a fast run needs for its loss.

    `target` is that faithful run where it has been made.
    """
    target = target or run(faithful, part.faithful_steps, seed, folder)
    runs = [run(fast, steps, seed, folder) for steps in part.fast_steps]
    enough = [row for row in runs if row["val_loss"] <= target["val_loss"]]
    first = min(enough, key=lambda row: row["tokens"], default=None)
    return {
        "faithful": target,
        "fast": runs,
        "share_of_tokens": first and first["tokens"] / target["tokens"],
        "share_of_seconds": first and first["seconds"] / target["seconds"],
    }


def spread(shares: Sequence[float | None]) -> Figures | None:
    """Median, lowest and highest; None unless every seed reached the loss."""
    if None in shares:
        return None
    return {"median": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}


def optimizer_milliseconds(flags: list[str], device: torch.device) -> float:
    """Median time of the optimizers' part of a step, without clipping."""
    from train_gpt import read_arguments

    args = read_arguments(flags)[0]
    vocab_size = 65 if args.tokenizer == "char" else PADDED_GPT2_VOCAB  # of Tiny Shakespeare
    model = GPT(GPTConfig(args.seq_len, vocab_size, args.n_layer, args.n_head, args.n_embd)).to(device)
    choose_matmul(model)
    optimizers = make_optimizers(args, model, Distributed(device))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        for optimizer in optimizers.values():
            optimizer.step()
        model.lm_head.weight[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[2:])


# ------------------------------------------------------------------------------------------------------------
# What is reported


def print_summary(figures: Figures) -> None:
    """Prints the share of tokens and of seconds for each seed, and of all."""
    for seed, row in figures["seeds"].items():
        if row["share_of_tokens"] is None:
            print(f"seed {seed}: no fast run reaches {row['faithful']['val_loss']:.4f}")
        else:
            shares = f"{row['share_of_tokens']:.0%} of the tokens, {row['share_of_seconds']:.0%} of the time"
            print(f"seed {seed}: {row['faithful']['val_loss']:.4f} reached with {shares}")
    if shares := figures["share_of_tokens"]:
        print(
            f"median {shares['median']:.0%} ({shares['lowest']:.0%} to {shares['highest']:.0%}) of the tokens"
        )
    for recipe, milliseconds in figures["optimizer_milliseconds"].items():
        print(f"optimizers of {recipe}: {milliseconds:.1f} ms a step")


def draw(figures: Figures, path: Path) -> None:
    """Draws the val losses of all runs against tokens, and the losses to reach."""
    figure = new_figure(layout="constrained")
    figure.set_size_inches(9, 5)
    axis, lowest = figure.subplots(), []
    for row in figures["seeds"].values():
        for recipe, runs in (("faithful", [row["faithful"]]), ("fast", row["fast"])):
            for one in runs:
                axis.plot(*zip(*one["curve"][1:]), color=COLORS[recipe], marker="o", markersize=3, alpha=0.6)
                lowest.append(one["curve"][1][1])
        axis.axhline(row["faithful"]["val_loss"], color=COLORS["faithful"], linestyle="--", linewidth=0.8)
    for recipe, color in COLORS.items():
        axis.plot([], [], color=color, label=f"--recipe {recipe}")
    seeds = format_count(len(figures["seeds"]), "seed")
    axis.set_title(f"{figures['name']}: every run with its own full schedule, {seeds}")
    axis.set_xlabel("training tokens")
    axis.set_ylabel("val loss (nats per token)")
    axis.legend()
    axis.grid(alpha=0.3)
    save_picture(figure, path)
