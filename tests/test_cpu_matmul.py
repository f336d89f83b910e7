"""Matmuls by oneDNN or in parts compute what nn.Linear does, and are used only where they are faster."""

from __future__ import annotations

import pytest
import torch

from gpt_model import GPT
from tests.conftest import tiny_config, tiny_model
from utils import cpu_matmul, runtime
from utils.cpu_matmul import FEW_ROWS, FastLinear, use_fast_linear
from utils.runtime import choose_matmul

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
SHAPES = [(1, 1, 24), (2, 24), (FEW_ROWS, 1, 24), (2, 2, 24), (FEW_ROWS + 1, 24), (3, 5, 24), (24,), (0, 24)]


def twins(out_features: int, bias: bool) -> tuple[FastLinear, torch.nn.Linear]:
    """Our layer and PyTorch's with the same weights."""
    torch.manual_seed(0)
    ours, reference = FastLinear(24, out_features, bias=bias), torch.nn.Linear(24, out_features, bias=bias)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["PyTorch's", "oneDNN"])
def onednn(request, monkeypatch) -> bool:
    """Runs a test as on a processor where MKL is faster, and as on one where oneDNN is."""
    monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [3, 48, 57])
def test_values_equal_those_of_a_linear_layer(out_features, bias, onednn):
    """To rounding, for any shape and uneven parts, without gradients and under autocast."""
    layer, reference = twins(out_features, bias)
    for shape in SHAPES:
        x = torch.randn(shape)
        with torch.no_grad():
            found, expected = layer(x), reference(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                low = layer(x)
                assert low.dtype == reference(x).dtype
                torch.testing.assert_close(low.float(), expected, rtol=0, atol=0.02)  # 8 bits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "input", "weight"])
def test_gradients_equal_those_of_a_linear_layer(frozen, bias, onednn):
    """Of input, weight and bias: to rounding by oneDNN, bit for bit otherwise; none for frozen tensors."""
    layer, reference = twins(57, bias)
    for shape in SHAPES:
        gradients = []
        for module in (layer, reference):
            torch.manual_seed(1)
            x = torch.randn(shape, requires_grad=frozen != "input")
            module.weight.requires_grad_(frozen != "weight")
            module.zero_grad(set_to_none=True)
            y = module(x)
            (y * torch.randn(y.shape)).sum().backward()
            gradients.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
        for found, expected in zip(*gradients):
            assert (found is None) == (expected is None)
            if found is not None and onednn:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            elif found is not None:
                assert torch.equal(found, expected)


def test_inputs_of_any_strides_are_accepted(onednn):
    """An expanded row or column, a slice, a transpose: values and gradients equal those of a copy."""
    layer, _ = twins(57, bias=True)
    rows = torch.randn(10, 3, 24)
    views = [rows[:1, 0].expand(10, 24), rows[:, 0, :1].expand(10, 24), rows[:, 1], torch.randn(24, 10).t()]
    for view in views:
        results = []
        for x in (view, view.contiguous()):
            layer.zero_grad(set_to_none=True)
            y = layer(x)
            y.sum().backward()  # its gradient is one expanded number
            results.append([y.detach(), layer.weight.grad, layer.bias.grad])
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_computes_per_example_gradients(onednn):
    """grad, and vmap over examples."""
    layer, reference = twins(57, bias=True)
    x = torch.randn(10, 3, 24)
    results = []
    for module in (layer, reference):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters, x, module=module):
            return torch.func.functional_call(module, parameters, (x,)).tanh().sum()

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
        assert results[-1]["weight"].shape == (10, 57, 24)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_model_can_be_traced(onednn):
    """torch.jit.trace records PyTorch's own linear layer."""
    layer, reference = twins(57, bias=True)
    x = torch.randn(10, 24)
    assert torch.equal(torch.jit.trace(layer, x)(x), reference(x))


