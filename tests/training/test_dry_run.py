"""The dry run: disk, time and cost by arithmetic, memory and speed by measurement, and nothing written."""

from __future__ import annotations

import re
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.conftest import ROOT, run, tiny_config
from tests.small_runs import TINY, small_args
from utils import files
from utils.command_line import UserError, format_bytes
from utils.distributed import Distributed
from utils.training import dry_run, model_source
from utils.training.dry_run import Plan
from utils.training.log_reader import read_metrics
from utils.training.model_source import least_bytes, outline_if_too_large

CPU = torch.device("cpu")


def plan_of(log_dir: Path, **changes: Any) -> Plan:
    """The plan of 100 steps of 2 micro-steps of 4 rows of 16 tokens with a tiny model."""
    settings = dict(micro_batch=4, seq_len=16, total_batch_tokens=128, max_steps=100, log_dir=log_dir)
    settings.update(val_every=25, val_tokens=1600, checkpoint_every=30, keep_checkpoints=2, keep_every=60)
    settings.update(cost_per_hour=None, optimizer="adamw")
    val = Namespace(num_val_windows=lambda num_tokens: num_tokens // 16)
    args = Namespace(**{**settings, **changes})
    return Plan(args, GPT(tiny_config()), Namespace(), val, 2, Distributed(CPU), {})


# ------------------------------------------------------------------------------------------------------------
# Time and cost


def test_time_and_cost_are_arithmetic(tmp_path):
    """100 steps of 2 micro-steps of 0.5 s; 5 validations of 25 micro-batches at a third; 36 an hour."""
    text = "\n".join(plan_of(tmp_path, cost_per_hour=36.0).time_lines(0.5))
    assert "500 ms x 2 micro-steps = 1,000 ms a step, 128 tok/s, mfu n/a" in text
    assert "time: 2m00s = 100 steps 1m40s + validation about 20s" in text
    assert "cost: 1.21 = 0.03 hours x 36 an hour" in text
    assert "cost" not in "\n".join(plan_of(tmp_path).time_lines(0.5))


@pytest.mark.parametrize(("every", "count"), [(25, 5), (30, 5), (100, 2), (1000, 2), (0, 0)])
def test_validations_are_counted_as_the_loop_makes_them(every, count, tmp_path):
    """Every N steps and after the last, which may be one of them; never for 0."""
    # 25 micro-batches, each a third of 24.001 seconds: a little more than 200 seconds.
    text = "\n".join(plan_of(tmp_path, val_every=every).time_lines(24.001))
    minutes, seconds = divmod(200 * count, 60)
    expected = f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    assert f"+ validation about {expected} (" in text


def test_the_speed_on_a_known_gpu_is_a_share_of_its_peak(tmp_path, monkeypatch):
    """MFU by the formula of the training line."""
    plan = plan_of(tmp_path)
    flops = plan.model.flops_per_token(16) * 128
    monkeypatch.setattr(dry_run, "peak_flops", lambda device, num_devices: flops * 4.0)
    assert "mfu 25.0%" in plan.time_lines(0.5)[0]


# ------------------------------------------------------------------------------------------------------------
# Disk


@pytest.mark.parametrize(
    ("changes", "models", "optimizers"),
    [
        ({}, 3, 2),  # of 30 60 90 100: the newest two, and the milestone 60
        ({"keep_every": 0}, 2, 2),
        ({"checkpoint_every": 0}, 1, 1),  # the last one only
        ({"keep_checkpoints": 9}, 4, 4),
        ({"max_steps": 90}, 2, 2),
    ],
)
def test_checkpoints_are_counted_as_they_are_kept(changes, models, optimizers, tmp_path):
    """The models, the best one and the optimizer files of a finished run, and one pair more during a save."""
    plan = plan_of(tmp_path, **changes)
    line, _ = plan.checkpoints()
    assert f"; {models} models and {optimizers} optimizers stay, " in line
    most = 4 * plan.model.num_parameters() * (models + 2) + 8 * plan.model.num_parameters() * (optimizers + 1)
    assert f"at most {format_bytes(most)} at one time with model_best.pt; " in line


def test_the_count_of_checkpoints_is_that_of_a_real_run(text_file, tmp_path, capsys):
    """A run leaves as many models and optimizer files as its dry run announces."""
    flags = "--max-steps 20 --checkpoint-every 3 --keep-every 6 --val-every 4 --sample-every 0".split()
    flags = small_args(text_file, tmp_path / "log", *flags)
    assert train_gpt.main([*flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    announced = re.search(r"(\d+) models and (\d+) optimizers stay", out).groups()
    assert train_gpt.main(flags) == 0
    found = tuple(len(list((tmp_path / "log").glob(f"{name}_*.pt"))) for name in ("model", "optimizer"))
    best = int((tmp_path / "log" / "model_best.pt").exists())
    assert best == 1 and "with model_best.pt" in out
    assert tuple(map(int, announced)) == (found[0] - best, found[1]) == (4, 2)


def test_too_little_disk_space_is_a_warning(tmp_path, monkeypatch):
    """Checkpoint sizes beside the free space of the nearest existing folder; nothing is created."""
    plan = plan_of(tmp_path / "not" / "yet" / "log")
    line, fits = plan.checkpoints()
    assert line.startswith("checkpoints: model 0.1 MB + optimizer 0.2 MB") and fits
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Namespace(free=1000))
    line, fits = plan.checkpoints()
    assert line.endswith(": not enough") and not fits
    assert list(tmp_path.iterdir()) == []


def test_existing_checkpoints_of_a_resumed_run_need_no_more_space(tmp_path, monkeypatch):
    """They are among those that will be kept, so the start of a resumed run does not warn."""
    plan = plan_of(tmp_path)
    pair = 12 * plan.model.num_parameters()  # weights and two moments
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Namespace(free=2 * pair + pair // 3))
    assert plan.space_warning().startswith("checkpoints: ")
    (tmp_path / "model_00060.pt").write_bytes(bytes(pair // 3))
    (tmp_path / "model_00030.pt").write_bytes(bytes(pair // 3))
    (tmp_path / "optimizer_00030.pt").write_bytes(bytes(2 * pair // 3))
    assert plan.space_warning() is None


# ------------------------------------------------------------------------------------------------------------
# Memory and whole dry runs


def test_a_dry_run_prints_the_plan_then_measures_and_writes_nothing(text_file, tmp_path, capsys, monkeypatch):
    """The plan is on the console before the first micro-step; then memory, speed, time and cost follow."""
    real, before = dry_run.forward_backward, []

    def measured(*arguments: Any) -> torch.Tensor:
        before.append(capsys.readouterr().out)
        return real(*arguments)

    monkeypatch.setattr(dry_run, "forward_backward", measured)
    flags = ("--max-steps", "1000", "--dry-run", "--cost-per-hour", "20")
    assert train_gpt.main(small_args(text_file, tmp_path / "log", *flags)) == 0
    after = capsys.readouterr().out
    for name in ("device", "model", "train", "val", "batch", "checkpoints"):
        assert f"\n{name}: " in before[0] and f"\n{name}: " not in after
    assert [line.split(":")[0] for line in after.splitlines()] == ["memory", "speed", "time", "cost"]
    assert len(before) == dry_run.DRY_RUN_STEPS and not any(before[1:])
    assert not (tmp_path / "log").exists()


def test_a_dry_run_leaves_an_earlier_run_as_it_is(stopped_run, short_text):
    """Also with --resume, and also where a run without it would move the files to the archive."""
    before = {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}
    for resume in ([], ["--resume"]):
        flags = small_args(short_text, stopped_run, "--max-steps", "20", "--dry-run", *resume)
        assert train_gpt.main(flags) == 0
    assert {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("tokens", "gradients"), [(64, False), (128, True), (1024, True)])
def test_the_measured_memory_is_that_of_a_full_step(
    tokens, gradients, text_file, tmp_path, monkeypatch, capsys
):
    """The last micro-step, like those of a run, finds the moments, and the gradients of the one before it.

    With one micro-step an update there are none: the optimizer has used them.
    """
    found: list[tuple[bool, bool]] = []
    real = GPT.configure_optimizers
    optimizers: list[torch.optim.Optimizer] = []

    def recorded(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizers.append(real(*arguments, **options))
        return optimizers[-1]

    def micro_step(model: GPT, *arguments: Any) -> torch.Tensor:
        moments = [optimizers[0].state[p].get("exp_avg_sq") is not None for p in model.parameters()]
        held = [p.grad is not None for p in model.parameters()]
        assert len({*moments}) == len({*held}) == 1
        found.append((moments[0], held[0]))
        return real_micro_step(model, *arguments)

    real_micro_step = dry_run.forward_backward
    monkeypatch.setattr(GPT, "configure_optimizers", recorded)
    monkeypatch.setattr(dry_run, "forward_backward", micro_step)
    monkeypatch.setattr(dry_run, "peak_memory_bytes", lambda device: 123_456_789_000)
    flags = ("--total-batch-tokens", str(tokens), "--max-steps", "9", "--dry-run")
    assert train_gpt.main(small_args(text_file, tmp_path, *flags)) == 0
    assert found[0] == (False, False) and found[-1] == (True, gradients)
    assert "memory: peak 123.46 GB a process, measured (parameters, " in capsys.readouterr().out


@pytest.mark.slow
def test_the_measured_memory_is_that_of_the_run(text_file, tmp_path):
    """Within 10 %, with a model of 38M parameters, whose peak is far above that of PyTorch itself."""
    flags = "--n-layer 12 --n-head 8 --n-embd 512 --seq-len 256 --micro-batch 8 "
    flags += "--total-batch-tokens 2048 --max-steps 2 --val-every 0 --sample-every 0"
    flags = [*TINY, *flags.split(), "--data", str(text_file), "--log-dir", str(tmp_path / "log")]
    dry = run(ROOT / "train_gpt.py", *flags, "--dry-run", timeout=600)
    assert dry.returncode == 0, dry.stderr
    real = run(ROOT / "train_gpt.py", *flags, timeout=600)
    assert real.returncode == 0, real.stderr
    measured = float(re.search(r"memory: peak (\S+) GB a process, measured", dry.stdout)[1])
    records = read_metrics(tmp_path / "log" / "metrics.jsonl")
    peak = [record["memory"] for record in records if record["kind"] == "train"][-1]
    assert measured == pytest.approx(peak / 1e9, rel=0.1) and measured > 1


@pytest.mark.slow
def test_a_model_that_cannot_fit_is_reported_within_seconds(tmp_path):
    """800 billion parameters: exit code 0, the plan with all its numbers, and the reason not to measure."""
    started = time.monotonic()
    flags = ("--dry-run", "--n-layer", "1000", "--n-embd", "8192", "--n-head", "64", "--log-dir", tmp_path)
    process = run(ROOT / "train_gpt.py", *flags)
    assert process.returncode == 0, process.stderr
    assert time.monotonic() - started < 60
    out = process.stdout
    assert "model: 805," in out and " parameters (1000 layers, 64 heads, 8192 channels" in out
    warning = r"warning: checkpoints: model 3,\d+\.\d+ GB \+ optimizer 6,\d+\.\d+ GB.*: not enough\n"
    assert re.search(warning, process.stderr)
    sentence = (
        r"memory: parameters, gradients and moments take 12,\S+ GB, with activations at least 12,\S+ GB, "
    )
    sentence += r"cpu has \S+ GB: "
    assert re.search(sentence + "this does not fit, so nothing is measured\n$", out)
    assert "\nspeed: " not in out and "\ntime: " not in out
    assert list(tmp_path.iterdir()) == []


def memory_of_a_run(**changes: Any) -> tuple[Namespace, int]:
    """Arguments of a run with the tiny model, and the bytes that it needs at least."""
    settings = dict(seq_len=16, micro_batch=4, eval_only=False, dry_run=True, optimizer="adamw")
    args = Namespace(**{**settings, **changes})
    return args, least_bytes(GPT(tiny_config()), args)


@pytest.mark.parametrize(
    ("changes", "bytes_a_parameter", "others"),
    [
        ({}, 16, 4 * 16 * 2 * 32 * 4),  # B T L C, float32
        ({"micro_batch": "auto"}, 16, 1 * 16 * 2 * 32 * 4),
        ({"optimizer": "muon"}, 16, 4 * 16 * 2 * 32 * 4 - 24_576 * 4),  # a matrix has one moment
        ({"eval_only": True}, 4, 4 * 16 * 8),  # no gradients: only the token ids are certain
    ],
)
def test_a_model_fits_if_its_state_and_one_activation_a_layer_do(
    changes, bytes_a_parameter, others, monkeypatch
):
    """float32 parameters, gradients and two moments; a model that does not fit takes no memory."""
    args, needed = memory_of_a_run(**changes)
    assert needed == bytes_a_parameter * GPT(tiny_config()).num_parameters() + others
    for memory, fits in ((needed, True), (needed - 1, False), (None, True)):
        monkeypatch.setattr(model_source, "memory_bytes", lambda device, memory=memory: memory)
        outline = outline_if_too_large(lambda: GPT(tiny_config()), args, Distributed(CPU))
        assert (outline is None) is fits
        if outline is not None:
            assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize(
    "flags", [("--n-embd", "200000"), ("--n-layer", "2000", "--n-embd", "4096"), ("--init-from", "MODEL")]
)
@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_it_allocates(flags, text_file, tmp_path, monkeypatch):
    """With the numbers, and for a model that is loaded as well; without a log, because nothing has begun."""
    model = GPT(tiny_config(vocab_size=27, n_embd=16))
    model.tokenizer_state = {"name": "char", "characters": "The quickbrownfxjmpsvlazydg;.\n"[:27]}
    if flags[0] == "--init-from":
        monkeypatch.setattr(model_source, "memory_bytes", lambda device: 1000)
        monkeypatch.setattr(GPT, "load", lambda source: model)
    with pytest.raises(
        UserError, match=r"parameters with --micro-batch 4 need at least .*, cpu has "
    ) as caught:
        train_gpt.main(small_args(text_file, tmp_path / "log", "--max-steps", "2", *flags))
    assert "--n-embd" in caught.value.hint and not (tmp_path / "log" / "log.txt").exists()
