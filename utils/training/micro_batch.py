"""Forward and backward of a micro-batch, and the search for the largest one that fits the device."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.command_line import UserError
from utils.distributed import Distributed
from utils.runtime import Decision, autocast

if TYPE_CHECKING:
    from gpt_model import GPT

HEADROOM = 0.9  # share of the device's memory: exchange buffers and fragmentation need the rest


def forward_backward(
    model: nn.Module,
    idx: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler | None = None,
    micro_steps: int = 1,
) -> Tensor:
    """Adds the gradient of a micro-batch, divided by `micro_steps`, to the parameters' gradients.

    Args:
        idx, targets: (B, T) token ids.
        dtype: of matmuls, under autocast.
        scaler: loss scaling for fp16.

    Returns:
        The mean loss of the micro-batch in nats, detached and still on the device.
    """
    with autocast(idx.device, dtype):
        _, loss = model(idx, targets, return_logits=False)
    scaled = loss / micro_steps
    (scaled if scaler is None else scaler.scale(scaled)).backward()
    return loss.detach()


def settle_gradient_buckets(
    trained_model: nn.Module, micro_batch: int, seq_len: int, dtype: torch.dtype, dist: Distributed
) -> None:
    """Runs one micro-batch and discards its gradients, before the first step of every run.

    After its first exchange DDP rebuilds its buckets in the order in which gradients arrive, and from then on
    sums in another order. Without this a resumed run would differ from an uninterrupted one in its first
    step.
    """
    if dist.is_alone:
        return
    rows = torch.zeros(micro_batch, seq_len + 1, dtype=torch.long, device=dist.device)
    # With the strides of the loader's batches, or a compiled model would be compiled again.
    forward_backward(trained_model, rows[:, :-1], rows[:, 1:], dtype)
    trained_model.zero_grad(set_to_none=True)


def choose_micro_batch(
    args: Namespace, model: "GPT", dist: Distributed, dtype: torch.dtype, fallback: int
) -> Decision:
    """The largest micro-batch that fits on every rank, or `fallback` where a search does not pay.

    The weights are unchanged when it returns.
    """
    if model.lm_head.weight.device.type != "cuda":
        return Decision(fallback, "auto: the preset's, because a search pays on CUDA only")
    rows, rest = divmod(args.total_batch_tokens, args.seq_len * dist.world_size)
    if rest or not rows:
        return Decision(fallback, "the batch is not a multiple of the windows of all ranks")
    weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    found = largest_that_fits(lambda B: _trial_step(model, B, args.seq_len, dist.device, dtype), rows)
    model.load_state_dict(weights)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(dist.device)
    agreed = int(-dist.max_number(-found))
    return Decision(agreed, f"the largest power of two that fits and divides {rows} windows a rank")


def largest_that_fits(try_step: Callable[[int], None], rows: int) -> int:
    """The largest power of two that divides `rows` and whose step fits. Raises UserError if none does."""
    found, B = 0, 1
    while rows % B == 0:
        try:
            try_step(B)
        except torch.OutOfMemoryError:
            break
        found, B = B, 2 * B
    if not found:
        what = "not even one window fits the device's memory"
        raise UserError(what, "use a smaller model or --seq-len", one_rank_only=True)
    return found


def _trial_step(model: "GPT", B: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
    """An update on B random rows through the bare module, without collectives: ranks may differ."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    optimizer = model.configure_optimizers(0.0, 0.0, device.type, is_master_process=False)
    rows = torch.randint(0, model.config.vocab_size, (B, seq_len), device=device)
    try:
        forward_backward(model, rows, rows, dtype)
        optimizer.step()
        total = torch.cuda.get_device_properties(device).total_memory
        if torch.cuda.max_memory_allocated(device) > HEADROOM * total:
            raise torch.OutOfMemoryError(f"{B} rows leave no headroom")
    finally:
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def explain_out_of_memory(args: Namespace) -> Iterator[None]:
    """Turns an out-of-memory error of the device into a UserError that names the flag to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = max(1, args.micro_batch // 2) if args.micro_batch != "auto" else 1
        raise UserError(
            f"out of memory with --micro-batch {args.micro_batch}",
            f"use --micro-batch {smaller} or auto: the batch of an update stays the same; then --resume",
            one_rank_only=True,
        ) from error
