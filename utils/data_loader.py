"""Tokens for training: one logical stream, cut into windows, each a training example exactly once per epoch.

A stream is a sequence of tokens with random access: `TextStream` holds a text file in memory, `ShardStream`
in utils/shards/stream.py reads a folder of shards. Window w is tokens [w*T, w*T + T]: T inputs, and T targets
that are the inputs shifted by one. Step s trains on windows [s*W, (s+1)*W) of the epoch's order, for any
number of ranks, micro-batch or accumulation steps. So the position in the data is a pure function of the
number of windows trained so far: there is no loader state to save or to lose.

Shapes: B micro-batch, T time (tokens of a window), W windows of a step.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from utils.command_line import UserError
from utils.tokenizer import token_dtype

TRAIN_SHARE = 0.9  # of a text file's tokens; the rest is val


class TokenStream(Protocol):
    """A sequence of tokens with random access."""

    name: str  # for messages
    num_tokens: int

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start`, 1-D unsigned integers. Raises UserError for damaged data."""

    def locate(self, position: int) -> tuple[str, int]:
        """The file of the token at a position of the stream, and its position there, for messages."""

    def fingerprint(self) -> dict:
        """Identifies the data, as plain values: a resumed run must find the same data."""


class TextStream(TokenStream):
    """One split of a text file, tokenized, in memory: tokens are 1-D, the first at `offset` in the file."""

    def __init__(self, name: str, tokens: np.ndarray, offset: int, fingerprint: dict):
        self.name, self.tokens, self.offset, self._fingerprint = name, tokens, offset, fingerprint
        self.num_tokens = len(tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def locate(self, position: int) -> tuple[str, int]:
        return self.name, self.offset + position

    def fingerprint(self) -> dict:
        return self._fingerprint


def split_text(
    name: str, tokens: np.ndarray, fingerprint: dict, seq_len: int, border: int | None = None
) -> tuple[TextStream, TextStream]:
    """Streams of the tokens before `border`, by default 90 %, and of the rest.

    Raises UserError if one is below a window.
    """
    tokens = tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1))  # int64 takes up to four times that
    if border is None:  # cut by tokens, not characters: no token is split between train and val
        border = int(len(tokens) * TRAIN_SHARE)
    if min(border, len(tokens) - border) < seq_len + 1:
        need = f"need at least T+1 = {seq_len + 1} in each of train (90 %) and val (last 10 %)"
        what = f"{name} has {len(tokens):,} tokens, {need}"
        raise UserError(what, "give a longer text or a smaller --seq-len")
    train = TextStream(name, tokens[:border], 0, fingerprint)
    return train, TextStream(name, tokens[border:], border, fingerprint)


@lru_cache(maxsize=2)  # the current epoch, and the next one for a step that crosses the end of an epoch
def epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's windows: a permutation, (num_windows,) uint32."""
    # RandomState, because numpy guarantees that its stream never changes between versions; Generator's may.
    # uint32 halves the memory: 10 billion tokens are 10 million windows.
    return np.random.RandomState([seed, epoch]).permutation(num_windows).astype(np.uint32)


