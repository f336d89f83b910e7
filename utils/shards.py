"""Token shards: .npy files that are one logical stream of tokens.

A shard is a 1-D .npy file of uint16 (uint32 where the vocabulary needs it), named
`edufineweb_{split}_{number:06d}.npy`; in name
order the shards of a split are one row of tokens, and documents and windows cross their borders freely. The
format is
build-nanogpt's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data_loader import TokenStream
from utils.errors import UserError

REBUILD_HINT = "rebuild it: delete the file and run build_fineweb_edu_shards.py again, or copy it once more"


class Shard(NamedTuple):
    """A file of tokens, as its header describes it."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    data_offset: int  # bytes of header before the first token


def shard_name(split: str, number: int) -> str:
    """File name of a shard; number 0 is val."""
    return f"edufineweb_{split}_{number:06d}.npy"


def find_shards(folder: Path, split: str) -> list[Path]:
    """The .npy files of a split in name order, whatever comes before the split's name."""
    return sorted(
        path for path in folder.glob("*.npy") if split in path.name and not path.name.startswith(".")
    )


def read_header(path: Path) -> Shard:
    """Checks a shard by its header and its size, without reading its tokens.

    Raises UserError for anything that is no shard.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            data_offset = file.tell()
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file ({size:,} bytes)", REBUILD_HINT) from error
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        raise UserError(
            f"{path}: {dtype} array of shape {shape} (expected one row of uint16 or uint32)", REBUILD_HINT
        )
    expected = data_offset + shape[0] * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes, header says {expected:,}", REBUILD_HINT)
    return Shard(path, shape[0], dtype, data_offset)


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
        _check_numbers(paths)
        self.shards = [read_header(path) for path in paths]
        self.starts = np.cumsum(
            [0] + [shard.num_tokens for shard in self.shards]
        )  # stream position of each shard
        self.num_tokens = int(self.starts[-1])
        if self.num_tokens < seq_len + 1:
            raise UserError(
                f"{self.name} has {self.num_tokens:,} tokens, need at least T+1 = {seq_len + 1}",
                "build more shards or use a smaller --seq-len",
            )

    def read(self, start: int, count: int) -> np.ndarray:
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while count > 0:
            shard, inside = self.shards[index], start - int(self.starts[index])
            part = self._read_from(shard, inside, min(count, shard.num_tokens - inside))
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_from(self, shard: Shard, start: int, count: int) -> np.ndarray:
        try:
            tokens = np.fromfile(
                shard.path, shard.dtype, count, offset=shard.data_offset + start * shard.dtype.itemsize
            )
        except OSError as error:
            raise UserError(f"cannot read {shard.path}: {error}", REBUILD_HINT, one_rank_only=True) from error
        if len(tokens) < count:
            raise UserError(
                f"{shard.path}: {len(tokens)} tokens at position {start} (expected {count}: truncated in use?)",
                REBUILD_HINT,
                one_rank_only=True,
            )
        if count and tokens.max() >= self.vocab_size:
            bad = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{shard.path}: token {tokens[bad]} >= vocab_size {self.vocab_size} "
                f"at position {start + bad}",
                "were the shards written with another tokenizer?",
                one_rank_only=True,
            )
        return tokens

    def locate(self, position: int) -> tuple[str, int]:
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[index].path.name, position - int(self.starts[index])

    def fingerprint(self) -> dict:
        return {"shards": [[shard.path.name, shard.num_tokens] for shard in self.shards]}


def _check_numbers(paths: list[Path]) -> None:
    """Raises UserError if the numbers at the ends of the names leave one out."""
    numbers = [re.search(r"(\d+)\.npy$", path.name) for path in paths]
    if not all(numbers):
        return
    found = [int(match.group(1)) for match in numbers]
    for before, after in zip(found, found[1:]):
        if after != before + 1:
            raise UserError(
                f"{paths[0].parent}: shard {before + 1} is missing between {before} and {after}",
                "copy or build the missing shard: the order of the data depends on all of them",
            )
