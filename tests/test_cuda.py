"""On a CUDA device, and skipped without one: what the other tests prove on a CPU, with kernels and graphs.

`python -m tests.benchmarks cuda` runs these tests first, and allows them three and a half minutes.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gpt_model
import train_gpt
from tests.conftest import OFFLINE, ROOT, run, tiny_model
from tests.small_runs import assert_same_losses, assert_same_run, losses_of
from tests.training.test_signals import wait_for
from utils import decoding, fused_loss
from utils.fused_loss import fused_cross_entropy
from utils.loss_kernel import choose_kernel
from utils.runtime import Decision, autocast, find_triton
from utils.training import micro_batch as micro_batch_module

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("no_pictures"),
]

DEVICE = torch.device("cuda", 0)
# The scripts that tests start see no GPU, except here.
WITH_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
# A run of a second, whose losses fall slowly enough to be compared between dtypes.
RUN = (
    *("--preset", "tiny", "--device", str(DEVICE), "--tokenizer", "char", "--max-lr", "2e-3"),
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--seq-len", "64", "--micro-batch", "8"),
    *("--total-batch-tokens", "1024", "--max-steps", "40", "--warmup-steps", "4"),
    *("--val-every", "20", "--sample-every", "0", "--checkpoint-every", "0", "--no-compile"),
)


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """Turns TF32 off, which a run in this process turns on."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def triton() -> None:
    """Skips a test where Triton cannot compile for the device."""
    if not find_triton(DEVICE).value:
        pytest.skip(find_triton(DEVICE).reason)


def train(text_file: Path, log_dir: Path, *flags: str) -> None:
    """Runs train_gpt.main with `RUN` in this process."""
    assert train_gpt.main([*RUN, "--data", str(text_file), "--log-dir", str(log_dir), *flags]) == 0


def start(text_file: Path, log_dir: Path, *flags: str) -> subprocess.Popen:
    """Starts the script with `RUN` as a process; its output is a pipe."""
    files = ("--data", str(text_file), "--log-dir", str(log_dir))
    return subprocess.Popen(
        [sys.executable, ROOT / "train_gpt.py", *RUN, *files, *flags],
        env={**os.environ, **OFFLINE, **WITH_GPU},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a process, which must end with an exit code; returns the rest of its output."""
    out, error = process.communicate(timeout=90)
    assert process.returncode == code, error
    return out


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of the expected tensor."""
    return ((ours - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("V", [50304, 65])
@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "tolerance"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 1e-2), (torch.float16, 1e-3, 5e-3)],
)
def test_the_loss_is_that_of_full_logits(dtype, loss_tolerance, tolerance, with_kernel, V, monkeypatch):
    """Loss and gradients of four chunks, to rounding; with the kernel, launched once a chunk, and without."""
    if with_kernel and not choose_kernel(DEVICE).value:
        pytest.skip(choose_kernel(DEVICE).reason)
    if with_kernel:
        with autocast(DEVICE, dtype):  # as at the first call of a run
            backend = fused_loss.loss_backend.__wrapped__(DEVICE)
        assert backend.value, backend.reason
    launches, launch = [], fused_loss.logits_to_gradient_
    monkeypatch.setattr(fused_loss, "logits_to_gradient_", lambda *a: launches.append(a) or launch(*a))
    monkeypatch.setattr(fused_loss, "loss_backend", lambda device: Decision(with_kernel, "as asked"))
    torch.manual_seed(0)
    hidden = torch.randn(1000, 256, device=DEVICE, requires_grad=True)
    weight = (0.02 * torch.randn(V, 256, device=DEVICE)).requires_grad_()
    targets = torch.randint(V, (1000,), device=DEVICE)
    targets[5:20] = fused_loss.IGNORE_INDEX
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with autocast(DEVICE, dtype):
        loss = fused_cross_entropy(hidden, weight, targets, chunk_rows=256)
    assert abs(loss - expected) < loss_tolerance
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), gradients):
        assert relative_error(ours, theirs) < tolerance
    assert len(launches) == (4 if with_kernel else 0)


# ------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(top_k=20), dict(top_p=0.8)], ids=str)
def test_sampling_with_graphs_gives_the_tokens_of_eager_sampling(sampling, monkeypatch):
    """In float32, from 100 to 500 tokens: three buckets, each captured once, and past two ends of a block."""
    model = tiny_model(block_size=300).to(DEVICE)
    prompt = torch.randint(97, (3, 100), device=DEVICE)
    captures, capture = [], decoding.capture_cuda_graph
    monkeypatch.setattr(decoding, "capture_cuda_graph", lambda *a: captures.append(a) or capture(*a))

    def tokens(**options: Any) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(1)
        return model.generate(prompt, 400, generator=generator, **sampling, **options)

    with_graphs = tokens()
    assert with_graphs.shape == (3, 500) and len(captures) == 3
    assert torch.equal(with_graphs, tokens(use_cache=False))
    monkeypatch.setattr(gpt_model, "graph_pays", lambda device, max_new_tokens: False)
    assert torch.equal(with_graphs, tokens())
    assert len(captures) == 3 and with_graphs[0].unique().numel() > 5


# ------------------------------------------------------------------------------------------------------------
# Training


