"""A folder of token shards as one logical stream of tokens.

The shards of a split, in their order, are one sequence of tokens; documents and windows cross the borders
between shards. `utils/shards/token_files.py` finds the files, which may be of other programs.
"""

import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from utils.command_line import UserError
from utils.data_loader import TokenStream
from utils.shards.format import REBUILD_HINT, find_invalid_token
from utils.shards.token_files import token_files

MAX_OPEN_FILES = 128  # shards are kept open; some systems allow a process only 256 files


class ShardStream(TokenStream):
    """The shards of one split as one stream, read slice by slice: memory stays at a few batches.

    Files are read, not memory-mapped: a map of a file that another process truncates kills Python with a
    SIGBUS instead of raising an exception.

    `split` is "train" or "val"; every id that is read must be below `vocab_size`. Raises UserError for no
    shards, a gap in their numbers, a damaged one, or a split shorter than one window of seq_len + 1 tokens.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, seq_len: int):
        self.name = f"{folder} ({split})"
        self.vocab_size = vocab_size
        self.shards = token_files(folder, split)
        # Stream position of the start of each shard, and of the end.
        self.starts = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])
        self.num_tokens = int(self.starts[-1])
        self._files: OrderedDict[int, FileIO] = OrderedDict()  # by index of the shard, least recent first
        self._lock = threading.Lock()  # batches are prepared in a thread of their own
        if self.num_tokens < seq_len + 1:
            what = f"{self.name} has {self.num_tokens:,} tokens, need at least T+1 = {seq_len + 1}"
            raise UserError(what, "build more shards or use a smaller --seq-len")

    def read(self, start: int, count: int) -> np.ndarray:
        index, offset = self._shard_at(start)
        parts = []
        while count > 0:
            parts.append(self._read_from(index, offset, min(count, self.shards[index].num_tokens - offset)))
            count -= len(parts[-1])
            index, offset = index + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def locate(self, position: int) -> tuple[str, int]:
        index, offset = self._shard_at(position)
        return self.shards[index].path.name, self.shards[index].first + offset

    def fingerprint(self) -> dict[str, Any]:
        entries = [(shard.path.name, shard.num_tokens, shard.digest) for shard in self.shards]
        return {"shards": [[value for value in entry if value is not None] for entry in entries]}

    def _shard_at(self, position: int) -> tuple[int, int]:
        """The index of the shard that contains a stream position, and the position in it."""
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        return index, position - int(self.starts[index])

    def _read_from(self, index: int, start: int, count: int) -> np.ndarray:
        """Tokens of one shard, checked. A short read means that the file was truncated after the start."""
        shard = self.shards[index]
        size = count * shard.dtype.itemsize
        try:
            data = self._read_bytes(index, shard.data_offset + start * shard.dtype.itemsize, size)
        except OSError as error:
            raise UserError(f"cannot read {shard.path}: {error}", REBUILD_HINT, one_rank_only=True) from error
        start += shard.first
        if len(data) < size:
            what = f"{shard.path}: {len(data):,} bytes at token {start:,} (expected {size:,}: truncated?)"
            raise UserError(what, REBUILD_HINT, one_rank_only=True)
        tokens = np.frombuffer(data, dtype=shard.dtype)
        if problem := find_invalid_token(tokens, self.vocab_size, start):
            hint = "were the shards written with another tokenizer?"
            raise UserError(f"{shard.path}: {problem}", hint, one_rank_only=True)
        return tokens

    def _read_bytes(self, index: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard, or fewer at its end. Opening a file costs more than reading a window."""
        with self._lock:
            if index not in self._files:
                # Unbuffered: a buffer would hide that the file has been truncated.
                self._files[index] = open(self.shards[index].path, "rb", buffering=0)
                if len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(index)
            self._files[index].seek(offset)
            return self._files[index].read(size)
