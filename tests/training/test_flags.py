"""Flags, presets, the learning rate schedule, and settings that are refused before the first step."""

from __future__ import annotations

import ast
import importlib.util
import re
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train_gpt
from gpt_model import GPT, GPTConfig
from tests.conftest import ROOT, run
from tests.small_runs import small_args
from utils.command_line import UserError, run_script
from utils.training.flags import (
    Flags,
    accumulation_steps,
    check_training_settings,
    fitting_micro_batch,
    warn_of_unused,
)
from utils.training.model_source import check_typed

FAST = ["--recipe", "fast"]
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
GRAD_CLIP_LINE = next(line for line in SOURCE.splitlines() if '"--grad-clip"' in line)

# ------------------------------------------------------------------------------------------------------------
# The learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 6e-4 / 715),
        (357, 6e-4 * 358 / 715),
        (714, 6e-4),
        (715, 6e-4),
        ((715 + 19073) // 2, (6e-4 + 6e-5) / 2),
        (19072, 6e-5),
        (19073, 6e-5),
        (30000, 6e-5),
    ],
)
def test_learning_rate_table(step, expected):
    """Linear warmup to the maximum, the mean of both ends in the middle of the cosine, then the minimum."""
    assert train_gpt.learning_rate_for(step) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_without_warmup_starts_at_the_maximum():
    """Without a division by zero."""
    assert train_gpt.learning_rate_for(0, warmup_steps=0, max_steps=10) == train_gpt.MAX_LR


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.1), (9, 1), (10, 1), (20, 1), (21, 79 / 80), (60, 0.5), (99, 1 / 80), (100, 0), (150, 0)],
)
def test_the_linear_schedule_is_constant_and_then_falls_to_zero(step, factor):
    """In the last 80 of 100 steps; the last update still has a rate, and none follows."""
    rate = train_gpt.learning_rate_for(step, 0.5, 0.1, 10, 100, "linear", 0.8)
    assert rate == pytest.approx(0.5 * factor)


@pytest.mark.parametrize(("warmup_steps", "decay_fraction"), [(0, 1.0), (30, 1.0), (100, 0.5)])
def test_the_linear_schedule_has_no_jump_where_decay_would_begin_in_the_warmup(warmup_steps, decay_fraction):
    """Then it begins after the warmup, from the peak."""
    schedule = (0.5, 0.1, warmup_steps, 100, "linear", decay_fraction)
    rates = [train_gpt.learning_rate_for(step, *schedule) for step in range(101)]
    assert max(rates) == 0.5 and rates[100] == 0
    down = [before - after for before, after in zip(rates[warmup_steps:-1], rates[warmup_steps + 1 : -1])]
    assert down == pytest.approx([0.5 / max(1, 100 - warmup_steps)] * len(down))


# ------------------------------------------------------------------------------------------------------------
# Constants, flags and presets