def test_dtypes_agree(text_file, tmp_path):
    """Val losses after 40 steps within 0.03 of float32, for falling losses; fp16 with its scaler."""
    has_bf16 = torch.cuda.get_device_capability(DEVICE) >= (8, 0)
    losses = {}
    for dtype in ("float32", "float16", *(["bfloat16"] if has_bf16 else [])):
        train(text_file, tmp_path / dtype, "--dtype", dtype)
        losses[dtype] = dict(losses_of(tmp_path / dtype))
    assert losses["float32"]["40 val"] < losses["float32"]["0 val"] - 0.5
    for dtype, found in losses.items():
        for name in ("0 val", "20 val", "40 val"):
            assert abs(found[name] - losses["float32"][name]) < 0.03, (dtype, name)


def test_the_automatic_micro_batch_is_the_largest_that_fits(text_file, tmp_path, monkeypatch):
    """The whole batch where it fits, with the losses of that micro-batch; less where memory runs out."""
    flags = ("--total-batch-tokens", "4096", "--max-steps", "5", "--dtype", "float32")
    train(text_file, tmp_path / "auto", *flags, "--micro-batch", "auto")
    train(text_file, tmp_path / "64", *flags, "--micro-batch", "64")
    assert_same_losses(tmp_path / "auto", tmp_path / "64")

    def micro_batch(name: str) -> int:
        saved = torch.load(tmp_path / name / "optimizer_00005.pt", weights_only=True)
        return saved["train_args"]["micro_batch"]

    assert micro_batch("auto") == 64
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    monkeypatch.setattr(micro_batch_module, "HEADROOM", 1e9 / total)
    flags = ("--total-batch-tokens", str(2**20), "--max-steps", "5", "--micro-batch", "auto")
    train(text_file, tmp_path / "little", *flags)
    assert 8 <= micro_batch("little") < 2**20 // 64


@pytest.mark.parametrize("more", [(), ("--dropout", "0.2", "--recompute")], ids=str)
def test_a_killed_deterministic_run_is_resumed_bitwise(more, text_file, tmp_path):
    """SIGKILL at step 20, between checkpoints: logs, samples and weights are those of an undisturbed run."""
    flags = ["--deterministic", "--max-steps", "60", "--checkpoint-every", "8", "--sample-every", "15", *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed, process = start(text_file, whole, *flags), start(text_file, killed, *flags)
    wait_for(process, "step    20 |")
    process.kill()
    finish(process, -signal.SIGKILL)
    assert "resumed" in finish(start(text_file, killed, *flags, "--resume"))
    finish(undisturbed)
    assert_same_run(killed, whole, step=60)


def test_determinism_with_compile_is_refused(text_file, tmp_path):
    """Two lines and exit code 2."""
    flags = ("--data", text_file, "--log-dir", tmp_path, "--deterministic", "--compile")
    process = run("train_gpt.py", *RUN, *flags, **WITH_GPU)
    assert process.returncode == 2
    error, hint = process.stderr.strip().split("\n")
    assert error.startswith("error: --compile with --deterministic: ")
    assert hint == "hint: leave one of the two out"


def test_the_quick_start_chooses_what_suits_the_gpu(triton, text_file, tmp_path):
    """The preset small; so short a run is not compiled, and the reason says how that was estimated."""
    flags = ("--data", text_file, "--log-dir", tmp_path, "--max-steps", 5)
    process = run("train_gpt.py", *flags, **WITH_GPU)
    assert process.returncode == 0, process.stderr
    assert "done in" in process.stdout and (tmp_path / "model_00005.pt").is_file()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[0])
    assert record["reasons"]["preset"] == "small (CUDA, a text), recipe faithful"
    estimate = r"compile off \(auto: about \S+ of \S+ saved, 30s spent\)"
    assert re.search(estimate, record["reasons"]["numerics"])
    losses = dict(losses_of(tmp_path))
    assert losses["5 val"] < losses["0 val"]


# ------------------------------------------------------------------------------------------------------------
# Compiled training


def test_evaluations_and_samples_cause_no_recompilation(triton, text_file, tmp_path, monkeypatch):
    """One compilation before the first step, and none after val, HellaSwag, samples and checkpoints."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    update, graphs = train_gpt.update, []

    def counting(*arguments: Any) -> tuple[float, float]:
        graphs.append(counters["stats"]["unique_graphs"])
        result = update(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(train_gpt, "update", counting)
    every = ("--val-every", "2", "--hellaswag-every", "2", "--sample-every", "2", "--checkpoint-every", "2")
    flags = ("--tokenizer", "gpt2", "--hellaswag-dir", str(ROOT / "tests" / "fixtures"), "--max-steps", "6")
    train(text_file, tmp_path, *flags, *every, "--compile")
    names = [name for name, _ in losses_of(tmp_path)]
    assert {"2 hella", "4 hella", "6 hella", "4 val", "5 train"} <= set(names)
    assert (tmp_path / "samples.txt").read_text().count("--- step 4") == 4
    assert len(graphs) == 12 and len(set(graphs)) == 1 and graphs[0] > 0


def test_a_compiled_run_saves_at_sigterm(triton, text_file, tmp_path):
    """Exit code 143 and a checkpoint; the compilation has a line of its own, and is in no step's time."""
    process = start(
        text_file, tmp_path, "--compile", "--max-steps", "100000", "--val-every", "0", "--log-every", "1"
    )
    wait_for(process, "compiled in ")
    wait_for(process, "step     9 |")
    process.send_signal(signal.SIGTERM)
    assert "received SIGTERM: saved" in finish(process, 128 + signal.SIGTERM)
    assert list(tmp_path.glob("model_*.pt")) and list(tmp_path.glob("optimizer_*.pt"))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["seconds"] < 1 for record in records if record["kind"] == "train")
