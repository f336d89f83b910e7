"""One process or many: the only reader of torchrun's variables. Alone, every collective is a no-op.

So no caller asks which it is. NCCL between GPUs, gloo between CPUs. Flags and small Python values travel over
a second, gloo group on the CPU, so they cost no device synchronisation.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Callable, Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from utils.errors import Unfinished, UserError

PATIENCE = timedelta(hours=12)  # longer than any download or checkpoint takes


def environment_rank() -> int:
    """This process's number in the job, 0 when alone."""
    return int(os.environ.get("RANK", 0))


def environment_local_rank() -> int:
    """This process's number on its machine, 0 when alone."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched_by_torchrun() -> bool:
    """Whether a torchrun agent is this process's parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """How often torchrun has restarted this job (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@dataclass
class Distributed:
    """This process's place in the job, and the collectives."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control_group: Any = field(default=None, repr=False)  # gloo on the CPU, for flags and Python objects
    patient_group: Any = field(default=None, repr=False)  # waits for what rank 0 does alone, however long

    @property
    def is_master(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over all ranks, in place, on the device."""
        if not self.is_alone:
            torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.SUM)  # gloo has no reliable AVG
        return tensor.div_(self.world_size)

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Adds Python numbers up over all ranks in float64, over the control group."""
        if self.is_alone:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        torch_dist.all_reduce(values, op=torch_dist.ReduceOp.SUM, group=self.control_group)
        return values.tolist()

    def max_number(self, number: float) -> float:
        """Largest of all ranks' numbers, over the control group."""
        if self.is_alone:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX, group=self.control_group)
        return value.item()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's Python value, on every rank, over the control group."""
        if self.is_alone:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def broadcast_tensors(self, tensors: list[Tensor]) -> None:
        """Overwrites every rank's tensors with rank 0's."""
        if not self.is_alone:
            for tensor in tensors:  # NCCL carries no tensor that is on the CPU, such as AdamW's step counts
                on_device = tensor.device.type == self.device.type
                torch_dist.broadcast(tensor, src=0, group=None if on_device else self.control_group)

    def on_master(self, function: Callable[[], Any]) -> Any:
        """Calls a function on rank 0 alone. Its (small) value, or its UserError, is every rank's."""
        value, error = None, None
        if self.is_master:
            try:
                value = function()
            except UserError as raised:
                error = (str(raised), raised.hint)
            except OSError as raised:
                error = (str(raised), "is the disk full, or its file system unable to do this?")
        self.barrier()  # longer than a broadcast would wait
        value, error = self.broadcast((value, error))
        if error is not None:
            raise UserError(*error)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's Python value, in rank order, on every rank, over the control group."""
        if self.is_alone:
            return [value]
        values = [None] * self.world_size
        torch_dist.all_gather_object(values, value, group=self.control_group)
        return values

    def barrier(self) -> None:
        """Waits until all ranks are here, even if rank 0 saves or downloads for longer than the timeout."""
        if not self.is_alone:
            torch_dist.barrier(group=self.patient_group)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to train through: DistributedDataParallel, or the model itself when alone.

        Gradients live in the buckets that are sent (`gradient_as_bucket_view`), whose default size
        lets the exchange of the last layers overlap the backward pass through the first ones.
        """
        if self.is_alone:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def settle_gradient_buckets(self, trained_model: nn.Module, B: int, T: int, autocast) -> None:
        """One backward pass whose gradients are thrown away, before the first step of every run.

        After its first exchange DDP rebuilds its buckets in the order in which gradients arrive, and sums in
        another order from then on. So a resumed run would differ from an uninterrupted one in its first step.
        """
        if self.is_alone:
            return
        zeros = torch.zeros(B, T + 1, dtype=torch.long, device=self.device)
        with (
            autocast
        ):  # strides are those of the loader's windows, or a compiled model would be compiled again
            _, loss = trained_model(zeros[:, :-1], zeros[:, 1:], return_logits=False)
        loss.backward()
        trained_model.zero_grad(set_to_none=True)

    def exchange_gradients(self, model: nn.Module, now: bool):
        """Context for forward *and* backward of a micro-step: gradients are exchanged only if `now`."""
        return contextlib.nullcontext() if now or self.is_alone else model.no_sync()


@contextlib.contextmanager
def start(device: torch.device, timeout_seconds: float = 600) -> Iterator[Distributed]:
    """Joins the job that torchrun describes in the environment, and leaves it at the end.

    Args:
        device: of this process.
        timeout_seconds: a collective that waits longer ends the process.

    Raises:
        UserError: torchrun's variables contradict each other or are missing in part.
        Unfinished: the job cannot be joined.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "WORLD_SIZE" not in os.environ or (int(os.environ["WORLD_SIZE"]) == 1 and missing):
        yield Distributed(device)
        return
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} but {', '.join(missing)} not set",
            "start with torchrun, or unset WORLD_SIZE",
            True,
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} but WORLD_SIZE={world_size}", "start with torchrun", True)
    if device.type == "cuda":
        local_rank, local_size = environment_local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device.index != local_rank and local_size > 1 and torch.cuda.device_count() > 1:
            raise UserError(
                f"process {local_rank} of {local_size} was given {device}", "use --device cuda", True
            )
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        torch_dist.init_process_group(backend, timeout=timeout)
        control_group = torch_dist.new_group(backend="gloo", timeout=timeout)
        patient_group = torch_dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's own errors of stores and networks are RuntimeErrors
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().split("\n")[0]
        hint = (
            "use torchrun --standalone, or another --master_port; can every node reach that address? "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface"
        )
        raise Unfinished(
            f"rank {rank} cannot join the job at {address} over {backend}: {reason}", hint, True
        ) from error
    yield Distributed(device, rank, environment_local_rank(), world_size, control_group, patient_group)
    torch_dist.destroy_process_group()  # after an error, `run_script` leaves without it
