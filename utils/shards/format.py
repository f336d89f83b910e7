"""The token shard file: its name, its header, and how it comes to the disk whole or not at all.

A shard is a 1-D .npy file of uint16 (uint32 where the vocabulary needs it), named
`edufineweb_{split}_{number:06d}.npy`; number 0 is val. The format is build-nanogpt's. Nothing here needs
torch, so that the processes which build shards start fast.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import whole_file

REBUILD_HINT = "rebuild it: delete the file and run build_fineweb_edu_shards.py again, or copy it once more"
UNFINISHED = (".edufineweb_*.npy.tmp", ".manifest.json.tmp", ".probe.*.tmp")  # others are not ours to delete
DTYPES = (np.dtype("<u2"), np.dtype("<u4"))


class Shard(NamedTuple):
    """A file of tokens, as its header describes it."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    data_offset: int  # bytes of header before the first token


def shard_name(split: str, number: int) -> str:
    """File name of a shard; number 0 is val."""
    return f"edufineweb_{split}_{number:06d}.npy"


def shard_number(path: Path) -> int | None:
    """The number at the end of a shard's name, or None if it has none."""
    match = re.search(r"(\d+)\.npy$", path.name)
    return int(match.group(1)) if match else None


def find_shards(folder: Path, split: str) -> list[Path]:
    """The .npy files with the word `split` in their names, by number if all have one, else by name."""
    paths = sorted(
        path
        for path in folder.glob("*.npy")
        if split in re.split(r"[^A-Za-z]+", path.stem) and not path.name.startswith(".")
    )
    if all(shard_number(path) is not None for path in paths):
        paths.sort(key=shard_number)
    return paths


def check_numbers(folder: Path) -> None:
    """Raises UserError if the numbers of a folder's shards, val and train together, leave one out.

    Names without numbers are a row of their own, in alphabetical order, if all are such.
    """
    paths = find_shards(folder, "val") + find_shards(folder, "train")
    unnumbered = [path.name for path in paths if shard_number(path) is None]
    if unnumbered and len(unnumbered) < len(paths):
        raise UserError(
            f"{folder}: {unnumbered[0]} has no number, other shards have", "if it is a copy, move it away"
        )
    names = {path.name for path in paths}
    copies = [name for name in sorted(names) if re.sub(r" \d+\.npy$", ".npy", name) in names - {name}]
    if copies:
        raise UserError(f"{folder}: {copies[0]} is a copy of another shard", "move it away")
    numbers = sorted({number for number in map(shard_number, paths) if number is not None})
    for before, after in zip(numbers, numbers[1:]):
        if after != before + 1:
            raise UserError(
                f"{folder}: shard {before + 1} is missing between {before} and {after}",
                "copy or build the missing shard: the order of the data depends on all of them",
            )


def read_header(path: Path) -> Shard:
    """Checks a shard by its header and its size, without reading its tokens.

    Raises UserError for anything that is no shard.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            npy = np.lib.format
            is_old = npy.read_magic(file) == (1, 0)
            read = npy.read_array_header_1_0 if is_old else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            data_offset = file.tell()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", REBUILD_HINT) from error
    except Exception as error:  # a damaged header fails in numpy's parser in many ways
        raise UserError(f"{path}: not a .npy file ({size:,} bytes)", REBUILD_HINT) from error
    if dtype not in DTYPES or len(shape) != 1:
        raise UserError(
            f"{path}: {dtype.str} array of shape {shape} (expected one row of uint16 or uint32)", REBUILD_HINT
        )
    expected = data_offset + shape[0] * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size:,} bytes, header says {expected:,}", REBUILD_HINT)
    return Shard(path, shape[0], dtype, data_offset)


def write_shard(path: Path, arrays: Iterable[np.ndarray], num_tokens: int) -> str:
    """Writes uint16 tokens as the file that numpy.save would write, under a temporary name until it is whole.

    Args:
        path: where it appears, replacing what was there.
        arrays: the tokens, in order.
        num_tokens: how many they are together.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: the disk is full or the like; the temporary file is gone, an earlier `path` untouched.
    """
    digest = hashlib.sha256()
    with whole_file(path, "w+b", temporary=unfinished_name(path), durable=True) as file:
        header = {"descr": DTYPES[0].str, "fortran_order": False, "shape": (num_tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0)
        digest.update(file.read())
        for array in arrays:
            piece = np.ascontiguousarray(array, dtype=DTYPES[0])
            file.write(piece.data)
            digest.update(piece.data)
    return digest.hexdigest()


def unfinished_name(path: Path) -> Path:
    """The name of a file of a build before it is whole: the same in every build, and that of no shard."""
    return path.with_name(f".{path.name}.tmp")


def remove_unfinished(folder: Path) -> list[str]:
    """Deletes what a killed build left, and returns the names."""
    names = []
    for pattern in UNFINISHED:
        for path in sorted(folder.glob(pattern)):
            path.unlink(missing_ok=True)  # a probe goes when its build has made it
            names.append(path.name)
    return names