def names_that_differ(source: str) -> list[str]:
    """Declarations `NAME = flag("--other-name", ...)`; also counts those that agree."""
    declarations = [
        (ast.unparse(node.targets[0]), node.value.args[0].value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "flag"
    ]
    assert len(declarations) > 30  # the search finds the declarations
    return [f"{name} {flag}" for name, flag in declarations if name != flag[2:].replace("-", "_").upper()]


def script_from(source: str) -> types.ModuleType:
    """The training script with a changed source."""
    module = types.ModuleType("changed_train_gpt")
    module.__file__ = str(ROOT / "train_gpt.py")
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


def test_every_constant_has_the_name_of_its_flag():
    """So that a reader, and an editor, finds one by the other."""
    assert names_that_differ(SOURCE) == []


def test_a_renamed_constant_is_noticed_and_its_flag_keeps_its_default():
    """The test above fails; --grad-clip is still 1.0 and never None, because one call declares both."""
    source = SOURCE.replace("GRAD_CLIP = flag(", "GRADIENT_CLIP = flag(")
    assert names_that_differ(source) == ["GRADIENT_CLIP --grad-clip"]
    script = script_from(source)
    assert script.read_arguments([])[0].grad_clip == script.GRADIENT_CLIP == 1.0
    with pytest.raises(NameError, match="MAX_LR"):  # one that the script uses fails at import
        script_from(SOURCE.replace("MAX_LR = flag(", "PEAK_LR = flag("))


def test_a_changed_constant_is_the_new_default():
    """In the namespace and in --help: each number stands in the source once."""
    script = script_from(SOURCE.replace(GRAD_CLIP_LINE, GRAD_CLIP_LINE.replace("1.0", "0.25")))
    assert script.read_arguments([])[0].grad_clip == script.GRAD_CLIP == 0.25
    assert "maximum norm of the gradient (default: 0.25)" in " ".join(
        script.flag.parser.format_help().split()
    )


def test_a_new_hyperparameter_is_one_line():
    """Constant, flag, type, default and help come from the same line."""
    line = 'BETA_TWO = flag("--beta-two", 0.95, positive_float, "decay of the second moment")'
    source = SOURCE.replace(GRAD_CLIP_LINE, f"{GRAD_CLIP_LINE}\n{line}")
    assert names_that_differ(source) == []
    script = script_from(source)
    assert script.read_arguments([])[0].beta_two == script.BETA_TWO == 0.95
    assert script.read_arguments(["--beta_two=0.9"])[0].beta_two == 0.9
    assert "--beta-two X decay of the second moment (default: 0.95)" in " ".join(
        script.flag.parser.format_help().split()
    )
    with pytest.raises(UserError, match="-1 is not above zero"):
        script.read_arguments(["--beta-two", "-1"])


@pytest.mark.parametrize("name", ["val", "hellaswag", "sample", "checkpoint"])
def test_a_plan_of_a_trillion_events_is_refused_with_the_numbers(name):
    """The plan of a run lists them; 0, never, and a million are fine."""
    flags = ["--preset", "tiny", "--max-steps", str(10**15)]
    for other in ("val", "hellaswag", "sample", "checkpoint"):
        flags += [f"--{other}-every", "0"]
    check_training_settings(train_gpt.read_arguments([*flags, f"--{name}-every", str(10**9)])[0], 1)
    message = f"--{name}-every 1000 in --max-steps {10**15} is 1,000,000,000,000 times"
    with pytest.raises(UserError, match=message):
        check_training_settings(train_gpt.read_arguments([*flags, f"--{name}-every", "1000"])[0], 1)


def test_every_kind_of_flag_is_read():
    """With a value, from a list, without a value as True or as a text, and with an optional value."""
    flags = Flags()
    flags.group("any")
    number = flags("--number", 1.5, float, "a number")
    flags("--choice", "a", ("a", "b"), "a or b")
    flags("--switch", False, bool, "True when given")
    flags("--on", "auto", "on", "a value for a flag without one")
    flags("--off", None, "off", "another value", dest="on")
    flags("--optional", None, str, "with or without a value", nargs="?", const="newest")
    assert number == 1.5

    def read(text: str) -> tuple:
        args = flags.parser.parse_args(text.split())
        return args.number, args.choice, args.switch, args.on, args.optional

    assert read("") == (1.5, "a", False, "auto", None)
    assert read("--number 2 --choice b --switch --on --optional") == (2.0, "b", True, "on", "newest")
    assert read("--off --optional x") == (1.5, "a", False, "off", "x")
    with pytest.raises(UserError, match="invalid choice: 'c'"):
        read("--choice c")


def test_flags_override_the_preset_and_the_preset_the_constants():
    """`-` and `_` are equivalent; a shorter run has a shorter warmup."""
    args, _ = train_gpt.read_arguments(["--preset", "tiny", "--max_lr=0.5", "--n_layer", "7"])
    assert (args.max_lr, args.n_layer) == (0.5, 7)
    assert args.n_embd == train_gpt.PRESETS["tiny"]["n_embd"]
    assert args.weight_decay == train_gpt.WEIGHT_DECAY
    assert train_gpt.read_arguments(["--preset", "gpt2"])[0].max_steps == 19073
    assert train_gpt.read_arguments(["--max-steps", "5"])[0].warmup_steps == 0


def test_without_a_preset_device_and_data_decide(tmp_path, monkeypatch):
    """A table of both, over shards, a text and a text read as characters; the reason has both facts."""
    text = str(tmp_path / "text.txt")
    (tmp_path / "text.txt").touch()
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "edufineweb_train_000001.npy").touch()
    data_flags = {
        "shards": ["--data", str(shards)],
        "a text": ["--data", text],
        "characters": ["--data", text, "--tokenizer", "char"],
    }
    assert len(train_gpt.PRESET_FOR) == 2 * len(data_flags)
    for (device, data), preset in train_gpt.PRESET_FOR.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "CUDA")
        args, reason = train_gpt.read_arguments(data_flags[data])
        assert (args.preset, reason) == (preset, f"{device}, {data}")
        assert args.tokenizer == ("char" if data == "characters" else None)
    assert train_gpt.read_arguments(["--data", str(tmp_path)])[1] == "no CUDA, a text"  # a folder of texts
    assert train_gpt.PRESET_FOR["CUDA", "shards"] == "gpt2"
    assert train_gpt.PRESET_FOR["no CUDA", "a text"] == "tiny"
    assert len(set(train_gpt.PRESET_FOR.values())) == len(train_gpt.PRESETS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, reason = train_gpt.read_arguments(["--data", str(shards), "--device", "cpu"])
    assert (args.preset, reason) == ("tiny", "no CUDA, shards")
    assert train_gpt.read_arguments(["--preset", "char"])[1] == "--preset"


def test_flags_override_the_recipe_and_the_recipe_the_preset():
    """faithful, the default, changes no preset; fast changes each, and nothing that the model or data are."""
    for preset, changes in train_gpt.RECIPES["fast"].items():
        flags = ["--preset", preset]
        faithful, fast = (vars(train_gpt.read_arguments([*flags, *more])[0]) for more in ([], FAST))
        assert faithful == vars(train_gpt.read_arguments([*flags, "--recipe", "faithful"])[0]) | {
            "typed": ["preset"]
        }
        assert (faithful["optimizer"], faithful["schedule"]) == ("adamw", "cosine")
        differing = {name for name in fast if fast[name] != faithful[name]} - {"typed", "recipe"}
        assert {"optimizer", "schedule", "max_steps"} <= differing <= {*changes, "min_lr"}
        assert fast["max_steps"] < faithful["max_steps"]
        sizes = {"n_layer", "n_head", "n_embd", "seq_len", "tokenizer"}
        assert not sizes & changes.keys()
    assert train_gpt.RECIPES["fast"].keys() == train_gpt.PRESETS.keys()
    flags = ["--preset", "tiny", *FAST, "--max-lr", "0.5", "--optimizer", "adamw", "--muon-lr", "0.1"]
    args = train_gpt.read_arguments(flags)[0]
    assert (args.max_lr, args.optimizer, args.muon_lr, args.schedule) == (0.5, "adamw", 0.1, "linear")


def test_a_recipe_cannot_set_a_flag_that_does_not_exist():
    """A typing error in the table of recipes fails at once."""
    script = script_from(SOURCE.replace('MUON = dict(optimizer="muon"', 'MUON = dict(optimiser="muon"'))
    with pytest.raises(AssertionError, match="preset tiny sets a flag that does not exist"):
        script.read_arguments(["--preset", "tiny", *FAST])


def test_a_preset_cannot_set_a_flag_that_does_not_exist():
    """A typing error in the table of presets fails at once."""
    script = script_from(SOURCE.replace("dict(\n        n_layer=4,", "dict(\n        num_layers=4,"))
    with pytest.raises(AssertionError, match="preset tiny sets a flag that does not exist"):
        script.read_arguments(["--preset", "tiny"])


def test_every_flag_is_used():
    """Each name occurs as args.NAME in the training script or in utils."""
    modules = list((ROOT / "utils").rglob("*.py"))
    sources = SOURCE + "".join(path.read_text(encoding="utf-8") for path in modules)
    for name in vars(train_gpt.flag.parser.parse_args([])):
        assert re.search(rf"\bargs\.{name}\b", sources), name


def test_settings_are_plain_values():
    """So they can be written as JSON: every default is plain or a path."""
    for value in vars(train_gpt.flag.parser.parse_args([])).values():
        assert isinstance(value, (int, float, str, bool, type(None), Path))
    assert isinstance(train_gpt.read_arguments([])[0], Namespace)


def test_preset_char_is_small():
    """At most 850,000 parameters with the 65 characters of Tiny Shakespeare."""
    args, _ = train_gpt.read_arguments(["--preset", "char"])
    with torch.device("meta"):
        model = GPT(GPTConfig(args.seq_len, 65, args.n_layer, args.n_head, args.n_embd))
    assert model.num_parameters() <= 850_000


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "12", "--seq-len", "1024"], "36864; nearest: 516096, 552960"),
        (["--total-batch-tokens", "100", "--seq-len", "64", "--micro-batch", "2"], "nearest: 128"),
        (["--n-embd", "100"], "not a multiple of --n-head 12"),
        (["--warmup-steps", "20000"], "--warmup-steps 20000 is more than --max-steps 19073"),
        (["--min-lr", "1"], "--min-lr 1 is above --max-lr 0.0006"),
        (["--seed", "5000000000"], "--seed 5000000000 is not below 2..32"),
        (["--decay-fraction", "1.5"], "--decay-fraction 1.5 is above 1"),
    ],
)
def test_inconsistent_settings_are_reported_with_their_numbers(arguments, message):
    """Before the first step; with three ranks where their number matters."""
    args, _ = train_gpt.read_arguments(["--preset", "gpt2", *arguments])
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check_training_settings(args, world_size=3 if "12" in arguments else 1)


