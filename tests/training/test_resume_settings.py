"""Resumed with other settings or other data: refused where it would be another run, else listed and used."""

from __future__ import annotations

import pytest
import torch

from tests.small_runs import assert_same_losses, train
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_pictures")  # drawing takes longer than the run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-layer", "1", "--n-embd", "32"], "has n_layer=2, this run asks n_layer=1; has n_embd=16"),
        (["--seq-len", "8"], "seq_len=16, this run has seq_len=8"),
        (["--seed", "1"], "seed=1337, this run has seed=1"),
        (["--shuffle", "off"], "shuffle=on, this run has shuffle=off"),
        (["--tokenizer", "gpt2", "--n-embd", "16"], "another tokenizer"),
    ],
)
def test_what_would_be_another_run_is_refused(flags, message, stopped_run, short_text):
    """Every differing key in one message, and nothing is touched."""
    before = {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")}
    with pytest.raises(UserError, match=message):
        train(short_text, stopped_run, "--resume", *flags)
    assert {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")} == before


def test_other_data_is_refused(stopped_run, short_text, tmp_path):
    """Another text of the same length."""
    other = tmp_path / "other.txt"
    other.write_text(short_text.read_text().replace("dog", "cow", 1).replace("cow", "god", 1))
    with pytest.raises(UserError, match=r"made on other data.*before: sha256 \w+.*; now: sha256 \w+"):
        train(other, stopped_run, "--resume")


def test_changed_settings_are_listed_and_used(stopped_run, short_text, capsys):
    """The run goes on with the new values from the windows already trained."""
    flags = ("--max-lr", "5e-3", "--total-batch-tokens", "128")
    assert train(short_text, stopped_run, "--resume", *flags) == 0
    out = capsys.readouterr().out
    assert "settings have changed: total_batch_tokens 64 -> 128, max_lr 0.01 -> 0.005" in out
    state = torch.load(stopped_run / "optimizer_00020.pt", weights_only=True)
    assert state["windows"] == 9 * 4 + 11 * 8
    assert state["optimizer"]["param_groups"][0]["lr"] <= 5e-3


def test_another_micro_batch_changes_rounding_only(stopped_run, short_text, undisturbed):
    """The same windows in each step, the losses to 1e-4."""
    assert train(short_text, stopped_run, "--resume", "--micro-batch", "4") == 0
    assert_same_losses(stopped_run, undisturbed)
