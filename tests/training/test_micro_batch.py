"""The search for the largest micro-batch, on a simulated device, and what it becomes in a resumed run."""

from __future__ import annotations

import pytest
import torch

import train_gpt
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.training.micro_batch import largest_that_fits
from utils.training.resume import find_checkpoint


@pytest.mark.parametrize(
    ("fits", "rows", "expected"), [(5, 64, 4), (100, 64, 64), (100, 24, 8), (1, 64, 1), (9, 7, 1)]
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_the_largest_power_of_two_that_fits_and_divides(error, fits, rows, expected):
    """Doubling stops when the memory is full, or when the rows of an update are no longer a multiple."""
    tried = []

    def step(B: int) -> None:
        tried.append(B)
        if B > fits:
            raise error

    assert largest_that_fits(step, rows) == expected
    assert tried == sorted(set(tried))


def test_a_device_without_room_for_one_row_is_an_error():
    """The user must change the model or the sequence length."""

    def step(B: int) -> None:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(UserError, match="not even one window"):
        largest_that_fits(step, 8)


@pytest.fixture
def char_flags(text_file, tmp_path) -> list[str]:
    """Flags of a run of two steps with the preset char."""
    flags = ["--preset", "char", "--data", str(text_file), "--log-dir", str(tmp_path), "--device", "cpu"]
    return flags + "--n-embd 16 --n-head 2 --n-layer 1 --max-steps 2 --val-every 0 --sample-every 0".split()


def test_auto_on_a_cpu_is_the_preset_value(char_flags, tmp_path, capsys):
    """The reason is printed, and the number, not "auto", is saved with the checkpoint."""
    assert train_gpt.main([*char_flags, "--micro-batch", "auto"]) == 0
    assert "micro-batch: auto: the preset's, because a search pays on CUDA only" in capsys.readouterr().out
    saved = torch.load(tmp_path / "optimizer_00002.pt", weights_only=True)["train_args"]["micro_batch"]
    assert saved == train_gpt.PRESETS["char"]["micro_batch"]


def test_a_resumed_run_says_that_it_compiles_as_before(char_flags, capsys):
    """Once, in the line of the numerics, and also in a dry run, whatever the micro-batch."""
    assert train_gpt.main(char_flags) == 0
    for flags in (["--dry-run"], []):
        capsys.readouterr()
        assert train_gpt.main([*char_flags, "--resume", "--max-steps", "3", *flags]) == 0
        out = capsys.readouterr().out
        assert "compile off (as in the resumed run)" in out and out.count("as in the resumed run") == 1


def test_auto_in_a_resumed_run_is_the_micro_batch_of_the_checkpoint(char_flags, capsys):
    """So that a resumed run is bitwise the same; printed with its reason, also by a dry run."""
    assert train_gpt.main([*char_flags, "--micro-batch", "4"]) == 0
    args, _ = train_gpt.read_arguments([*char_flags, "--micro-batch", "auto", "--resume"])
    reasons: dict[str, str] = {}
    checkpoint = find_checkpoint(args, Distributed(torch.device("cpu")), reasons)
    assert checkpoint.state["step"] == 2
    assert args.micro_batch == 4 and reasons["micro-batch"] == "that of the checkpoint"
    resumed = [*char_flags, "--micro-batch", "auto", "--resume", "--max-steps", "3"]
    for flags in (["--dry-run"], []):
        capsys.readouterr()
        assert train_gpt.main([*resumed, *flags]) == 0
        out, err = capsys.readouterr()
        assert "micro-batch: that of the checkpoint" in out and "= 4 rows x 64 tokens x" in out
    assert "settings have changed: max_steps 2 -> 3; continuing" in err


def test_a_run_that_runs_out_of_memory_names_the_flag(char_flags, monkeypatch):
    """Exit code 2 and a hint, instead of a traceback from inside the model."""

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt, "update", full)
    with pytest.raises(UserError, match="out of memory with --micro-batch 12") as caught:
        train_gpt.main([*char_flags, "--micro-batch", "12"])
    assert "--micro-batch 6 or auto" in caught.value.hint and caught.value.exit_code == 2
