"""Sampling: what its arguments may be, and fast on CUDA: a static key/value cache, one step as a CUDA graph.

A step of GPT-2 124M is about 150 short kernels, and launching them one by one takes far longer than running
them. A CUDA graph launches them together, but on the same addresses each time: so the token, its position,
keys and values, the mask and the logits are tensors that stay in place. Sampling stays outside of the graph:
its dozen kernels are launched while the graph runs, and any `torch.Generator` works as it does elsewhere.

Shapes as in gpt_model.py; S is the number of cached positions that a step reads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.command_line import LARGEST_INT, UserError, shown

if TYPE_CHECKING:
    from gpt_model import GPT

Step = Callable[[], None]
Capture = Callable[[Step], Step]

# Values of S, besides the block size, each with a graph of its own: short texts do not read empty positions.
BUCKETS = (128, 256, 512, 1024)
# A capture costs about three eager steps, and a graph saves most of an eager step: it should pay from about
# four tokens on, a second bucket and the copy of the weights under autocast included from about 16 on. More
# until it has been measured on a GPU: the short samples during training do not need it.
MIN_TOKENS = 64

capture_stream = cache(torch.cuda.Stream)  # one for each device, as cuBLAS keeps a workspace for each stream


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_samples: int = 1
) -> None:
    """Raises one UserError that lists everything wrong with the arguments of `GPT.generate`."""
    counts = dict(max_new_tokens=max_new_tokens, num_samples=num_samples, top_k=1 if top_k is None else top_k)
    problems = []
    for name, value in counts.items():
        is_int = isinstance(value, Integral)
        if not is_int or not 0 < value <= LARGEST_INT:
            given = shown(int(value)) if is_int else value
            problems.append(f"{name}={given} is not a whole number from 1 to {LARGEST_INT:,}")
    if not 0 <= temperature < math.inf:  # also for NaN
        problems.append(f"temperature={temperature} is not a finite number of at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p={top_p} is not above 0 and at most 1")
    if problems:
        hint = "give counts from 1, a temperature from 0 (greedy decoding), a top_p above 0 and at most 1"
        raise UserError(f"sampling: {'; '.join(problems)}", hint)


def graph_pays(device: torch.device, max_new_tokens: int) -> bool:
    """Whether sampling so many tokens is faster with CUDA graphs, their capture included."""
    # Deterministic algorithms replace index_copy_ by a kernel that a graph cannot record in every version.
    is_possible = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    return is_possible and max_new_tokens >= MIN_TOKENS


def capture_cuda_graph(device: torch.device, step: Step) -> Step:
    """Runs `step` once, records its kernels as a CUDA graph and returns the function that launches them."""
    side, current, graph = capture_stream(device), torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()  # loads kernels and creates handles and workspaces: none of that can be recorded
    current.wait_stream(side)
    # "thread_local": other threads, such as NCCL's watchdog, may use CUDA during the capture.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay


def in_autocast_dtype(model: GPT) -> GPT:
    """The model, or under autocast a copy of it in autocast's dtype: cast once instead of in every step.

    Layer norms and the residual stream of the copy have that dtype too; autocast keeps them in float32.
    """
    device_type = model.lm_head.weight.device.type
    if not torch.is_autocast_enabled(device_type):
        return model
    dtype = torch.get_autocast_dtype(device_type)
    # deepcopy takes what its memo holds for a parameter, so only the cast weights are allocated.
    memo = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


class StaticDecoder:
    """Continues B texts with tensors at fixed addresses; is itself the cache that `hidden_states` fills.

    Args:
        model: a GPT, copied under autocast: a decoder serves one call of `GPT.stream`, not later weights.
        batch_size: B.
        length: positions needed, at most the block size.
        capture: turns a step into the function that repeats it; by default `capture_cuda_graph` on CUDA, and
            elsewhere the step is repeated as it is.
    """

    def __init__(self, model: GPT, batch_size: int, length: int, capture: Capture | None = None):
        self.model, config = in_autocast_dtype(model), model.config
        weight = self.model.lm_head.weight
        self.buckets = sorted({min(size, config.block_size) for size in (*BUCKETS, config.block_size)})
        size = next(size for size in self.buckets if size >= length)
        shape = (config.n_layer, 2, batch_size, config.n_head, size, config.n_embd // config.n_head)
        self.buffer = weight.new_zeros(shape)  # (L, 2, B, H, S, D); zeros: a NaN would pass the mask
        # Added to attention scores: 0 where filled, else -inf. Rows are aligned, as kernels need it.
        self.mask = weight.new_empty(1, 1, 1, -(-size // 16) * 16)
        self.logits = weight.new_empty(batch_size, config.vocab_size, dtype=torch.float32)  # (B, V)
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        on_cuda = partial(capture_cuda_graph, weight.device)
        self.capture = capture or (on_cuda if weight.is_cuda else lambda step: step)
        self.replays: dict[int, Step] = {}  # by bucket

    def prefill(self, context: Tensor) -> None:
        """Restarts the texts with `context` (B, T); `logits` become those of the next token."""
        T = context.size(1)
        self.mask.fill_(float("-inf"))[..., :T] = 0.0
        self._forward(context, torch.arange(T, device=context.device), None, T)

    def step(self, token: Tensor, position: int) -> None:
        """Adds the next `token` (B, 1), whose position is given; `logits` become those of the one after."""
        self.token.copy_(token)
        self.position.fill_(position)
        bucket = next(size for size in self.buckets if size > position)
        if bucket not in self.replays:
            self.replays[bucket] = self.capture(partial(self._step, bucket))
        self.replays[bucket]()

    def _step(self, bucket: int) -> None:
        self.mask.index_fill_(3, self.position, 0.0)
        self._forward(self.token, self.position, self.mask[..., :bucket], bucket)

    def _forward(self, idx: Tensor, positions: Tensor, mask: Tensor | None, visible: int) -> None:
        self.positions, self.visible, self.length = positions, visible, 0  # length: counted by hidden_states
        with torch.autocast(idx.device.type, enabled=False):  # the weights are in its dtype already
            x = self.model.hidden_states(idx, positions, mask, self)[:, -1]  # (B, C)
            self.logits.copy_(self.model.lm_head(x))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's keys and values (B, H, T, D) at `positions`; returns those of the first S."""
        keys, values = self.buffer[layer]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def stream(
        self, idx: Tensor, max_new_tokens: int, vocab_size: int | None, sample: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yields the ids (B, 1) of one new token after another, as `GPT.stream` does.

        `sample` takes logits (B, vocab_size) to ids (B, 1) without waiting for the device. The one wait for
        each token comes when the step after it is queued, so the device is never idle. Raises
        FloatingPointError for non-finite logits.
        """
        block_size = self.model.config.block_size
        context = idx[:, -block_size:]  # (B, T)
        self.prefill(context)
        for remaining in reversed(range(max_new_tokens)):
            logits = self.logits[:, :vocab_size]
            token = sample(logits)
            is_finite = torch.isfinite(logits).all().to("cpu", non_blocking=True)
            sampled = torch.cuda.current_stream(idx.device).record_event() if idx.is_cuda else None
            context = torch.cat((context, token), dim=1)
            if remaining and context.size(1) > block_size:
                context = context[:, -max(1, block_size // 2) :]  # as in GPT.stream
                self.prefill(context)
            elif remaining:
                self.step(token, context.size(1) - 1)
            if sampled is not None:
                sampled.synchronize()
            if not is_finite:
                raise FloatingPointError("non-finite logits")
            yield token
