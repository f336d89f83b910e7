"""Checkpoints, downloads, logs and plots: what is written is whole, what is read is checked."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from gpt_model import GPT
from tests.conftest import run, tiny_model
from utils.distributed import Distributed
from utils.download import download
from utils.errors import UserError
from utils.training import data_source as datasets
from utils.training.log_directory import cut_logs_back, locked
from utils.training.plotting import plot_run, read_log, smoothed
from utils.training.run_log import RunLog, Speedometer, format_duration
from utils.weights.checkpoint import (
    load_model_file,
    model_content,
    newest_model_file,
    save_atomically,
    save_pair,
)

ALONE = Distributed(torch.device("cpu"))


def saved(path: Path) -> GPT:
    model = tiny_model()
    content = model_content(model, vars(model.config).copy(), 7, 1.5, {"name": "char", "characters": "abc"})
    save_pair(path.parent, 7, content, {"step": 7})
    return model


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """Weights bit for bit, sizes, tokenizer; plain values only, so the safe loader reads it; still tied."""
    model = saved(tmp_path / "model_00007.pt")
    again = GPT.from_checkpoint(tmp_path / "model_00007.pt")
    assert all(torch.equal(again.state_dict()[n], p) for n, p in model.state_dict().items())
    assert again.config == model.config and again.tokenizer_state == {"name": "char", "characters": "abc"}
    assert again.transformer.wte.weight is again.lm_head.weight
    content = torch.load(tmp_path / "model_00007.pt", weights_only=True)
    assert (content["step"], content["val_loss"]) == (7, 1.5)
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in content["model"])
    size = (tmp_path / "model_00007.pt").stat().st_size
    assert size < 1.2 * 4 * model.num_parameters() + 20_000  # the tied tensor is stored once


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """An error while writing, and the file of before is untouched, and nothing else lies around."""
    path = tmp_path / "model_00007.pt"
    saved(path)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_atomically({path: {"a": 1}})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_00007.pt", "optimizer_00007.pt"]


def test_a_file_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    """fsync(file), rename, fsync(folder): a power cut at any moment leaves the old file or the new one."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    save_atomically({tmp_path / "x.pt": {"a": 1}})
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_called_damaged(tmp_path, share):
    """A damaged file is said to be one, whatever torch would say of it."""
    path = tmp_path / "model_00007.pt"
    saved(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


def test_a_flipped_byte_is_found(tmp_path):
    """torch.load would give wrong weights without a word; the archive's checksum does not."""
    path = tmp_path / "model_00007.pt"
    saved(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


@pytest.mark.parametrize(("offset", "mask"), [(46, 0x80), (8, 0x01), (38, 0x10)])
def test_a_flipped_bit_in_a_header_is_found(tmp_path, offset, mask):
    """In the name, the flag of encryption, and the mark of a folder, which no checksum covers."""
    path = tmp_path / "model_00007.pt"
    saved(path)
    whole = path.read_bytes()
    entry = whole.find(b"PK\x01\x02")
    while entry >= 0:
        data = bytearray(whole)
        data[entry + offset] ^= mask
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            load_model_file(path)
        entry = whole.find(b"PK\x01\x02", entry + 1)


def test_a_damaged_end_of_the_archive_is_found(tmp_path):
    """Where the directory's place points before the file's beginning: no fault of the disk's."""
    path = tmp_path / "model_00007.pt"
    saved(path)
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x06\x06") + 48] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """The system's reason is given: another owner, a dying disk."""
    path = tmp_path / "model_00007.pt"
    saved(path)

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", refused)
    with pytest.raises(UserError, match="cannot read checkpoint .*model_00007.pt: Permission denied"):
        load_model_file(path)


def test_a_full_disk_is_found_before_a_run(tmp_path, monkeypatch):
    """Unless a torn file of a killed run fills it: that is swept before anything is written."""
    real_write, torn = Path.write_text, tmp_path / ".model_00021.pt.tmp-99999"
    torn.write_text("most of the disk")

    def full(path, text, **options):
        if torn.exists() or path.exists():
            raise OSError(28, "No space left on device")
        return real_write(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    with locked(tmp_path):
        assert not torn.exists()
    monkeypatch.setattr("utils.training.log_directory.sweep", lambda log_dir: torn.touch())
    with pytest.raises(UserError, match="cannot write to log dir .*: No space left on device") as caught:
        with locked(tmp_path):
            pass
    assert caught.value.hint == "make room on the disk"


def test_a_picture_that_cannot_be_drawn_is_said_once(tmp_path, capsys):
    """And named: a full disk would else fill the console."""

    def broken(log_dir):
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path, True) as log:
        for _ in range(3):
            log.try_to("curves.png", broken)
    said = capsys.readouterr().out
    assert said == "warning: no curves.png: [Errno 28] No space left on device\n"


def test_code_in_a_checkpoint_is_refused(tmp_path):
    """A pickle that would run a command does not, and the message names it and offers no way around."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'PWNED'}",)

    torch.save({"format": "minigpt-ckpt", "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refusing to load") as caught:
        load_model_file(tmp_path / "evil.pt")
    assert "system" in str(caught.value) and "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


def test_an_old_torch_is_warned_of(tmp_path, monkeypatch, capsys):
    """Below 2.10 the safe loader has known holes: a line says so for files that may be other people's."""
    saved(tmp_path / "model_00007.pt")
    for version, warned in (("2.5.1+cu121", True), ("2.9.0", True), ("2.10.0", False), ("2.13.0+cpu", False)):
        monkeypatch.setattr(torch, "__version__", version)
        load_model_file(tmp_path / "model_00007.pt")
        assert ("known holes in weights_only" in capsys.readouterr().out) is warned


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"format": "other"}])
def test_a_foreign_file_is_no_checkpoint(tmp_path, content):
    """Other tensors in a valid archive are refused by name."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model_file(tmp_path / "x.pt")


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path):
    """What a later format means is not guessed."""
    torch.save({"format": "minigpt-ckpt", "version": 2, "config": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"format version 2 \(expected 1\)"):
        load_model_file(tmp_path / "x.pt")


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path):
    """By number, not by name: 100000 comes after 99999."""
    for name in ("model_00010.pt", "model_99999.pt", "model_100000.pt", "model_old.pt"):
        (tmp_path / name).touch()
    assert newest_model_file(tmp_path).name == "model_100000.pt"
    assert newest_model_file(tmp_path / "nowhere") is None


@pytest.fixture
def server():
    """An HTTP server on loopback; `server.files` maps paths to bodies, `server.gets` counts requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.gets += 1
            if self.path == "/chatter":
                return self.wfile.write(b"hello, this is no HTTP\r\n\r\n")
            body = self.server.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()  # no Content-Length: a short body looks complete
            self.wfile.write(body or b"<html>not found</html>")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.gets = {}, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_appears_when_it_is_right(server, tmp_path):
    """The file has the bytes; half of it, an error page and an answer that is no HTTP change nothing."""
    body = b"a text" * 1000
    server.files = {"/good": body, "/short": body[:100]}
    digest = hashlib.sha256(body).hexdigest()
    download(f"{server.url}/good", tmp_path / "good", digest, len(body))
    assert (tmp_path / "good").read_bytes() == body
    for path in ("/short", "/missing", "/chatter"):
        with pytest.raises(OSError):
            download(server.url + path, tmp_path / "good", digest, len(body))
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    assert (tmp_path / "good").read_bytes() == body


