"""Token files of nanoGPT and datatrove: the same stream as shards of the same tokens, and the same checks."""

from __future__ import annotations

import itertools
import pickle
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import OFFLINE, ROOT
from tests.shards.test_build import build, make_documents, tokens_of, write_jsonl
from tests.small_runs import Killed, assert_same_run, kill_in_update, train
from utils.command_line import UserError
from utils.data_loader import split_text
from utils.distributed import Distributed
from utils.shards.format import shard_name, write_shard
from utils.shards.stream import ShardStream
from utils.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, GPT2Tokenizer
from utils.tokenizer_json import train_bpe
from utils.tokenizer_json import write_tokenizer as write_tokenizer_json
from utils.training.data_source import Source, open_data
from utils.weights.export import write_tokenizer

T = 8


def write_bins(folder: Path, train: np.ndarray, val: np.ndarray) -> Path:
    """As nanoGPT's prepare.py writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    train.astype(np.uint16).tofile(folder / "train.bin")
    val.astype(np.uint16).tofile(folder / "val.bin")
    return folder


def write_ds(path: Path, ends: list[int], tokens: np.ndarray, tokenizer: str = "gpt2") -> Path:
    """As datatrove writes them: tokens, ends of documents, and their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens.tofile(path)
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    metadata = f"{tokenizer}|{tokens.itemsize}\n{len(tokens)}\n{len(tokens)} T"
    path.with_name(f"{path.name}.metadata").write_text(metadata)
    return path


def write_datatrove(folder: Path, *lengths: int, dtype: str = "<u2") -> np.ndarray:
    """Files of these lengths; token i of all is i. Returns the tokens."""
    tokens = np.arange(sum(lengths), dtype=dtype)
    start = 0
    for number, length in enumerate(lengths):
        ends = [length // 2, length] if length else []
        write_ds(folder / f"{number:05d}_unshuffled.ds", ends, tokens[start : start + length])
        start += length
    return tokens


# ------------------------------------------------------------------------------------------------------------
# The same stream


def test_bins_of_nanogpt_are_split_as_their_names_say(tmp_path):
    """Every slice, and the place of a token in its file."""
    write_bins(tmp_path, np.arange(100), np.arange(500, 530))
    streams = {split: ShardStream(tmp_path, split, 50257, T) for split in ("train", "val")}
    assert streams["train"].read(0, 100).tolist() == list(range(100))
    assert streams["train"].read(31, 9).tolist() == list(range(31, 40))
    assert streams["val"].read(0, 30).tolist() == list(range(500, 530))
    assert streams["val"].locate(7) == ("val.bin", 7)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_first_file_of_datatrove_is_val(tmp_path, dtype):
    """In the order of names; the others are one stream, and files of tasks without documents are left out."""
    tokens = write_datatrove(tmp_path, 0, 40, 30, 0, 1, 60, dtype=dtype)
    train, val = (ShardStream(tmp_path, split, 50257, T) for split in ("train", "val"))
    assert val.read(0, 40).tolist() == tokens[:40].tolist()
    assert train.num_tokens == 91
    for start, count in itertools.product(range(0, 91, 3), (1, 9, 37)):
        count = min(count, 91 - start)
        assert train.read(start, count).tolist() == tokens[40 + start : 40 + start + count].tolist()
    assert train.locate(31) == ("00005_unshuffled.ds", 0)


def test_a_single_file_of_datatrove_is_split_as_a_text_is(tmp_path):
    """The last 10 % are val; positions in messages are those in the file."""
    tokens = write_datatrove(tmp_path, 207)
    train, val = (ShardStream(tmp_path, split, 50257, T) for split in ("train", "val"))
    for ours, text in zip((train, val), split_text("text", tokens, {}, T)):
        assert ours.read(0, ours.num_tokens).tolist() == text.tokens.tolist()
        assert ours.locate(5) == ("00000_unshuffled.ds", text.offset + 5)
    with pytest.raises(UserError, match="unshuffled.ds: token 191 >= vocab_size 191 at position 191"):
        ShardStream(tmp_path, "val", 191, T).read(0, 10)


@pytest.mark.parametrize("kind", ["bins", "datatrove"])
def test_another_content_of_the_same_size_has_another_fingerprint(tmp_path, kind):
    """The names are always the same ones: one token at either end differs."""
    prints = []
    for name, place in (("a", None), ("b", 0), ("c", -1)):
        tokens = np.arange(90, dtype=np.uint16)
        if place is not None:
            tokens[place] += 1
        if kind == "bins":
            write_bins(tmp_path / name, tokens, np.arange(50))
        else:
            write_ds(tmp_path / name / "0.ds", [50], np.arange(50, dtype=np.uint16))
            write_ds(tmp_path / name / "1.ds", [90], tokens)
        prints.append(ShardStream(tmp_path / name, "train", 50257, T).fingerprint())
        assert ShardStream(tmp_path / name, "train", 50257, T).fingerprint() == prints[-1]
    assert len({str(entries) for entries in prints}) == 3


def test_shards_keep_the_fingerprint_of_earlier_checkpoints(tmp_path):
    """Name and number of tokens, nothing else: their runs can be resumed."""
    write_shard(tmp_path / shard_name("train", 1), [np.arange(30, dtype=np.uint16)], 30)
    expected = {"shards": [["edufineweb_train_000001.npy", 30]]}
    assert ShardStream(tmp_path, "train", 50257, T).fingerprint() == expected


# ------------------------------------------------------------------------------------------------------------
# The same checks


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (lambda f: (f / "val.bin").unlink(), r"cannot read .*val.bin: No such file", "prepare.py wrote both"),
        (lambda f: (f / "train.bin").unlink(), r"cannot read .*train.bin: No such", "prepare.py wrote both"),
        (lambda f: (f / "val.bin").write_bytes(b"123"), r"val.bin: 3 bytes \(expected an", "copy it again"),
        (lambda f: (f / "val.bin").write_bytes(b""), r"\(val\) has 0 tokens, need at least", "smaller"),
    ],
)  # fmt: skip
def test_damaged_bins_are_reported_at_the_start(tmp_path, damage, message, hint):
    """One of the two is missing, cut in the middle of a token, or empty."""
    write_bins(tmp_path, np.arange(100), np.arange(50))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        for split in ("train", "val"):
            ShardStream(tmp_path, split, 50257, T)
    assert hint in caught.value.hint


