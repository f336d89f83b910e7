"""Training from shards: one stream over all files, the same steps for any ranks, checks at the start."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.command_line import Unfinished, UserError
from utils.data_loader import WindowLoader, epoch_order
from utils.distributed import Distributed
from utils.shards.format import shard_name, write_shard
from utils.shards.stream import ShardStream
from utils.training.data_source import Source, open_data

T = 8
CPU = torch.device("cpu")


def write_folder(folder: Path, *lengths: int, vocab_size: int = 50257) -> np.ndarray:
    """Train shards of these lengths and one val shard; token i of train is i. Returns train's tokens."""
    tokens = np.arange(sum(lengths), dtype=np.uint16) % vocab_size
    start = 0
    for number, length in enumerate(lengths):
        write_shard(folder / shard_name("train", number + 1), [tokens[start : start + length]], length)
        start += length
    write_shard(folder / shard_name("val", 0), [tokens[:50]], 50)
    return tokens


@pytest.mark.parametrize(
    ("tokenizer_state", "message", "hint"),
    [
        ({"name": "char"}, "GPT-2 tokens, not characters", "--tokenizer gpt2"),
        ({"name": "char", "characters": "abc"}, "GPT-2 tokens, not characters", "a model trained on them"),
        ({"name": "folder"}, "a tokenizer of its own", "only eval_hellaswag.py"),
    ],
)
def test_shards_require_a_model_of_gpt2_tokens(tmp_path, tokenizer_state, message, hint):
    """A model of characters or of another tokenizer is refused, with a hint that helps."""
    write_folder(tmp_path, 30)
    with pytest.raises(UserError, match=message) as caught:
        open_data(Source("shards", tmp_path, "as asked"), tokenizer_state, T, Distributed(CPU))
    assert hint in caught.value.hint


def test_windows_cross_the_borders_between_shards(tmp_path):
    """Any slice of the stream is that of the concatenated shards, also across several short ones."""
    tokens = write_folder(tmp_path, 30, 1, 5, 40, 24)
    stream = ShardStream(tmp_path, "train", 50257, T)
    assert stream.num_tokens == 100
    for start, count in itertools.product(range(0, 100, 3), (1, 9, 37)):
        count = min(count, 100 - start)
        assert stream.read(start, count).tolist() == tokens[start : start + count].tolist()
    assert stream.locate(31) == ("edufineweb_train_000003.npy", 0)


@pytest.mark.parametrize("seed", [None, 7])
def test_every_step_is_the_same_for_any_ranks_micro_batch_and_accumulation(tmp_path, seed):
    """For all with ranks x micro-batch x accumulation = 12, a step has the same windows in the same order.

    Ten steps cross two borders between shards in an epoch, and two between epochs.
    """
    write_folder(tmp_path, 130, 83, 110)
    windows_per_step, steps = 12, 10
    seen = set()
    for ranks, micro_batch in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6, 12)):
        if windows_per_step % (ranks * micro_batch):
            continue
        streams = [ShardStream(tmp_path, "train", 50257, T) for _ in range(ranks)]
        loaders = [WindowLoader(streams[r], T, micro_batch, r, ranks, seed=seed) for r in range(ranks)]
        batches = [loader.train_batches(0) for loader in loaders]
        order = []
        for _ in range(steps * windows_per_step // (ranks * micro_batch)):
            for of_rank in batches:
                x, y = next(of_rank)
                assert (y == x + 1).all()
                order += (x[:, 0] // T).tolist()
        seen.add(tuple(order))
        for of_rank in batches:
            of_rank.close()
    assert len(seen) == 1
    order = seen.pop()
    assert len(order) == steps * windows_per_step
    for epoch in range(3):
        assert sorted(order[epoch * 40 : epoch * 40 + 40]) == list(range(40))  # (323 - 1) // 8 windows


def test_the_position_of_step_ten_thousand_is_computed_without_data(tmp_path):
    """Where the step starts is a pure function: the files have been deleted by then."""
    write_folder(tmp_path, 3000, 3000)
    loader = WindowLoader(ShardStream(tmp_path, "train", 50257, T), T, 4, seed=1)
    for path in tmp_path.glob("*.npy"):
        path.unlink()
    first = 10_000 * 16
    again = [loader.window_at(n) for n in range(first, first + 16)]
    epoch, place = divmod(first, loader.windows_per_epoch)
    assert epoch == first // 749 and len(set(again)) == 16
    assert again == epoch_order(749, 1, epoch)[place : place + 16].tolist()


def test_shards_written_by_numpy_save_can_be_read(tmp_path):
    """As build-nanogpt writes them, and uint32 ones; write_shard writes the same bytes."""
    np.save(tmp_path / "edufineweb_val_000000", np.arange(20, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001", np.arange(30, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000002", np.arange(30, 60, dtype=np.uint32))
    assert ShardStream(tmp_path, "train", 100, T).read(0, 60).tolist() == list(range(60))
    assert ShardStream(tmp_path, "val", 100, T).num_tokens == 20
    mine, by_numpy = tmp_path / "mine.npy", tmp_path / "edufineweb_val_000000.npy"
    write_shard(mine, [np.arange(12, dtype=np.uint16), np.arange(12, 20, dtype=np.uint16)], 20)
    assert mine.read_bytes() == by_numpy.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:0]), r"000002.npy: not a .npy file \(0 bytes\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:5]), r"000002.npy: not a .npy file \(5 bytes\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), r"000002.npy: not a .npy file \(60 bytes\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:128]), r"000002.npy: 128 bytes, header says 328"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"000002.npy: 327 bytes, header says 328"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"000002.npy: 329 bytes, header says 328"),
        (
            lambda path: path.write_bytes(b"<html>" * 50),
            r"000002.npy: not a .npy file \(300 bytes\), but HTML",
        ),
        (
            lambda path: np.save(path, np.zeros(9, np.float32)),
            r"<f4 array of shape \(9,\) \(expected 1-D",
        ),
        (lambda path: np.save(path, np.zeros((3, 3), np.uint16)), r"<u2 array of shape \(3, 3\)"),
        (lambda path: np.save(path, np.uint16(3)), r"<u2 array of shape \(\)"),
        (lambda path: np.save(path, np.zeros(9, ">u2")), r">u2 array"),
        (lambda path: np.save(path, np.array([{}], object)), r"\|O array"),
        (lambda path: path.unlink(), r"shard 2 is missing between 1 and 3"),
        (
            lambda path: path.with_name(f"{path.stem} (1).npy").write_bytes(path.read_bytes()),
            r"000002 \(1\).npy has no number, other shards have",
        ),
        (
            lambda path: path.with_name(f"{path.stem} 2.npy").write_bytes(path.read_bytes()),
            r"000002 2.npy is a copy of another shard",
        ),
    ],
)
def test_a_damaged_shard_is_reported_at_the_start(tmp_path, damage, message):
    """From its header and its size, before any token is read."""
    write_folder(tmp_path, 100, 100, 100)
    damage(tmp_path / shard_name("train", 2))
    with pytest.raises(UserError, match=message):
        ShardStream(tmp_path, "train", 50257, T)


