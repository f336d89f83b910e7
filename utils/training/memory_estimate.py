"""How much memory a training step takes, by counting its tensors: known before anything is allocated.

The account of tensors is the same for CPU and CUDA; on a CPU, what fragmentation leaves unused comes on top.
What belongs to no tensor of ours is left out: libraries' work areas, Python itself.

Shapes: B batch, T time, C channels, H heads, L layers, V vocabulary, N = B * T rows, R rows of a chunk of
logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from utils.cpu_matmul import mkl_is_slow
from utils.fused_loss import CHUNK_ROWS

# What resident memory is above the tensors, as a share of those that come and go in a step: glibc's heap
# keeps holes that no later tensor fits. Measured with 124M parameters, 256 to 2048 tokens. A GPU's cached
# blocks are none of max_memory_allocated's.
UNUSED_REST = {"cpu": 0.25}
FLOAT32 = 4  # bytes; of parameters, gradients, moments and the residual stream, whatever autocast does


class MemoryEstimate(NamedTuple):
    """Bytes of one process, by what they are for.

    `activations` and `loss` are at their most while the loss is computed, `backward` is what the end of the
    backward pass needs besides the gradients, `unused` what the allocator holds in between; `peak` is the
    most at one time.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    backward: int
    unused: int
    peak: int


def estimate_memory(
    config: Any,
    num_parameters: int,
    B: int,
    T: int,
    dtype: torch.dtype,
    device_type: str,
    micro_steps: int = 1,
) -> MemoryEstimate:
    """Counts the tensors of a training step, from the second on (in the first, Adam's moments come last).

    Args:
        config: the model's GPTConfig.
        num_parameters: of the model, the tied embedding once.
        B, T: rows and tokens of a micro-batch.
        dtype: of matrix products, under autocast.
        device_type: "cpu", "cuda" or "mps".
        micro_steps: with more than one, gradients exist while activations do.
    """
    parameters = gradients = FLOAT32 * num_parameters
    optimizer = 2 * FLOAT32 * num_parameters  # both moments of AdamW
    itemsize = torch.finfo(dtype).bits // 8
    activations = activation_bytes(config, B * T, itemsize)
    # Low-precision copies of the weights live from the forward pass to the end of the backward pass.
    if itemsize < FLOAT32:
        activations += itemsize * num_parameters
    loss = loss_bytes(config, B * T, itemsize, device_type)
    # Last of all the embedding gets a gradient of its own, beside the output layer's, which becomes the
    # gradient in the first micro-step and is added to it in the others.
    embedding = FLOAT32 * config.vocab_size * config.n_embd
    backward = (2 if micro_steps > 1 else 1) * embedding
    during_loss = activations + loss + (gradients if micro_steps > 1 else 0)
    unused = int(UNUSED_REST.get(device_type, 0) * (gradients + activations + loss))
    peak = parameters + optimizer + max(during_loss, gradients + backward) + unused
    return MemoryEstimate(parameters, gradients, optimizer, activations, loss, backward, unused, peak)


def activation_bytes(config: Any, num_rows: int, itemsize: int) -> int:
    """Bytes that the forward pass of N rows keeps for the backward pass.

    Args:
        itemsize: bytes of a number in a matrix product: 4, or 2 under autocast.
    """
    row = num_rows * config.n_embd  # numbers in an (N, C) tensor
    # Inputs of both normalisations: the residual stream, which stays float32. Then, in the products' dtype:
    # outputs of both normalisations (2), queries, keys and values (3), attention's output (1), the MLP's
    # hidden layer before and after GELU (4 + 4).
    per_layer = 2 * row * FLOAT32 + 14 * row * itemsize
    per_layer += num_rows * config.n_head * FLOAT32  # log-sum-exp of attention
    per_layer += 4 * num_rows * FLOAT32  # mean and deviation of two normalisations
    return config.n_layer * per_layer + 2 * row * FLOAT32  # input and output of the last normalisation


def loss_bytes(config: Any, num_rows: int, itemsize: int, device_type: str) -> int:
    """Bytes of the chunked loss: the logits of one chunk, and the gradients it computes on the way."""
    rows = min(num_rows, CHUNK_ROWS.get(device_type, CHUNK_ROWS["cpu"]))
    weight = config.vocab_size * config.n_embd  # numbers in the output projection
    total = rows * config.vocab_size * FLOAT32 + weight * FLOAT32 + num_rows * config.n_embd * itemsize
    if device_type == "cpu" and (itemsize < FLOAT32 or mkl_is_slow()):
        total += weight * FLOAT32  # a whole product in float32 exists before it is added
    if itemsize < FLOAT32:
        # A second buffer in the low dtype, the weight in it, and a product before it is added in float32.
        total += (rows * config.vocab_size + 2 * weight) * itemsize
    return total
