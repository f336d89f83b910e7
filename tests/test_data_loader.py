"""Each window of a stream is seen once an epoch, in an order independent of ranks and micro-batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from utils.command_line import UserError
from utils.data_loader import TextStream, WindowLoader, split_text


def counting_stream(num_tokens: int) -> TextStream:
    """A stream whose token i is i, so a batch shows its position."""
    return TextStream("numbers", np.arange(num_tokens, dtype=np.uint32), 0, {})


def test_a_window_is_inputs_and_the_tokens_that_follow_them():
    """x is tokens [w*T, w*T + T), y is shifted by one; both int64."""
    loader = WindowLoader(counting_stream(100), seq_len=8, micro_batch=2)
    x, y = loader.batch([0, 3])
    assert x.tolist() == [list(range(8)), list(range(24, 32))]
    assert torch.equal(y, x + 1)
    assert x.dtype == y.dtype == torch.int64
    assert loader.windows_per_epoch == 12  # 99 tokens have a successor


@pytest.mark.parametrize(("world_size", "micro_batch"), list(itertools.product((1, 2, 4), (1, 2, 3))))
@pytest.mark.parametrize("seed", [None, 7])
def test_steps_see_the_same_windows_for_any_ranks_and_micro_batches(world_size, micro_batch, seed):
    """The windows of ten steps, over four ends of an epoch, are those of one process with micro-batch 1."""
    windows_per_step, steps = 24, 10
    expected = WindowLoader(counting_stream(50 * 8 + 1), 8, 1, seed=seed)
    loaders = [
        WindowLoader(counting_stream(50 * 8 + 1), 8, micro_batch, rank, world_size, seed=seed)
        for rank in range(world_size)
    ]
    batches = [loader.train_batches(0) for loader in loaders]
    for step in range(steps):
        seen = []
        for _ in range(windows_per_step // (world_size * micro_batch)):
            for stream in batches:
                seen += (next(stream)[0][:, 0] // 8).tolist()
        first = step * windows_per_step
        assert seen == [expected.window_at(n) for n in range(first, first + windows_per_step)]


def test_every_window_is_seen_once_an_epoch():
    """An epoch is a permutation: another one each time, and the same ones for the same seed."""
    loader = WindowLoader(counting_stream(401), 8, 1, seed=3)
    epochs = [[loader.window_at(n) for n in range(e * 50, e * 50 + 50)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    again = WindowLoader(counting_stream(401), 8, 1, seed=3)
    assert [again.window_at(n) for n in range(50)] == epochs[0]


def test_training_can_start_at_any_window():
    """The batches after window n do not depend on where training started, so the loader has no state."""
    from_start = WindowLoader(counting_stream(401), 8, 2, seed=3).train_batches(0)
    for _ in range(6):
        next(from_start)
    resumed = WindowLoader(counting_stream(401), 8, 2, seed=3).train_batches(12)
    for _ in range(30):
        assert torch.equal(next(from_start)[0], next(resumed)[0])


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 5)])
def test_validation_reads_the_same_tokens_for_any_ranks(world_size, micro_batch):
    """The first windows, each exactly once over all ranks, in equally many rounds on every rank."""
    rounds, seen = set(), []
    for rank in range(world_size):
        batches = list(WindowLoader(counting_stream(401), 8, micro_batch, rank, world_size).val_batches(150))
        rounds.add(len(batches))
        seen += [row for batch in batches if batch is not None for row in (batch[0][:, 0] // 8).tolist()]
    assert len(rounds) == 1
    assert sorted(seen) == list(range(150 // 8))


def test_validation_reads_at_most_the_whole_split():
    """More tokens than the split has mean all its windows."""
    assert WindowLoader(counting_stream(401), 8, 4).num_val_windows(10**9) == 50


def test_the_description_of_a_batch_stays_within_its_window():
    """The last window of a stream has no 24 tokens after its start: a shard would be read beyond its end."""
    loader = WindowLoader(counting_stream(401), 8, 2)
    assert loader.describe_batch(48, 0, lambda ids: str(ids.tolist())) == (
        "numbers position 384, text '[384, 385, 386, 387, 388, 389, 390, 391]'"
    )


def test_text_is_split_at_ninety_percent():
    """The first 90 % of the tokens are train, the rest is val; positions are those in the whole file."""
    train, val = split_text("t.txt", np.arange(100, dtype=np.uint16), {}, seq_len=4)
    assert train.read(0, 100).tolist() == list(range(90))
    assert val.read(0, 100).tolist() == list(range(90, 100))
    assert val.locate(3) == ("t.txt", 93)


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_the_tokens_of_a_text_are_kept_in_few_bytes(largest, dtype):
    """A tokenizer's int64 would take four times the memory of uint16, for as long as the run lasts."""
    tokens = np.array([0, 5, largest, 7] * 25)
    train, val = split_text("t.txt", tokens, {}, seq_len=4)
    assert train.tokens.dtype == val.tokens.dtype == dtype and tokens.dtype == np.int64
    assert [*train.tokens, *val.tokens] == tokens.tolist()


def test_a_text_too_short_for_a_window_is_refused():
    """The message has the number of tokens and the number needed."""
    with pytest.raises(UserError, match=r"100 tokens, need at least T\+1 = 11"):
        split_text("t.txt", np.zeros(100, dtype=np.uint16), {}, seq_len=10)
