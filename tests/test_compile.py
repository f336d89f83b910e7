"""torch.compile on a CPU: the same losses, and no recompilation."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

import train_gpt
from tests.small_runs import TINY, assert_same_losses

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
SETTINGS = (
    *(*TINY, "--n-layer", "1", "--micro-batch", "2", "--total-batch-tokens", "64"),
    *("--max-steps", "6", "--val-every", "3", "--sample-every", "3"),
)


@pytest.mark.slow
@needs_compiler
def test_compiled_training_is_the_same_and_compiles_once(text_file, tmp_path):
    """Losses equal to 1e-4; evaluations and samples between the updates cause no compilation."""
    from torch._dynamo.utils import counters

    real_update, graphs = train_gpt.update, []

    def counting(*arguments: Any) -> tuple[float, float]:
        result = real_update(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    for flag in ("--no-compile", "--compile"):
        graphs.clear()
        log_dir = tmp_path / flag
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "update", counting)
            assert train_gpt.main([*SETTINGS, "--data", str(text_file), "--log-dir", str(log_dir), flag]) == 0
    assert_same_losses(tmp_path / "--compile", tmp_path / "--no-compile")
    assert graphs[0] > 0 and len(set(graphs)) == 1


@pytest.mark.slow
@needs_compiler
def test_compiled_dropout_is_seeded(text_file, tmp_path):
    """Two compiled runs have the same losses, bit for bit; with --recompute the masks are the same, too."""
    for name in ("one", "two", "--recompute"):
        flags = ("--compile", "--dropout", "0.2", *([name] if name.startswith("--") else []))
        where = ("--data", str(text_file), "--log-dir", str(tmp_path / name))
        assert train_gpt.main([*SETTINGS, *where, *flags]) == 0
    assert (tmp_path / "one" / "log.txt").read_bytes() == (tmp_path / "two" / "log.txt").read_bytes()
    assert_same_losses(tmp_path / "--recompute", tmp_path / "one", tolerance=1e-5)
