"""The training script, as functions and as a user runs it."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace

import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.conftest import ROOT, run
from utils.errors import Diverged, UserError
from utils.settings import accumulation_steps, check_training_settings
from utils.train_flags import make_parser

SMALL = (
    *(
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--n-layer",
        "2",
        "--n-head",
        "2",
        "--n-embd",
        "16",
    ),
    *("--seq-len", "16", "--micro-batch", "4", "--total-batch-tokens", "128", "--tokenizer", "char"),
    *("--max-lr", "1e-2", "--val-every", "10", "--sample-every", "15", "--checkpoint-every", "10"),
)


def small_args(text_file, log_dir, *flags) -> list[str]:
    return [*SMALL, "--data", str(text_file), "--log-dir", str(log_dir), *flags]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of 30 steps on a small text, as a user starts it: (process, log directory, text file)."""
    folder = tmp_path_factory.mktemp("run")
    text_file = folder / "text.txt"
    text_file.write_text(
        "The quick brown fox jumps over the lazy dog; the dog sleeps on.\n" * 300, encoding="utf-8"
    )
    process = run(
        ROOT / "train_gpt.py", *small_args(text_file, folder / "log", "--max-steps", "30"), cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return process, folder / "log", text_file


def test_a_run_writes_its_log_line_by_line(finished_run):
    """log.txt has every train loss with six decimals, val losses when due and after the last, and nothing
    else.
    """
    _, log_dir, _ = finished_run
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    assert [int(step) for step, kind, _ in lines if kind == "train"] == list(range(30))
    assert [int(step) for step, kind, _ in lines if kind == "val"] == [0, 10, 20, 30]
    assert {kind for _, kind, _ in lines} == {"train", "val"}
    assert all(len(value.split(".")[1]) == (6 if kind == "train" else 4) for _, kind, value in lines)


def test_a_run_learns(finished_run):
    """The first loss is a uniform guess, the last one is far below it."""
    _, log_dir, text_file = finished_run
    losses = [
        float(line.split()[2]) for line in (log_dir / "log.txt").read_text().splitlines() if "train" in line
    ]
    assert abs(losses[0] - math.log(len(set(text_file.read_text())))) < 0.3
    assert losses[-1] < losses[0] - 1


def test_a_run_records_its_environment_first_and_then_its_steps(finished_run):
    """metrics.jsonl: settings and versions, then one record an update and one a validation."""
    _, log_dir, _ = finished_run
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["kind"] == "run"
    assert records[0]["settings"]["max_steps"] == 30
    assert records[0]["environment"]["torch"] == torch.__version__
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(30))
    assert all(r["seconds"] > 0 and r["norm"] > 0 and r["memory"] > 0 and r["mfu"] is None for r in steps)
    vals = [r for r in records if r["kind"] == "val"]
    assert [r["tokens"] for r in vals] == [0, 1280, 2560, 3840]


