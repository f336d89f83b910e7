"""Folders of transformers that are damaged or were not made for this: two lines, at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gpt_model import GPT
from tests.conftest import tiny_model
from utils.command_line import UserError
from utils.tokenizer import CharTokenizer
from utils.weights import schema
from utils.weights.export import write_model

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The export of a model of four characters."""
    write_model(tmp_path, tiny_model(vocab_size=4), CharTokenizer("abcd"), 4)
    GPT.load(tmp_path)  # undamaged, it loads
    return tmp_path


@pytest.mark.parametrize("value", [None, "2", 2.5, True, -1, 0, [1], 10**12])
@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions"])
def test_a_size_that_is_none_is_named(key, value, folder):
    """Before transformers is asked to build a model of it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    name = "block_size" if key == "n_positions" else key
    with pytest.raises(UserError, match=rf"config.json: {name}=.* is not a whole number from 1 to "):
        GPT.load(folder)


@pytest.mark.parametrize(
    "sizes", [dict(n_layer=10**6), dict(n_layer=2000, n_embd=2**13), dict(vocab_size=2**24, n_embd=2**15)]
)
def test_a_config_beyond_the_machine_is_refused_at_once(sizes, folder, monkeypatch):
    """A million layers took minutes; the numbers are in the message."""
    monkeypatch.setattr(schema, "memory_bytes", lambda device: 10**9)
    path, started = folder / "config.json", time.monotonic()
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    with pytest.raises(UserError, match="from 1 to 2,048|need .* GB, this machine has 1.00 GB"):
        GPT.load(folder)
    assert time.monotonic() - started < 5


DAMAGE = {
    "nested deeply": "[" * 100_000,
    "nested deeply inside": '{"x": ' + "[" * 100_000,
    "a list": "[]",
    "empty": "",
    "a number": "7",
    "binary": b"\x80\xff\x00",
    "cut off": '{"n_layer": 2',
    "5000 digits": '{"n_layer": ' + "9" * 5000 + "}",
    "a key twice": '{"a": 0, "a": 0}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "characters.json"])
def test_a_file_that_is_no_object_is_named(name, damage, folder):
    """With the reason, and without a traceback of the parser."""
    (folder / name).write_bytes(damage.encode() if isinstance(damage, str) else damage)
    with pytest.raises(UserError, match=f"{name} cannot be read as an object of JSON: "):
        GPT.load(folder)


@pytest.mark.parametrize(
    "ids",
    [
        '{"ab": 0}',
        '{"a": -1}',
        '{"a": "0"}',
        '{"a": 0.0}',
        '{"a": false}',
        '{"a": 1}',
        "{}",
        '{"a": 0, "b": 0}',
    ],
)
def test_ids_that_are_no_vocabulary_are_refused(ids, folder):
    """Characters must be single, and their ids 0, 1, 2, ... as whole numbers."""
    (folder / "characters.json").write_text(ids)
    with pytest.raises(UserError, match="characters.json holds no characters"):
        GPT.load(folder)


TOKENIZERS = [
    {"tokenizer.json": "{}"},
    {"tokenizer.json": "[" * 5000},
    {"vocab.json": "[1]", "merges.txt": "a b"},
    {"vocab.json": "[" * 50_000, "merges.txt": ""},
    {"vocab.json": "\x00", "merges.txt": "\x00"},
]


@pytest.mark.parametrize("files", TOKENIZERS)
def test_a_damaged_tokenizer_is_an_error(files, folder):
    """Whatever its library raises, panics of Rust included; GPT-2's is not used in its place."""
    (folder / "characters.json").unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(
        UserError, match="cannot load the tokenizer in |json is not a tokenizer.json"
    ) as caught:
        GPT.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "index", ["{}", "[" * 50_000, '{"metadata": {}, "weight_map": {"a": 5}}', "null", '{"weight_map": 7}']
)
def test_a_damaged_index_of_the_weights_is_an_error(index, folder):
    """Of weights in several files."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="cannot load ") as caught:
        GPT.load(folder)
    assert "\n" not in str(caught.value)