def test_all_problems_are_in_one_message():
    """Three mistakes can be corrected at once."""
    args, _ = train_gpt.read_arguments(
        ["--preset", "gpt2", "--n-embd", "5", "--min-lr", "1", "--micro-batch", "7"]
    )
    with pytest.raises(UserError) as caught:
        check_training_settings(args, 1)
    for problem in ("--n-embd 5 is not", "--min-lr 1 is above", "= 7*1024*1 = 7168"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_accumulation_makes_the_batch_exact(world_size):
    """Rows x tokens x ranks x micro-steps is the batch."""
    assert accumulation_steps(64 * 128 * world_size * 5, 64, 128, world_size) == 5


@pytest.mark.parametrize(
    ("flags", "world_size", "fitted"),
    [
        (["--preset", "tiny"], 1, 8),
        (["--preset", "tiny"], 2, 4),
        (["--preset", "tiny"], 4, 2),
        (["--preset", "tiny"], 3, 8),  # 8 windows cannot be divided by 3 ranks
        (["--preset", "char"], 3, 4),
        (["--preset", "char"], 2, 6),
        (["--preset", "char", "--total-batch-tokens", "640"], 1, 10),
        (["--preset", "gpt2"], 8, 64),
        (["--preset", "gpt2"], 16, 32),
    ],
)
def test_a_micro_batch_that_was_not_typed_fits_the_number_of_ranks(flags, world_size, fitted):
    """The largest divisor of a rank's windows; where there is none, the error names the numbers."""
    args, _ = train_gpt.read_arguments(flags)
    args.micro_batch = fitting_micro_batch(args, args.micro_batch, world_size)
    assert args.micro_batch == fitted
    if world_size != 3 or flags[1] == "char":
        assert accumulation_steps(args.total_batch_tokens, fitted, args.seq_len, world_size) >= 1
    else:
        with pytest.raises(
            UserError, match=r"--micro-batch \* --seq-len \* ranks = 8\*64\*3 = 1536; nearest"
        ):
            accumulation_steps(args.total_batch_tokens, fitted, args.seq_len, world_size)


def test_the_fitted_micro_batch_is_part_of_the_batch_line(text_file, tmp_path, capsys):
    """Without another word; one that was typed is an error."""
    flags = ["--preset", "char", "--total-batch-tokens", "640", "--dry-run", "--device", "cpu"]
    flags += ["--data", str(text_file), "--log-dir", str(tmp_path)]
    for more in ([], ["--micro-batch", "auto"]):
        assert train_gpt.main([*flags, *more]) == 0
        line = "batch: 640 tokens = 10 rows x 64 tokens x 1 process x 1 micro-step"
        out, error = capsys.readouterr()
        assert line in out and error == ""
    with pytest.raises(UserError, match=r"= 12\*64\*1 = 768"):
        train_gpt.main([*flags, "--micro-batch", "12"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "device 'cuda' requested, but torch"),
        (["--device", "cudaa"], "unknown device 'cudaa'"),
        (["--dtype", "float16"], "--dtype float16 requested on cpu"),
        (["--max-lr", "nan"], "nan is not a finite number"),
        (["--max-steps", "-3"], "-3 is not above zero"),
        (["--max-step", "3"], "unrecognized arguments: --max-step"),
        (["--log-dir", "/dev/null/log"], "cannot write to log dir /dev/null/log: Not a directory"),
        (["--data", "nowhere.txt"], "cannot read nowhere.txt"),
        (
            ["--seq-len", "4096", "--micro-batch", "1", "--total-batch-tokens", "4096"],
            "need at least T+1 = 4097",
        ),
        (["--init-from", "gpt2-larg"], "unknown model 'gpt2-larg'; choose gpt2, gpt2-medium"),
        (["--eval-only", "--log-dir", "/nowhere"], "no checkpoint in /nowhere"),
    ],
)
def test_a_user_error_is_one_error_line_and_one_hint(flags, message, text_file, tmp_path, capsys):
    """Exit code 2, two lines on stderr, no traceback, and no file of a run."""
    code = run_script(lambda: train_gpt.main(small_args(text_file, tmp_path / "log", *flags)))
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[0].startswith("error: ") and message in error[0]
    assert error[1].startswith("hint: ") and len(error) == 2
    assert not list(tmp_path.glob("log/[!.]*"))


