"""Which data to train on, and its streams: shards, texts, or a download."""

import hashlib
import os
import platform
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.command_line import UserError, command_name
from utils.console import announced, say, warn
from utils.data_loader import TextStream, TokenStream, WindowLoader, split_text
from utils.distributed import Distributed
from utils.files import download
from utils.shards.documents import (
    KINDS,
    TEXT_FIELD,
    Position,
    is_text,
    kind_of,
    parts_from,
    read_documents,
    split_at_separators,
)
from utils.shards.format import find_shards
from utils.shards.local_files import LocalFiles, describe_left_out, find_files
from utils.shards.stream import ShardStream
from utils.shards.token_files import holds_tokens, is_token_file, refuse_characters
from utils.suggestions import similar_file
from utils.text_files import decode_text, free_name, quoted, read_text
from utils.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    valid_text,
)
from utils.training.tokenizing import (
    available_tokenizer,
    encode_texts,
    has_end_of_text,
    tokenizer_of_shards,
)

ROOT = Path(__file__).resolve().parents[2]
SHARDS_DIR = ROOT / "edu_fineweb10B"
TEXT_PATH = ROOT / "input.txt"

MAX_CHARACTERS = 200_000_000  # of a folder of texts, which are tokenized at each start, in memory
MAX_SEARCHED_FILES = 10_000  # for a text: the folder may be a whole disk

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394


class Source(NamedTuple):
    """Where the data comes from, and why."""

    # "shards" or "texts" (folders), "text" or "records" (files), "download" (to `path`), "pydoc" (no path)
    kind: str
    path: Path | None
    reason: str


