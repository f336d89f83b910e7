"""Measures a part of the project: `python -m tests.benchmarks PART`; `... PART --help` lists its flags.

A part is a module of this package with two functions: `add_arguments(parser)` declares its flags, and
`measure(args)` measures, prints what it found, and returns the figures, a dict of plain values.
`figures["agree"]` tells whether the compared implementations gave the same results; if not, the exit code
is 1.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.benchmarks.figures import header, write_json
from utils.command_line import ArgumentParser, Unfinished, run_script

PARTS = ("step", "generate", "hellaswag", "shards", "loader", "loss", "decode", "recompute", "recipe", "cuda")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    choice = ArgumentParser(prog="-m tests.benchmarks", description="Measure a part of the project.")
    choice.add_argument("part", choices=PARTS, help="part to measure; its flags follow, see PART --help")
    part = choice.parse_args(argv[:1]).part
    # Only this module is imported: the others may need packages that are not installed.
    module = importlib.import_module(f"tests.benchmarks.{part}")
    description = (module.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"-m tests.benchmarks {part}", description=description)
    module.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv[1:])
    figures = header(part) | module.measure(args)
    write_json(args.json, figures)
    if not figures["agree"]:
        what = "the compared implementations gave different results"
        raise Unfinished(what, "find the cause in the output above; these figures compare nothing")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