@pytest.mark.slow
def test_exit_codes_of_the_process(text_file, tmp_path):
    """A usage error ends the real process with 2 and a diverged run with 3, without a traceback."""
    script = ROOT / "train_gpt.py"
    usage = run(script, "--device", "cuda")
    assert usage.returncode == 2 and "Traceback" not in usage.stderr
    diverged = run(
        script,
        *small_args(text_file, tmp_path, "--max-lr", "1e30", "--grad-clip", "1e30", "--max-steps", "9"),
    )
    assert diverged.returncode == 3, diverged.stderr
    assert diverged.stderr.startswith("error: non-finite") and "Traceback" not in diverged.stderr


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--wandb", "wandb")])
def test_a_mirror_that_is_not_installed_is_an_error_before_the_first_step(flag, package, text_file, tmp_path):
    """The hint names the package to install, and nothing is logged."""
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(UserError) as caught:
        train_gpt.main(small_args(text_file, tmp_path / "log", flag))
    assert f"pip install {package}" in caught.value.hint
    assert not (tmp_path / "log" / "log.txt").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--sample-every", "0", "--sample-prompt", "x"), "--sample-prompt (with --sample-every 0)"),
        (("--val-every", "0", "--val-tokens", "64"), "--val-tokens (with --val-every 0)"),
        (("--val-every", "0", "--patience", "3"), "--patience (with --val-every 0)"),
        (("--hellaswag-examples", "5"), "--hellaswag-examples (with --hellaswag-every 0)"),
        (("--cost-per-hour", "3"), "--cost-per-hour (without --dry-run)"),
        (("--max-lr", "1", "--eval-only"), "--max-lr (with --eval-only)"),
        (("--muon-lr", "0.1"), "--muon-lr (with --optimizer adamw)"),
        (("--decay-fraction", "0.5"), "--decay-fraction (with --schedule cosine)"),
        (("--min-lr", "0", "--recipe", "fast"), "--min-lr (with --schedule linear)"),
        (("--muon-lr", "0.1", "--decay-fraction", "0.5", "--recipe", "fast"), None),
        (("--sample-every", "2", "--sample-prompt", "x"), None),
        (("--cost-per-hour", "3", "--dry-run"), None),
    ],
)
def test_a_flag_that_the_run_does_not_use_is_named(flags, why, tmp_path, capsys):
    """In one warning, with the reason; flags that are used, and those of the preset, are not mentioned."""
    (tmp_path / "model_00001.pt").touch()  # the newest checkpoint, for --eval-only
    args, _ = train_gpt.read_arguments(["--preset", "tiny", "--log-dir", str(tmp_path), *flags])
    warn_of_unused(args)
    assert capsys.readouterr().err == (f"warning: not used: {why}\n" if why else "")


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", 5), ("n_head", 1), ("n_embd", 32), ("tokenizer", "gpt2")]
)
def test_a_flag_that_contradicts_the_loaded_model_is_refused(name, value):
    """With both values; on the command line only: the preset's sizes give way to the model's."""
    found = dict(n_layer=2, n_head=2, n_embd=16, tokenizer="char")
    args = train_gpt.read_arguments([f"--{name}", str(value)])[0]
    message = rf"m.pt contradicts --{name.replace('_', '-')} {value} \(found {found[name]}\)"
    with pytest.raises(UserError, match=message):
        check_typed(args, found, "m.pt")
    check_typed(train_gpt.read_arguments(["--preset", "gpt2"])[0], found, "m.pt")
    same = [f"--{key}={entry}" for key, entry in found.items()]
    check_typed(train_gpt.read_arguments(same)[0], found, "m.pt")
