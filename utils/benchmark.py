"""Measures the parts of the project: `python -m utils.benchmark PART`, and `python -m utils.benchmark PART
--help`.

A part is a module `utils/benchmark_PART.py` with two functions: `add_arguments(parser)` declares its flags,
and `run(args)` measures and prints; what it returns, a dict of plain values, goes to the file of `--json`,
where the part has that flag.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from utils.command_line import ArgumentParser
from utils.errors import UserError, run_script


def parts() -> list[str]:
    """Names of the parts that are there."""
    return sorted(path.stem[len("benchmark_") :] for path in Path(__file__).parent.glob("benchmark_*.py"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    choice = ArgumentParser(prog="-m utils.benchmark", description="Measures a part of the project.")
    choice.add_argument("part", choices=parts(), help="what to measure; its flags follow, see PART --help")
    part = choice.parse_args(argv[:1]).part
    # Only this one is imported: another may need a package that is not installed.
    module = importlib.import_module(f"utils.benchmark_{part}")
    description = (module.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"-m utils.benchmark {part}", description=description)
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    figures = module.run(args)
    if getattr(args, "json", None) is not None:
        try:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            what = f"cannot write {args.json}: {error.strerror}"
            raise UserError(what, "give --json another file") from error
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