def test_a_folder_without_enough_shards_is_refused(tmp_path):
    """No shards, no val, the first train shard missing, or a split shorter than one window."""
    with pytest.raises(UserError, match="holds no train shards") as caught:
        ShardStream(tmp_path, "train", 50257, T)
    assert "build_fineweb_edu_shards.py" in caught.value.hint
    write_folder(tmp_path, 60, 60)
    with pytest.raises(UserError, match=r"has 50 tokens, need at least T\+1 = 51"):
        ShardStream(tmp_path, "val", 50257, 50)
    (tmp_path / shard_name("train", 1)).unlink()
    with pytest.raises(UserError, match="shard 1 is missing between 0 and 2"):
        ShardStream(tmp_path, "train", 50257, T)
    (tmp_path / shard_name("val", 0)).unlink()
    with pytest.raises(UserError, match="holds no val shards"):
        ShardStream(tmp_path, "val", 50257, T)


def test_an_id_beyond_the_vocabulary_is_reported_when_it_is_read(tmp_path):
    """File and position of the first one; slices without it can be read."""
    write_folder(tmp_path, 40)
    tokens = np.zeros(40, np.uint16)
    tokens[23:25] = 60000
    np.save(tmp_path / "edufineweb_train_000002", tokens)
    stream = ShardStream(tmp_path, "train", 50257, T)
    stream.read(0, 60)
    with pytest.raises(
        UserError, match="000002.npy: token 60000 >= vocab_size 50257 at position 23"
    ) as caught:
        stream.read(58, 9)
    assert caught.value.one_rank_only


def test_a_shard_truncated_while_in_use_is_a_user_error(tmp_path):
    """Reads see the end of the file; with a memory map, Python would be killed by SIGBUS."""
    write_folder(tmp_path, 100)
    stream = ShardStream(tmp_path, "train", 50257, T)
    stream.read(0, 9)
    os.truncate(tmp_path / shard_name("train", 1), 150)
    with pytest.raises(UserError, match=r"12 bytes at token 5 \(expected 18") as caught:
        stream.read(5, 9)
    assert caught.value.one_rank_only


def test_a_failed_write_leaves_the_old_shard_unchanged(tmp_path, monkeypatch):
    """Flushed before it is renamed; if the rename fails, the old file is complete and the only one."""
    path, calls = tmp_path / shard_name("train", 1), []
    write_shard(path, [np.arange(5, dtype=np.uint16)], 5)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))

    def replace(old, new):
        calls.append("replace")
        raise OSError("no")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Unfinished, match="cannot write .*: no"):
        write_shard(path, [np.arange(9, dtype=np.uint16)], 9)
    assert calls == ["fsync", "replace"]
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch):
    """The least recently read file is closed, and opened again when it is needed."""
    monkeypatch.setattr("utils.shards.stream.MAX_OPEN_FILES", 2)
    tokens = write_folder(tmp_path, *[20] * 6)
    stream = ShardStream(tmp_path, "train", 50257, T)
    for start in (0, 100, 20, 60, 0, 90):
        assert stream.read(start, 15).tolist() == tokens[start : start + 15].tolist()
        assert len(stream._files) <= 2


@pytest.mark.parametrize(
    ("fill", "hint"),
    [
        (lambda folder: None, "give --data a text file, a folder of texts, or one that build_fineweb_edu_"),
        (lambda folder: (folder / "a.docx").touch(), "give --data a text file, a folder of texts"),
        (lambda folder: np.save(folder / "tokens_1.npy", np.zeros(9)), "if tokens_1.npy is a shard, put"),
        (lambda folder: np.save(folder / shard_name("val", 0), np.zeros(9)), "copy the other shards into it"),
        (lambda folder: (folder / "manifest.json").touch(), "run the command that built it again"),
    ],
)
def test_the_hint_for_a_folder_without_shards_depends_on_what_it_holds(tmp_path, fill, hint):
    """It never names a command that would download another data set into the user's own folder."""
    folder = tmp_path / "my data"
    folder.mkdir()
    fill(folder)
    with pytest.raises(UserError, match="my data holds no train shards") as caught:
        ShardStream(folder, "train", 50257, T)
    assert hint in caught.value.hint
    assert "build_fineweb_edu_shards.py --" not in caught.value.hint
