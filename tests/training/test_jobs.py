"""What a process does as part of a job of several, where one process can stand for the others."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch

from tests.conftest import run, tiny_model
from tests.small_runs import train
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.runtime import Decision
from utils.training import data_source, micro_batch, resume
from utils.training.data_source import Source, fetch
from utils.training.micro_batch import explain_out_of_memory, time_micro_batch, warm_up

CPU = torch.device("cpu")


def test_a_restart_that_only_another_machine_counted_continues_the_run(
    short_text, tmp_path, capsys, monkeypatch
):
    """torchrun counts a restart only where a worker died; no machine starts the run again from step 0."""
    assert train(short_text, tmp_path, "--max-steps", "4") == 0
    ours = -1
    monkeypatch.setattr(resume, "restart_count", lambda: ours)
    monkeypatch.setattr(Distributed, "max_number", lambda self, number: 1 if number == ours else number)
    assert train(short_text, tmp_path, "--max-steps", "6") == 0
    assert "at step 4" in capsys.readouterr().out
    assert not (tmp_path / "archive").exists()


def test_an_impossible_rank_is_an_error_on_every_rank():
    """As from a script that sets the variables by hand: other ranks may not see it, so each reports it."""
    process = run(
        "train_gpt.py", RANK="5", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    assert process.returncode == 2
    assert process.stderr == "error: RANK=5 but WORLD_SIZE=2\nhint: start with torchrun\n"


@pytest.mark.parametrize("kind", ["text", "shards", "download"])
def test_every_rank_waits_for_the_data_of_any_kind(kind, tmp_path, monkeypatch):
    """A machine with shards and one without meet in the same collective before they compare their data."""
    waits = []

    class Counting(Distributed):
        def barrier(self) -> None:
            waits.append(self.rank)

    (tmp_path / "input.txt").write_text("some text")
    source = Source(kind, tmp_path / "input.txt", "why")
    monkeypatch.setattr(data_source, "choose_source", lambda requested: source)
    assert fetch(None, Counting(CPU)).path == tmp_path / "input.txt"
    assert waits == [0]


def test_the_warm_up_has_the_strides_of_training():
    """A compiled model is specialized to strides, so the batch before the first step has the loader's."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(
            self, idx: torch.Tensor, targets: torch.Tensor, return_logits: bool
        ) -> tuple[None, torch.Tensor]:
            seen.extend((idx.shape, idx.stride(), targets.stride()))
            return None, self.weight.sum()

    model = Model(1, 1)
    assert warm_up(model, 3, 5, torch.float32, CPU) > 0
    assert seen == [(3, 5), (6, 1), (6, 1)]
    assert model.weight.grad is None


def test_a_micro_batch_is_timed_where_it_can_run(monkeypatch):
    """Not a model without weights, of which a dry run reports the size; without memory it is infinite."""
    tokens = dict(B=2, T=4, dtype=torch.float32, device=CPU)
    model = tiny_model()
    assert 0 < time_micro_batch(model, **tokens) < 60
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.device("meta"):
        assert time_micro_batch(tiny_model(), **tokens) == 0

    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(micro_batch, "forward_backward", out_of_memory)
    assert time_micro_batch(model, **tokens) == math.inf


def test_all_ranks_compile_or_none_does(short_text, tmp_path, capsys, monkeypatch):
    """A rank that would compile does not where another one cannot."""
    monkeypatch.setattr(micro_batch, "choose_compile", lambda *a, **k: Decision(True, "auto: it pays"))
    monkeypatch.setattr(Distributed, "max_number", lambda self, number: number is False or number)
    assert train(short_text, tmp_path, "--max-steps", "4") == 0
    assert "compile off (auto: on some rank it does not pay or is not possible)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_an_error_that_names_the_flag(error):
    """Also outside a step, for example in a dry run, and on a CPU."""
    with pytest.raises(UserError, match="out of memory with --micro-batch 8") as caught:
        with explain_out_of_memory(Namespace(micro_batch=8)):
            raise error
    assert "--micro-batch 4 or auto" in caught.value.hint
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(Namespace(micro_batch=8)):
        raise RuntimeError("another")
