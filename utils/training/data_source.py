"""Which data to train on, and as which streams: shards, a text file, a download, or what is at hand."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

from utils.data_loader import TokenStream, read_text, split_text
from utils.distributed import Distributed
from utils.download import download
from utils.errors import UserError
from utils.shards.stream import ShardStream, find_shards
from utils.tokenizer import CharTokenizer, tiktoken_is_installed, tokenizer_from_state

ROOT = Path(__file__).resolve().parents[2]
SHARDS_DIR = ROOT / "edu_fineweb10B"
TEXT_PATH = ROOT / "input.txt"

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394


class Source(NamedTuple):
    """Where the data comes from.

    kind: "shards", "text", "download" (fetched to `path` before use) or "pydoc" (Python's own documentation,
    no file).
    """

    kind: str
    path: Path | None
    reason: str


def choose_source(requested: str | None) -> Source:
    """What to train on, without touching the network: `--data`, shards, input.txt, or else a download."""
    if requested is not None:
        path = Path(requested)
        kind = "shards" if path.is_dir() else "text"
        return Source(kind, path, "--data")
    if find_shards(SHARDS_DIR, "train"):
        return Source("shards", SHARDS_DIR, "the folder holds shards")
    if TEXT_PATH.exists():
        return Source("text", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/")
    return Source("download", TEXT_PATH, f"no shards in {SHARDS_DIR.name}/ and no {TEXT_PATH.name}")


def fetch(source: Source, dist: Distributed) -> Source:
    """Gets Tiny Shakespeare where chosen, once a machine; without a network, Python's documentation."""
    if source.kind == "download" and dist.local_rank == 0 and not source.path.exists():
        try:
            download(TINY_SHAKESPEARE_URL, source.path, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_BYTES)
        except OSError as error:
            print(
                f"warning: cannot download Tiny Shakespeare ({error}); "
                f"put any text into {source.path} to train on it"
            )
    dist.barrier()  # for any kind of source: another machine may have chosen another one
    if source.kind != "download":
        return source
    # Every rank looks at its own machine's disk; open_streams compares what they found.
    if source.path.exists():
        return Source("text", source.path, source.reason + ": Tiny Shakespeare was downloaded")
    return Source("pydoc", None, source.reason + ", no network: the documentation inside Python")


def choose_tokenizer(requested: str, dist: Distributed) -> str:
    """ "gpt2" or "char": GPT-2's BPE needs tiktoken; without it characters must do, with a warning."""
    if requested == "gpt2" and not tiktoken_is_installed():
        if dist.is_master:
            print("warning: tiktoken is not installed, training on characters instead (pip install tiktoken)")
        return "char"
    return requested


def open_streams(source: Source, tokenizer_state: dict, seq_len: int, dist: Distributed):
    """Opens the data.

    Args:
        source: as `fetch` returned it.
        tokenizer_state: of a loaded model, or {"name": "gpt2"} or {"name": "char"}: then characters are the
            text's.
        seq_len: T; each split must hold a window of it.

    Returns:
        (tokenizer, train stream, val stream).

    Raises:
        UserError: missing, empty, damaged or too short data, or ranks that see different data.
    """
    by_characters = tokenizer_state["name"] == "char"
    if source.kind == "shards":
        if by_characters:
            loaded = "characters" in tokenizer_state
            other = "a model that reads them" if loaded else "use --tokenizer gpt2 (pip install tiktoken)"
            raise UserError(
                f"{source.path} holds GPT-2 tokens, not characters", f"give --data a text file, or {other}"
            )
        tokenizer = tokenizer_from_state(tokenizer_state)
        train, val = (
            ShardStream(source.path, split, tokenizer.num_words, seq_len) for split in ("train", "val")
        )
    else:
        path = source.path or Path(f"pydoc_data.topics of Python {platform.python_version()}")
        text = read_text(source.path) if source.path else python_documentation()
        if by_characters and "characters" not in tokenizer_state:
            tokenizer = CharTokenizer.from_text(text)
        else:
            tokenizer = tokenizer_from_state(tokenizer_state)
        train, val = split_text(path, text, tokenizer.encode(text), seq_len)
    _check_ranks_agree(train, val, dist)
    return tokenizer, train, val


def _check_ranks_agree(train: TokenStream, val: TokenStream, dist: Distributed) -> None:
    mine = [train.fingerprint(), val.fingerprint()]
    if dist.broadcast(mine) != mine:
        raise UserError(
            f"rank {dist.rank} sees other data than rank 0 in {train.name}",
            "give every machine the same files",
            one_rank_only=True,
        )


def python_documentation() -> str:
    """The language reference that ships inside Python, about 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
