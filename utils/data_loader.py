"""Tokens for training: one logical stream, cut into windows, each an example exactly once an epoch.

A stream is a row of tokens with random access: `TextStream` holds a text in memory, `utils/shards/stream.py`
reads a folder. Window w of a stream is tokens [w*T, w*T + T], T inputs and the T targets that follow them by
one. Step s trains on windows [s*W, (s+1)*W) of the epoch order whatever the number of ranks, the micro-batch
or the accumulation, so the position in the data is a pure function of the windows trained so far: there is no
loader state to save or to lose.

Shapes: B micro-batch, T time, W windows of a step.
"""

from __future__ import annotations

import codecs
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

TRAIN_PART = 0.9  # of a text file; the rest is val


class TokenStream:
    """A row of tokens with random access.

    Attributes:
        name: what to call it in messages.
        num_tokens: its length.
    """

    name: str
    num_tokens: int

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start`, unsigned integers.

        Raises UserError for damaged data or ids too large.
        """
        raise NotImplementedError

    def locate(self, position: int) -> tuple[str, int]:
        """File and position inside it of a token of the stream, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> dict:
        """What identifies the data, as plain values: a resumed run must find the same."""
        raise NotImplementedError


class TextStream(TokenStream):
    """Tokens in memory: one split of a text file.

    Args:
        name: of the file, for messages.
        tokens: 1-D unsigned integers.
        offset: position of the first one in the whole file's tokens.
        fingerprint: see TokenStream.
    """

    def __init__(self, name: str, tokens: np.ndarray, offset: int, fingerprint: dict):
        self.name, self.tokens, self.offset, self._fingerprint = name, tokens, offset, fingerprint
        self.num_tokens = len(tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def locate(self, position: int) -> tuple[str, int]:
        return self.name, self.offset + position

    def fingerprint(self) -> dict:
        return self._fingerprint


def read_text(path: Path, flag: str = "--data") -> str:
    """A text file's content, without a byte order mark.

    Raises UserError, with a hint that names the flag it came by, unless it is non-empty UTF-8.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder (expected a text file)",
            f"give {flag} a text file",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", f"give {flag} a file that exists") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        hint = f"convert it: iconv -f {encoding} -t utf-8 {path} > utf8.txt"
        if data.startswith(b"\x93NUMPY"):
            hint = f"give {flag} {'the folder of the shards' if flag == '--data' else 'a text file'}"
        raise UserError(
            f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8", hint
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty", f"give {flag} a file with text in it")
    return text


def split_text(path: Path, text: str, tokens: np.ndarray, seq_len: int) -> tuple[TextStream, TextStream]:
    """Train and val streams of a text: the first 90 % of its tokens, and the rest.

    Raises:
        UserError: a split is shorter than one window (seq_len + 1 tokens).
    """
    import hashlib

    border = int(len(tokens) * TRAIN_PART)
    if min(border, len(tokens) - border) < seq_len + 1:
        raise UserError(
            f"{path} has {len(tokens):,} tokens, need at least T+1 = {seq_len + 1} "
            "in each of train (90 %) and val (last 10 %)",
            "give a longer text or a smaller --seq-len",
        )
    identity = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (
        TextStream(str(path), tokens[:border], 0, identity),
        TextStream(str(path), tokens[border:], border, identity),
    )


@lru_cache(maxsize=2)  # the current epoch, and the next one in a step that crosses the border
def epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's windows: a permutation, a pure function of its arguments.

    numpy promises that RandomState's stream never changes between its versions, which Generator's may.
    """
    return np.random.RandomState([seed, epoch]).permutation(num_windows).astype(np.uint32)


class WindowLoader:
    """Batches of windows from a stream.

    Args:
        stream: the tokens.
        seq_len: T.
        micro_batch: B, rows of a batch.
        rank, world_size: this process takes every world_size-th batch.
        device: where the batches go.
        seed: of the shuffle; None keeps the order of the stream.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ):
        self.stream, self.seq_len, self.micro_batch = stream, seq_len, micro_batch
        self.rank, self.world_size, self.device, self.seed = rank, world_size, torch.device(device), seed
        self.windows_per_epoch = (stream.num_tokens - 1) // seq_len

    def window_at(self, number: int) -> int:
        """The window that training sees as its `number`-th, counted from 0 and through all epochs."""
        epoch, place = divmod(number, self.windows_per_epoch)
        if self.seed is None:
            return place
        return int(epoch_order(self.windows_per_epoch, self.seed, epoch)[place])

    def numbers_of_batch(self, first: int, micro_step: int) -> range:
        """Numbers of the windows in this rank's batch, in a step that starts with window number `first`.

        A micro-step covers B * world_size windows in a row, rank after rank.
        """
        start = first + (micro_step * self.world_size + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64, of these windows, on the device."""
        T = self.seq_len
        tokens = np.stack([self.stream.read(window * T, T + 1) for window in windows]).astype(np.int64)
        rows = torch.from_numpy(tokens)  # (B, T + 1)
        if self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        else:
            rows = rows.to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def train_batches(self, first: int, windows_per_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches from window `first` on, endlessly; the next is prepared while one is in use.

        Args:
            first: windows trained so far.
            windows_per_step: W, a multiple of B * world_size.
        """
        micro_steps = windows_per_step // (self.micro_batch * self.world_size)

        def prepare(index: int) -> tuple[Tensor, Tensor]:
            step, micro_step = divmod(index, micro_steps)
            return self.batch(
                [
                    self.window_at(n)
                    for n in self.numbers_of_batch(first + step * windows_per_step, micro_step)
                ]
            )

        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(prepare, 0)
            index = 0
            while True:
                batch = coming.result()
                index += 1
                coming = pool.submit(prepare, index)
                yield batch

    def num_val_windows(self, num_tokens: int) -> int:
        """Windows of an evaluation on `num_tokens` tokens, or on the whole stream if that is shorter."""
        return min(max(1, num_tokens // self.seq_len), self.windows_per_epoch)

    def val_batches(self, num_tokens: int) -> Iterator[tuple[Tensor, Tensor] | None]:
        """This rank's share of the first `num_tokens` tokens, in order.

        Yields:
            batches; the last may have fewer rows. All ranks get equally many items, None where there is
            nothing left, so that what ranks do together after each item stays in step.
        """
        total = self.num_val_windows(num_tokens)
        for round_start in range(0, total, self.micro_batch * self.world_size):
            start = round_start + self.rank * self.micro_batch
            windows = list(range(start, min(start + self.micro_batch, total)))
            yield self.batch(windows) if windows else None
