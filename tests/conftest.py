"""What several tests share: small models, small texts, and scripts run as a user would, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt_model import GPT, GPTConfig
from tests.small_runs import TEXT, Killed, kill_in, train
from utils.training import run_log

ROOT = Path(__file__).resolve().parent.parent

# Every proxy points at a closed port of this machine: what asks for the network fails at once.
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

torch.set_num_threads(1)  # the models here are too small for more to pay


def run(*arguments, cwd: Path = ROOT, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` without a network and returns it with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def tiny_config(**changes) -> GPTConfig:
    """A model of a few thousand parameters."""
    return GPTConfig(**{**dict(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32), **changes})


def tiny_model(seed: int = 0, **changes) -> GPT:
    """A tiny model with weights large enough that its predictions differ from token to token."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of a few thousand words with something to learn in it."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 300, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def short_text(tmp_path_factory) -> Path:
    """A text of fourteen and a quarter steps an epoch for a run with `RESUMABLE`."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    return path


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than a small run, and test_files.py draws."""
    monkeypatch.setattr(run_log, "plot_run", lambda log_dir: None)


@pytest.fixture(scope="session")
def undisturbed(short_text, tmp_path_factory) -> Path:
    """The log directory of a run that nothing stopped."""
    log_dir = tmp_path_factory.mktemp("undisturbed") / "log"
    assert train(short_text, log_dir) == 0
    return log_dir


@pytest.fixture
def stopped_run(short_text, tmp_path, monkeypatch) -> Path:
    """A run killed in step 11, with checkpoints of steps 6 and 9 to resume from."""
    with monkeypatch.context() as patch:
        kill_in(patch, "update", lambda args: args[2].step == 11)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    return tmp_path
