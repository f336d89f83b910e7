"""Mistakes on the command line: the hint names what was probably meant, and is true when followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import build_fineweb_edu_shards
import eval_hellaswag
import generate
import train_gpt
from gpt_model import PRETRAINED_CONFIGS
from tests.conftest import ROOT
from utils.command_line import ArgumentParser, UserError, positive_int
from utils.distributed import Distributed
from utils.shards.local_files import find_files
from utils.suggestions import FORMER_FLAGS, similar, similar_file
from utils.training.data_source import fetch, open_data
from utils.weights.find_model import find_model

PARSERS = {
    "train": train_gpt.flag.parser.parse_args,
    "generate": generate.parse_arguments,
    "hellaswag": lambda flags: eval_hellaswag.make_parser().parse_args(flags),
    "shards": build_fineweb_edu_shards.parse_arguments,
}


def hint(script: str, *arguments: str) -> str:
    """The hint for a command line that a script refuses."""
    with pytest.raises(UserError) as caught:
        PARSERS[script](list(arguments))
    return caught.value.hint


@pytest.mark.parametrize(
    ("script", "arguments", "meant"),
    [
        ("train", "--max-step 3", "--max-steps"),
        ("train", "--batch-size 12", "--micro-batch"),
        ("train", "--max_iters=2000", "--max-steps"),
        ("train", "--eval_interval=5", "--val-every"),
        ("train", "--block_size=64", "--seq-len"),
        ("train", "--out_dir=out", "--log-dir"),
        ("train", "--learning_rate 1e-3", "--max-lr"),
        ("train", "--dataset=shakespeare_char", "--data (a file or a folder)"),
        ("train", "--model_type gpt2", "--init-from"),
        ("train", "-preset char", "--preset"),
        ("train", "max_steps=5", "--max-steps"),
        ("train", "config/train_gpt2.py", "--preset (with flags: there are no configuration files)"),
        ("train", "input.txt", "--data input.txt"),
        ("train", "log/model_01000.pt", "--init-from log/model_01000.pt"),
        ("train", "--max-step 3 --lr=4 --max-step 5", "--max-steps for --max-step, --max-lr for --lr"),
        ("train", "--eval_iters=20 --qqqq=1", "--val-tokens (in tokens) for --eval-iters"),
        ("train", "--log_interval=1", "--log-every"),
        ("train", "--max-iter 5", "--max-steps"),
        ("train", "--learning-rat 1e-3", "--max-lr"),
        ("train", "--batch-siz 12", "--micro-batch"),
        ("train", "--data-dir x", "--data"),
        ("generate", "--model-typ gpt2", "--model-name"),
        ("generate", "--start hello", "--prompt"),
        ("generate", "--init_from=resume", "--model-name"),
        ("generate", "--out_dir=out", "--model-name (a folder is its newest checkpoint)"),
        ("generate", "--model gpt2", "--model-name"),
        ("generate", "log/model_01000.pt", "--model-name log/model_01000.pt"),
        ("hellaswag", "--model_type gpt2", "--model-name"),
        ("hellaswag", "--batch-size 8", "--batch-tokens (in tokens)"),
        ("shards", "--worker 4", "--num-workers"),
        ("shards", "a.txt", "--input a.txt"),
        ("train", "--compile=False", "--no-compile, without a value"),
        ("train", "--eval_only=True", "--eval-only, without a value"),
        ("train", "--eval_only=False", "to leave out --eval-only"),
        ("train", "--wandb_log=False", "--wandb (left out: it is off by default)"),
        ("train", "gpt2-xl", "--init-from gpt2-xl"),
        ("generate", "gpt2", "--model-name gpt2"),
        ("generate", "tests", "--model-name tests"),
        ("train", "--preset chr", "--preset char"),
        ("train", "--recipe faithfull", "--recipe faithful"),
        ("train", "--optimizer AdamW", "--optimizer adamw"),
        ("generate", "--dtype float31", "--dtype float32"),
    ],
)  # fmt: skip
def test_a_mistaken_argument_is_answered_with_what_was_meant(script, arguments, meant):
    """Flags of one's own or of nanoGPT, values, files without their flag; each suggestion once."""
    assert hint(script, *arguments.split()).startswith(f"did you mean {meant}? python ")


@pytest.mark.parametrize("arguments", ["--qqqq", "--preset zzzz", "3"])
def test_nothing_is_suggested_where_nothing_is_similar(arguments):
    """Then the hint names --help only."""
    assert (
        hint("train", *arguments.split()) == "python train_gpt.py --help lists the flags and their defaults"
    )


def test_the_value_of_an_unknown_flag_is_no_argument_of_its_own():
    """`--batch_size 12 config.py` has two mistakes, `--batch_size config.py` one."""
    assert "configuration" in hint("train", "--batch_size", "12", "config.py")
    assert "configuration" not in hint("train", "--batch_size", "config.py")


def test_a_choice_of_a_positional_argument_is_suggested_without_a_flag():
    """As in `python -m tests.benchmarks stpe`; numbers can be choices."""
    parser = ArgumentParser(prog="x.py")
    parser.add_argument("part", choices=("step", "loss"))
    parser.add_argument("--n", type=positive_int, choices=(1000, 200))
    for arguments, meant in ((["stpe"], "step"), (["step", "--n", "1001"], "--n 1000")):
        with pytest.raises(UserError) as caught:
            parser.parse_args(arguments)
        assert caught.value.hint.startswith(f"did you mean {meant}? ")


def test_init_from_resume_is_resume():
    """nanoGPT's value is no model here, unless a file has that name."""
    with pytest.raises(UserError, match="--init-from resume names no model") as caught:
        train_gpt.read_arguments(["--init_from=resume"])
    assert caught.value.hint == "did you mean --resume?"


