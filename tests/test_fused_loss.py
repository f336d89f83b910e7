"""The chunked loss against F.cross_entropy on full logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpt_model import GPT
from tests.conftest import tiny_config
from utils import fused_loss
from utils.fused_loss import cross_entropy_rows, fused_cross_entropy
from utils.runtime import Decision


def example(N=37, C=16, V=101, seed=0, dtype=torch.float32):
    """Hidden states, weight and targets whose sizes are not multiples of any chunk size."""
    torch.manual_seed(seed)
    hidden = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, V - 7, (N,))


def loss_and_gradients(loss_function, hidden, weight, targets, scale=1.0):
    """Loss, and gradients of `scale` times the loss, of hidden states and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_function(hidden, weight, targets)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden, weight, targets):
    """The loss from full logits."""
    return F.cross_entropy(hidden @ weight.t(), targets)


def kernel_in_pytorch(logits, targets, ignore_index):
    """What utils/loss_kernel.py does, for machines without Triton; test_loss_kernel.py runs the kernel."""
    losses = F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="none")
    gradient = logits.float().softmax(dim=1) - F.one_hot(targets.clamp(min=0), logits.size(1))
    logits.copy_(gradient * (targets != ignore_index).unsqueeze(1))
    return losses


@pytest.fixture(params=["operations", "kernel"])
def backend(request, monkeypatch):
    """Both forms of a chunk: PyTorch's operations, and three matmuls around a kernel."""
    if request.param == "kernel":
        monkeypatch.setattr(fused_loss, "loss_backend", lambda device: Decision(True, "test"))
        monkeypatch.setattr(fused_loss, "logits_to_gradient_", kernel_in_pytorch)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 64, None])
@pytest.mark.parametrize("num_ignored", [0, 10])
def test_loss_and_both_gradients_are_exact(chunk_rows, num_ignored):
    """To 1e-5 for any chunk size, with ignored targets and tokens that are never a target."""
    hidden, weight, targets = example()
    targets[:num_ignored] = -100
    ours = loss_and_gradients(
        lambda *a: fused_cross_entropy(*a, chunk_rows=chunk_rows), hidden, weight, targets, 0.25
    )
    theirs = loss_and_gradients(reference, hidden, weight, targets, 0.25)
    for mine, expected in zip(ours, theirs):
        assert (mine - expected).abs().max() < 1e-5


@pytest.mark.usefixtures("backend")
def test_large_logits_do_not_overflow():
    """The softmax is shifted by its maximum: logits in the thousands give the right, finite loss."""
    hidden, weight, targets = example()
    ours = loss_and_gradients(fused_cross_entropy, 100 * hidden, 10 * weight, targets)
    theirs = loss_and_gradients(reference, 100 * hidden, 10 * weight, targets)
    for mine, expected in zip(ours, theirs):
        assert torch.isfinite(mine).all()
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_all_targets_ignored_is_nan_as_in_pytorch():
    """The mean over no targets is NaN."""
    hidden, weight, targets = example()
    assert torch.isnan(fused_cross_entropy(hidden, weight, torch.full_like(targets, -100)))


def test_no_grad_computes_no_gradient(monkeypatch):
    """Under no_grad the loss is the same, and the autograd function is not entered."""
    monkeypatch.setattr(fused_loss._FusedCrossEntropy, "apply", lambda *args: pytest.fail("entered"))
    hidden, weight, targets = example()
    with torch.no_grad():
        loss = fused_cross_entropy(hidden, weight, targets)
    assert abs(loss.item() - reference(hidden, weight, targets).item()) < 1e-5


@pytest.mark.usefixtures("backend")
def test_row_losses_equal_those_of_pytorch():
    """One loss per row, zero for ignored rows."""
    hidden, weight, targets = example()
    targets[3] = -100
    rows = cross_entropy_rows(hidden, weight, targets, chunk_rows=8)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert (rows - expected).abs().max() < 1e-5
    assert rows[3] == 0


@pytest.mark.usefixtures("backend")
def test_the_tied_weight_receives_both_gradients():
    """Those of embedding and output projection add up, also over two accumulated micro-batches."""
    torch.manual_seed(0)
    ours, theirs = GPT(tiny_config()), GPT(tiny_config())
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        idx, targets = torch.randint(0, 97, (2, 4, 16))
        (ours(idx, targets, return_logits=False)[1] / 2).backward()
        (theirs(idx, targets)[1] / 2).backward()
    for (name, mine), expected in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_under_autocast_it_is_exact_to_the_rounding_of_the_dtype(dtype, tolerance):
    """Loss and gradients are float32 and close to those of the float32 reference."""
    hidden, weight, targets = example(N=64, C=32, V=500)

    def low(function):
        def call(*args):
            with torch.autocast("cpu", dtype=dtype):
                return function(*args)

        return call

    truth = loss_and_gradients(reference, 0.3 * hidden, 0.3 * weight, targets)
    ours = loss_and_gradients(low(fused_cross_entropy), 0.3 * hidden, 0.3 * weight, targets)
    for mine, expected in zip(ours, truth):
        assert mine.dtype == torch.float32
        assert (mine - expected).norm() <= tolerance * expected.norm()