def edit(folder: Path, name: str, change: object) -> None:
    """Replaces what a file beside the second .ds file, or that file, holds."""
    path = folder / f"00001_unshuffled.ds{name}"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, "", lambda data: data[:-1]), r"00001_unshuffled.ds: 59 bytes, .* says 30 tokens"),
        (lambda f: edit(f, "", lambda data: data + data), r"unshuffled.ds: 120 bytes, .*says 30 tokens of 2"),
        (lambda f: edit(f, ".index", lambda data: data[:-8]), r"index: 8 bytes, .* ends at 15 of 30 tokens"),
        (lambda f: edit(f, ".index", lambda data: data[:-3]), r"index: 13 bytes, the last document ends"),
        (lambda f: edit(f, ".index", lambda data: b""), r"index: 0 bytes, the last document ends at 0 of 30"),
        (lambda f: edit(f, ".metadata", lambda data: b"gpt2|4\n30\n"), r"says 30 tokens of 4 bytes"),
        (lambda f: edit(f, ".metadata", lambda data: b"gpt2|8\n30\n"), r"metadata: b'gpt2\|8\\n30\\n'"),
        (lambda f: edit(f, ".metadata", lambda data: b"gpt2\n30\n"), r"expected lines TOKENIZER\|2, or \|4"),
        (lambda f: edit(f, ".metadata", lambda data: b"gpt2|2\n"), r"metadata: b'gpt2\|2\\n'"),
        (lambda f: edit(f, ".metadata", lambda data: b"\xff|2\n30"), r"metadata: b'\\xff\|2\\n30'"),
        (lambda f: edit(f, ".metadata", lambda data: b"llama|2\n30"), r"of gpt2 .* and of llama \(00001_"),
        (lambda f: (f / "00001_unshuffled.ds.metadata").unlink(), r"cannot read .*ds.metadata: No such file"),
        (lambda f: (f / "00001_unshuffled.ds.index").unlink(), r"cannot read .*ds.index: No such file"),
    ],
)  # fmt: skip
def test_damaged_files_of_datatrove_are_reported_at_the_start(tmp_path, damage, message):
    """By their sizes, before any token is read; an unfinished task lacks what is beside the file."""
    write_datatrove(tmp_path, 40, 30, 60)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ShardStream(tmp_path, "train", 50257, T)


