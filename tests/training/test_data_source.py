"""Which data a run trains on when none, or some, is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tests.conftest import FileServer
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.training import data_source
from utils.training.data_source import choose_source, fetch, open_data

ALONE = Distributed(torch.device("cpu"))


@pytest.fixture(autouse=True)
def empty_repository(tmp_path, monkeypatch) -> None:
    """Neither shards nor input.txt."""
    monkeypatch.setattr(data_source, "TEXT_PATH", tmp_path / "input.txt")
    monkeypatch.setattr(data_source, "SHARDS_DIR", tmp_path / "shards")


def test_tiny_shakespeare_is_downloaded_once(server: FileServer, tmp_path, monkeypatch):
    """To input.txt, which the next run uses without the network."""
    body = b"First Citizen:\nSpeak, speak.\n" * 100
    server.files = {"/input.txt": body}
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_URL", f"{server.url}/input.txt")
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_BYTES", len(body))
    source = fetch(None, ALONE)
    assert (source.kind, source.path) == ("text", tmp_path / "input.txt")
    assert fetch(None, ALONE).reason == "no shards in shards/"
    assert server.num_requests == 1


def test_without_a_network_the_text_is_the_documentation_of_python(tmp_path, monkeypatch, capsys):
    """The quick start always has data; a warning and the reason say which."""
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    source = fetch(None, ALONE)
    assert source.kind == "pydoc" and "no network" in source.reason
    assert "warning: cannot download Tiny Shakespeare" in capsys.readouterr().err
    tokenizer, train, _, reason = open_data(source, {"name": "gpt2"}, 64, ALONE)
    assert reason == source.reason
    assert "pydoc_data.topics of Python 3" in train.name and train.num_tokens > 50_000
    assert "statement" in tokenizer.decode(train.read(0, 20_000))
    assert list(tmp_path.iterdir()) == []


def test_the_order_in_which_data_is_looked_for(tmp_path, monkeypatch):
    """--data, then shards, then input.txt, then a download."""
    monkeypatch.setattr(data_source, "SHARDS_DIR", tmp_path)
    assert choose_source(None).kind == "download"
    (tmp_path / "input.txt").touch()
    assert choose_source(None).kind == "text"
    (tmp_path / "edufineweb_train_000001.npy").touch()
    assert choose_source(None).kind == "shards"
    assert choose_source("other.txt").path == Path("other.txt")
    assert choose_source(str(tmp_path)).kind == "shards"


def test_shards_cannot_be_read_as_characters(tmp_path):
    """They hold GPT-2 tokens; the hint depends on whether a model was loaded."""
    source = choose_source(str(tmp_path))
    for state, hint in (
        ({"name": "char"}, "use --tokenizer gpt2"),
        ({"name": "char", "characters": "ab"}, "a"),
    ):
        with pytest.raises(UserError, match="holds GPT-2 tokens, not characters") as caught:
            open_data(source, state, 16, ALONE)
        assert f"give --data a text file, or {hint}" in caught.value.hint


def test_a_rank_with_other_data_is_named(text_file):
    """The fingerprints of all ranks are compared before the first step."""

    class OtherRank(Distributed):
        def broadcast(self, value: list) -> list:
            return [{**entry, "sha256": "that of rank 0"} for entry in value]

    other = OtherRank(torch.device("cpu"), rank=1, world_size=2)
    source = choose_source(str(text_file))
    assert open_data(source, {"name": "char"}, 16, ALONE).train.name == str(text_file)
    with pytest.raises(UserError, match="rank 1 sees other data than rank 0 in .*text.txt") as caught:
        open_data(source, {"name": "char"}, 16, other)
    assert caught.value.one_rank_only  # rank 0 does not see the error