def choose_source(requested: str | None) -> Source:
    """What to train on, without using the network: `--data`, shards, input.txt, else a download."""
    if requested is not None:
        path = Path(requested)
        kind = "text" if is_text(kind_of(path) or "text") else "records"
        if os.path.isdir(path):  # Path.is_dir raises where a folder may not be read
            kind = "texts" if holds_texts(path) else "shards"
        return Source(kind, path, "--data")
    if find_shards(SHARDS_DIR, "train"):
        return Source("shards", SHARDS_DIR, "the folder holds shards")
    if TEXT_PATH.exists():
        return Source("text", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/")
    return Source("download", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/ and no {TEXT_PATH.name}")


def holds_texts(folder: Path) -> bool:
    """Whether a folder, or one below it, holds texts, and no shards."""
    files = islice(folder.rglob("*"), MAX_SEARCHED_FILES)
    return not holds_tokens(folder) and any(path.name.lower().endswith(tuple(KINDS)) for path in files)


def fetch(requested: str | None, dist: Distributed) -> Source:
    """The source of `choose_source`, after its download; without a network, Python's documentation."""
    source = choose_source(requested)
    if source.kind == "download" and dist.local_rank == 0 and not source.path.exists():
        try:
            download(TINY_SHAKESPEARE_URL, source.path, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_BYTES)
        except OSError as error:
            warn(f"cannot download Tiny Shakespeare ({error}); put any text into {source.path}")
    dist.barrier()  # for every kind of source: another machine may have chosen another one
    if requested and not os.path.exists(source.path) and (close := similar_file(source.path)):
        raise UserError(f"cannot read {requested}: no such file", f"did you mean --data {quoted(close)}?")
    if is_token_file(source.path):
        hint = f"give its folder: --data {quoted(source.path.parent)}"
        raise UserError(f"{source.path} is a file of tokens, which are read from their folder", hint)
    if source.kind != "download":
        return source
    # Every rank looks at the disk of its own machine; open_data compares what they found.
    if source.path.exists():
        return Source("text", source.path, source.reason + ": Tiny Shakespeare was downloaded")
    return Source("pydoc", None, source.reason + ", no network: the documentation inside Python")


class Data(NamedTuple):
    """Opened data: a tokenizer, both splits in its tokens, and the reason for this data."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    reason: str


def open_data(
    source: Source, tokenizer_state: dict[str, Any] | None, seq_len: int, dist: Distributed
) -> Data:
    """Opens the data that `fetch` returned; each split must hold at least one window of seq_len + 1 tokens.

    `tokenizer_state` is that of a loaded model, or what `requested_tokenizer` returns; None is the tokenizer
    of the shards, and GPT-2's for a text. Raises UserError for missing, empty, damaged or too short data, or
    if ranks see different data.
    """
    if source.kind == "shards":
        refuse_characters(source.path)
        tokenizer = tokenizer_of_shards(source.path, tokenizer_state, dist)
        vocab_size = tokenizer.vocab_size
        train, val = (ShardStream(source.path, split, vocab_size, seq_len) for split in ("train", "val"))
        reason = source.reason
    else:
        state = tokenizer_state or {"name": available_tokenizer("gpt2", dist)}
        tokenizer, tokens, border, fingerprint = tokenize(source, state, dist)
        name = str(source.path or f"pydoc_data.topics of Python {platform.python_version()}")
        train, val = split_text(name, tokens, fingerprint, seq_len, border)
        count = fingerprint.get("documents")
        reason = source.reason if count is None else f"{source.reason}, {count:,} documents"
    fingerprints = [train.fingerprint(), val.fingerprint()]
    if dist.broadcast(fingerprints) != fingerprints:
        what = f"rank {dist.rank} sees other data than rank 0 in {train.name}"
        raise UserError(what, "give every machine the same files", one_rank_only=True)
    return Data(tokenizer, train, val, reason)


def tokenize(
    source: Source, tokenizer_state: dict[str, Any], dist: Distributed
) -> tuple[Tokenizer, np.ndarray, int | None, dict[str, Any]]:
    """Tokenizes a text or records.

    Returns the tokenizer; the tokens, 1-D; how many of them are train, None for 90 %; and plain values that
    identify the data.

    Documents (records, those of a folder, or of a text with lines that read <|endoftext|>) become the tokens
    that the shard builder makes of them; a text without such a line is tokenized as it is. Raises UserError
    for unusable files.
    """
    with announced(f"reading {source.path or 'the documentation'}", shown=dist.is_master):
        text, documents = read_source(source, tokenizer_state, dist)
    if documents is not None and not has_end_of_text(tokenizer_state):
        if dist.is_master:
            have = "characters have" if tokenizer_state["name"] == "char" else "the tokenizer has"
            warn(f"{source.path}: documents are joined by blank lines: {have} no {END_OF_TEXT}")
        text = "\n\n".join(text.strip("\r\n") for text in chain.from_iterable(documents))
        text, documents = valid_text(text), None
    texts = [text] if documents is None else chain.from_iterable(documents)
    tokenizer, tokens, border = encode_texts(
        texts, tokenizer_state, dist, are_documents=documents is not None
    )
    if documents is None:
        data = text.encode()
        return tokenizer, tokens, border, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    count = int(np.count_nonzero(tokens == tokenizer.end_of_text))
    sha256 = hashlib.sha256(tokens.data).hexdigest()
    return tokenizer, tokens, border, {"documents": count, "sha256": sha256}


def read_source(
    source: Source, tokenizer_state: dict[str, Any], dist: Distributed
) -> tuple[str, Iterable[list[str]] | None]:
    """A text and None, or "" and lists of documents."""
    if source.kind == "texts":
        return "", [read_folder(source.path, tokenizer_state, dist)]
    if source.kind == "records":
        warn_of_records(source.path, dist)
        parts = parts_from(LocalFiles([source.path]), TEXT_FIELD, Position())
        return "", (read_documents(part, TEXT_FIELD) for part in parts)
    if source.path is None:
        text = python_documentation()
    elif kind_of(source.path) in (None, "text"):
        text = read_text(source.path)
    else:  # packed
        parts = parts_from(LocalFiles([source.path]), TEXT_FIELD, Position())
        text = "".join(decode_text(part.path, part.data, part.start) for part in parts)
    documents = split_at_separators(text)
    if len(documents) == 1:
        return text, None
    return "", [[text for text in documents if text.strip()]]


def read_folder(folder: Path, tokenizer_state: dict[str, Any], dist: Distributed) -> list[str]:
    """The documents that the shard builder finds in a folder.

    Raises UserError if they are too long; its hint is for the tokenizer.
    """
    paths, left_out = find_files([str(folder)], "--data")
    files = LocalFiles(paths)
    if left_out and dist.is_master:
        say(f"left out of --data: {describe_left_out(left_out)}")
    if not all(map(is_text, files.kinds)):
        warn_of_records(folder, dist)
    documents: list[str] = []
    num_characters = 0
    for part in parts_from(files, TEXT_FIELD, Position()):
        texts = read_documents(part, TEXT_FIELD)
        num_characters += sum(map(len, texts))
        if num_characters > MAX_CHARACTERS:
            what = f"{folder} has more than {MAX_CHARACTERS:,} characters, too many to tokenize at each start"
            raise UserError(what, shards_hint(folder, tokenizer_state))
        if part.continues_document:
            documents[-1] += texts.pop(0)
        documents += texts
    return documents


def shards_hint(folder: Path, tokenizer_state: dict[str, Any]) -> str:
    """How to train on a folder of too many texts: on shards of the same tokenizer."""
    if tokenizer_state["name"] == "char":
        return "characters have no shards: give --data a smaller folder, or one file, which may be larger"
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    new = quoted(free_name(folder.parent / f"{name}_shards"))
    builder = command_name("build_fineweb_edu_shards.py")
    command = f"python {builder} --input {quoted(folder)} --output-dir {new}"
    if "vocab_size" in tokenizer_state:
        command += f" --tokenizer bpe:{tokenizer_state['vocab_size']}"
    elif tokenizer_state["name"] != "gpt2":
        command += " --tokenizer FILE (your tokenizer.json; utils.weights.export writes that of a checkpoint)"
    return f"make shards of its texts: {command}; then --data {new}"


def warn_of_records(path: Path, dist: Distributed) -> None:
    """Says which field of a file's or folder's records is used."""
    if dist.is_master:
        warn(f"{path}: of each record, only the field {TEXT_FIELD!r} is used, as a document")


def part_of(data: Data, part: str) -> TokenStream:
    """The stream of a part of the data: "train", "val", or "all" of a text, in its order.

    Raises UserError for all of a folder of shards.
    """
    if part != "all":
        return data.val if part == "val" else data.train
    if not isinstance(data.train, TextStream):
        what = f"--eval-part all reads a text, and {data.train.name} are shards"
        raise UserError(what, "give --eval-part train or val, or --data a text")
    tokens = np.concatenate([data.train.tokens, data.val.tokens])
    return TextStream(data.train.name, tokens, 0, data.train.fingerprint())


@announced("reading the evaluated tokens")
def bytes_per_token(loader: WindowLoader, num_targets: int, tokenizer: Tokenizer) -> float:
    """Mean bytes of the first `num_targets` targets of a stream."""
    return loader.target_bytes(num_targets, tokenizer.token_bytes()) / num_targets


def python_documentation() -> str:
    """The language reference inside Python's standard library, about 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