def test_the_tokenizer_may_have_been_in_another_folder_on_another_machine(tmp_path):
    """The last part of its path counts."""
    for number, tokenizer in enumerate(("/a/tokenizer.json", "/home/b/tokenizer.json")):
        write_ds(tmp_path / f"{number}.ds", [30], np.arange(30, dtype=np.uint16), tokenizer)
    assert ShardStream(tmp_path, "train", 50257, T).num_tokens == 30


@pytest.mark.parametrize("kind", ["bins", "datatrove"])
def test_an_id_beyond_the_vocabulary_is_reported_when_it_is_read(tmp_path, kind):
    """File and position; slices without it can be read."""
    tokens = np.zeros(60, np.uint16)
    tokens[41] = 60000
    if kind == "bins":
        name = "train.bin"
        write_bins(tmp_path, tokens, np.arange(50))
    else:
        name = "1.ds"
        write_ds(tmp_path / "0.ds", [50], np.arange(50, dtype=np.uint16))
        write_ds(tmp_path / name, [60], tokens)
    stream = ShardStream(tmp_path, "train", 50257, T)
    stream.read(0, 41)
    with pytest.raises(UserError, match=f"{name}: token 60000 >= vocab_size 50257 at position 41"):
        stream.read(38, 9)
    (tmp_path / name).write_bytes(tokens.tobytes()[:70])  # truncated while in use: no SIGBUS
    with pytest.raises(UserError, match=rf"{name}: 10 bytes at token 30 \(expected 18"):
        stream.read(30, 9)


class Evil:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_nanogpts_characters_are_trained_on_as_text(tmp_path, monkeypatch, no_pictures, capsys, tokenizer):
    """meta.pkl is not unpickled; the hint, when followed, trains on the same ids, split at the same place."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shakespeare char"
    text = "First Citizen: speak, speak.\n" * 40
    ids = np.array([sorted(set(text)).index(character) for character in text])
    write_bins(folder, ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :])
    (folder / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        UserError, match="the ids of train.bin are characters that only meta.pkl lists"
    ) as caught:
        train(folder, tmp_path / "log", "--tokenizer", tokenizer)
    assert "give --data the text that it was made of" in caught.value.hint
    (folder / "input.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        train(folder, tmp_path / "log", "--tokenizer", tokenizer)
    assert not (tmp_path / "unpickled").exists()
    flags = caught.value.hint.split("same ids: ")[1]
    assert flags == f"--tokenizer char --data '{folder}/input.txt'"
    assert train(folder / "input.txt", tmp_path / "log", "--tokenizer", "char", "--max-steps", "2") == 0
    assert f"train: {int(0.9 * len(ids)):,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "warned"), [("gpt2", False), ("openai/gpt2-xl", False), ("/a.json", True)])
def test_ids_are_gpt2s_unless_a_tokenizer_is_named(tmp_path, capsys, name, warned):
    """A warning says what datatrove calls it; --tokenizer, or a tokenizer.json in the folder, decides."""
    for number in range(2):
        write_ds(tmp_path / "ds" / f"{number}.ds", [90], np.arange(90, dtype=np.uint16), name)
    source, alone = Source("shards", tmp_path / "ds", "--data"), Distributed(torch.device("cpu"))
    assert open_data(source, None, T, alone).tokenizer.name == "gpt2"
    assert (
        f"read as GPT-2's tokens; datatrove calls the tokenizer {name}" in capsys.readouterr().err
    ) is warned
    state = train_bpe(["some words and some more"] * 9, 270)
    assert open_data(source, state, T, alone).tokenizer.vocab_size == 270
    write_tokenizer_json(tmp_path / "ds", state)
    assert open_data(source, None, T, alone).tokenizer.state() == state
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="holds tokens of a bpe tokenizer of 270 tokens, not GPT-2 tokens"):
        open_data(source, {"name": "gpt2"}, T, alone)


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bins", marks=pytest.mark.slow),
        pytest.param("datatrove", marks=pytest.mark.slow),
        "one file of datatrove",
    ],
)
def test_a_run_on_foreign_token_files_resumes_bitwise(tmp_path, monkeypatch, no_pictures, kind):
    """Killed and resumed, it ends with the same bits; other tokens are refused, with what has changed."""
    tokens = (np.arange(900) * 7919 % 97).astype(np.uint16)
    folder = tmp_path / "tokens"
    if kind == "bins":
        write_bins(folder, tokens[:800], tokens[800:])
    elif kind == "datatrove":
        for number, (start, stop) in enumerate(((0, 100), (100, 450), (450, 900))):
            write_ds(folder / f"{number}.ds", [stop - start], tokens[start:stop])
    else:
        write_ds(folder / "0.ds", [900], tokens)
    flags = ("--tokenizer", "gpt2", "--sample-every", "0")
    assert train(folder, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        kill_in_update(patch, 11)
        with pytest.raises(Killed):
            train(folder, tmp_path / "log", *flags)
    (changed,) = folder.glob("train.bin") if kind == "bins" else sorted(folder.glob("*.ds"))[-1:]
    data = changed.read_bytes()
    changed.write_bytes(b"\x01\x00" + data[2:-2] + b"\x02\x00")
    entry = rf"{changed.name} \d+ \w{{64}}"
    with pytest.raises(UserError, match=rf"made on other data.*before: {entry}.*; now: {entry}"):
        train(folder, tmp_path / "log", "--resume", *flags)
    changed.write_bytes(data)
    assert train(folder, tmp_path / "log", "--resume", *flags) == 0
    (tmp_path / "log" / "samples.txt").touch()
    (tmp_path / "whole" / "samples.txt").touch()
    assert_same_run(tmp_path / "log", tmp_path / "whole")


PIPELINE = """
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    source, target, tokenizer, tasks, shuffle, logs = sys.argv[1:]
    steps = [
        JsonlReader(source),
        DocumentTokenizer(target, tokenizer, eos_token="<|endoftext|>", shuffle_documents=shuffle == "yes"),
    ]
    LocalPipelineExecutor(steps, tasks=int(tasks), workers=1, logging_dir=logs).run()
