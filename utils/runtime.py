"""Device, dtype, compile, GEMM backend and determinism: each decision with its reason for the console."""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.command_line import UserError, format_count, format_duration, shown
from utils.cpu_matmul import cpu_info, mkl_is_slow, use_fast_linear

MINIMUM_TORCH = (2, 10)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 peaks in FLOP/s with fp32 accumulation, by the vendors' data sheets (fp16 for V100 and T4). The
# first pattern that matches counts: boards that are slower than the usual one come before it.
PEAK_FLOPS = {
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"H100.*PCIe": 756e12,
    r"H[12]00.*NVL": 835e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"A10G": 70e12,
    r"L40S": 362e12,
    r"L4$": 121e12,
    r"V100.*PCIE": 112e12,
    r"V100": 125e12,
    r"T4$": 65e12,
    r"RTX 5090$": 209e12,
    r"RTX 4090$": 165e12,
    r"RTX 4080$": 97e12,
    r"RTX 3090$": 71e12,
}

# On one H200 compiling GPT-2 124M took 23 to 24 s, and compiled updates took 27 % less time than eager ones.
COMPILE_SECONDS, COMPILE_SAVING = 30, 0.25


class Decision(NamedTuple):
    """What was chosen, and the reason as text for the console."""

    value: Any
    reason: str


