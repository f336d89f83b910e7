"""What a run will take, before it does: memory by counting tensors; disk, time and money by arithmetic."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace

import pytest
import torch

from gpt_model import GPT
from tests.conftest import ROOT, run, tiny_config
from utils import runtime
from utils.distributed import Distributed
from utils.training import dry_run as plan
from utils.training.memory_estimate import activation_bytes, estimate_memory, loss_bytes

CPU = torch.device("cpu")


def planned_run(log_dir, **changes):
    """A stand-in for the training script's Run: a tiny model, 2 micro-steps of 4 rows of 16 tokens."""
    settings = dict(micro_batch=4, seq_len=16, total_batch_tokens=128, max_steps=100, log_dir=log_dir)
    settings.update(val_every=25, val_tokens=1600, checkpoint_every=30, keep_checkpoints=2, keep_every=60)
    return Namespace(
        args=Namespace(**{**settings, **changes}),
        model=GPT(tiny_config()),
        dist=Distributed(CPU),
        dtype=torch.float32,
        micro_steps=2,
        val_loader=Namespace(num_val_windows=lambda num_tokens: num_tokens // 16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype):
    """Every tensor that the forward pass saves, once, less the weights: the estimate is within 5 %."""
    config = tiny_config(block_size=64, n_layer=3, n_embd=64)
    model, idx = GPT(config), torch.zeros(8, 64, dtype=torch.long)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast(CPU, dtype):
        hidden = model.hidden_states(idx)
    copies = {p.numel() for p in model.parameters()} if dtype != torch.float32 else set()
    kept.setdefault(hidden.untyped_storage().data_ptr(), hidden)
    # Integers are token ids; tensors of a weight's size in the low dtype are its copies, counted elsewhere.
    counted = sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in weights and tensor.is_floating_point()
        and not (tensor.dtype == dtype and tensor.numel() in copies)
    )  # fmt: skip
    estimate = activation_bytes(config, 8 * 64, torch.finfo(dtype).bits // 8)
    assert counted == pytest.approx(estimate, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_the_estimate_is_the_peak_of_all_tensors(tmp_path, dtype, micro_steps):
    """Every allocation and release of real micro-steps, added up: the estimate of the peak is within 5 %."""
    config, B, T = tiny_config(block_size=64, vocab_size=5000, n_layer=2, n_embd=128), 8, 64
    model, rows = GPT(config), torch.randint(5000, (B, T + 1))
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(micro_steps):
            with runtime.autocast(CPU, dtype):
                _, loss = model(rows[:, :-1], rows[:, 1:], return_logits=False)
            loss.backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: e["ts"])
    peak = max(itertools.accumulate(event["args"]["Bytes"] for event in events))
    estimate = estimate_memory(config, model.num_parameters(), B, T, dtype, "cpu", micro_steps)
    # The weights were there before, and no optimizer runs.
    counted = estimate.peak - estimate.unused - estimate.parameters - estimate.optimizer
    assert counted == pytest.approx(peak, rel=0.05)


def test_static_memory_is_sixteen_bytes_a_parameter():
    """Weights, gradients and two moments in float32; with accumulation the gradients outlive a micro-step."""
    config = tiny_config()
    once, twice = (estimate_memory(config, 1000, 1, 1, torch.float32, "cpu", steps) for steps in (1, 2))
    assert (once.parameters, once.gradients, once.optimizer) == (4000, 4000, 8000)
    large = [estimate_memory(config, 1000, 64, 16, torch.float32, "cpu", steps) for steps in (1, 2)]
    assert large[1].peak - large[0].peak == 4000
    assert once.peak > 16000 and twice.peak > once.peak


def test_logits_never_count_as_a_whole():
    """The loss's buffer is a chunk of rows, on CUDA a larger one: 64 x 1024 rows cost what 8192 cost."""
    config = tiny_config(vocab_size=50304)
    hidden = 4 * config.n_embd  # bytes of a row of gradients of the hidden states
    few, many = (loss_bytes(config, rows, 4, "cuda") - rows * hidden for rows in (8192, 65536))
    assert few == many
    assert loss_bytes(config, 8192, 4, "cpu") < loss_bytes(config, 8192, 4, "cuda") / 7


def test_time_and_money_are_arithmetic(tmp_path):
    """100 steps of 2 micro-steps of 0.5 s; 5 validations of 25 micro-batches at a third; 36 an hour."""
    lines = plan.dry_run_lines(planned_run(tmp_path), 0.5, cost_per_hour=36)
    assert plan.run_seconds(planned_run(tmp_path), 0.5) == pytest.approx((100, 5 * 25 / 6))
    text = "\n".join(lines)
    assert "500 ms x 2 micro-step(s) = 1,000 ms a step, 128 tok/s, mfu n/a" in text
    assert "time: 2m00s = 100 steps 1m40s + validation about 20s" in text
    assert "cost: 1.21 = 0.03 hours x 36 an hour" in text
    assert "cost" not in "\n".join(plan.dry_run_lines(planned_run(tmp_path), 0.5))


def test_validations_are_counted_as_the_loop_makes_them(tmp_path):
    """Every N steps and after the last, which may be one of them; never for zero."""
    each = 25 / 6
    for every, count in ((25, 5), (30, 5), (100, 2), (1000, 2), (0, 0)):
        assert plan.run_seconds(planned_run(tmp_path, val_every=every), 0.5)[1] == pytest.approx(count * each)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (3, 2)),  # 30 60 90 100: the newest two, and the milestone 60
        ({"keep_every": 0}, (2, 2)),
        ({"checkpoint_every": 0}, (1, 1)),  # the last one only
        ({"keep_checkpoints": 9}, (4, 4)),
        ({"max_steps": 90}, (2, 2)),
    ],
)
def test_checkpoints_are_counted_as_they_are_kept(tmp_path, changes, expected):
    """Models and optimizers that a finished run leaves."""
    assert plan.num_checkpoints(planned_run(tmp_path, **changes).args) == expected


