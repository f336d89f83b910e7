"""--help as a newcomer reads it: effective defaults, examples that can be pasted, columns at any width."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

import build_fineweb_edu_shards
import eval_hellaswag
import generate
import train_gpt
from utils.command_line import ArgumentParser, UserError, positive_float, positive_int, run_script

SCRIPTS: dict[str, Callable] = {
    "train_gpt.py": train_gpt.main,
    "generate.py": generate.main,
    "eval_hellaswag.py": eval_hellaswag.main,
    "build_fineweb_edu_shards.py": build_fineweb_edu_shards.main,
}
WIDTHS = (60, 80, 200)


def help_of(main: Callable, capsys, *flags: str) -> str:
    """What --help prints; it ends with exit code 0 and writes nothing else."""
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--help"])
    out, error = capsys.readouterr()
    assert ended.value.code == 0 and error == ""
    return out


def default_of(flag: str, text: str) -> str | None:
    """The default that --help shows for a flag."""
    entry = re.search(rf"^  {flag}[ \n].*?(?=^  \S|^$)", text, re.M | re.S)
    found = re.search(r"\(default: (.*)\)$", " ".join(entry[0].split()))
    return found and found[1]


def examples_in(text: str) -> list[str]:
    """The commands at the end of a help text; lines that end in a backslash are joined, as a shell does."""
    lines = re.sub(r" \\\n +", " ", text.split("\nexamples:\n")[1]).splitlines()
    return [line.split("  ")[0] for line in map(str.strip, lines) if line.startswith(("python", "torchrun"))]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_terminal(script, width, monkeypatch, capsys):
    """No line is longer, unless one word is; every help text begins in the same column."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = help_of(SCRIPTS[script], capsys)
    assert text.startswith(f"usage: {script} [flags]\n")
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) == 1, line
    flags = [line for line in text.split("\nexamples:")[0].splitlines() if line.startswith("  -")]
    columns = {match.end() for line in flags if (match := re.match(r"  -.*?\S {2,}(?=\S)", line))}
    assert len(flags) > 8 and columns == {26}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_are_those_of_the_docstring_at_any_width(script, width, monkeypatch, capsys):
    """At least three; wrapped ones are the same command to a shell; the script accepts their flags."""
    monkeypatch.setenv("COLUMNS", str(width))
    commands = [shlex.split(line) for line in examples_in(help_of(SCRIPTS[script], capsys))]
    monkeypatch.setenv("COLUMNS", "1000")
    assert commands == [shlex.split(line) for line in examples_in(help_of(SCRIPTS[script], capsys))]
    assert len(commands) >= 3 and all(script in command for command in commands)


EXAMPLES = {
    "train_gpt.py": train_gpt.read_arguments,
    "generate.py": generate.parse_arguments,
    "eval_hellaswag.py": lambda flags: eval_hellaswag.make_parser().parse_args(flags),
    "build_fineweb_edu_shards.py": build_fineweb_edu_shards.parse_arguments,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_of_the_examples_exist(script, capsys):
    """Each is read by the script without an error."""
    for line in examples_in(help_of(SCRIPTS[script], capsys)):
        command = shlex.split(line)
        EXAMPLES[script](command[command.index(script) + 1 :])


@pytest.mark.parametrize(
    ("flags", "preset", "reason", "recipe"),
    [
        (("--preset", "char"), "char", "--preset", "faithful"),
        (("--preset=small", "--recipe", "fast"), "small", "--preset", "fast"),
        (("--tokenizer", "char"), "char", "no CUDA, characters", "faithful"),
        (("--data", "README.md"), "tiny", "no CUDA, a text", "faithful"),
    ],
)
def test_help_shows_the_defaults_of_the_preset_that_would_be_taken(flags, preset, reason, recipe, capsys):
    """All that preset and recipe set, and a line that names both and says why; flags may follow --help."""
    text = help_of(train_gpt.main, capsys, *flags)
    assert f"Defaults: preset {preset} ({reason}), recipe {recipe}." in " ".join(text.split())
    with pytest.raises(SystemExit):
        train_gpt.main(["--help", *flags])
    assert capsys.readouterr().out == text
    settings = train_gpt.PRESETS[preset] | train_gpt.RECIPES[recipe][preset]
    for name, value in {**settings, "preset": preset, "recipe": recipe, "grad_clip": 1.0}.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert default_of(f"--{name.replace('_', '-')}", text) == shown
    assert default_of("--no-compile", text) is default_of("--eval-only", text) is None


def test_help_is_printed_beside_unknown_flags_and_changes_no_default(capsys):
    """Whoever asks for help gets it; a preset that does not exist is an error; later calls are unchanged."""
    before = train_gpt.read_arguments(["--preset", "gpt2"])
    assert "--max-steps N" in help_of(train_gpt.main, capsys, "--max-stps", "3", "--preset", "tiny")
    with pytest.raises(UserError, match="invalid choice: 'chr'"):
        train_gpt.main(["--preset", "chr", "--help"])
    assert train_gpt.read_arguments(["--preset", "gpt2"]) == before


def test_a_flag_is_shown_with_its_kind_of_value_and_its_default():
    """Numbers as N and X, also zero and a percent sign; none for a switch and where the help says it."""
    parser = ArgumentParser(prog="x.py")
    parser.add_argument("--num-steps", type=positive_int, default=5, help="steps")
    parser.add_argument("--rate", type=positive_float, default=0.0, help="in %%; 0: off")
    parser.add_argument("--name", default="5 %", help="name")
    parser.add_argument("--on", action="store_true", help="switch")
    parser.add_argument("--limit", type=int, help="first N; default: all")
    lines = [line.strip() for line in parser.format_help().splitlines() if line.startswith("  --")]
    assert [re.sub(" +", " ", line) for line in lines] == [
        "--num-steps N steps (default: 5)",
        "--rate X in %; 0: off (default: 0)",
        "--name NAME name (default: 5 %)",
        "--on switch",
        "--limit N first N; default: all",
    ]


def test_a_long_example_is_wrapped_between_its_words(monkeypatch):
    """Behind its purpose; quoted words stay whole; each line but the last ends in a backslash."""
    monkeypatch.setenv("COLUMNS", "46")
    doc = """Does it.

    python x.py --prompt "two words" --name 'a b c' --flag value    what it is for
    """
    text = ArgumentParser(prog="x.py", doc=doc).format_help().split("examples:\n")[1]
    assert text.splitlines() == [
        "  what it is for:",
        '    python x.py --prompt "two words" \\',
        "      --name 'a b c' --flag value",
    ]


def test_hints_name_a_script_as_it_was_started(monkeypatch, capsys):
    """By its path, quoted, so that they are true in any folder; a module by its name."""
    import sys

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["../a b/generate.py"])
    assert run_script(lambda: generate.main(["--nonsense-flag"])) == 2
    assert "hint: python '../a b/generate.py' --help lists" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["/x/other.py"])
    assert ArgumentParser(prog="generate.py").prog == "generate.py"
    monkeypatch.setattr(sys, "argv", ["utils/weights/export.py"])
    assert ArgumentParser(prog="-m utils.weights.export").prog == "utils/weights/export.py"
