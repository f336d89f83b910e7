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


@pytest.mark.parametrize("text", ["abc", "", "0", "-1", "1.5", "2,x", "9" * 30])
def test_a_number_of_threads_that_openmp_ignores_is_an_error(text, monkeypatch):
    """libgomp says so in a line of its own and uses all processors; a list of numbers is valid."""
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match=f"environment variable OMP_NUM_THREADS='{text}'"):
        runtime.choose_device("cpu")
    for valid in ("4", " 2 ", "4,2,1"):
        monkeypatch.setenv("OMP_NUM_THREADS", valid)
        assert runtime.choose_device("cpu").value.type == "cpu"


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


def compile_decision(
    requested: str, device: torch.device = CUDA, *, seconds: float = 1000.0, deterministic: bool = False
) -> runtime.Decision:
    """`choose_compile` for a run whose eager updates would take so many seconds."""
    return runtime.choose_compile(
        requested, device, deterministic=deterministic, eager_seconds=lambda: seconds
    )


def test_compile_is_on_where_a_long_run_has_cuda_and_triton(gpus, monkeypatch):
    """auto is off on a CPU and without Triton; a flag overrides it, and then nothing is measured."""
    cpu = torch.device("cpu")
    assert not compile_decision("auto", cpu).value
    assert compile_decision("on", cpu).value
    gpus()
    for installed in (True, False):
        monkeypatch.setattr(runtime, "find_spec", lambda name, found=installed: found or None)
        assert compile_decision("auto").value is installed
        assert not compile_decision("off").value and compile_decision("on").value
    never = dict(deterministic=False, eager_seconds=lambda: pytest.fail("measured without need"))
    for requested, device in (("on", CUDA), ("off", CUDA), ("auto", cpu), ("auto", CUDA)):
        runtime.choose_compile(requested, device, **never)


@pytest.mark.parametrize(("seconds", "expected"), [(40.0, False), (119.0, False), (121.0, True), (9e4, True)])
def test_auto_compiles_where_it_saves_more_time_than_it_takes(gpus, monkeypatch, seconds, expected):
    """A quarter of the eager updates' time against 30 s; the reason has both sides of the estimate."""
    gpus()
    monkeypatch.setattr(runtime, "find_spec", lambda name: True)
    decision = compile_decision("auto", seconds=seconds)
    assert decision.value is expected
    saved, total = runtime.format_duration(seconds / 4), runtime.format_duration(seconds)
    assert decision.reason == f"auto: about {saved} of {total} saved, 30s spent"


def test_auto_compiles_where_eager_training_does_not_fit(gpus, monkeypatch):
    """An infinite estimate is no duration: the reason says that memory decides."""
    gpus()
    monkeypatch.setattr(runtime, "find_spec", lambda name: True)
    decision = compile_decision("auto", seconds=float("inf"))
    assert decision.value and "fits the memory only with it" in decision.reason


def test_a_deterministic_run_on_cuda_is_not_compiled(gpus, monkeypatch):
    """auto says why, an explicit --compile is refused; on a CPU both are allowed together."""
    gpus()
    monkeypatch.setattr(runtime, "find_spec", lambda name: True)
    decision = compile_decision("auto", deterministic=True)
    assert not decision.value and decision.reason.startswith("--deterministic: ")
    with pytest.raises(UserError, match="--compile with --deterministic") as caught:
        compile_decision("on", deterministic=True)
    assert caught.value.hint == "leave one of the two out"
    assert compile_decision("on", torch.device("cpu"), deterministic=True).value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 5090", 209e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4080", 97e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
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