def check_torch_version() -> None:
    """Raises UserError below the oldest supported PyTorch.

    Older versions can run code from a file that `weights_only=True` should make safe (CVE-2025-32434,
    CVE-2026-24747).
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        what = f"torch {torch.__version__} is too old (expected {needed} or newer)"
        raise UserError(what, f"pip install -U 'torch>={needed}'")


def check_thread_count() -> None:
    """Raises UserError for an OMP_NUM_THREADS that OpenMP would ignore, which is a line of libgomp only."""
    text = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*0*[1-9]\d{0,5}(\s*,\s*0*[1-9]\d{0,5})*\s*", text):
        what = f"environment variable OMP_NUM_THREADS={shown(text)} (expected a number of threads)"
        raise UserError(what, "correct it, or remove it: unset OMP_NUM_THREADS", one_rank_only=True)


def choose_device(requested: str, local_rank: int = 0) -> Decision:
    """The torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps".

    `local_rank` selects the GPU for "auto" and "cuda". Raises UserError if it is missing, or for old torch.
    """
    check_torch_version()
    check_thread_count()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    devices = ["cpu", *(f"cuda:{i}" for i in range(num_gpus)), *(["mps"] if has_mps else [])]
    found = ", ".join(devices)
    reason = "as requested"
    if requested == "auto":
        requested = "cuda" if num_gpus else "mps" if has_mps else "cpu"
        reasons = {"cuda": f"{format_count(num_gpus, 'CUDA device')} found", "mps": "no CUDA, but MPS"}
        reason = reasons.get(requested, "no CUDA device found")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")  # refused below, like every name that is not in `devices`
    if device.type == "cuda" and not num_gpus:
        what = f"device {requested!r} requested, but torch {torch.__version__} has no CUDA"
        raise UserError(what, "use --device cpu")
    if device.type == "cuda" and device.index is None:
        if local_rank >= num_gpus:
            what = f"process {local_rank} of this machine has no GPU of its own (found {found})"
            hint = f"start at most {num_gpus} processes: torchrun --nproc_per_node={num_gpus}"
            raise UserError(what, hint, one_rank_only=True)
        device = torch.device("cuda", local_rank)
    name = str(device) if device.type == "cuda" else device.type
    if name not in devices:
        raise UserError(f"unknown device {requested!r} (expected one of {found})", "--device auto picks one")
    return Decision(device, reason)


def choose_dtype(requested: str, device: torch.device) -> Decision:
    """The dtype of autocast for "auto" or a key of DTYPES. Raises UserError if it is not available here."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() also says yes where bf16 is only emulated (T4), hence the capability.
        capability = torch.cuda.get_device_capability(device)
        native_bf16, name = capability >= (8, 0), f"compute capability {capability[0]}.{capability[1]}"
        automatic = torch.bfloat16 if native_bf16 else torch.float16
    else:
        # AMX computes bf16 in tiles; avx512_bf16 alone is no faster than float32.
        native_bf16 = device.type == "cpu" and "amx_bf16" in cpu_info()
        name = f"this {device.type.upper()}"
        automatic = torch.bfloat16 if native_bf16 else torch.float32
    reason = f"{name} {'computes' if native_bf16 else 'does not compute'} bf16 natively"
    if requested == "auto":
        return Decision(automatic, reason)
    dtype = DTYPES[requested]
    if dtype == torch.bfloat16 and device.type == "cuda" and not native_bf16:
        what = f"--dtype bfloat16 requested, but {reason} (needs 8.0)"
        raise UserError(what, "use --dtype float16 or --dtype auto")
    if dtype == torch.float16 and device.type != "cuda":
        what = f"--dtype float16 requested on {device.type} (needs CUDA: it must scale the loss)"
        raise UserError(what, "use --dtype auto or float32")
    return Decision(dtype, "as requested")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context of a forward pass: autocast to `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches a model's dropout off for a block, and then back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling for fp16, whose gradients would underflow; without effect for other dtypes.

    Ranks need not agree on overflows: the gradients it inspects have been summed over all of them.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def choose_matmul(model: nn.Module) -> str:
    """On a CPU, exchanges the model's linear layers for faster ones; returns the GEMM backend as text."""
    if model.lm_head.weight.device.type != "cpu":
        return "matmuls by PyTorch"
    use_fast_linear(model)
    if mkl_is_slow() and torch.backends.mkldnn.enabled:
        return "float32 matmuls by oneDNN (MKL does not use AVX-512 on AMD)"
    return "matmuls by PyTorch, a few rows split over all threads"


def choose_compile(
    requested: str, device: torch.device, *, deterministic: bool, eager_seconds: Callable[[], float]
) -> Decision:
    """Whether to use torch.compile: if "auto", where it saves more time than it takes.

    Args:
        requested: "auto", "on" or "off".
        eager_seconds: estimates the time of all updates without it, infinite if memory does not suffice;
            called only if that decides.

    Raises:
        UserError: "on" with `deterministic` on CUDA.
    """
    if deterministic and device.type == "cuda":
        reason = "compiled kernels are not proven to give the same bits in every run"
        if requested == "on":
            raise UserError(f"--compile with --deterministic: {reason}", "leave one of the two out")
        return Decision(False, f"--deterministic: {reason}")
    if requested != "auto":
        return Decision(requested == "on", "as requested")
    if device.type != "cuda":
        return Decision(False, f"auto: pays on CUDA, not on {device.type}")
    triton = find_triton(device)
    if not triton.value:
        return Decision(False, f"auto: {triton.reason}")
    seconds = eager_seconds()
    if math.isinf(seconds):
        return Decision(True, "auto: a micro-batch fits the memory only with it, if at all")
    saved, total = format_duration(COMPILE_SAVING * seconds), format_duration(seconds)
    reason = f"auto: about {saved} of {total} saved, {COMPILE_SECONDS}s spent"
    return Decision(COMPILE_SAVING * seconds > COMPILE_SECONDS, reason)


def find_triton(device: torch.device) -> Decision:
    """Whether Triton is installed and can compile kernels for a CUDA device."""
    if find_spec("triton") is None:
        return Decision(False, "Triton is not installed")
    if torch.cuda.get_device_capability(device) < (7, 0):
        return Decision(False, "Triton needs compute capability 7.0")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return Decision(False, "Triton needs a C compiler (gcc or clang)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return Decision(False, "Triton needs Python.h (the package python3-dev)")
    return Decision(True, "CUDA with Triton")


def keep_freed_memory() -> None:
    """Makes malloc keep the pages of freed tensors for the next ones. Without glibc this does nothing.

    By default glibc maps each large block anew and unmaps it when it is freed; on a CPU those page faults
    cost a third of a small model's step.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def set_numerics(seed: int, *, deterministic: bool) -> str:
    """Sets seed, TF32 and determinism for the whole process; returns a description for the console."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA: 10 bits of mantissa, 8x the speed on an A100
    description = "TF32 matmuls on where the device has them"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        description += "; deterministic algorithms only"
    return description


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS)"
    found = re.search(r"^model name\s*:(.*)", cpu_info(), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, num_devices: int = 1) -> float | None:
    """Dense half-precision peak in FLOP/s of `num_devices` GPUs; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b{pattern}", name)]
    return peaks[0] * num_devices if peaks else None


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the device; for a CPU that of the machine or of its container. None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, not Linux, or "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: of its tensors on CUDA, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux: its getrusage would include the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
