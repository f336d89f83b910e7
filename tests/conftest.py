"""Shared by the tests: small models, small texts, and scripts started as a user would, without a network."""

from __future__ import annotations

import fcntl
import http.server
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gpt_model import GPT, GPTConfig
from tests.small_runs import TEXT, Killed, kill_in_update, train
from utils import console
from utils.training import run_log

ROOT = Path(__file__).resolve().parent.parent

# Marks by module: parts of the suite that one may want to run alone, or leave out.
MARKS = {
    "core": ("gpt_model", "data_loader", "fused_loss", "decoding", "dropout", "optimizers", "guards", "state")
    + ("resume", "resume_settings", "checkpoint", "tokenization", "tokenizer"),
    "distributed": ("distributed", "jobs"),
    "benchmark": ("benchmarks",),
}

# Every proxy points at a closed port of this machine, so each use of the network fails at once.
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

# Tests interrupt processes: they must not inherit an ignored Ctrl-C, as from a job in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # these models are too small to profit from more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the marks of `MARKS`."""
    for item in items:
        for mark, modules in MARKS.items():
            if item.path.stem.removeprefix("test_") in modules:
                item.add_marker(mark)


def run(
    *arguments: str | Path | int, cwd: Path = ROOT, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` without a network, and returns the process with its output as text.

    Without announcements of slow work, which depend on how busy the machine is.
    """
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    process.stderr = re.sub(r"^.* \.\.\.\n", "", process.stderr, flags=re.MULTILINE)
    return process


def run_in_terminal(*arguments: str | Path | int, columns: int = 80, **environment: str) -> tuple[int, str]:
    """Runs `python ARGUMENTS` without a network in a terminal; returns exit code and what it shows."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = dict(stdin=subprocess.DEVNULL, stdout=side, stderr=side)
    variables = {**os.environ, **OFFLINE, "TERM": "xterm", **environment}
    variables.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=variables, **streams)
    os.close(side)
    output = b""
    with suppress(OSError):  # EIO: the process has ended
        while data := os.read(terminal, 1 << 16):
            output += data
    os.close(terminal)
    return process.wait(timeout=60), output.decode().replace("\r\n", "\n")


def tiny_config(**changes: int) -> GPTConfig:
    """A model of a few thousand parameters."""
    return GPTConfig(**{**dict(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32), **changes})


def tiny_model(seed: int = 0, **changes: int) -> GPT:
    """A tiny model with weights large enough that its predictions differ from token to token."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(autouse=True)
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPU of a machine that has one, except from test_cuda.py: all tests run alike everywhere."""
    if request.path.name != "test_cuda.py":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def no_announcements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work may take long on a busy machine; test_console.py and test_announcements.py test what is said."""
    monkeypatch.setattr(console, "LONG_SECONDS", 3600.0)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A repetitive text of a few thousand words."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 300, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def short_text(tmp_path_factory) -> Path:
    """A text whose epoch is 14.25 steps of a run with `RESUMABLE`."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 16, encoding="utf-8")
    return path


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Draws no curves.png: that takes longer than a small run. test_curves.py tests the drawing."""
    monkeypatch.setattr(run_log, "plot_run", lambda log_dir: None)


@pytest.fixture(scope="session")
def undisturbed(short_text, tmp_path_factory) -> Path:
    """The log directory of an uninterrupted run with `RESUMABLE`."""
    log_dir = tmp_path_factory.mktemp("undisturbed") / "log"
    assert train(short_text, log_dir) == 0
    return log_dir


@pytest.fixture
def stopped_run(short_text, tmp_path, monkeypatch) -> Path:
    """The log directory of a run that was killed at step 11, with checkpoints of steps 6 and 9."""
    with monkeypatch.context() as patch:
        kill_in_update(patch, 11)
        with pytest.raises(Killed):
            train(short_text, tmp_path)
    return tmp_path


class FileServer(http.server.ThreadingHTTPServer):
    """An HTTP server on loopback: `files` maps paths to contents, `num_requests` counts requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.files: dict[str, bytes] = {}
        self.num_requests = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Answers requests to a FileServer; `/invalid` is answered with bytes that are no HTTP."""

    server: FileServer

    def do_GET(self) -> None:
        self.server.num_requests += 1
        if self.path == "/invalid":
            self.wfile.write(b"hello, this is no HTTP\r\n\r\n")
            return
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()  # no Content-Length: an incomplete answer looks complete
        self.wfile.write(content or b"<html>not found</html>")

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


@pytest.fixture
def server(monkeypatch) -> Iterator[FileServer]:
    """A running FileServer, reached without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = FileServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
