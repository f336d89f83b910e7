"""Decisions about PyTorch, device, dtype and compile, for devices that this machine need not have."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ROOT, run
from utils import runtime
from utils.command_line import UserError, run_script

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are two GPUs of a given compute capability and name."""

    def pretend(capability=(9, 0), name="NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


@pytest.mark.parametrize(("version", "is_old"), [("2.9.1+cpu", True), ("2.10.0", False), ("3.0.0", False)])
def test_a_pytorch_below_the_minimum_is_refused(version, is_old, monkeypatch, capsys):
    """Two lines and exit code 2, with the command that installs a newer one."""
    monkeypatch.setattr(torch, "__version__", version)
    assert run_script(runtime.check_torch_version) == (2 if is_old else 0)
    expected = (
        f"error: torch {version} is too old (expected 2.10 or newer)\nhint: pip install -U 'torch>=2.10'\n"
    )
    assert capsys.readouterr().err == (expected if is_old else "")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_bf16_is_chosen_where_the_gpu_computes_it_natively(gpus, capability, expected):
    """A T4 (7.5) emulates bf16 but reports support for it, so the capability decides and is named."""
    gpus(capability)
    decision = runtime.choose_dtype("auto", CUDA)
    assert decision.value == expected
    assert f"{capability[0]}.{capability[1]}" in decision.reason


def test_a_dtype_that_the_device_lacks_is_an_error(gpus):
    """An explicit dtype is never replaced silently."""
    gpus((7, 5))
    with pytest.raises(UserError, match="bfloat16"):
        runtime.choose_dtype("bfloat16", CUDA)
    with pytest.raises(UserError, match="float16"):
        runtime.choose_dtype("float16", torch.device("cpu"))


def test_each_process_has_a_gpu_of_its_own(gpus):
    """The local rank selects the GPU; with one process too many the error says how many fit."""
    gpus()
    assert runtime.choose_device("auto", local_rank=1).value == torch.device("cuda", 1)
    assert runtime.choose_device("cuda:0").value == torch.device("cuda", 0)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU") as caught:
        runtime.choose_device("cuda", local_rank=2)
    assert "--nproc_per_node=2" in caught.value.hint
    with pytest.raises(UserError, match="unknown device 'cuda:5'"):
        runtime.choose_device("cuda:5", local_rank=1)


def test_cpu_is_the_fallback(monkeypatch):
    """Without CUDA and MPS, with the reason; a device that is missing or unknown is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    decision = runtime.choose_device("auto")
    assert decision.value == torch.device("cpu") and "no CUDA" in decision.reason
    with pytest.raises(UserError, match="unknown device 'mps'"):
        runtime.choose_device("mps")
    with pytest.raises(UserError, match="unknown device 'meta'"):
        runtime.choose_device("meta")


def test_compile_is_on_with_cuda_and_triton(gpus, monkeypatch):
    """auto is off on a CPU and without Triton; an explicit flag overrides it."""
    assert not runtime.choose_compile("auto", torch.device("cpu")).value
    assert runtime.choose_compile("on", torch.device("cpu")).value
    gpus()
    for installed in (True, False):
        monkeypatch.setattr(runtime, "find_spec", lambda name, found=installed: found or None)
        assert runtime.choose_compile("auto", CUDA).value is installed
        assert not runtime.choose_compile("off", CUDA).value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_known_gpus_are_those_of_their_data_sheets(gpus, name, expected):
    """For other GPUs there is no guess, so no MFU is shown."""
    gpus(name=name)
    assert runtime.peak_flops(CUDA) == expected


def test_peak_memory_is_that_of_the_process():
    """In a new process, filling and freeing 256 MB raises it by that much."""
    code = (
        "import torch; from utils.runtime import peak_memory_bytes as peak; cpu = torch.device('cpu'); "
        "before = peak(cpu); torch.ones(1 << 26); print((peak(cpu) - before) / 1e6)"
    )
    assert 200 < float(run("-c", code, cwd=ROOT).stdout) < 400
