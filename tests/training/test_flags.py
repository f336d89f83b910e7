"""Flags, presets and schedules: what a run is told, and how it says no before the first step."""

from __future__ import annotations

import importlib.util
import re
import time
from argparse import Namespace

import pytest
import torch

import train_gpt
from gpt_model import GPT, GPTConfig
from tests.conftest import ROOT, run
from tests.small_runs import small_args
from utils.errors import UserError, run_script
from utils.training.flags import make_parser
from utils.training.settings import accumulation_steps, check_training_settings


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
    """Warmup is linear and ends at the maximum, the cosine is half-way in the middle, the floor holds."""
    assert train_gpt.learning_rate_for(step) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_without_warmup_starts_at_the_maximum():
    """No warmup divides by nothing."""
    assert train_gpt.learning_rate_for(0, warmup_steps=0, max_steps=10) == train_gpt.MAX_LR


def test_an_explicit_flag_beats_the_preset_and_the_preset_the_constant():
    """One table of overrides between constants and flags; `_` and `-` are the same."""
    args, _ = train_gpt.read_arguments(["--preset", "tiny", "--max_lr=0.5", "--n_layer", "7"])
    assert (args.max_lr, args.n_layer) == (0.5, 7)
    assert args.n_embd == train_gpt.PRESETS["tiny"]["n_embd"]
    assert args.weight_decay == train_gpt.WEIGHT_DECAY
    assert train_gpt.read_arguments(["--preset", "gpt2"])[0].max_steps == 19073
    assert train_gpt.read_arguments(["--max-steps", "5"])[0].warmup_steps == 0


def test_every_flag_is_read_somewhere():
    """No flag is parsed and forgotten: each name occurs as args.NAME in the training script or its utils."""
    modules = [path for path in (ROOT / "utils").rglob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "train_gpt.py", *modules])
    for name in vars(make_parser(vars(train_gpt), train_gpt.PRESETS).parse_args([])):
        assert re.search(rf"\bargs\.{name}\b", sources), name


def test_namespace_is_plain(tmp_path):
    """Settings survive JSON: every value of the parser is plain or a path."""
    for value in vars(make_parser(vars(train_gpt), train_gpt.PRESETS).parse_args([])).values():
        assert isinstance(value, (int, float, str, bool, type(None), type(tmp_path)))
    assert isinstance(train_gpt.read_arguments([])[0], Namespace)


def test_preset_char_is_small():
    """At most 0.85M parameters with the 65 characters of Tiny Shakespeare."""
    args, _ = train_gpt.read_arguments(["--preset", "char"])
    with torch.device("meta"):
        model = GPT(GPTConfig(args.seq_len, 65, args.n_layer, args.n_head, args.n_embd))
    assert model.num_parameters() <= 850_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "12", "--seq-len", "1024"], "36864; nearest: 516096, 552960"),
        (["--total-batch-tokens", "100", "--seq-len", "64", "--micro-batch", "2"], "nearest: 128"),
        (["--n-embd", "100"], "not a multiple of --n-head 12"),
        (["--warmup-steps", "20000"], "--warmup-steps 20000 is more than --max-steps 19073"),
        (["--min-lr", "1"], "--min-lr 1 is above --max-lr 0.0006"),
        (["--seed", "5000000000"], "--seed 5000000000 is not below 2..32"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_numbers(arguments, message):
    """Each check before the first step, on three ranks where ranks matter."""
    args, _ = train_gpt.read_arguments(["--preset", "gpt2", *arguments])
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check_training_settings(args, world_size=3 if "12" in arguments else 1)


def test_all_problems_come_in_one_message():
    """Three mistakes cost one start."""
    args, _ = train_gpt.read_arguments(
        ["--preset", "gpt2", "--n-embd", "5", "--min-lr", "1", "--micro-batch", "7"]
    )
    with pytest.raises(UserError) as caught:
        check_training_settings(args, 1)
    for problem in ("--n-embd 5 is not", "--min-lr 1 is above", "= 7*1024*1 = 7168"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_accumulation_makes_the_batch_exact(world_size):
    """Rows x tokens x ranks x steps is the batch."""
    assert accumulation_steps(64 * 128 * world_size * 5, 64, 128, world_size) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "device 'cuda' asked but torch"),
        (["--device", "cudaa"], "unknown device 'cudaa'"),
        (["--dtype", "float16"], "--dtype float16 asked on cpu"),
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
def test_what_a_user_can_get_wrong_is_one_error_and_one_hint(flags, message, text_file, tmp_path, capsys):
    """Exit code 2, two lines on stderr, no traceback, and no file of a run."""
    code = run_script(lambda: train_gpt.main(small_args(text_file, tmp_path / "log", *flags)))
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[0].startswith("error: ") and message in error[0]
    assert error[1].startswith("hint: ") and len(error) == 2
    assert not list(tmp_path.glob("log/[!.]*"))


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


def test_gpt2_without_a_network_says_what_to_do(tmp_path):
    """Weights that are not on disk and cannot be had are exit 2 with a hint, within seconds."""
    started = time.monotonic()
    process = run(ROOT / "generate.py", "-m", "gpt2", "-p", "x", HF_HOME=str(tmp_path))
    assert process.returncode == 2, process.stderr
    assert "error: cannot download " in process.stderr and "HF_HOME" in process.stderr
    assert "Traceback" not in process.stderr and time.monotonic() - started < 60


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--wandb", "wandb")])
def test_a_mirror_that_is_not_installed_is_an_error_before_the_first_step(flag, package, text_file, tmp_path):
    """The package to install is named, and no run has begun."""
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(UserError) as caught:
        train_gpt.main(small_args(text_file, tmp_path / "log", flag))
    assert f"pip install {package}" in caught.value.hint
    assert not (tmp_path / "log" / "log.txt").exists()


def test_a_dry_run_says_what_the_run_would_take_and_writes_nothing(text_file, tmp_path, capsys):
    """--dry-run: decisions, arithmetic, disk, memory, time and money; no file, no folder."""
    flags = ("--max-steps", "1000", "--dry-run", "--cost-per-hour", "20")
    assert train_gpt.main(small_args(text_file, tmp_path / "log", *flags)) == 0
    out = capsys.readouterr().out
    for start in ("device", "model", "train", "batch", "checkpoints", "memory", "time", "cost"):
        assert f"\n{start}: " in out, start
    assert not (tmp_path / "log").exists()
