"""Builds from the hub, here a local server that fails as the real one does."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
import time

import numpy as np
import pytest

from tests.conftest import run
from tests.shards.test_build import (
    checksums,
    expected_tokens,
    make_documents,
    tokens_of,
    write_parquet,
)
from utils.shards.format import find_all_shards
from utils.shards.manifest import Manifest


class Hub(http.server.BaseHTTPRequestHandler):
    """The few addresses of the hub that a build requests. `trouble`: the failure of each request."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    trouble: list[str] = []
    requests: list[str] = []
    commit = "a" * 40

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        trouble = self.trouble.pop(0) if self.trouble else ""
        if trouble == "drop":
            self.close_connection = True
            self.connection.close()
        elif trouble:
            self.answer(int(trouble), b"trouble")
        elif self.path.startswith("/api/datasets/some/data"):
            self.answer(200, json.dumps(self.info()).encode(), Content_Type="application/json")
        elif self.path.startswith(f"/datasets/some/data/resolve/{self.commit}/"):
            name = self.path.split(self.commit + "/")[1]
            self.answer(200, self.files[name], ETag=f'"{name}"', X_Repo_Commit=self.commit)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.files.items()
        ]
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def info(self) -> dict:
        configs = [{"config_name": "small", "data_files": [{"split": "train", "path": "sample/S/*"}]}]
        return {
            "id": "some/data",
            "sha": self.commit,
            "siblings": [{"rfilename": name} for name in [*self.files, "README.md"]],
            "cardData": {"configs": configs},
        }

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A data set of three files, one outside the subset, and a function that builds from it in a process."""
    pytest.importorskip("huggingface_hub")
    documents = make_documents(90)
    Hub.trouble, Hub.requests, Hub.files = [], [], {}
    for name, start in (("sample/S/001.parquet", 30), ("sample/S/000.parquet", 0), ("other/000.parquet", 60)):
        Hub.files[name] = write_parquet(tmp_path / "f.parquet", documents[start : start + 30]).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Waits are shortened in the process: those of the client add up to half a minute.
    code = "import sys, time; real = time.sleep; time.sleep = lambda s: real(min(s, 0.01)); "
    code += "import build_fineweb_edu_shards as b; sys.exit(b.run_script(b.main))"

    def start(*flags: object, **environment: str) -> subprocess.CompletedProcess:
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        common = ["--dataset", "some/data", "--subset", "small", "--shard-tokens", 2000, "--num-workers", 1]
        return run("-c", code, *common, "--output-dir", tmp_path / "out", *flags, **settings)

    yield start, documents[:60], tmp_path / "out"
    server.shutdown()
    server.server_close()


def test_temporary_failures_are_retried_and_files_come_in_order(hub):
    """429, 503 and dropped connections; the revision is pinned; the rerun sends no request."""
    start, documents, out = hub
    Hub.trouble = ["429", "", "503", "drop", ""]
    result = start()
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens_of(out), expected_tokens(documents))
    source = Manifest.load(out).settings["source"]
    assert source["revision"] == Hub.commit
    assert [name for name, _ in source["files"]] == ["sample/S/000.parquet", "sample/S/001.parquet"]
    Hub.requests.clear()
    assert "nothing to do" in start().stdout
    assert not Hub.requests


@pytest.mark.slow
def test_a_permanent_failure_keeps_finished_shards_and_a_rerun_completes(hub):
    """The second file cannot be downloaded: exit code 1 with the next command."""
    start, documents, out = hub
    assert start("--max-shards", 2).returncode == 0
    progress = checksums(out)
    Hub.trouble = ["503"] * 500
    result = start()
    assert result.returncode == 1, result.stderr
    assert "error: the hub keeps failing" in result.stderr and "run the same command again" in result.stderr
    assert progress.items() <= {**checksums(out), "manifest.json": progress["manifest.json"]}.items()
    Hub.trouble = []
    result = start()
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens_of(out), expected_tokens(documents))


def test_no_network_and_no_such_data_set_are_user_errors(hub):
    """Offline mode, dead connections, a data set or subset that does not exist: an error with a hint."""
    start, _, out = hub
    started = time.perf_counter()
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = start(**environment)
        assert result.returncode == 2, result.stderr
        assert "no network" in result.stderr and "hint: run once with a network" in result.stderr
    assert time.perf_counter() - started < 60
    assert "cannot get some/none" in start("--dataset", "some/none").stderr
    assert "its subsets: small" in start("--subset", "large").stderr
    assert not find_all_shards(out)
