"""Checkpoints: which ones are kept, how large they are, and what loading them requires."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, tiny_model
from utils import __version__
from utils.command_line import UserError
from utils.weights.checkpoint import (
    checkpoints_to_keep,
    load_checked,
    load_pair,
    model_content,
    model_path,
    newest_complete,
    pair_bytes,
    prune,
    save_pair,
    state_path,
    step_of,
)

FIXTURE = ROOT / "tests" / "fixtures" / "checkpoint_v1"


def touch_pair(log_dir: Path, step: int) -> Path:
    """Creates empty files of a checkpoint; returns the model file."""
    path = model_path(log_dir, step)
    path.touch()
    state_path(path).touch()
    return path


def kept(log_dir: Path) -> tuple[set[int], set[int]]:
    """Steps of the model files and of the optimizer files in a folder."""
    return tuple({step_of(path) for path in log_dir.glob(f"{name}_*.pt")} for name in ("model", "optimizer"))


@pytest.mark.parametrize(
    ("keep_pairs", "keep_every", "final_step", "expected"),
    [
        (2, 60, 100, ({60, 90, 100}, {90, 100})),  # the milestone 60 is not among the newest two
        (2, 0, 100, ({90, 100}, {90, 100})),
        (1, 45, 60, ({60, 90, 100}, {100})),
        (9, 60, 100, ({30, 60, 90, 100}, {30, 60, 90, 100})),
    ],
)
def test_the_newest_pairs_the_milestones_and_the_final_model_are_kept(
    keep_pairs, keep_every, final_step, expected
):
    """A milestone keeps its model and loses its optimizer file once it is not among the newest."""
    assert checkpoints_to_keep([30, 60, 90, 100], keep_pairs, keep_every, final_step) == expected


@pytest.mark.parametrize(("max_steps", "every"), [(20, 3), (20, 5), (7, 1), (20, 50)])
def test_pruning_after_every_save_leaves_what_the_rule_predicts(max_steps, every, tmp_path):
    """So a dry run may apply the rule once to all steps that a run will save."""
    steps = sorted({max_steps, *range(every, max_steps, every)})
    for number, (keep_pairs, keep_every) in enumerate(itertools.product((1, 2, 5), (0, 2, 6, 7))):
        log_dir = tmp_path / str(number)
        log_dir.mkdir()
        for step in steps:
            touch_pair(log_dir, step)
            prune(log_dir, keep_pairs, keep_every, max_steps, None)
        assert kept(log_dir) == checkpoints_to_keep(steps, keep_pairs, keep_every, max_steps)


def test_the_checkpoint_resumed_from_is_kept(tmp_path, monkeypatch):
    """Both files, also where --resume names it relative to the working directory."""
    for step in (10, 20, 30, 40):
        touch_pair(tmp_path, step)
    monkeypatch.chdir(tmp_path)
    prune(tmp_path, 1, 0, 100, Path("model_00020.pt"))
    assert kept(tmp_path) == ({20, 40}, {20, 40})


def test_pruning_touches_complete_pairs_and_orphaned_optimizer_files_only(tmp_path):
    """Models without an optimizer file and files of other names stay; an optimizer file alone is useless."""
    model_path(tmp_path, 10).touch()
    state_path(model_path(tmp_path, 50)).touch()
    for name in ("model_best.pt", "optimizer_best.pt"):
        (tmp_path / name).touch()
    for step in (20, 30):
        touch_pair(tmp_path, step)
    prune(tmp_path, 1, 0, 100, None)
    assert kept(tmp_path) == ({-1, 10, 30}, {-1, 30})


def test_a_checkpoint_has_the_predicted_size(tmp_path):
    """The formula gives the bytes of both files, but for names and headers."""
    model = tiny_model(n_embd=128)
    optimizer = model.configure_optimizers(0.1, 1e-3, "cpu", is_master_process=False)
    model(*torch.randint(97, (2, 1, 16)))[1].backward()
    optimizer.step()
    content = model_content(model, vars(model.config).copy(), 1, None, {"name": "gpt2"})
    path = save_pair(tmp_path, 1, content, {"optimizer": optimizer.state_dict()})
    sizes = pair_bytes(model.num_parameters(), 2 * model.num_parameters())
    for file, predicted in zip((path, state_path(path)), sizes):
        assert predicted < file.stat().st_size < 1.05 * predicted


def test_a_checkpoint_comes_back_with_its_fields(tmp_path):
    """By path and as the newest: the path and the content of both files."""
    model = tiny_model()
    state = torch.load(FIXTURE / "optimizer_00009.pt", weights_only=True)
    content = model_content(model, vars(model.config).copy(), 7, 1.5, state["tokenizer"])
    del state["save_id"]  # which is the pair's own
    path = save_pair(tmp_path, 7, content, {**state, "step": 7, "windows": 448})
    for checkpoint in (load_pair(path), newest_complete(tmp_path)):
        assert checkpoint.path == path
        assert checkpoint.model["step"] == 7 and checkpoint.state["windows"] == 448
        assert checkpoint.model["versions"]["mini-gpt"] == __version__


def test_both_files_are_flushed_before_the_first_appears(tmp_path, monkeypatch):
    """Then the optimizer file appears, and the folder is flushed before the model file appears."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("flush"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    save_pair(tmp_path, 7, {}, {})
    assert calls == ["flush", "flush", "optimizer_00007.pt", "flush", "model_00007.pt", "flush"]


def test_a_file_that_reads_back_damaged_replaces_nothing(tmp_path, monkeypatch):
    """The old pair stays as it was, and no temporary file is left."""
    path = save_pair(tmp_path, 7, {"step": 7}, {})
    before = path.read_bytes()
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda archive: "data/0")
    with pytest.raises(
        OSError, match="model_00007.pt was not written correctly: checksum mismatch in data/0"
    ):
        save_pair(tmp_path, 7, {"step": 8}, {})
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"model_00007.pt", "optimizer_00007.pt"}


def test_an_old_torch_loads_no_checkpoint(tmp_path, monkeypatch):
    """Below 2.10 weights_only=True is known to run code, so torch.load is not even called."""
    torch.save({"a": 1}, tmp_path / "a.pt")
    assert load_checked(tmp_path / "a.pt") == {"a": 1}
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("called"))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"torch 2.9.1\+cpu is too old"):
        load_checked(tmp_path / "a.pt")
