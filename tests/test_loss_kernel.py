"""The Triton kernel of the loss, without a GPU: interpreted against PyTorch, and compiled for two GPUs.

Triton decides when it is imported whether it interprets kernels, so they run in a process of their own.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import run
from utils import loss_kernel
from utils.loss_kernel import choose_kernel, logits_to_gradient_
from utils.runtime import Decision

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bounds of the relative norm: gradients are computed in float32 and converted once, to 8 or 11 bits. Triton's
# interpreter truncates to bf16; a GPU rounds.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7.5, torch.float16: 2**-11}

# Adds to every case of the file the result of the kernel, or of the loss with the kernel.
RUN_CASES = """
import sys, torch
from gpt_model import GPT
from tests.conftest import tiny_config
from utils import fused_loss
from utils.loss_kernel import logits_to_gradient_

def kernel(case):
    case["losses"] = logits_to_gradient_(case["logits"], case["targets"], -100, case["max_block"])

def loss(case):
    inputs, dtype = (case["hidden"], case["weight"], case["targets"]), case["dtype"]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        result = fused_loss.fused_cross_entropy(*inputs, chunk_rows=case["chunk_rows"])
        (0.25 * result).backward()
        with torch.no_grad():
            case["evaluated"] = fused_loss.fused_cross_entropy(*inputs, chunk_rows=case["chunk_rows"])
    case.update(loss=result.detach(), gradients=[tensor.grad for tensor in inputs[:2]])

def compiled(case):
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = GPT(tiny_config())
        forward = torch.compile(model, backend="aot_eager") if name == "compiled" else model
        for _ in range(2):  # accumulated
            idx, targets = torch.randint(0, 97, (2, 4, 16))
            forward(idx, targets, return_logits=False)[1].backward()
        case[name] = [parameter.grad for parameter in model.parameters()]

calls = []
def counted(*arguments):
    calls.append(arguments)
    return logits_to_gradient_(*arguments)
fused_loss.logits_to_gradient_ = counted

cases = torch.load(sys.argv[1])
for name, case in cases.items():
    calls.clear()
    globals()[name.split()[0]](case)
    case["num_calls"] = len(calls)
torch.save(cases, sys.argv[1])
"""


def kernel_case(
    num_ignored: int = 0,
    V: int = 1000,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    **changes: Any,
) -> dict[str, Any]:
    """Input of the kernel: 9 rows of logits inside of a larger, strided buffer."""
    torch.manual_seed(0)
    buffer = (scale * torch.randn(9, V + 10)).to(dtype)
    targets = torch.randint(0, V, (9,))
    targets[0] = V - 1
    targets[:num_ignored] = -100
    return {"buffer": buffer, "logits": buffer[:, 3 : V + 3], "targets": targets, "max_block": 64, **changes}


def loss_case(chunk_rows: int | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Input of the loss: sizes that are not multiples of any chunk size, and five ignored rows."""
    torch.manual_seed(0)
    hidden, weight = 0.5 * torch.randn(37, 24), 0.5 * torch.randn(203, 24)
    targets = torch.randint(0, 190, (37,))  # as in a padded vocabulary, some tokens are never a target
    targets[5:10] = -100
    inputs = dict(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), targets=targets)
    return {**inputs, "chunk_rows": chunk_rows, "dtype": dtype}