def test_a_small_disk_is_a_warning(tmp_path, monkeypatch):
    """Checkpoint sizes stand beside the free space, of the nearest folder that exists already."""
    planned = planned_run(tmp_path / "not" / "yet" / "log")
    assert plan.checkpoints_line(planned).startswith("checkpoints: model 0.1 MB + optimizer 0.2 MB")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: Namespace(free=1000))
    assert plan.checkpoints_line(planned).startswith("warning: checkpoints: ")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_room_where_its_checkpoints_are(tmp_path, monkeypatch):
    """Those that exist already are among those that will be kept: they need no more room."""
    planned = planned_run(tmp_path)
    pair = 12 * planned.model.num_parameters()  # of weights and two moments
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: Namespace(free=2 * pair))
    assert plan.space_warning(planned)[0].startswith("warning: checkpoints: ")
    (tmp_path / "model_00060.pt").write_bytes(bytes(pair // 3))
    (tmp_path / "model_00030.pt").write_bytes(bytes(pair // 3))
    (tmp_path / "optimizer_00030.pt").write_bytes(bytes(2 * pair // 3))
    assert plan.space_warning(planned) == []


def test_a_known_gpu_has_a_share_of_its_peak(tmp_path, monkeypatch):
    """MFU from the same formula as the training line."""
    planned = planned_run(tmp_path)
    flops = planned.model.flops_per_token(16) * 128
    monkeypatch.setattr(runtime, "peak_flops", lambda device: flops * 4.0)
    assert "mfu 25.0%" in plan.speed_line(planned, 0.5)


MEASURE = """
import json, resource, sys, torch
from gpt_model import GPT, GPTConfig
from utils import runtime

B, T, micro_steps, keep = map(int, sys.argv[1:])
if keep:
    runtime.keep_freed_memory()


def train(model, rows):
    optimizer = model.configure_optimizers(0.1, 1e-4, "cpu", is_master_process=False)
    for step in range(2):  # from the second step on, Adam's moments exist during the forward pass
        for micro_step in range(micro_steps):
            _, loss = model(rows[:, :-1], rows[:, 1:], return_logits=False)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# A small model first: PyTorch's code and its libraries' work areas are part of the baseline.
train(GPT(GPTConfig(64, 512, 2, 2, 64)), torch.randint(512, (2, 65)))
baseline = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = GPT(GPTConfig(vocab_size=50304))
train(model, torch.randint(50257, (B, T + 1)))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"added": peak - baseline, "parameters": model.num_parameters()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("keep_freed_memory", [0, 1])
@pytest.mark.parametrize(("B", "T", "micro_steps"), [(1, 256, 1), (2, 256, 2), (4, 512, 1)])
def test_the_estimate_is_what_a_real_step_adds(B, T, micro_steps, keep_freed_memory):
    """GPT-2 124M on the CPU: peak resident memory less what was there before the model, within 20 %."""
    from gpt_model import GPTConfig

    arguments = (B, T, micro_steps, keep_freed_memory)
    process = run("-c", MEASURE, *arguments, cwd=ROOT, timeout=600, OMP_NUM_THREADS="2")
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    config = GPTConfig(vocab_size=50304)
    estimate = estimate_memory(config, measured["parameters"], B, T, torch.float32, "cpu", micro_steps)
    print(f"B{B} T{T} micro-steps {micro_steps}: {measured['added'] / 1e9:.2f} GB, {estimate}")
    assert estimate.peak == pytest.approx(measured["added"], rel=0.2)
