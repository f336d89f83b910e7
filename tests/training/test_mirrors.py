"""The mirrors of the metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import train_gpt
from utils.command_line import UserError
from utils.training import flags
from utils.training.log_directory import LOGS
from utils.training.run_log import RunLog


class FakeWriter:
    """The methods of TensorBoard's SummaryWriter that are used; with `broken` every write fails."""

    broken = False
    last: FakeWriter

    def __init__(self, log_dir: str, purge_step: int | None = None):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        FakeWriter.last = self

    def add_text(self, *arguments: object) -> None:
        """Ignored."""

    def add_scalar(self, *arguments: object) -> None:
        if FakeWriter.broken:
            raise ConnectionError("no route to host\nand more")
        self.scalars.append(arguments)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch) -> type[FakeWriter]:
    """Replaces torch.utils.tensorboard."""
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter)
    )
    monkeypatch.setattr(FakeWriter, "broken", False)
    return FakeWriter


def test_a_mirror_receives_every_number_at_its_step(tmp_path, tensorboard):
    """Numbers only, as kind/name; after a resume, events beyond the checkpoint are hidden."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 7, "settings": {"max_lr": 1}}, tensorboard=True, wandb=False)
        log.add_record("train", step=7, loss=1.5, mfu=None, note="x", flag=True)
        log.add_record("run", parameters="5")
    assert tensorboard.last.scalars == [("train/loss", 1.5, 7)] and tensorboard.last.closed
    assert tensorboard.last.purge_step == 7 and tensorboard.last.log_dir == str(tmp_path / "tensorboard")


def test_a_service_that_fails_is_one_warning(tmp_path, tensorboard, capsys):
    """At the first failed write; then the mirror is left alone, and the caller sees no exception."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {}}, tensorboard=True, wandb=False)
        tensorboard.broken = True
        for step in range(5):
            log.add_record("train", step=step, loss=1.0)
    warning = "warning: TensorBoard failed: no route to host; continuing without it\n"
    assert capsys.readouterr().err == warning and log.mirrors == []


def test_wandb_continues_the_same_run_after_a_resume(tmp_path, monkeypatch, capsys):
    """With the id of the first start; a start without a network is one warning."""
    calls, logged = [], []

    def init(**options: Any) -> types.SimpleNamespace:
        calls.append(options)
        if len(calls) == 3:
            raise TimeoutError("cannot reach api.wandb.ai")
        return types.SimpleNamespace(id="abc123", log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start_step in (0, 10, 10):
        with RunLog(tmp_path, is_master=True) as log:
            log.log_start({"step": start_step, "settings": {"seed": 1}}, tensorboard=False, wandb=True)
            log.add_record("val", step=start_step, loss=2.0)
    assert [call["id"] for call in calls] == [None, "abc123", "abc123"]
    assert logged == [{"val/loss": 2.0, "step": 0}, {"val/loss": 2.0, "step": 10}]
    warning = "warning: wandb failed: cannot reach api.wandb.ai; continuing without it\n"
    assert capsys.readouterr().err == warning


def test_a_run_writes_to_its_mirrors(text_file, tmp_path, tensorboard, monkeypatch):
    """With --tensorboard every update and every validation arrives."""
    monkeypatch.setattr(flags, "find_spec", lambda name: True)
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --seq-len 16 --micro-batch 2 --total-batch-tokens 32"
    argv = f"--preset char --device cpu {sizes} --max-steps 2 --val-every 2 --sample-every 0".split()
    argv += ["--data", str(text_file), "--log-dir", str(tmp_path / "log"), "--tensorboard"]
    assert train_gpt.main(argv) == 0
    steps = {(name, step) for name, _, step in tensorboard.last.scalars}
    assert {("train/loss", 0), ("train/loss", 1), ("val/loss", 0), ("val/loss", 2)} <= steps
    assert tensorboard.last.closed


def test_a_missing_package_is_an_error_before_anything_starts(monkeypatch):
    """The hint names what to install; without the flags no package is looked for."""
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    flags.check_training_settings(train_gpt.read_arguments(["--preset", "tiny"])[0], 1)
    for name in ("tensorboard", "wandb"):
        args, _ = train_gpt.read_arguments(["--preset", "tiny", f"--{name}"])
        with pytest.raises(UserError, match=f"--{name} needs the package {name}") as caught:
            flags.check_training_settings(args, 1)
        assert caught.value.hint == f"pip install {name}"


def test_without_flags_there_is_no_mirror(tmp_path):
    """No package is imported and no file appears beside the logs."""
    with RunLog(tmp_path, is_master=True) as log:
        log.log_start({"step": 0, "settings": {}}, tensorboard=False, wandb=False)
        log.add_record("train", step=0, loss=1.0)
    assert log.mirrors == [] and {path.name for path in tmp_path.iterdir()} == set(LOGS)