@dataclass
class WindowLoader:
    """Batches of windows from a stream, for one rank: every world_size-th batch is its own."""

    stream: TokenStream
    seq_len: int  # T
    micro_batch: int  # B, rows of a batch
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"  # of the batches
    seed: int | None = None  # of the shuffle; None keeps the order of the stream

    def __post_init__(self):
        self.device = torch.device(self.device)
        # The last window needs one more token as its last target; a partial window at the end is left out.
        self.windows_per_epoch = (self.stream.num_tokens - 1) // self.seq_len

    def window_at(self, number: int) -> int:
        """The window at place `number` of the training order, counted from 0 over all epochs."""
        # The whole order of the data is decided here, and depends on neither rank nor micro-batch.
        epoch, place = divmod(number, self.windows_per_epoch)
        if self.seed is None:
            return place
        return int(epoch_order(self.windows_per_epoch, self.seed, epoch)[place])

    def numbers_of_batch(self, first: int, micro_step: int) -> range:
        """Numbers of the windows in this rank's batch of a micro-step, counted from window number `first` on.

        A micro-step covers B * world_size consecutive windows, rank after rank: with fewer ranks or a smaller
        B there are more micro-steps, over the same windows.
        """
        start = first + (micro_step * self.world_size + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, each (B, T) int64, on the device."""
        T = self.seq_len
        # Consecutive windows share one token: the last target of one is the first input of the next.
        tokens = np.stack([self.stream.read(window * T, T + 1) for window in windows]).astype(np.int64)
        rows = torch.from_numpy(tokens)  # (B, T + 1)
        # `device.type`, because comparing a torch.device with a string is always False.
        if self.device.type == "cuda":
            # Only from pinned memory does the copy overlap with computation.
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        else:
            rows = rows.to(self.device)
        return rows[:, :-1], rows[:, 1:]  # two (B, T) views of the same memory

    def train_batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this rank's batches from window number `first` on, without end."""

        def prepare(index: int) -> tuple[Tensor, Tensor]:
            # A pure function of the index: neither the thread that calls it nor the loop has a position.
            # Steps need no mention here, because a step is a whole number of micro-steps.
            return self.batch([self.window_at(number) for number in self.numbers_of_batch(first, index)])

        # One thread prepares the next batch while the device works on the current one. A thread is enough:
        # reading and copying release the global interpreter lock.
        with ThreadPoolExecutor(max_workers=1) as pool:
            next_batch = pool.submit(prepare, 0)
            for index in itertools.count(1):
                batch = next_batch.result()
                next_batch = pool.submit(prepare, index)
                yield batch

    def describe_batch(self, first: int, micro_step: int, decode: Callable[[np.ndarray], str]) -> str:
        """Place and beginning of the text in this rank's batch, for messages; see `numbers_of_batch`."""
        start = self.window_at(self.numbers_of_batch(first, micro_step)[0]) * self.seq_len
        name, position = self.stream.locate(start)
        text = decode(self.stream.read(start, min(24, self.seq_len)))  # not beyond the end of the stream
        return f"{name} position {position}, text {text!r}"

    def num_val_windows(self, num_tokens: int) -> int:
        """Number of windows for an evaluation on `num_tokens` tokens, at most the whole stream."""
        return min(max(1, num_tokens // self.seq_len), self.windows_per_epoch)

    def target_bytes(self, num_targets: int, token_bytes: np.ndarray) -> int:
        """Bytes of the first `num_targets` targets of the stream, given those of each token, (V,)."""
        targets = range(1, num_targets + 1)  # token 0 is never a target
        pieces = (targets[start : start + (1 << 20)] for start in range(0, len(targets), 1 << 20))
        return sum(int(token_bytes[self.stream.read(piece[0], len(piece))].sum()) for piece in pieces)

    def val_batches(self, num_tokens: int) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yields this rank's share of the first `num_tokens` tokens, in order.

        The last batch may have fewer rows. All ranks get equally many items, None where nothing is left, so
        that collectives after each item are called equally often on every rank.
        """
        total = self.num_val_windows(num_tokens)
        for round_start in range(0, total, self.micro_batch * self.world_size):  # one batch per rank
            start = round_start + self.rank * self.micro_batch
            windows = list(range(start, min(start + self.micro_batch, total)))
            yield self.batch(windows) if windows else None

    def sliding_batches(self, stride: int) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yields this rank's share of overlapping windows: every token but the first is scored exactly once.

        A window starts `stride` (at most T) tokens after the one before it. What both have in common is only
        context in the second: its targets are -100, which the loss ignores. The last batch has one window,
        which may be shorter. All ranks get equally many items, as from `val_batches`.
        """
        T, last = self.seq_len, self.stream.num_tokens - 1  # the last target
        starts = range(0, max(last - T, 0) + stride, stride)
        groups = [starts[:-1][i : i + self.micro_batch] for i in range(0, len(starts) - 1, self.micro_batch)]
        groups.append(starts[-1:])
        for index in range(self.rank, -(-len(groups) // self.world_size) * self.world_size, self.world_size):
            if index >= len(groups):
                yield None
                continue
            length = min(T, last - groups[index][0])
            tokens = [self.stream.read(start, length + 1) for start in groups[index]]
            rows = torch.from_numpy(np.stack(tokens).astype(np.int64)).to(self.device)  # (B, T + 1)
            targets = rows[:, 1:].clone()
            for row, start in enumerate(groups[index]):
                targets[row, : T - stride if start else 0] = -100
            yield rows[:, :-1], targets