def all_cases() -> dict[str, dict[str, Any]]:
    """The inputs by name; the first word of a name is the function that runs it."""
    cases = {f"kernel {name}": kernel_case(2, dtype=dtype) for name, dtype in DTYPES.items()}
    cases |= {f"kernel odd V {name}": kernel_case(2, V=1001, dtype=dtype) for name, dtype in DTYPES.items()}
    cases["kernel one block"] = kernel_case(V=97, max_block=loss_kernel.MAX_BLOCK)
    cases["kernel all ignored"] = kernel_case(9)
    cases["kernel large logits"] = kernel_case(scale=1e4)
    cases["kernel shifted"] = kernel_case()
    cases["kernel shifted"]["buffer"] += 1e4  # neighbouring float32 numbers differ by 1e-3 there
    cases["kernel -inf"] = kernel_case()
    cases["kernel -inf"]["logits"][:, 0:64] = -torch.inf
    cases["kernel -inf"]["targets"].fill_(64)
    cases["kernel strided targets"] = kernel_case(targets=torch.arange(18)[::2])
    cases["kernel invalid"] = kernel_case(
        targets=torch.tensor([1000, -1, 2**31, -(2**31), 0, 0, -100, -100, 0])
    )
    cases["kernel invalid"]["logits"][4, 7] = torch.nan
    cases["kernel invalid"]["logits"][5, 70] = torch.inf
    cases["kernel invalid"]["logits"][6] = torch.nan
    cases |= {f"loss {rows}": loss_case(rows) for rows in (1, 8, 37, None)}
    cases |= {f"loss {name}": loss_case(8, DTYPES[name]) for name in ("bfloat16", "float16")}
    return cases | {"compiled": {}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases with their results, from one process whose Triton interprets kernels."""
    path = tmp_path_factory.mktemp("kernel") / "cases.pt"
    torch.save(all_cases(), path)
    process = run("-c", RUN_CASES, path, TRITON_INTERPRET="1")
    assert process.returncode == 0, process.stderr
    return torch.load(path)


def reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of all rows, and the gradient of their sum, in float64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of the expected tensor."""
    return ((ours.double() - expected).norm() / expected.norm()).item()


@needs_triton
@pytest.mark.parametrize("name", [name for name in all_cases() if re.match("kernel (?!all|inv)", name)])
def test_losses_and_gradients_are_those_of_pytorch(results, name):
    """Exact to one rounding: three dtypes, odd V, partial blocks, ignored rows, large and infinite logits."""
    before, after = all_cases()[name], results[name]
    losses, gradient = reference(before["logits"], before["targets"])
    assert after["losses"].dtype == torch.float32
    assert torch.allclose(after["losses"].double(), losses, rtol=1e-6, atol=2e-6)
    assert relative_error(after["logits"], gradient) < ROUNDING[after["logits"].dtype]
    ignored = before["targets"] == -100
    assert not after["losses"][ignored].any() and not after["logits"][ignored].any()


@needs_triton
@pytest.mark.parametrize("name", ["kernel float32", "kernel odd V bfloat16", "kernel one block"])
def test_memory_beside_the_logits_is_not_written(results, name):
    """The columns left and right of a strided chunk are unchanged."""
    before, after = all_cases()[name], results[name]
    V = before["logits"].size(1)
    assert torch.equal(after["buffer"][:, :3], before["buffer"][:, :3])
    assert torch.equal(after["buffer"][:, V + 3 :], before["buffer"][:, V + 3 :])


@needs_triton
def test_all_rows_ignored_gives_zeros(results):
    """Losses and gradients are zero, not NaN."""
    case = results["kernel all ignored"]
    assert not case["losses"].any() and not case["logits"].any()


@needs_triton
def test_invalid_targets_and_non_finite_logits_give_nan(results):
    """The training loop stops on a loss of NaN. An ignored row stays zero, a valid one finite."""
    case = results["kernel invalid"]
    assert torch.isnan(case["losses"]).tolist() == [True] * 6 + [False] * 3
    assert not case["losses"][6:8].any() and not case["logits"][6:8].any()
    assert case["losses"][8] > 0 and torch.isfinite(case["logits"][8]).all()


@needs_triton
@pytest.mark.parametrize("name", [name for name in all_cases() if name.startswith("loss")])
def test_the_loss_with_the_kernel_equals_full_logits(results, name):
    """Loss and both gradients, to 1e-5 in float32 and to the dtype's rounding under autocast."""
    case, before = results[name], all_cases()[name]
    inputs = before["hidden"], before["weight"]
    expected = F.cross_entropy(inputs[0] @ inputs[1].t(), before["targets"])
    gradients = torch.autograd.grad(0.25 * expected, inputs)
    loss_tolerance, tolerance = {"bfloat16": (1e-2, 1e-2), "float16": (1e-3, 2e-3)}.get(
        name.split()[1], (1e-5, 1e-5)
    )
    assert abs(case["loss"] - expected) < loss_tolerance
    assert abs(case["evaluated"] - expected) < loss_tolerance
    for ours, theirs in zip(case["gradients"], gradients):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) < tolerance
    rows = before["chunk_rows"] or 37
    assert case["num_calls"] == 2 * -(-37 // rows)  # the kernel did run: once a chunk, trained and evaluated


@needs_triton
def test_a_compiled_model_uses_the_kernel_with_the_same_gradients(results):
    """Also accumulated over two micro-batches, and for the tied weight."""
    case = results["compiled"]
    assert case["num_calls"] == 4
    assert all(torch.equal(ours, expected) for ours, expected in zip(case["compiled"], case["eager"]))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "V"), [("bf16", 50_304), ("fp16", 50_304), ("fp32", 50_304), ("bf16", 65)])
def test_the_kernel_compiles_for_gpus(tmp_path, monkeypatch, dtype, V, capability):
    """For A100 and H100 without one: PTX whose loads and stores are of 128 bits where V is padded."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block = min(loss_kernel.MAX_BLOCK, triton.next_power_of_2(V))
    constants = {"V": V, "IGNORE_INDEX": -100, "BLOCK": block}
    signature = {"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32", "row_stride": "i32"}
    # At run time Triton notices by itself that pointers and strides are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3 if V % 16 else 4)}
    source = ASTSource(
        loss_kernel._kernel(), signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    options = {"num_warps": max(1, block // loss_kernel.BLOCK_PER_WARP), "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx and len(compiled.asm["cubin"]) > 1000
    assert "bar.sync" in ptx and ".local" not in ptx
    assert re.search(r"arith\.muli .*: i64", compiled.asm["ttir"])  # rows beyond 2**31 elements
    assert dtype == "fp32" or f"cvt.rn.{dtype.replace('fp', 'f')}" in ptx  # the gradient is rounded
    wide = [re.search(rf"{access}\.global[\w.:]*\.v4\.b32", ptx) is not None for access in ("ld", "st")]
    assert wide == [V % 16 == 0] * 2


def test_strided_rows_are_refused():
    """The kernel would read other logits than meant."""
    with pytest.raises(ValueError, match="contiguous"):
        logits_to_gradient_(torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.long), -100)


def test_the_kernel_is_chosen_on_cuda_where_triton_works(monkeypatch):
    """Not on a CPU except interpreted, not on ROCm, and not where Triton is missing; always with a reason."""
    choose, cpu, cuda = choose_kernel.__wrapped__, torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(loss_kernel, "find_spec", lambda name: None)
    assert not choose(cpu).value and "cpu" in choose(cpu).reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not choose(cpu).value
    monkeypatch.setattr(loss_kernel, "find_spec", lambda name: Path)
    assert choose(cpu).value
    assert not choose(torch.device("mps")).value
    for decision in (Decision(True, "found"), Decision(False, "Triton is not installed")):
        monkeypatch.setattr(loss_kernel, "find_triton", lambda device, found=decision: found)
        assert choose(cuda) == decision
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not choose(cuda).value and "ROCm" in choose(cuda).reason
