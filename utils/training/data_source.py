"""Which data to train on, and its streams: shards, a text file, or a download."""

import hashlib
import platform
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.command_line import UserError
from utils.console import warn
from utils.data_loader import TextStream, TokenStream, WindowLoader, split_text
from utils.distributed import Distributed
from utils.files import download
from utils.shards.documents import (
    TEXT_FIELD,
    Position,
    kind_of,
    parts_from,
    read_documents,
    split_at_separators,
)
from utils.shards.encoder import encode_one_by_one
from utils.shards.format import find_shards
from utils.shards.local_files import LocalFiles
from utils.shards.stream import ShardStream
from utils.text_files import read_text
from utils.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    CharTokenizer,
    Tokenizer,
    has_tiktoken,
    tokenizer_from_state,
)

if TYPE_CHECKING:
    pass

ROOT = Path(__file__).resolve().parents[2]
SHARDS_DIR = ROOT / "edu_fineweb10B"
TEXT_PATH = ROOT / "input.txt"

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394


class Source(NamedTuple):
    """Where the data comes from, and why."""

    kind: str  # "shards", "text", "records" (.jsonl, .parquet), "download" (to `path`), "pydoc" (no file)
    path: Path | None
    reason: str


def choose_source(requested: str | None) -> Source:
    """What to train on, without using the network: `--data`, shards, input.txt, else a download."""
    if requested is not None:
        path = Path(requested)
        kind = "text" if kind_of(path) in (None, "text") else "records"
        return Source("shards" if path.is_dir() else kind, path, "--data")
    if find_shards(SHARDS_DIR, "train"):
        return Source("shards", SHARDS_DIR, "the folder holds shards")
    if TEXT_PATH.exists():
        return Source("text", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/")
    return Source("download", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/ and no {TEXT_PATH.name}")


def fetch(requested: str | None, dist: Distributed) -> Source:
    """The source of `choose_source`, after its download; without a network, Python's documentation."""
    source = choose_source(requested)
    if source.kind == "download" and dist.local_rank == 0 and not source.path.exists():
        try:
            download(TINY_SHAKESPEARE_URL, source.path, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_BYTES)
        except OSError as error:
            warn(f"cannot download Tiny Shakespeare ({error}); put any text into {source.path}")
    dist.barrier()  # for every kind of source: another machine may have chosen another one
    if source.kind != "download":
        return source
    # Every rank looks at the disk of its own machine; open_data compares what they found.
    if source.path.exists():
        return Source("text", source.path, source.reason + ": Tiny Shakespeare was downloaded")
    return Source("pydoc", None, source.reason + ", no network: the documentation inside Python")


def available_tokenizer(requested: str, dist: Distributed) -> str:
    """The requested kind, "gpt2" or "char"; "char" with a warning where tiktoken is not installed."""
    if requested == "gpt2" and not has_tiktoken():
        if dist.is_master:
            warn("tiktoken is not installed, training on characters instead (pip install tiktoken)")
        return "char"
    return requested


class Data(NamedTuple):
    """Opened data: a tokenizer, both splits in its tokens, and the reason for this data."""

    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    reason: str


def open_data(source: Source, tokenizer_state: dict[str, Any], seq_len: int, dist: Distributed) -> Data:
    """Opens the data that `fetch` returned; each split must hold at least one window of seq_len + 1 tokens.

    `tokenizer_state` is that of a loaded model, {"name": "gpt2"}, or {"name": "char"} for the characters of
    the text. Raises UserError for missing, empty, damaged or too short data, or if ranks see different data.
    """
    if source.kind == "shards":
        if tokenizer_state["name"] == "char":
            other = "a model trained on them" if "characters" in tokenizer_state else "use --tokenizer gpt2"
            what = f"{source.path} holds GPT-2 tokens, not characters"
            raise UserError(what, f"give --data a text file, or {other}")
        tokenizer = tokenizer_from_state(tokenizer_state)
        vocab_size = tokenizer.vocab_size
        train, val = (ShardStream(source.path, split, vocab_size, seq_len) for split in ("train", "val"))
        reason = source.reason
    else:
        tokenizer, tokens, fingerprint = tokenize(source, tokenizer_state, dist)
        name = str(source.path or f"pydoc_data.topics of Python {platform.python_version()}")
        train, val = split_text(name, tokens, fingerprint, seq_len)
        count = fingerprint.get("documents")
        reason = source.reason if count is None else f"{source.reason}, {count:,} documents"
    fingerprints = [train.fingerprint(), val.fingerprint()]
    if dist.broadcast(fingerprints) != fingerprints:
        what = f"rank {dist.rank} sees other data than rank 0 in {train.name}"
        raise UserError(what, "give every machine the same files", one_rank_only=True)
    return Data(tokenizer, train, val, reason)


def tokenize(
    source: Source, tokenizer_state: dict[str, Any], dist: Distributed
) -> tuple[Tokenizer, np.ndarray, dict[str, Any]]:
    """The tokenizer, the tokens of a text or of records, 1-D, and what identifies them, as plain values.

    Documents (records, or a text with lines that read <|endoftext|>) become the tokens that the shard builder
    makes of them; a text without such a line is tokenized as it is. Raises UserError for unusable files.
    """
    text, documents = read_source(source, dist)
    if documents is not None and tokenizer_state["name"] == "char":
        if dist.is_master:
            warn(f"{source.path}: documents are joined by blank lines: characters have no {END_OF_TEXT}")
        text = "\n\n".join(text.strip("\r\n") for text in chain.from_iterable(documents))
        # Lone surrogates, which JSON can hold, become U+FFFD, as in tiktoken.
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        documents = None
    if tokenizer_state["name"] == "char" and "characters" not in tokenizer_state:
        tokenizer = CharTokenizer("".join(sorted(set(text))))
    else:
        tokenizer = tokenizer_from_state(tokenizer_state)
    if documents is None:
        tokens, data = tokenizer.encode(text), text.encode()
        return tokenizer, tokens, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    tokens = np.concatenate([encode_one_by_one(()), *map(encode_one_by_one, documents)])
    count = int(np.count_nonzero(tokens == END_OF_TEXT_ID))
    return tokenizer, tokens, {"documents": count, "sha256": hashlib.sha256(tokens.data).hexdigest()}


def read_source(source: Source, dist: Distributed) -> tuple[str, Iterable[list[str]] | None]:
    """A text and None, or "" and lists of documents."""
    if source.kind == "records":
        if dist.is_master:
            warn(f"{source.path}: of each record, only the field {TEXT_FIELD!r} is used, as a document")
        parts = parts_from(LocalFiles([source.path]), TEXT_FIELD, Position())
        return "", (read_documents(part, TEXT_FIELD) for part in parts)
    text = read_text(source.path) if source.path else python_documentation()
    documents = split_at_separators(text)
    if len(documents) == 1:
        return text, None
    return "", [[text for text in documents if text.strip()]]


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


def bytes_per_token(loader: WindowLoader, num_targets: int, tokenizer: Tokenizer) -> float:
    """Mean bytes of the first `num_targets` targets of a stream."""
    return loader.target_bytes(num_targets, tokenizer.token_bytes()) / num_targets


def python_documentation() -> str:
    """The language reference inside Python's standard library, about 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
