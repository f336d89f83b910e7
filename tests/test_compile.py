"""torch.compile on a CPU: the same losses, and no recompilation."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

import train_gpt
from tests.small_runs import TINY, assert_same_losses

SETTINGS = (
    *(*TINY, "--n-layer", "1", "--micro-batch", "2", "--total-batch-tokens", "64"),
    *("--max-steps", "6", "--val-every", "3", "--sample-every", "3"),
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
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
