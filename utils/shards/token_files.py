"""The token files of a folder, whoever wrote them, as lists of `Shard`.

    edufineweb_{val,train}_{number}.npy    of build_fineweb_edu_shards.py, or of build-nanogpt
    train.bin, val.bin                     of nanoGPT: uint16 without a header
    NAME.ds                                of datatrove: uint16 or uint32 without a header

Beside each NAME.ds, datatrove writes NAME.ds.metadata (lines: tokenizer and bytes per token, as `gpt2|2`;
number of tokens) and NAME.ds.index (the end of each document, uint64). Its documents end with <|endoftext|>,
ours begin with it. The first file in the order of names is val; if it is the only one, its last 10 % are.
"""

import os
from pathlib import Path

from utils.command_line import UserError
from utils.data_loader import TRAIN_SHARE
from utils.shards.format import (
    DTYPES,
    REBUILD_HINT,
    Shard,
    check_numbers,
    find_all_shards,
    find_shards,
    read_header,
)
from utils.shards.local_files import fingerprint_of
from utils.shards.manifest import FILE_NAME
from utils.text_files import quoted

SPLITS = ("train", "val")
DATATROVE_FILES = "[!.]*.ds"
PATTERNS = ("[!.]*.npy", DATATROVE_FILES, *(f"{split}.bin" for split in SPLITS))
METADATA_BYTES = 1 << 12  # more than any metadata
DATATROVE_HINT = (
    "copy the three files of that name again, or have datatrove's DocumentTokenizer write them again"
)


def holds_tokens(folder: Path) -> bool:
    """Whether a folder is, or should be, one of token files rather than of texts."""
    return any(next(folder.glob(pattern), None) for pattern in PATTERNS)


def is_token_file(path: Path) -> bool:
    """Whether a file has the name of a token file, which is read together with the others in its folder."""
    return os.path.isfile(path) and any(path.match(pattern) for pattern in PATTERNS)


def token_files(folder: Path, split: str) -> list[Shard]:
    """The files of a split, in order. Raises UserError if there are none, or for a damaged one."""
    if find_all_shards(folder):
        check_numbers(folder)
        shards = [read_header(path) for path in find_shards(folder, split)]
    elif any((folder / f"{name}.bin").exists() for name in SPLITS):
        shards = [_read_bin(folder / f"{split}.bin")]
    else:
        shards = _split_of(_datatrove_files(folder), split)
    if not shards:
        what = f"{folder} holds no {split} shards (expected .npy files with {split!r} in their names)"
        raise UserError(what, hint_without_shards(folder))
    return shards


def names_tokenizer(folder: Path) -> str | None:
    """How datatrove's files name their tokenizer; None for token files of others, which do not."""
    first = min(folder.glob(DATATROVE_FILES), default=None)
    return None if first is None or find_all_shards(folder) else _read_ds(first)[1]


def hint_without_shards(folder: Path) -> str:
    """What to do about a folder that lacks the shards of a split, or holds something else."""
    if (folder / FILE_NAME).exists():
        return (
            f"run the command that built it again: {FILE_NAME} names its input; --max-shards must be above 1"
        )
    if found := find_all_shards(folder):
        return f"copy the other shards into it (it holds {found[0].name})"
    if found := sorted(folder.glob("*.npy")):
        return f"if {found[0].name} is a shard, put the word train, or val, into its name"
    return "give --data a text file, a folder of texts, or one that build_fineweb_edu_shards.py wrote"


def refuse_characters(folder: Path) -> None:
    """Raises UserError for nanoGPT's files of characters: only a pickle says which id is which."""
    meta = folder / "meta.pkl"
    if not meta.exists() or not (folder / "train.bin").exists():
        return
    text = folder / "input.txt"
    hint = "give --data the text that it was made of, with --tokenizer char"
    if text.is_file():
        hint = f"train on the text, which gives the same ids: --tokenizer char --data {quoted(text)}"
    what = f"{folder}: the ids of train.bin are characters that only {meta.name} lists"
    raise UserError(f"{what}, a pickle, which is not read because it may run code", hint)


def _read_bin(path: Path) -> Shard:
    try:
        size = path.stat().st_size
    except OSError as error:
        hint = "copy train.bin and val.bin: nanoGPT's prepare.py wrote both into one folder"
        raise UserError(f"cannot read {path}: {error.strerror}", hint) from error
    num_tokens, rest = divmod(size, DTYPES[0].itemsize)
    if rest:
        raise UserError(f"{path}: {size:,} bytes (expected an even number: uint16)", REBUILD_HINT)
    return Shard(path, num_tokens, DTYPES[0], 0, digest=_digest(path))


def _datatrove_files(folder: Path) -> list[Shard]:
    """All .ds files that have tokens: a task of datatrove without documents writes an empty one."""
    shards, first = [], None
    for path in sorted(folder.glob(DATATROVE_FILES)):
        shard, tokenizer = _read_ds(path)
        first = first or (path, tokenizer)
        # Only the last part of a path: each machine may have had the tokenizer in another folder.
        if os.path.basename(tokenizer) != os.path.basename(first[1]):
            what = f"{folder} has tokens of {first[1]} ({first[0].name}) and of {tokenizer} ({path.name})"
            raise UserError(what, "keep the files of one tokenizer in a folder")
        shards += [shard] if shard.num_tokens else []
    return shards


def _read_ds(path: Path) -> tuple[Shard, str]:
    """A file of datatrove, checked by what is beside it, and the name of its tokenizer."""
    metadata, index = (path.with_name(f"{path.name}.{name}") for name in ("metadata", "index"))
    try:
        size = path.stat().st_size
        with open(metadata, "rb") as file:
            text = file.read(METADATA_BYTES)
        with open(index, "rb") as file:
            index_size = file.seek(0, os.SEEK_END)
            file.seek(max(0, index_size - 8))
            end = int.from_bytes(file.read(8), "little")  # of the last document
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}", DATATROVE_HINT) from error
    try:
        name, count, *_ = text.decode("utf-8").splitlines()
        tokenizer, width = name.rsplit("|", 1)
        num_tokens, dtype = int(count), {"2": DTYPES[0], "4": DTYPES[1]}[width]
    except (ValueError, KeyError) as error:
        what = f"{metadata}: {text[:60]!r} (expected lines TOKENIZER|2, or |4, and the number of tokens)"
        raise UserError(what, DATATROVE_HINT) from error
    if size != num_tokens * dtype.itemsize:
        what = f"{path}: {size:,} bytes, {metadata.name} says {num_tokens:,} tokens of {dtype.itemsize} bytes"
        raise UserError(what, DATATROVE_HINT)
    if index_size % 8 or end != num_tokens:
        what = f"{index}: {index_size:,} bytes, the last document ends at {end:,} of {num_tokens:,} tokens"
        raise UserError(what, DATATROVE_HINT)
    return Shard(path, num_tokens, dtype, 0), tokenizer


def _split_of(shards: list[Shard], split: str) -> list[Shard]:
    """Of datatrove's files, those of a split."""
    if len(shards) == 1:
        (whole,) = shards
        border = int(whole.num_tokens * TRAIN_SHARE)
        count, offset = whole.num_tokens - border, border * whole.dtype.itemsize
        val = whole._replace(num_tokens=count, data_offset=offset, first=border)
        shards = [val, whole._replace(num_tokens=border)]
    chosen = shards[:1] if split == "val" else shards[1:]
    return [shard._replace(digest=_digest(shard.path)) for shard in chosen]


def _digest(path: Path) -> str:
    """Of both ends of a file: a name as train.bin says nothing about the content."""
    return fingerprint_of(path)[-1]
