"""The search for the largest micro-batch, with a device whose memory is a number."""

from __future__ import annotations

import pytest
import torch

import train_gpt
from tests.conftest import tiny_model
from utils.distributed import Distributed
from utils.errors import UserError
from utils.training.micro_batch import OutOfMemory, choose, largest_that_fits


@pytest.mark.parametrize(
    ("fits", "rows", "expected"), [(5, 64, 4), (100, 64, 64), (100, 24, 8), (1, 64, 1), (9, 7, 1)]
)
def test_the_largest_power_of_two_that_fits_and_divides(fits, rows, expected):
    """Doubling stops at the memory's end, or where the rows of an update would no longer divide."""
    tried = []

    def step(B):
        tried.append(B)
        if B > fits:
            raise OutOfMemory(f"{B} rows")

    assert largest_that_fits(step, rows) == expected
    assert tried == sorted(set(tried))


def test_not_even_one_row_is_an_error():
    """Nothing to fall back to: the user must change the model or the sequence length."""

    def step(B):
        raise OutOfMemory("no")

    with pytest.raises(UserError, match="not even one window"):
        largest_that_fits(step, 8)


def test_auto_on_a_cpu_is_the_presets_and_says_so(text_file, tmp_path, capsys):
    """A whole run with --micro-batch auto, and a resumed one, which remembers."""
    flags = ["--preset", "char", "--data", str(text_file), "--log-dir", str(tmp_path), "--device", "cpu"]
    flags += "--n-embd 16 --n-head 2 --n-layer 1 --max-steps 2 --val-every 0 --sample-every 0".split()
    assert train_gpt.main([*flags, "--micro-batch", "auto"]) == 0
    usual = train_gpt.PRESETS["char"]["micro_batch"]
    assert "micro-batch: auto: a search pays on CUDA only" in capsys.readouterr().out
    saved = torch.load(tmp_path / "optimizer_00002.pt", weights_only=True)["train_args"]["micro_batch"]
    assert saved == usual
    args, _ = train_gpt.read_arguments([*flags, "--micro-batch", "auto", "--resume"])
    decision = choose(args, tiny_model(), Distributed(torch.device("cpu")), torch.float32, fallback=99)
    assert decision == (usual, "that of the checkpoint")


def test_running_out_of_memory_names_the_flag(text_file, tmp_path, monkeypatch):
    """Exit 2 and a hint, instead of a traceback from inside the model."""

    def full(run, batches, progress):
        raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(train_gpt, "update", full)
    flags = ["--preset", "char", "--data", str(text_file), "--log-dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError, match="out of memory with --micro-batch 12") as caught:
        train_gpt.main([*flags, "--val-every", "0", "--micro-batch", "12"])
    assert "--micro-batch 6 or auto" in caught.value.hint