def test_tiny_shakespeare_is_fetched_once_and_then_used(server, tmp_path, monkeypatch):
    """Without data: a download to input.txt; the second time the file is there."""
    body = b"First Citizen:\nSpeak, speak.\n" * 100
    server.files = {"/input.txt": body}
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE_URL", f"{server.url}/input.txt")
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE_BYTES", len(body))
    monkeypatch.setattr(datasets, "TEXT_PATH", tmp_path / "input.txt")
    monkeypatch.setattr(datasets, "SHARDS_DIR", tmp_path / "shards")
    source = datasets.fetch(datasets.choose_source(None), ALONE)
    assert (source.kind, source.path) == ("text", tmp_path / "input.txt")
    assert datasets.fetch(datasets.choose_source(None), ALONE).reason == "no shards in shards/"
    assert server.gets == 1


def test_without_a_network_python_itself_is_the_text(tmp_path, monkeypatch, capsys):
    """The quick start always has something to train on, and says what."""
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(datasets, "TEXT_PATH", tmp_path / "input.txt")
    monkeypatch.setattr(datasets, "SHARDS_DIR", tmp_path / "shards")
    source = datasets.fetch(datasets.choose_source(None), ALONE)
    assert source.kind == "pydoc" and "no network" in source.reason
    assert "cannot download Tiny Shakespeare" in capsys.readouterr().out
    tokenizer, train, val = datasets.open_streams(source, {"name": "gpt2"}, 64, ALONE)
    assert "pydoc_data.topics of Python 3" in train.name and train.num_tokens > 50_000
    assert "statement" in tokenizer.decode(train.read(0, 20_000))
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_data(tmp_path, monkeypatch):
    """--data, then shards, then input.txt, then a download."""
    monkeypatch.setattr(datasets, "TEXT_PATH", tmp_path / "input.txt")
    monkeypatch.setattr(datasets, "SHARDS_DIR", tmp_path)
    assert datasets.choose_source(None).kind == "download"
    (tmp_path / "input.txt").touch()
    assert datasets.choose_source(None).kind == "text"
    (tmp_path / "edufineweb_train_000001.npy").touch()
    assert datasets.choose_source(None).kind == "shards"
    assert datasets.choose_source("other.txt").path == Path("other.txt")
    assert datasets.choose_source(str(tmp_path)).kind == "shards"


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    """A full disk ends the log, not the run."""
    with RunLog(tmp_path, True) as log:
        log.log_file.close()
        log.log_file = open("/dev/full", "w")
        for step in range(3):
            log.result(step, "train", 1.0)
    assert capsys.readouterr().out.count("warning: cannot write /dev/full: No space left on device") == 1


