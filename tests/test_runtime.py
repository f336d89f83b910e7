"""Decisions about device, dtype and compile, with devices that this machine need not have."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ROOT, run
from utils import runtime
from utils.errors import UserError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are two GPUs of a capability."""

    def pretend(capability=(9, 0), name="NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_bf16_only_where_the_gpu_computes_it(gpus, capability, expected):
    """A T4 (7.5) emulates bf16 and says it supports it: the capability decides and is named."""
    gpus(capability)
    decision = runtime.choose_dtype("auto", CUDA)
    assert decision.value == expected
    assert f"{capability[0]}.{capability[1]}" in decision.reason


def test_a_dtype_that_the_device_lacks_is_an_error(gpus):
    """Asked by name, it is not replaced silently."""
    gpus((7, 5))
    with pytest.raises(UserError, match="bfloat16"):
        runtime.choose_dtype("bfloat16", CUDA)
    with pytest.raises(UserError, match="float16"):
        runtime.choose_dtype("float16", torch.device("cpu"))


def test_each_process_has_a_gpu_of_its_own(gpus):
    """The local rank picks the GPU; one process too many is told how many fit."""
    gpus()
    assert runtime.choose_device("auto", local_rank=1).value == torch.device("cuda", 1)
    assert runtime.choose_device("cuda:0").value == torch.device("cuda", 0)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU") as caught:
        runtime.choose_device("cuda", local_rank=2)
    assert "--nproc_per_node=2" in caught.value.hint
    with pytest.raises(UserError, match="device 'cuda:5' does not exist"):
        runtime.choose_device("cuda:5", local_rank=1)


def test_cpu_is_the_fallback_and_says_why(monkeypatch):
    """Without CUDA and MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    decision = runtime.choose_device("auto")
    assert decision.value == torch.device("cpu") and "no CUDA" in decision.reason
    with pytest.raises(UserError, match="'mps' asked"):
        runtime.choose_device("mps")
    with pytest.raises(UserError, match="unknown device 'meta'"):
        runtime.choose_device("meta")


def test_compile_is_on_where_it_pays(gpus, monkeypatch):
    """auto is off on a CPU and without Triton, each with its reason; a flag beats it."""
    import builtins

    assert not runtime.choose_compile("auto", torch.device("cpu")).value
    assert runtime.choose_compile("on", torch.device("cpu")).value
    gpus()
    real_import = builtins.__import__
    for installed in (True, False):

        def fake_import(name, *args, installed=installed, **kwargs):
            if name == "triton":
                if installed:
                    return None
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake_import)
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
def test_peaks_of_known_gpus_and_no_guess_for_others(gpus, name, expected):
    """MFU is shown against the data sheet or not at all."""
    gpus(name=name)
    assert runtime.peak_flops(CUDA) == expected


def test_peak_memory_is_that_of_the_process():
    """256 MB that are filled and freed again raise it by that much, in a process of their own."""
    code = (
        "import torch; from utils.runtime import peak_memory_bytes as peak; cpu = torch.device('cpu'); "
        "before = peak(cpu); torch.ones(1 << 26); print((peak(cpu) - before) / 1e6)"
    )
    assert 200 < float(run("-c", code, cwd=ROOT).stdout) < 400
