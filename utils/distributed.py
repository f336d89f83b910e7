"""One process or many: the only reader of torchrun's ranks; alone, every collective is a no-op.

NCCL between GPUs, gloo between CPUs. Flags and small Python values travel over a second group, gloo on the
CPU, so they cost no device synchronisation.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from utils.command_line import Unfinished, UserError, environment_int
from utils.console import announced

LONGEST_TIMEOUT_SECONDS = 1e9  # nanoseconds of a longer one overflow
MASTER_ALONE_TIMEOUT = timedelta(hours=12)  # longer than any download or checkpoint takes


def environment_rank() -> int:
    """Rank of this process in the job, 0 when alone."""
    return environment_int("RANK", 0)


def environment_local_rank() -> int:
    """Rank of this process on its machine, 0 when alone."""
    return environment_int("LOCAL_RANK", 0)


def restart_count() -> int:
    """How many times torchrun has restarted this job (`--max-restarts`)."""
    return environment_int("TORCHELASTIC_RESTART_COUNT", 0)


@dataclass
class Distributed:
    """Rank and device of this process, and the collectives."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control_group: Any = field(default=None, repr=False)  # gloo on the CPU, for flags and Python objects
    patient_group: Any = field(default=None, repr=False)  # long timeout: waits for work of rank 0 alone

    @property
    def is_master(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether the job has one process."""
        return self.world_size == 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over all ranks, in place, on the device."""
        if not self.is_alone:
            torch_dist.all_reduce(tensor)  # the sum: gloo has no reliable AVG
        return tensor.div_(self.world_size)

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Sums Python numbers over all ranks, over the control group."""
        return [sum(of_all_ranks) for of_all_ranks in zip(*self.gather(numbers))]

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

    def broadcast_state(self, state: Any) -> Any:
        """Rank 0's nested dicts and lists with tensors, on every rank; the tensors are on the device."""
        if self.is_alone:
            return state
        outline = self.broadcast(_map_tensors(lambda tensor: tensor.to("meta"), state))

        def share(tensor: Tensor) -> Tensor:
            device = self.device
            tensor = tensor.to(device) if self.is_master else torch.empty_like(tensor, device=device)
            torch_dist.broadcast(tensor, src=0)
            return tensor

        return _map_tensors(share, state if self.is_master else outline)

    def on_master(self, function: Callable[[], Any]) -> Any:
        """Calls a function on rank 0. All ranks return its (small) value, or raise its error as UserError."""
        value, error = None, None
        if self.is_master:
            try:
                value = function()
            except (UserError, OSError) as raised:
                hint = "check that the disk has room and that its file system supports this operation"
                error = str(raised), getattr(raised, "hint", hint)
        self.barrier()  # waits longer than a broadcast would
        value, error = self.broadcast((value, error))
        if error is not None:
            raise UserError(*error)
        return value

    def check_equal(self, values: dict[str, Any], hint: str) -> None:
        """Raises UserError on all ranks, with names, ranks and values, unless the values are equal on all."""
        of_ranks = self.gather(values)
        differ = [
            f"{name} is " + ", ".join(f"{value[name]} on rank {rank}" for rank, value in enumerate(of_ranks))
            for name in values
            if any(value[name] != of_ranks[0][name] for value in of_ranks)
        ]
        if differ:
            raise UserError(f"the ranks differ: {'; '.join(differ)}", hint)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's Python value, in rank order, on every rank, over the control group."""
        if self.is_alone:
            return [value]
        values = [None] * self.world_size
        torch_dist.all_gather_object(values, value, group=self.control_group)
        return values

    def barrier(self) -> None:
        """Waits for all ranks, even while rank 0 saves or downloads for longer than the timeout."""
        if not self.is_alone:
            torch_dist.barrier(group=self.patient_group)

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel around a model, or the model itself when alone."""
        if self.is_alone:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # As views of the buckets that are exchanged, gradients exist once.
        options = dict(device_ids=device_ids, gradient_as_bucket_view=True)
        with announced("sending the weights to all processes", shown=self.is_master):
            return nn.parallel.DistributedDataParallel(model, **options)

    def exchange_gradients(self, model: nn.Module, *, now: bool) -> contextlib.AbstractContextManager:
        """Context for forward *and* backward of a micro-step: gradients are exchanged only if `now`."""
        return contextlib.nullcontext() if now or self.is_alone else model.no_sync()


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(function, entry) for key, entry in value.items()}
    return [_map_tensors(function, entry) for entry in value] if isinstance(value, list) else value


@contextlib.contextmanager
def join_job(device: torch.device, timeout_seconds: float = 600) -> Iterator[Distributed]:
    """Joins the job that torchrun's variables describe, if any, and leaves it when the block ends.

    A collective that waits for longer than the timeout ends its process. Raises UserError if torchrun's
    variables are incomplete or contradict each other or the device, Unfinished if the job cannot be joined.
    """
    rank, local_rank = environment_rank(), environment_local_rank()
    world_size, port = environment_int("WORLD_SIZE", 1, 1), environment_int("MASTER_PORT", 1, 1, 65535)
    restart_count()  # read later, but checked with the others
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing and world_size == 1:
        yield Distributed(device)
        return
    if missing:
        what = f"WORLD_SIZE={world_size} but {', '.join(missing)} not set"
        raise UserError(what, "start with torchrun, or unset WORLD_SIZE", one_rank_only=True)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} but WORLD_SIZE={world_size}", "start with torchrun", one_rank_only=True)
    if device.type == "cuda":
        local_size = environment_int("LOCAL_WORLD_SIZE", 1, 1)
        if device.index != local_rank and local_size > 1 and torch.cuda.device_count() > 1:
            what = f"process {local_rank} of {local_size} was given {device}"
            raise UserError(what, "use --device cuda", one_rank_only=True)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=min(timeout_seconds, LONGEST_TIMEOUT_SECONDS))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        with announced(f"waiting for all {world_size} processes", shown=rank == 0):
            torch_dist.init_process_group(backend, timeout=timeout)
            control_group = torch_dist.new_group(backend="gloo", timeout=timeout)
            patient_group = torch_dist.new_group(backend="gloo", timeout=MASTER_ALONE_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # torch raises RuntimeError for store and network failures
        address = f"{os.environ['MASTER_ADDR']}:{port}"
        reason = str(error).strip().split("\n")[0]
        what = f"rank {rank} cannot join the job at {address} over {backend}: {reason}"
        hint = "use torchrun --standalone, or another --master_port; can every node reach that address? "
        hint += "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface"
        raise Unfinished(what, hint, one_rank_only=True) from error
    yield Distributed(device, rank, local_rank, world_size, control_group, patient_group)
    torch_dist.destroy_process_group()  # after an error, `run_script` leaves without it