def test_logs_are_cut_back_to_the_checkpoint_or_to_whole_lines(tmp_path, capsys):
    """What came later goes to the stale file; of a log that has lost lines, so does the torn one."""
    (tmp_path / "log.txt").write_text("0 val 1\n1 val 2\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n{torn")
    cut_logs_back(tmp_path, {"log.txt": 8, "metrics.jsonl": 1200, "samples.txt": 5})
    assert (tmp_path / "log.txt").read_text() == "0 val 1\n"
    assert (tmp_path / "log.txt.stale").read_text() == "1 val 2\n"
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert (tmp_path / "metrics.jsonl.stale").read_text() == "{torn"
    said = capsys.readouterr().out
    assert "metrics.jsonl has 8 bytes and had 1,200 at the checkpoint" in said and "log.txt" not in said
    assert "samples.txt has 0 bytes" in said


def test_other_ranks_write_nothing(tmp_path, capsys):
    """Only rank 0 has a log."""
    with RunLog(tmp_path / "log", False) as log:
        log.say("x")
        log.result(0, "train", 1.0)
        log.record("train", step=0)
        log.sample(0, ["x"])
    assert capsys.readouterr().out == "" and not (tmp_path / "log").exists()


def test_a_plot_from_the_log_alone(tmp_path):
    """Losses only, and with HellaSwag lines a third panel; a torn last line is left out."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "train", "step": s, "lr": 0.1}) + "\n" for s in (0, 1))
    )
    (tmp_path / "log.txt").write_text("0 val 10.8\n0 train 10.8\n1 train 9.0\n2 val 8.5\n3 trai")
    assert read_log(tmp_path / "log.txt") == {"val": ([0, 2], [10.8, 8.5]), "train": ([0, 1], [10.8, 9.0])}
    without = plot_run(tmp_path).read_bytes()
    with open(tmp_path / "log.txt", "w") as file:
        file.write("0 val 10.8\n0 hella 0.25\n0 train 10.8\n1 hella 0.26\n")
    assert plot_run(tmp_path).read_bytes() != without
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.txt", "metrics.jsonl"]


def test_smoothing_has_no_bias_towards_zero():
    """A constant stays what it is from the first value on."""
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


def test_speeds_are_tokens_over_seconds():
    """Tokens a second, share of the peak, and what is left at the mean speed."""
    meter = Speedometer(tokens_per_step=1000, max_steps=10, flops_per_step=2e9, peak_flops=1e10)
    assert meter.measure(0, 0.5) == (0.5, 2000.0, 0.4, 4.5)
    assert meter.measure(1, 1.5).eta == 8.0
    assert Speedometer(1000, 10, 2e9, None).measure(0, 0.5).mfu is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h")]
)
def test_durations_in_words(seconds, words):
    """As in the step line."""
    assert format_duration(seconds) == words


def test_generate_says_what_is_wrong(tmp_path):
    """No checkpoint, a bad setting: exit 2 and two lines."""
    from tests.conftest import ROOT

    for arguments, message in (
        (["-m", tmp_path / "none.pt", "-p", "x"], "no checkpoint at"),
        (["--temperature", "nan"], "not a finite number"),
        (["--temperature=-1"], "below zero"),
        (["--top-p", "1.5"], "not a probability"),
    ):
        process = run(ROOT / "generate.py", *arguments)
        assert process.returncode == 2 and message in process.stderr and "hint: " in process.stderr, (
            process.stderr
        )
