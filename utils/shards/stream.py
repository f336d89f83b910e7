"""A folder of token shards as one logical stream of tokens.

In the order of their numbers the shards of a split are one row of tokens; documents and windows cross their
borders freely. `utils/shards/format.py` owns the files themselves.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from utils.data_loader import TokenStream
from utils.errors import UserError
from utils.shards.format import (
    REBUILD_HINT,
    Shard,
    check_numbers,
    find_shards,
    read_header,
    shard_name,
)

__all__ = ["ShardStream", "find_shards", "read_header", "shard_name"]

MAX_OPEN_FILES = 128  # shards are kept open; some systems allow a process 256 files


class ShardStream(TokenStream):
    """The shards of one split as one stream. Reads slices from the files, so memory stays at a few batches.

    No memory map is kept: a map on a file that another process truncates ends Python without a word.

    Args:
        folder: of the shards.
        split: "train" or "val".
        vocab_size: every id that is read must be below it.
        seq_len: the split must hold at least one window of it.

    Raises:
        UserError: no shards, a gap in their numbers, a damaged one, or a split shorter than one window.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, seq_len: int):
        self.name = f"{folder} ({split})"
        self.vocab_size = vocab_size
        paths = find_shards(folder, split)
        if not paths:
            raise UserError(
                f"{folder} holds no {split} shards (expected {shard_name(split, int(split == 'train'))})",
                f"python build_fineweb_edu_shards.py --output-dir {folder}",
            )
        check_numbers(folder)
        self.shards = [read_header(path) for path in paths]
        lengths = [shard.num_tokens for shard in self.shards]
        self.starts = np.cumsum([0, *lengths])  # stream position of each shard, and of the end
        self.num_tokens = int(self.starts[-1])
        self._files: OrderedDict[int, int] = OrderedDict()  # shard index -> descriptor, longest unused first
        self._lock = threading.Lock()  # batches are prepared in a thread of their own
        if self.num_tokens < seq_len + 1:
            raise UserError(
                f"{self.name} has {self.num_tokens:,} tokens, need at least T+1 = {seq_len + 1}",
                "build more shards or use a smaller --seq-len",
            )

    def __del__(self):
        if os is None:
            return  # at the end of Python, which closes all files itself
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def read(self, start: int, count: int) -> np.ndarray:
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while count > 0:
            inside = start - int(self.starts[index])
            part = self._read_from(index, inside, min(count, self.shards[index].num_tokens - inside))
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_from(self, index: int, start: int, count: int) -> np.ndarray:
        """Tokens of one shard, checked. A short read means that the file was cut after the start."""
        shard = self.shards[index]
        size = count * shard.dtype.itemsize
        try:
            data = self._read_bytes(index, shard.data_offset + start * shard.dtype.itemsize, size)
        except OSError as error:
            raise UserError(f"cannot read {shard.path}: {error}", REBUILD_HINT, one_rank_only=True) from error
        if len(data) < size:
            raise UserError(
                f"{shard.path}: {len(data):,} bytes at token {start:,} (expected {size:,}; cut while used?)",
                REBUILD_HINT,
                one_rank_only=True,
            )
        tokens = np.frombuffer(data, dtype=shard.dtype)
        if count and tokens.max() >= self.vocab_size:
            raise self._bad_token(shard, tokens, start)
        return tokens

    def _read_bytes(self, index: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard, or fewer at its end. Opening a file costs more than reading a window."""
        with self._lock:
            if index not in self._files:
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                self._files[index] = os.open(self.shards[index].path, flags)
                if len(self._files) > MAX_OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(index)
            descriptor = self._files[index]
            pieces = []
            while size > 0:  # one read may return less than was asked: Linux stops at 2 GiB
                if hasattr(os, "pread"):
                    data = os.pread(descriptor, size, offset)
                else:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    data = os.read(descriptor, size)
                if not data:
                    break
                pieces.append(data)
                offset, size = offset + len(data), size - len(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _bad_token(self, shard: Shard, tokens: np.ndarray, start: int) -> UserError:
        place = int(np.argmax(tokens >= self.vocab_size))
        return UserError(
            f"{shard.path}: token {tokens[place]} >= vocab_size {self.vocab_size} "
            f"at position {start + place}",
            "were the shards written with another tokenizer?",
            one_rank_only=True,
        )

    def locate(self, position: int) -> tuple[str, int]:
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[index].path.name, position - int(self.starts[index])

    def fingerprint(self) -> dict:
        return {"shards": [[shard.path.name, shard.num_tokens] for shard in self.shards]}
