"""The optimizers of a run: AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix by its momentum with all singular
values set to about 1, which Newton-Schulz iterations do by matmuls alone. The rows of an embedding are looked
up one by one, so the embeddings stay with AdamW, as do biases and layer norms.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.console import say
from utils.cpu_matmul import linear
from utils.distributed import Distributed

if TYPE_CHECKING:
    from gpt_model import GPT


def make_optimizers(args: Namespace, model: "GPT", dist: Distributed) -> dict[str, torch.optim.Optimizer]:
    """The optimizers that --optimizer asks for, by their keys in a checkpoint.

    A training step sets the rate of each group to AdamW's times the group's `lr_scale`.
    """
    matrices = muon_matrices(model, args.optimizer)
    flags = (args.weight_decay, args.max_lr, dist.device.type, dist.is_master)
    optimizers = {"optimizer": model.configure_optimizers(*flags, leave_out=frozenset(matrices))}
    if matrices:
        kind = Float32Muon if dist.device.type == "cpu" else torch.optim.Muon
        # Without weight decay, as published: it made no difference here.
        group = {"params": matrices, "lr_scale": args.muon_lr / args.max_lr}
        optimizers["muon"] = kind([group], lr=args.muon_lr, weight_decay=0.0)
        if dist.is_master:
            count = f"{sum(p.numel() for p in matrices):,}"
            say(f"optimizer: Muon on the {len(matrices)} matrices of the blocks ({count} parameters)")
    return optimizers


def muon_matrices(model: "GPT", optimizer: str) -> list[nn.Parameter]:
    """The parameters that Muon trains: all matrices of the blocks, or none for another `optimizer`."""
    return [p for p in model.transformer.h.parameters() if p.dim() == 2 and optimizer == "muon"]


def num_moments(model: "GPT", optimizer: str) -> int:
    """How many numbers the optimizers keep: two per parameter of AdamW, one per parameter of Muon."""
    return 2 * model.num_parameters() - sum(p.numel() for p in muon_matrices(model, optimizer))


def state_bytes(model: "GPT", optimizer: str) -> int:
    """Bytes of parameters, gradients and what the optimizers keep, all in float32."""
    return 8 * model.num_parameters() + 4 * num_moments(model, optimizer)


class Float32Muon(torch.optim.Muon):
    """Muon for CPUs, with iterations in float32 instead of bf16.

    In bf16 the losses of another micro-batch differ by 1e-4 after ten steps, in float32 by 1e-6. The time of
    2 layers x 160 channels on one core of an AMD EPYC: 13 ms, or 8 ms in bf16; with AVX2 alone 26 ms, or
    342 ms in bf16, which is then emulated.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(grad)
                momentum = self.state[parameter]["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                nesterov = grad.lerp(momentum, group["momentum"])
                direction = orthogonalized(nesterov, group["ns_coefficients"], group["ns_steps"])
                # Singular values of 1 are shorter steps for each row of a tall matrix.
                scale = max(1.0, parameter.size(0) / parameter.size(1)) ** 0.5
                parameter.add_(direction, alpha=-group["lr"] * scale)
        return loss


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int) -> Tensor:
    """A matrix with the same singular vectors and singular values of about 1, from 0.7 to 1.2.

    Each iteration maps a singular value s to a s + b s^3 + c s^5.
    """
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.t() if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(num_steps):
        gram = linear(x, x)  # x x^T
        polynomial = linear(gram, gram).mul_(c).add_(gram, alpha=b)  # symmetric, as gram is
        x = linear(polynomial, x.t()).add_(x, alpha=a)
    return x.t() if is_tall else x
