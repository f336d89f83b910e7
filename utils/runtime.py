"""Device, dtype, compile and determinism: each decision with its reason in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.errors import UserError

OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # renamed in torch 2.5

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16 peaks in FLOP/s by the vendors' data sheets (fp16 for the T4). The PCIe and NVL boards are
# slower, so unknown.
PEAK_FLOPS = {
    r"H[12]00(?!.*(PCIe|NVL))": 989e12,
    r"A100": 312e12,
    r"L4$": 121e12,
    r"RTX 4090$": 165e12,
    r"T4$": 65e12,
}


class Decision(NamedTuple):
    """What was chosen, and why, in words for the console."""

    value: Any
    reason: str


def choose_device(requested: str, local_rank: int = 0) -> Decision:
    """The torch.device for this process.

    Args:
        requested: "auto", "cpu", "cuda", "cuda:N" or "mps".
        local_rank: number of this process on its machine; picks the GPU where only "cuda" or "auto" is asked.

    Raises:
        UserError: the device does not exist here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if requested == "auto":
        if num_gpus:
            requested, reason = "cuda", f"{num_gpus} CUDA device(s) found"
        else:
            requested, reason = ("mps", "no CUDA, but MPS") if has_mps else ("cpu", "no CUDA device found")
    else:
        reason = "as asked"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UserError(
            f"unknown device {requested!r} (expected {_devices_here()})", "--device auto picks one"
        ) from error
    if device.type == "cuda":
        if not num_gpus:
            raise UserError(
                f"device {requested!r} asked but torch {torch.__version__} has no CUDA", "use --device cpu"
            )
        index = local_rank if device.index is None else device.index
        if index >= num_gpus and device.index is not None:
            raise UserError(
                f"device {requested!r} does not exist (found {_devices_here()})", "--device auto picks one"
            )
        if index >= num_gpus:
            raise UserError(
                f"process {index} of this machine has no GPU of its own (found {_devices_here()})",
                f"start at most {num_gpus} processes: torchrun --nproc_per_node={num_gpus}",
                one_rank_only=True,
            )
        device = torch.device("cuda", index)
    elif device.type == "mps" and not has_mps:
        raise UserError(
            f"device 'mps' asked but this machine has none (found {_devices_here()})", "use --device cpu"
        )
    elif device.type not in ("cpu", "mps"):
        raise UserError(
            f"unknown device {requested!r} (expected {_devices_here()})", "--device auto picks one"
        )
    return Decision(device, reason)


def _devices_here() -> str:
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ", ".join(["cpu", *names, *(["mps"] if torch.backends.mps.is_available() else [])])


def choose_dtype(requested: str, device: torch.device) -> Decision:
    """The dtype of matrix products under autocast.

    Args:
        requested: "auto", "float32", "bfloat16" or "float16".
        device: chosen before.

    Raises:
        UserError: the device lacks a dtype that was asked for by name.
    """
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() also says yes where bf16 is only emulated (T4), hence the capability.
        capability = torch.cuda.get_device_capability(device)
        native_bf16, words = capability >= (8, 0), f"compute capability {capability[0]}.{capability[1]}"
        automatic = torch.bfloat16 if native_bf16 else torch.float16
        words += " computes bf16 natively" if native_bf16 else " has no native bf16"
    else:
        native_bf16 = device.type == "cpu" and cpu_computes_bf16()
        automatic = torch.bfloat16 if native_bf16 else torch.float32
        words = (
            f"this {device.type.upper()} {'computes' if native_bf16 else 'does not compute'} bf16 natively"
        )
    if requested == "auto":
        return Decision(automatic, words)
    dtype = DTYPES[requested]
    if dtype == torch.bfloat16 and device.type == "cuda" and not native_bf16:
        raise UserError(
            f"--dtype bfloat16 asked, but {words} (needs 8.0)", "use --dtype float16 or --dtype auto"
        )
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError(
            f"--dtype float16 asked on {device.type} (needs CUDA: it must scale the loss)",
            "use --dtype auto or float32",
        )
    return Decision(dtype, "as asked")


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX tiles); avx512_bf16 alone is no faster than
    fp32.
    """
    try:
        return "amx_bf16" in open("/proc/cpuinfo", encoding="utf-8").read()
    except OSError:
        return False


def autocast(device: torch.device, dtype: torch.dtype):
    """The context in which forward passes run: autocast to `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def make_scaler(device: torch.device, dtype: torch.dtype):
    """Scales the loss where gradients would underflow (fp16), and passes everything through where not.

    Overflows need no agreement between ranks: the gradients it looks at have been summed over all of them.
    """
    enabled = dtype == torch.float16
    if hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def choose_compile(requested: str, device: torch.device) -> Decision:
    """Whether to use torch.compile. `requested` is "auto", "on" or "off"."""
    if requested == "off":
        return Decision(False, "--no-compile")
    if requested == "on":
        return Decision(True, "--compile")
    if device.type != "cuda":
        return Decision(False, f"auto: pays on CUDA, not on {device.type}")
    try:
        import triton  # noqa: F401
    except ImportError:
        return Decision(False, "auto: Triton is not installed")
    if torch.cuda.get_device_capability(device) < (7, 0):
        return Decision(False, "auto: Triton needs compute capability 7.0")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return Decision(False, "auto: Triton needs a C compiler (gcc or clang)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return Decision(False, "auto: Triton needs Python.h (the package python3-dev)")
    return Decision(True, "auto: CUDA with Triton")


def keep_freed_memory() -> None:
    """Lets this process reuse the pages of freed tensors instead of giving them back after every one.

    glibc maps each large block anew and unmaps it when it is freed; on a CPU the page faults of that cost a
    third of a small model's step. Elsewhere than on Linux with glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)


def set_numerics(seed: int, deterministic: bool) -> str:
    """Seeds, TF32 and determinism for the whole process. Returns what to tell the user."""
    torch.manual_seed(seed)
    # TF32 for fp32 products on CUDA: 10 bits of mantissa, 8x the speed.
    torch.set_float32_matmul_precision("high")
    if not deterministic:
        return "TF32 matrix products on where the device has them"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return "TF32 matrix products on where the device has them; deterministic algorithms only"


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        for line in open("/proc/cpuinfo", encoding="utf-8"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def peak_flops(device: torch.device, num_devices: int = 1) -> float | None:
    """Dense half-precision peak in FLOP/s of so many GPUs of a known kind; None for others: no guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b{pattern}", name)]
    return peaks[0] * num_devices if peaks else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated by tensors on CUDA, resident in the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, whose getrusage also counts the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