def test_a_run_leaves_a_plot_samples_and_checkpoints_and_says_where(finished_run):
    """The files of design, and last lines that name them and the command that samples."""
    process, log_dir, _ = finished_run
    assert (log_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (log_dir / "samples.txt").read_text().count("--- step 15, sample") == train_gpt.NUM_SAMPLES
    names = sorted(p.name for p in log_dir.glob("*.pt"))
    assert names == ["model_00020.pt", "model_00030.pt", "optimizer_00020.pt", "optimizer_00030.pt"]
    last = process.stdout.strip().splitlines()[-1]
    assert last.startswith("sample from it: python generate.py -m ") and "model_00030.pt" in last
    assert "step    12 | loss " in process.stdout and " tok/s | eta " in process.stdout


def test_the_command_it_names_samples(finished_run):
    """generate.py reads the checkpoint, with its tokenizer, and gives the same text for the same seed."""
    _, log_dir, _ = finished_run
    command = (
        ROOT / "generate.py",
        "-m",
        log_dir / "model_00030.pt",
        "-p",
        "The quick",
        "--max-new-tokens",
        "20",
    )
    first, second = run(*command, "--seed", "1"), run(*command, "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The quick") and len(first.stdout) == len("The quick") + 20 + 1
    assert first.stdout == second.stdout


def test_eval_only_gives_the_val_loss_of_the_log(finished_run, capsys):
    """The final checkpoint, evaluated alone, has the last val loss, from the same tokens; another micro-batch
    too.
    """
    _, log_dir, text_file = finished_run
    logged = [line for line in (log_dir / "log.txt").read_text().splitlines() if " val " in line][-1].split()[
        2
    ]
    flags = ("--eval-only", "--init-from", str(log_dir / "model_00030.pt"), "--micro-batch", "7")
    assert train_gpt.main(small_args(text_file, log_dir, *flags)) == 0
    assert f"val loss {logged} | perplexity {math.exp(float(logged)):.2f}"[:20] in capsys.readouterr().out


def test_a_second_run_moves_the_first_ones_files(finished_run, tmp_path):
    """Nothing is overwritten: what a run finds in the log directory goes to archive/ as it was."""
    import shutil

    _, log_dir, text_file = finished_run
    copy = tmp_path / "log"
    shutil.copytree(log_dir, copy)
    (copy / "README.md").write_text("stays")
    assert train_gpt.main(small_args(text_file, copy, "--max-steps", "1", "--val-every", "0")) == 0
    (archive,) = (copy / "archive").iterdir()
    for path in log_dir.glob("[!.]*"):
        assert (archive / path.name).read_bytes() == path.read_bytes()
    assert (copy / "log.txt").read_text().count("\n") == 1
    assert (copy / "README.md").read_text() == "stays"


def test_two_equal_runs_have_equal_logs(finished_run, tmp_path):
    """Same machine, same settings: log.txt byte for byte, weights bit for bit."""
    _, log_dir, text_file = finished_run
    process = run(ROOT / "train_gpt.py", *small_args(text_file, tmp_path, "--max-steps", "30"))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "log.txt").read_bytes() == (log_dir / "log.txt").read_bytes()
    ours, theirs = (GPT.from_checkpoint(d / "model_00030.pt").state_dict() for d in (tmp_path, log_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_accumulation_changes_nothing_but_rounding(text_file, tmp_path):
    """The same batch in one piece or in eight: the same losses to 1e-4."""
    losses = []
    for micro_batch in ("8", "1"):
        log_dir = tmp_path / micro_batch
        flags = ("--max-steps", "8", "--micro-batch", micro_batch, "--sample-every", "0")
        assert train_gpt.main(small_args(text_file, log_dir, *flags)) == 0
        losses.append([float(line.split()[2]) for line in (log_dir / "log.txt").read_text().splitlines()])
    assert all(abs(a - b) < 1e-4 for a, b in zip(*losses))


def test_fine_tuning_starts_from_the_checkpoint(finished_run, tmp_path):
    """--init-from takes sizes, weights and vocabulary from the file: the first val loss is its last."""
    _, log_dir, text_file = finished_run
    flags = ("--init-from", str(log_dir / "model_00030.pt"), "--n-layer", "5", "--max-steps", "1")
    assert train_gpt.main(small_args(text_file, tmp_path, *flags)) == 0
    last = (log_dir / "log.txt").read_text().splitlines()[-1].split()[2]
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == f"0 val {last}"
    assert GPT.from_checkpoint(tmp_path / "model_00001.pt").config.n_layer == 2


def hellaswag_folder(folder):
    """Four made-up examples in the published form."""
    folder.mkdir()
    endings = ["sleeps on.", "jumps over the fox.", "is quick and brown.", "flies away."]
    words = ("lazy", "quick", "brown", "gone")
    rows = [
        dict(
            ind=i,
            activity_label="Dog",
            ctx_a="A dog",
            ctx_b="it",
            ctx=f"A {word} dog. It",
            label=i,
            endings=endings,
        )
        for i, word in enumerate(words)
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_hellaswag_in_training(text_file, tmp_path, capsys):
    """Every so many steps and after the last, a line in the log; a subset is shown as such."""
    flags = ("--tokenizer", "gpt2", "--max-steps", "2", "--hellaswag-every", "1", "--sample-every", "0")
    folder = hellaswag_folder(tmp_path / "data")
    flags += ("--hellaswag-dir", str(folder), "--hellaswag-examples", "3")
    assert train_gpt.main(small_args(text_file, tmp_path / "log", *flags)) == 0
    lines = [line.split() for line in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    values = [(int(step), float(value)) for step, kind, value in lines if kind == "hella"]
    assert [step for step, _ in values] == [0, 1, 2]
    assert all(round(3 * value, 2) in (0.0, 1.0, 2.0, 3.0) for _, value in values)
    assert "of 3 examples" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_without_hellaswag_training_goes_on(tokenizer, text_file, tmp_path, capsys, monkeypatch):
    """Data that cannot be had, or a model of characters: one warning, no line in the log, exit 0."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    flags = ("--tokenizer", tokenizer, "--max-steps", "1", "--hellaswag-every", "1", "--sample-every", "0")
    log_dir = tmp_path / "log"
    assert (
        train_gpt.main(small_args(text_file, log_dir, *flags, "--hellaswag-dir", str(tmp_path / "none"))) == 0
    )
    assert capsys.readouterr().out.count("warning: HellaSwag is off") == 1
    assert "hella" not in (log_dir / "log.txt").read_text()


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


def test_a_nan_stops_the_run_before_the_update(text_file, tmp_path, monkeypatch):
    """26: A loss that is not finite is exit code 3, and neither weights nor optimizer have moved."""
    runs = []
    real_update = train_gpt.update

    def poisoned(run, batches, progress):
        if progress.step == 3:
            with torch.no_grad():
                run.model.transformer.ln_f.bias[0] = float("nan")
            runs.append((run, {n: p.clone() for n, p in run.model.state_dict().items()}))
        return real_update(run, batches, progress)

    monkeypatch.setattr(train_gpt, "update", poisoned)
    with pytest.raises(
        Diverged, match="non-finite loss at step 3 .rank 0, micro-step 0, .*text.txt position .*quick"
    ) as caught:
        train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "5"))
    assert caught.value.exit_code == 3
    state, before = runs[0][0].model.state_dict(), runs[0][1]
    assert all(torch.equal(state[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)
    assert not list(tmp_path.glob("*.pt"))


def test_an_explicit_flag_beats_the_preset_and_the_preset_the_constant():
    """One table of overrides between constants and flags; `_` and `-` are the same."""
    args, _ = train_gpt.read_arguments(["--preset", "tiny", "--max_lr=0.5", "--n_layer", "7"])
    assert (args.max_lr, args.n_layer) == (0.5, 7)
    assert args.n_embd == train_gpt.PRESETS["tiny"]["n_embd"]
    assert args.weight_decay == train_gpt.WEIGHT_DECAY
    assert train_gpt.read_arguments(["--preset", "gpt2"])[0].max_steps == 19073
    assert train_gpt.read_arguments(["--max-steps", "5"])[0].warmup_steps == 0


def test_every_flag_is_read_somewhere():
    """No flag is parsed and forgotten: each name occurs as args.NAME in the project."""
    import re

    sources = "".join(
        p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.py"), *(ROOT / "utils").glob("*.py")]
    )
    for name in vars(make_parser(vars(train_gpt), train_gpt.PRESETS).parse_args([])):
        assert re.search(rf"\bargs\.{name}\b", sources) or name == "preset", name


def test_preset_char_is_small():
    """At most 0.85M parameters with the 65 characters of Tiny Shakespeare."""
    from gpt_model import GPTConfig

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
    """34, 35: Each check before the first step, on three ranks where ranks matter."""
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
    assert str(caught.value).count(";") >= 2


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
    """22, 32, 33, 38: Exit code 2, two lines on stderr, no traceback, and no file of a run."""
    from utils.errors import run_script

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


def test_evaluation_is_exact_for_any_micro_batch():
    """The mean over all windows does not depend on how they are grouped, the uneven last batch included."""
    import numpy as np

    from tests.conftest import tiny_model
    from utils.data_loader import TextStream, WindowLoader
    from utils.distributed import Distributed

    stream = TextStream("t", np.random.RandomState(0).randint(0, 97, 400).astype(np.uint16), 0, {})
    model, alone = tiny_model(), Distributed(torch.device("cpu"))
    losses = [
        train_gpt.evaluate(model, WindowLoader(stream, 16, micro_batch), 10**6, alone, torch.float32)
        for micro_batch in (1, 7, 100)
    ]
    rows = torch.from_numpy(stream.tokens[:385].astype(np.int64))
    logits, truth = model(rows[:384].view(24, 16), rows[1:].view(24, 16))
    assert max(losses) - min(losses) < 1e-6
    assert abs(losses[0] - truth.item()) < 1e-5


def test_namespace_is_plain(tmp_path):
    """Settings survive JSON: every value of the parser is plain or a path."""
    for value in vars(make_parser(vars(train_gpt), train_gpt.PRESETS).parse_args([])).values():
        assert isinstance(value, (int, float, str, bool, type(None), type(tmp_path)))
    assert isinstance(train_gpt.read_arguments([])[0], Namespace)


def test_samples_of_a_broken_model_are_skipped(text_file, tmp_path, monkeypatch, capsys):
    """28: logits that are not finite end the sampling with a line, not the run."""
    real = train_gpt.write_samples

    def broken(run, log, step):
        weight = run.model.transformer.ln_f.weight
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        real(run, log, step)
        weight.data.copy_(kept)

    monkeypatch.setattr(train_gpt, "write_samples", broken)
    assert train_gpt.main(small_args(text_file, tmp_path, "--max-steps", "2", "--val-every", "0")) == 0
    assert "generation skipped: non-finite logits" in capsys.readouterr().out


def test_deterministic_runs_are_equal(text_file, tmp_path):
    """31: --deterministic asks PyTorch for deterministic algorithms, and two runs have the same log."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train_gpt; train_gpt.main(); assert torch.are_deterministic_algorithms_enabled()"
    )
    for name in ("a", "b"):
        flags = small_args(text_file, tmp_path / name, "--max-steps", "5", "--deterministic")
        process = run("-c", code, *flags)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "a" / "log.txt").read_bytes() == (tmp_path / "b" / "log.txt").read_bytes()


def test_gpt2_without_a_network_says_what_to_do(tmp_path):
    """38, 39: weights that are not on disk and cannot be had are exit 2 with a hint, within seconds."""
    started = time.monotonic()
    process = run(ROOT / "generate.py", "-m", "gpt2", "-p", "x", HF_HOME=str(tmp_path))
    assert process.returncode == 2, process.stderr
    assert "error: cannot download " in process.stderr and "HF_HOME" in process.stderr
    assert "Traceback" not in process.stderr and time.monotonic() - started < 60


def test_a_dry_run_says_what_the_run_would_take_and_writes_nothing(text_file, tmp_path, capsys):
    """--dry-run: decisions, arithmetic, disk, memory, time and money; no file, no folder."""
    flags = ("--max-steps", "1000", "--dry-run", "--cost-per-hour", "20")
    assert train_gpt.main(small_args(text_file, tmp_path / "log", *flags)) == 0
    out = capsys.readouterr().out
    for start in (
        "device: ",
        "model: ",
        "train: ",
        "batch: ",
        "checkpoints: ",
        "memory: ",
        "time: ",
        "cost: ",
    ):
        assert f"\n{start}" in out, start
    assert not (tmp_path / "log").exists()


def test_a_finished_run_has_a_report(finished_run):
    """report.md names the final val loss of the log and shows the picture."""
    _, log_dir, _ = finished_run
    last_val = (log_dir / "log.txt").read_text().splitlines()[-1].split()[2]
    report = (log_dir / "report.md").read_text()
    assert last_val in report and "curves.png" in report


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboard"), ("--wandb", "wandb")])
def test_a_mirror_that_is_not_installed_is_an_error_before_the_first_step(flag, package, text_file, tmp_path):
    """The package to install is named, and no run has begun."""
    import importlib.util

    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(UserError) as caught:
        train_gpt.main(small_args(text_file, tmp_path / "log", flag))
    assert f"pip install {package}" in caught.value.hint
    assert not (tmp_path / "log" / "log.txt").exists()