"""


@pytest.mark.skipif(not find_spec("datatrove"), reason="datatrove is not installed")
@pytest.mark.parametrize(("tasks", "shuffle"), [(3, "no"), (4, "no"), (1, "no"), (2, "yes")])
def test_datatrove_makes_the_same_ids_of_the_same_documents(tmp_path, tasks, shuffle):
    """By its own executor, with our tokenizer's files; only, <|endoftext|> comes after a document there.

    Shuffled, as it does unless told not to, they are the same documents in another order.
    """
    from tokenizers import ByteLevelBPETokenizer

    documents = [text or "x" for text in make_documents(60)] + [f"{END_OF_TEXT} is text"]
    (tmp_path / "in").mkdir()
    for number, start in enumerate((0, 21, 42)):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", documents[start : start + 21])
    write_tokenizer(tmp_path, GPT2Tokenizer(), 1024)
    files = (str(tmp_path / name) for name in ("vocab.json", "merges.txt"))
    ByteLevelBPETokenizer.from_file(*files).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    paths = [tmp_path / name for name in ("pipeline.py", "in", "ds", "tokenizer.json")]
    command = [sys.executable, *map(str, paths), str(tasks), shuffle, str(tmp_path / "logs")]
    environment = {"PATH": "", **OFFLINE, "HOME": str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT, timeout=600)
    build(tmp_path / "npy", tmp_path / "in")
    ours = tokens_of(tmp_path / "npy").tolist()
    streams = [ShardStream(tmp_path / "ds", split, 50257, T) for split in ("val", "train")]
    if tasks == 1:
        streams.reverse()  # the only file: its last 10 % are val
    theirs = [id for stream in streams for id in stream.read(0, stream.num_tokens).tolist()]
    if shuffle == "no":
        assert ours[0] == theirs[-1] == END_OF_TEXT_ID
        assert [*theirs[-1:], *theirs[:-1]] == ours
    else:
        assert theirs != ours[1:] + ours[:1]
        assert documents_of(theirs) == documents_of(ours)


def documents_of(ids: list[int]) -> list[tuple[int, ...]]:
    """The documents between the ids of <|endoftext|>, sorted."""
    groups = itertools.groupby(ids, key=lambda id: id == END_OF_TEXT_ID)
    return sorted(tuple(group) for is_end, group in groups if not is_end)