def test_every_former_setting_leads_to_a_flag_that_exists():
    """Each text begins with a flag of one of the scripts; no former name is a flag of train_gpt.py now."""
    parsers = [train_gpt.flag.parser, eval_hellaswag.make_parser()]
    known = {flag for parser in parsers for flag in parser._option_string_actions} | {"--prompt"}
    generate.parse_arguments(["--prompt", "x"])
    for name, texts in FORMER_FLAGS.items():
        assert all(text.split()[0] in known for text in texts), name
        assert f"--{name.replace('_', '-')}" not in train_gpt.flag.parser._option_string_actions or (
            name == "init_from"  # of generate.py, which has no such flag
        )


def readme_rows() -> list[tuple[list[str], str]]:
    """The rows of the README's table for those who come from nanoGPT: names there, text here."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| there | here |\n")[1]
    rows = [line.split("|")[1:3] for line in table.split("\n\n")[0].splitlines()[1:]]
    return [(re.findall("`(.*?)`", there), here.replace("_", "-")) for there, here in rows]


def test_the_table_of_the_readme_agrees_with_the_hints():
    """Each setting in it has a hint, whose flag is in the same row; at least seven are settings."""
    compared = 0
    for names, here in readme_rows():
        for name in names:
            texts = FORMER_FLAGS.get(name.lstrip("-"))
            is_setting = "`--" in here and not name.endswith((".py", "get_lr")) or name == "config/*.py"
            assert bool(texts) == is_setting, name
            if texts:
                assert any(f"`{text.split()[0]}`" in here for text in texts), name
                compared += 1
    assert compared >= 7


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("given", "there"), [("inptu.txt", "input.txt"), ("Input.TXT", "input.txt"), ("ab.jsnl", "ab.jsonl")]
)
def test_a_missing_file_is_answered_with_the_similar_one(given, there, tmp_path, monkeypatch, capsys):
    """By --data, --input, -p FILE: and --tokenizer; the name in the hint is that of the file."""
    monkeypatch.chdir(tmp_path)
    Path(there).write_text("text")
    (tmp_path / "other.bin").touch()
    with pytest.raises(UserError, match=f"cannot read {given}: no such file") as caught:
        fetch(given, Distributed("cpu"))
    assert caught.value.hint == f"did you mean --data {there}?"
    with pytest.raises(UserError, match="no such file") as caught:
        find_files([given])
    assert caught.value.hint == f"did you mean --input {there}?"
    with pytest.raises(UserError) as caught:
        generate.read_prompt(f"FILE:{given}")
    assert caught.value.hint == f"did you mean -p FILE:{there}?"
    with pytest.raises(UserError, match=f"did you mean {there}?"):
        train_gpt.read_arguments(["--tokenizer", given])


def test_a_missing_folder_is_answered_with_the_similar_one(tmp_path):
    """Where the file exists in it; nothing is suggested where no name is similar, and for a pattern."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    assert similar_file(tmp_path / "corpsu" / "a.txt") == tmp_path / "corpus" / "a.txt"
    assert similar_file(tmp_path / "corpsu" / "b.txt") is None
    assert similar_file(tmp_path / "corpus" / "zzzzzz") is None
    assert similar_file(tmp_path / "x" / "y" / "z.txt") is None
    with pytest.raises(UserError) as caught:
        find_files([str(tmp_path / "corpus" / "*.text")])  # a pattern is no misspelled name
    assert "did you mean" not in caught.value.hint


def test_a_broken_link_is_not_answered_with_itself(tmp_path, monkeypatch):
    """By none of the flags that take a file."""
    monkeypatch.chdir(tmp_path)
    Path("broken.txt").symlink_to("nowhere")
    requests = {
        "--data": lambda: open_data(fetch("broken.txt", Distributed("cpu")), "gpt2", 8, Distributed("cpu")),
        "--input": lambda: find_files(["broken.txt"]),
        "-p": lambda: generate.read_prompt("FILE:broken.txt"),
        "-m": lambda: find_model("broken.txt", PRETRAINED_CONFIGS),
    }
    for flag, request in requests.items():
        with pytest.raises(UserError) as caught:
            request()
        assert "did you mean" not in caught.value.hint, flag


@pytest.mark.parametrize("name", ["a" * 300, "b" * 300 + "/c.txt"])
def test_a_name_too_long_for_the_system_is_an_error_in_two_lines(name):
    """Of every flag that takes a path."""
    flags = {"train": ("--data", "--tokenizer", "--init-from", "--log-dir", "--resume")}
    flags |= {"generate": ("-m",), "hellaswag": ("-m",), "shards": ("--input", "--tokenizer", "--output-dir")}
    for script, of_script in flags.items():
        for flag in of_script:
            assert "--help lists the flags" in hint(script, flag, name)
    with pytest.raises(UserError, match="File name too long"):
        generate.read_prompt(f"FILE:{name}")


def test_similar_words():
    """Whatever the case; nothing for words that share little."""
    assert similar("GPT2-Larg", ("gpt2", "gpt2-large")) == "gpt2-large"
    assert similar("gpt2-small", ("gpt2", "gpt2-xl")) == "gpt2"
    assert similar("abc", ("xyz",)) is None and similar("x", ()) is None
    assert similar("model", ("models-of-others", "model-name")) == "model-name"  # the shortest that begins so
    assert similar("log-interval", ("log-dir",)) is None


def test_a_tokenizer_is_suggested():
    """One of the kinds, in the message."""
    with pytest.raises(UserError, match=r"did you mean gpt2\?"):
        train_gpt.read_arguments(["--tokenizer", "gtp2"])
