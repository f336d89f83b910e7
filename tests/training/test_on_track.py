"""The band beside the val loss of the faithful run, and silence beside any other."""

from __future__ import annotations

from argparse import Namespace

import pytest

import train_gpt
from gpt_model import GPTConfig
from utils.training.on_track import band, is_faithful_recipe, verdict

SHARDS = [[f"edufineweb_train_{i:06d}.npy", 100_000_000] for i in range(1, 99)]
FINEWEB = {"shards": [*SHARDS, ["edufineweb_train_000099.npy", 53_989_101]]}


def faithful_args(**changes) -> Namespace:
    return Namespace(**{**vars(train_gpt.read_arguments(["--preset", "gpt2"])[0]), **changes})


@pytest.mark.parametrize(
    ("step", "val_loss", "expected"),
    [
        (250, 6.163, "OK (band of healthy runs 6.02-6.31)"),
        (250, 6.430, "HIGH (band of healthy runs 6.02-6.31)"),
        (1000, 4.153, "OK (band of healthy runs 4.09-4.22)"),
        (1000, 4.880, "HIGH (band of healthy runs 4.09-4.22)"),
        (1250, 3.952, "OK (band of healthy runs 3.90-4.00)"),
        (19073, 3.40, "HIGH (band of healthy runs 3.00-3.08)"),
        (19073, 2.90, "LOW (band of healthy runs 3.00-3.08)"),
    ],
)
def test_published_runs_get_their_verdict(step, val_loss, expected):
    """The healthy curve is OK at every published point, the runs known as broken are HIGH."""
    assert verdict(step, val_loss, True) == expected


def test_between_published_points_the_band_is_called_approximate():
    """Half-way in log(step) it is the mean of its ends, wider by 0.05 on each side."""
    low, high, approximate = band(500)  # 250 and 1000, in the middle
    assert (low, high) == pytest.approx(((6.02 + 4.09) / 2 - 0.05, (6.31 + 4.22) / 2 + 0.05))
    assert approximate and "approximate band" in verdict(5000, 3.4, True)
    lows = [band(step)[0] for step in range(1500, 19073, 250)]
    assert lows == sorted(lows, reverse=True)


@pytest.mark.parametrize("step", [0, 1, 249, 19074, 30000])
def test_nothing_is_said_where_nothing_is_known(step):
    """Before the first published point and after the last."""
    assert verdict(step, 10.0, True) is None


def test_nothing_is_said_of_other_recipes():
    """The same numbers mean nothing there."""
    assert verdict(1000, 4.153, False) is None


def test_the_constants_of_the_script_are_the_faithful_recipe():
    """Preset gpt2 on all the shards has a band; with the vocabulary padded or not."""
    for vocab_size in (50304, 50257):
        assert is_faithful_recipe(faithful_args(), GPTConfig(vocab_size=vocab_size), FINEWEB)


@pytest.mark.parametrize(
    "changes",
    [
        *({"max_lr": 1e-3}, {"max_steps": 5000}, {"warmup_steps": 0}, {"total_batch_tokens": 65536}),
        *({"weight_decay": 0.0}, {"grad_clip": 0.5}, {"min_lr": 0.0}, {"init_from": "gpt2"}),
    ],
)
def test_another_setting_is_another_recipe(changes):
    """Each of them moves the curve."""
    assert not is_faithful_recipe(faithful_args(**changes), GPTConfig(vocab_size=50304), FINEWEB)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        (GPTConfig(n_layer=24, n_head=16, n_embd=1024), FINEWEB),
        (GPTConfig(), {"shards": SHARDS[:10]}),
        (GPTConfig(), {"shards": [["wikipedia_train_000001.npy", 9_854_000_000]]}),
        (GPTConfig(), {"bytes": 1115394, "sha256": "x"}),
    ],
)
def test_another_model_or_other_data_is_another_recipe(config, data):
    """A larger model, a tenth of the shards, other shards, a text file."""
    assert not is_faithful_recipe(faithful_args(), config, data)


def test_what_does_not_move_the_curve_does_not_matter():
    """Micro-batch, dtype and seed are free."""
    args = faithful_args(micro_batch=8, dtype="float32", seed=7)
    assert is_faithful_recipe(args, GPTConfig(), FINEWEB)
