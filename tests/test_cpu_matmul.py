"""Matrix products by another library or in parts: the numbers of nn.Linear, and only where they pay."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import tiny_model
from utils import cpu_matmul as products
from utils.cpu_matmul import FEW_ROWS, Linear

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
needs_onednn = pytest.mark.skipif(not products.onednn_is_here(), reason="this PyTorch has no oneDNN")
SHAPES = [(1, 1, 24), (2, 24), (FEW_ROWS, 1, 24), (2, 2, 24), (FEW_ROWS + 1, 24), (3, 5, 24), (24,), (0, 24)]


def twins(out_features: int, bias: bool) -> tuple[Linear, torch.nn.Linear]:
    """Our layer and PyTorch's, of the same weights."""
    torch.manual_seed(0)
    ours, reference = Linear(24, out_features, bias=bias), torch.nn.Linear(24, out_features, bias=bias)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["PyTorch's", "oneDNN"])
def onednn(request, monkeypatch) -> bool:
    """Every test of it runs as on a processor where oneDNN is slower, and as on one where it is faster."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [3, 48, 57])
def test_values_are_those_of_a_linear_layer(out_features, bias, onednn):
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
def test_gradients_are_those_of_a_linear_layer(frozen, bias, onednn):
    """Of input, weight and bias: to rounding by oneDNN, bit for bit otherwise; none for what is frozen."""
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


def test_any_strides_will_do(onednn):
    """Rows that are one row, a column, a slice, a transpose: gradients as of a copy."""
    layer, _ = twins(57, bias=True)
    rows = torch.randn(10, 3, 24)
    views = [rows[:1, 0].expand(10, 24), rows[:, 0, :1].expand(10, 24), rows[:, 1], torch.randn(24, 10).t()]
    for view in views:
        results = []
        for x in (view, view.contiguous()):
            layer.zero_grad(set_to_none=True)
            y = layer(x)
            y.sum().backward()  # of a gradient that is one number
            results.append([y.detach(), layer.weight.grad, layer.bias.grad])
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch, "get_autocast_dtype"), reason="vmap of torch < 2.4 trips over itself")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_single_examples(onednn):
    """torch.func's grad, and its vmap over examples."""
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
    """torch.jit.trace records PyTorch's own product."""
    layer, reference = twins(57, bias=True)
    x = torch.randn(10, 24)
    assert torch.equal(torch.jit.trace(layer, x)(x), reference(x))


def test_gradients_of_gradients(onednn):
    """Second derivatives, as a Hessian's product with a vector needs them."""
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
def test_a_product_is_added(M, onednn):
    """total + a @ b, whatever the strides of a and b."""
    torch.manual_seed(0)
    a, b, start = torch.randn(7, M).t(), torch.randn(7, 11), torch.randn(M, 11)
    for total in (products.zeros_to_add_to(M, 11, like=b), torch.zeros(M, 11)):
        total.add_(start)
        products.add_product(total, a, b)
        assert (total - (start + a @ b)).abs().max() < 1e-5


@needs_onednn
def test_onednn_is_used_where_it_is_faster_and_nowhere_else(monkeypatch):
    """Not in another dtype, under autocast, where PyTorch's switch is off, or where MKL is as fast."""
    float32, float64 = torch.randn(8, 8), torch.randn(8, 8, dtype=torch.float64)
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    assert products.onednn_is_faster(float32, float32) and "oneDNN" in products.described()
    assert not products.onednn_is_faster(float64, float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.onednn_is_faster(float32, float32)
    torch.backends.mkldnn.enabled = False
    try:
        assert not products.onednn_is_faster(float32, float32) and "oneDNN" not in products.described()
    finally:
        torch.backends.mkldnn.enabled = True
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    assert not products.onednn_is_faster(float32, float32)


@needs_onednn
@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_mkl_is_slow_on_amd_with_avx512(maker, capability, expected, monkeypatch):
    """What the processor says of itself, and what PyTorch says of it."""
    monkeypatch.setattr(products.Path, "read_text", lambda self: f"vendor_id : {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.mkl_is_slow.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products.mkl_is_slow.__wrapped__() is False


@needs_mkl
def test_few_rows_take_the_other_way(monkeypatch):
    """Up to FEW_ROWS texts go through the batch of products in every layer, one more does not."""
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(a) or bmm(*a))
    model = tiny_model()
    for rows, expected in ((1, 9), (FEW_ROWS, 9), (FEW_ROWS + 1, 0)):
        calls.clear()
        with torch.no_grad():
            model(torch.zeros(rows, 1, dtype=torch.int64))
        assert len(calls) == expected  # four products in each of two layers, and the words


@needs_onednn
def test_every_product_of_a_training_step_is_onednns(monkeypatch):
    """Forward and backward: three products in each of nine layers, the output layer's among them."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    model = tiny_model().train()
    idx, targets = torch.randint(97, (2, 4, 16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(idx, targets, return_logits=False)[1].backward()
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["mkldnn::_linear_pointwise"] == 3 * 9
    assert not {"aten::addmm", "aten::mm", "aten::linear"} & set(count)
