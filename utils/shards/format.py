"""The token shard file: its name, its header, and writing it atomically.

A shard is a 1-D .npy file of uint16 (uint32 where the vocabulary needs it), named
`edufineweb_{split}_{number:06d}.npy`; number 0 is val. The format is build-nanogpt's. Nothing here imports
torch, so that the processes that build shards start fast.
"""

import hashlib
import io
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.command_line import Unfinished, UserError
from utils.files import whole_file
from utils.text_files import describe_bytes, first_bytes

REBUILD_HINT = "copy it again; or delete it and run the command that built the folder again"
DTYPES = (np.dtype("<u2"), np.dtype("<u4"))


class Shard(NamedTuple):
    """A file of tokens, or a section of one."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    data_offset: int  # bytes before the first token
    first: int = 0  # position in the file of the first token
    digest: str | None = None  # identifies the content where the name does not


def shard_name(split: str, number: int) -> str:
    """File name of a shard; number 0 is val."""
    return f"edufineweb_{split}_{number:06d}.npy"


def shard_number(path: Path) -> int | None:
    """The number at the end of a shard's name, or None."""
    match = re.search(r"(\d+)\.npy$", path.name)
    return int(match.group(1)) if match else None


def find_shards(folder: Path, split: str) -> list[Path]:
    """The .npy files with the word `split` in their names, by number if all have one, else by name."""
    paths = sorted(p for p in folder.glob("[!.]*.npy") if split in re.split(r"[^A-Za-z]+", p.stem))
    if all(shard_number(path) is not None for path in paths):
        paths.sort(key=shard_number)
    return paths


def find_all_shards(folder: Path) -> list[Path]:
    """The shards of both splits, val first."""
    return find_shards(folder, "val") + find_shards(folder, "train")


def check_numbers(folder: Path) -> None:
    """Raises UserError if a number is missing among the shards of a folder, val and train together.

    A folder whose shards all have no number is accepted: their order is alphabetical.
    """
    paths = find_all_shards(folder)
    numbers = [shard_number(path) for path in paths]
    if None in numbers and any(number is not None for number in numbers):
        what = f"{folder}: {paths[numbers.index(None)].name} has no number, other shards have"
        raise UserError(what, "if it is a copy, move it away")
    names = {path.name for path in paths}
    for name in sorted(names):
        if re.sub(r" \d+\.npy$", ".npy", name) in names - {name}:
            raise UserError(f"{folder}: {name} is a copy of another shard", "move it away")
    for before, after in pairwise(sorted({number for number in numbers if number is not None})):
        if after != before + 1:
            hint = "copy or build the missing shard: the order of the data depends on all of them"
            raise UserError(f"{folder}: shard {before + 1} is missing between {before} and {after}", hint)


def read_header(path: Path) -> Shard:
    """Reads the header of a shard. Raises UserError unless the file is a complete shard, by its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            npy = np.lib.format
            is_version_1 = npy.read_magic(file) == (1, 0)
            read = npy.read_array_header_1_0 if is_version_1 else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            data_offset = file.tell()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", REBUILD_HINT) from error
    except Exception as error:  # numpy's parser fails on a damaged header in many ways
        found = describe_bytes(first_bytes(path))
        found = "" if found in ("empty", "a NumPy array") else f", but {found}"
        raise UserError(f"{path}: not a .npy file ({size:,} bytes){found}", REBUILD_HINT) from error
    if dtype not in DTYPES or len(shape) != 1:
        what = f"{path}: {dtype.str} array of shape {shape} (expected 1-D uint16 or uint32)"
        raise UserError(what, REBUILD_HINT)
    expected = data_offset + shape[0] * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes, header says {expected:,}", REBUILD_HINT)
    return Shard(path, shape[0], dtype, data_offset)


def find_invalid_token(tokens: np.ndarray, vocab_size: int, start: int) -> str | None:
    """Describes the first id that is not below `vocab_size`, or returns None; tokens[0] is at `start`."""
    if not len(tokens) or tokens.max() < vocab_size:
        return None
    index = int(np.argmax(tokens >= vocab_size))
    return f"token {tokens[index]} >= vocab_size {vocab_size} at position {start + index}"


def write_shard(path: Path, arrays: Iterable[np.ndarray], num_tokens: int) -> str:
    """Writes uint16 or uint32 tokens, `num_tokens` in all, as the file that numpy.save would write.

    The file appears at `path` when it is complete, replacing an earlier one. Returns its SHA-256, in
    hexadecimal. Raises Unfinished if the disk is full or similar; an earlier file is then untouched.
    """
    header = io.BytesIO()
    arrays = iter(arrays)
    first = next(arrays)
    dtype = first.dtype.newbyteorder("<")
    assert dtype in DTYPES
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(header, fields)
    digest = hashlib.sha256(header.getvalue())
    with write_errors(path, dtype.itemsize * num_tokens), whole_file(path, "wb", durable=True) as file:
        file.write(header.getvalue())
        for array in chain([first], arrays):
            data = np.ascontiguousarray(array, dtype=dtype).data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


@contextmanager
def write_errors(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns an OSError of the block, which writes `num_bytes` to `path`, into Unfinished."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        what = f"cannot write {path}: {error.strerror or error}"
        space = f"(free {free / 1e6:,.0f} MB, need {num_bytes / 1e6:,.0f} MB)"
        hint = "finished shards are kept; make room and run the same command again to continue"
        raise Unfinished(f"{what} {space}", hint) from error