def test_gradients_of_many_rows_do_not_underflow_in_fp16():
    """They are divided by the number of rows in float32: 1 / 65,536 of a probability is zero in fp16."""
    torch.manual_seed(0)
    N, C, V = 65_536, 4, 200
    hidden = torch.randn(N, C, dtype=torch.float16).requires_grad_()
    weight = torch.randn(V, C, dtype=torch.float16).requires_grad_()
    targets = torch.randint(0, V, (N,))
    _, _, grad_weight = loss_and_gradients(fused_cross_entropy, hidden, weight, targets)
    _, _, expected = loss_and_gradients(reference, hidden.float(), weight.float(), targets)
    assert (grad_weight.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("backend")
def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    """The weight's gradient is scaled in place, so it can be used once only."""
    hidden, weight, targets = example()
    loss = fused_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("backend")
def test_gradients_of_many_rows_do_not_overflow_in_fp16():
    """8192 rows of one token with channels of 100: their sum exceeds fp16's range, their mean does not."""
    hidden = torch.full((8192, 2), 100.0, requires_grad=True)
    weight = torch.zeros(4, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = fused_cross_entropy(hidden, weight, torch.zeros(8192, dtype=torch.long), chunk_rows=8192)
    loss.backward()
    expected = torch.tensor([-75.0, 25.0, 25.0, 25.0])  # (softmax - onehot) x 100
    assert torch.allclose(weight.grad, expected.unsqueeze(1).expand(4, 2), rtol=1e-2)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, [2, 2, 1]), (torch.bfloat16, [4, 1])])
def test_the_kernel_takes_twice_the_rows_in_16_bits(monkeypatch, dtype, expected):
    """Chunks of 16-bit and of float32 logits then take the same memory, in training and in evaluation."""
    sizes = []

    def recorded(logits, targets, ignore_index):
        sizes.append(len(logits))
        return kernel_in_pytorch(logits, targets, ignore_index)

    monkeypatch.setattr(fused_loss, "loss_backend", lambda device: Decision(True, "test"))
    monkeypatch.setattr(fused_loss, "logits_to_gradient_", recorded)
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 2)
    inputs = example(N=5, dtype=dtype)
    fused_cross_entropy(*inputs)
    cross_entropy_rows(*inputs)
    assert sizes == expected * 2


class FakeCuda:
    """Stands for a CUDA device whose tensors are on the CPU."""

    type = "cuda"


def backend_with(kernel, monkeypatch) -> Decision:
    """`loss_backend` of a device on which the kernel's path is replaced by a function."""
    monkeypatch.setattr(fused_loss, "choose_kernel", lambda device: Decision(True, "CUDA with Triton"))
    monkeypatch.setattr(fused_loss, "_add_gradients_with_kernel", kernel)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, real=torch.Tensor.to: real(self, args[-1])
                        if isinstance(args[-1], torch.dtype) else self)  # fmt: skip
    return fused_loss.loss_backend.__wrapped__(FakeCuda())


def test_the_kernel_is_used_only_where_it_agrees_with_pytorch(monkeypatch):
    """It is compared before its first use; other numbers or an exception rule it out, with the reason."""
    plain = fused_loss._add_gradients

    def wrong(hidden, weight, targets, grad_hidden, grad_weight):
        losses = plain(hidden, weight, targets, grad_hidden, grad_weight)
        grad_weight.mul_(1.1)
        return losses

    def broken(*arguments):
        raise RuntimeError("no ptxas\nand more")

    assert backend_with(plain, monkeypatch).value
    decision = backend_with(wrong, monkeypatch)
    assert not decision.value and "differ" in decision.reason
    decision = backend_with(broken, monkeypatch)
    assert not decision.value and decision.reason == "the loss kernel failed here: no ptxas"

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # no verdict: the search for a micro-batch must see it
        backend_with(out_of_memory, monkeypatch)


def test_the_kernel_is_compared_without_autocast(monkeypatch):
    """The first call of a float16 run comes from within autocast, which would mix dtypes."""
    enabled = []

    def kernel(*arguments):
        enabled.append(torch.is_autocast_enabled("cuda"))
        return plain(*arguments)

    plain = fused_loss._add_gradients
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.autocast("cuda", torch.float16):
        assert torch.is_autocast_enabled("cuda") and backend_with(kernel, monkeypatch).value
    assert enabled == [False]