def test_second_derivatives_are_right(onednn):
    """Gradients can be differentiated again, as Hessian-vector products need."""
    layer, reference = twins(57, bias=True)
    x = torch.randn(10, 24)
    results = []
    for module in (layer, reference):
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(module(x).tanh().square().sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters))
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("M", [2, 40])
def test_add_matmul_adds_to_its_first_argument(M, onednn):
    """total + a @ b, whatever the strides of a and b."""
    torch.manual_seed(0)
    a, b, start = torch.randn(7, M).t(), torch.randn(7, 11), torch.randn(M, 11)
    for total in (cpu_matmul.zeros_for_add_matmul(M, 11, like=b), torch.zeros(M, 11)):
        total.add_(start)
        cpu_matmul.add_matmul(total, a, b)
        assert (total - (start + a @ b)).abs().max() < 1e-5


@needs_onednn
def test_onednn_is_used_only_where_it_is_faster(monkeypatch):
    """Not in another dtype, under autocast, with PyTorch's switch off, or where MKL is as fast."""
    model, float32, float64 = tiny_model(), torch.randn(8, 8), torch.randn(8, 8, dtype=torch.float64)
    for module in (cpu_matmul, runtime):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: True)
    assert cpu_matmul.onednn_is_faster(float32, float32) and "oneDNN" in choose_matmul(model)
    assert not cpu_matmul.onednn_is_faster(float64, float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_matmul.onednn_is_faster(float32, float32)
    torch.backends.mkldnn.enabled = False
    try:
        assert not cpu_matmul.onednn_is_faster(float32, float32)
        assert "oneDNN" not in choose_matmul(model)
    finally:
        torch.backends.mkldnn.enabled = True
    for module in (cpu_matmul, runtime):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    assert not cpu_matmul.onednn_is_faster(float32, float32) and "oneDNN" not in choose_matmul(model)


@needs_onednn
@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_mkl_is_slow_on_amd_with_avx512(maker, capability, expected, monkeypatch):
    """By the vendor in /proc/cpuinfo and PyTorch's CPU capability, if PyTorch has MKL."""
    monkeypatch.setattr(cpu_matmul, "cpu_info", lambda: f"vendor_id : {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_matmul.mkl_is_slow.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert cpu_matmul.mkl_is_slow.__wrapped__() is False


@needs_mkl
def test_few_rows_use_the_batched_matmul(monkeypatch):
    """In every layer up to FEW_ROWS sequences, and in none for one more."""
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(a) or bmm(*a))
    model = tiny_model()
    use_fast_linear(model)
    for rows, expected in ((1, 9), (FEW_ROWS, 9), (FEW_ROWS + 1, 0)):
        calls.clear()
        with torch.no_grad():
            model(torch.zeros(rows, 1, dtype=torch.int64))
        assert len(calls) == expected  # four in each of two blocks, and the output layer


@needs_onednn
def test_every_matmul_of_a_training_step_uses_onednn(monkeypatch):
    """Forward and backward: three matmuls in each of nine linear layers, the output layer among them."""
    monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: True)
    model = tiny_model().train()
    use_fast_linear(model)
    idx, targets = torch.randint(97, (2, 4, 16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(idx, targets, return_logits=False)[1].backward()
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["mkldnn::_linear_pointwise"] == 3 * 9
    assert not {"aten::addmm", "aten::mm", "aten::linear"} & set(count)


def test_exchanging_the_layers_changes_nothing_else():
    """Names, parameter objects (the tied ones too) and the state dict remain; every linear layer is fast."""
    model = tiny_model()
    modules = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_fast_linear(model)
    assert [name for name, _ in model.named_modules()] == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in after)
    assert model.transformer.wte.weight is model.lm_head.weight
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 9 and {type(module) for module in linear} == {FastLinear}


def test_the_model_itself_contains_plain_linear_layers_only():
    """gpt_model.py knows no GEMM backend, and on a GPU nothing is exchanged."""
    model = GPT(tiny_config())
    types = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert types == {torch.nn.Linear}
    with torch.device("meta"):
        elsewhere = GPT(tiny_config())
    assert choose_matmul(elsewhere) == "matmuls by PyTorch"
    assert type(elsewhere.lm_head) is torch.nn.Linear
