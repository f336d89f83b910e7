"""What a process does as part of a job of several, where one process can play its part."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.conftest import run
from tests.small_runs import train
from utils.distributed import Distributed
from utils.training import resume
from utils.training.data_source import Source, fetch
from utils.training.micro_batch import OutOfMemory, explains_out_of_memory

CPU = torch.device("cpu")


def test_a_restart_that_another_machine_counted_goes_on_with_the_run(
    short_text, tmp_path, capsys, monkeypatch
):
    """torchrun counts a restart only where a worker died; elsewhere the run is not begun anew either."""
    assert train(short_text, tmp_path, "--max-steps", "4") == 0
    ours = -1
    monkeypatch.setattr(resume, "restart_count", lambda: ours)
    monkeypatch.setattr(Distributed, "max_number", lambda self, number: 1 if number == ours else number)
    assert train(short_text, tmp_path, "--max-steps", "6") == 0
    assert "at step 4" in capsys.readouterr().out
    assert not (tmp_path / "archive").exists()


def test_a_job_that_was_started_wrongly_says_so_on_every_rank():
    """A rank that is none, as from a script that sets the variables by hand: rank 5 is alone in knowing."""
    process = run(
        "train_gpt.py", RANK="5", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    assert process.returncode == 2
    assert process.stderr == "error: RANK=5 but WORLD_SIZE=2\nhint: start with torchrun\n"


@pytest.mark.parametrize("kind", ["text", "shards", "download"])
def test_every_rank_waits_whatever_data_it_has_chosen(kind, tmp_path):
    """A machine that found shards and one that found none meet in the same collective, and then compare."""
    waits = []

    class Counting(Distributed):
        def barrier(self):
            waits.append(self.rank)

    (tmp_path / "input.txt").write_text("is there")
    assert fetch(Source(kind, tmp_path / "input.txt", "why"), Counting(CPU)).path == tmp_path / "input.txt"
    assert waits == [0]


def test_the_first_exchange_has_the_strides_of_training():
    """A model is compiled for the strides it sees: the pass before the first step has the loader's."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, idx, targets, return_logits):
            seen.extend((idx.shape, idx.stride(), targets.stride()))
            return None, self.weight.sum()

    Distributed(CPU, world_size=2).settle_gradient_buckets(Model(1, 1), 3, 5, contextlib.nullcontext())
    assert seen == [(3, 5), (6, 1), (6, 1)]


def test_no_room_on_the_device_is_an_error_with_a_flag():
    """Also where no step has begun, as in a dry run."""
    from argparse import Namespace

    from utils.errors import UserError

    with pytest.raises(UserError, match="out of memory with --micro-batch 8") as caught:
        with explains_out_of_memory(Namespace(micro_batch=8)):
            raise OutOfMemory("CUDA out of memory")
    assert "--micro-batch 4 or auto" in caught.value.hint
