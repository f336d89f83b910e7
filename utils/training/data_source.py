"""Which data to train on, and its streams: shards, a text file, or a download."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.command_line import UserError
from utils.data_loader import TokenStream, read_text, split_text
from utils.distributed import Distributed
from utils.files import download
from utils.shards.format import find_shards
from utils.shards.stream import ShardStream
from utils.tokenizer import CharTokenizer, Tokenizer, check_vocab_size, has_tiktoken, tokenizer_from_state

if TYPE_CHECKING:
    from gpt_model import GPTConfig

ROOT = Path(__file__).resolve().parents[2]
SHARDS_DIR = ROOT / "edu_fineweb10B"
TEXT_PATH = ROOT / "input.txt"

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_BYTES = 1_115_394


class Source(NamedTuple):
    """Where the data comes from, and why."""

    kind: str  # "shards", "text", "download" (to `path`, before use) or "pydoc" (Python's own documentation)
    path: Path | None
    reason: str


def choose_source(requested: str | None) -> Source:
    """What to train on, without using the network: `--data`, shards, input.txt, else a download."""
    if requested is not None:
        return Source("shards" if Path(requested).is_dir() else "text", Path(requested), "--data")
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
            print(f"warning: cannot download Tiny Shakespeare ({error}); put any text into {source.path}")
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
            print("warning: tiktoken is not installed, training on characters instead (pip install tiktoken)")
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
    characters_known = "characters" in tokenizer_state
    if source.kind == "shards":
        if tokenizer_state["name"] == "char":
            other = "a model trained on them" if characters_known else "use --tokenizer gpt2"
            what = f"{source.path} holds GPT-2 tokens, not characters"
            raise UserError(what, f"give --data a text file, or {other}")
        tokenizer = tokenizer_from_state(tokenizer_state)
        vocab_size = tokenizer.vocab_size
        train, val = (ShardStream(source.path, split, vocab_size, seq_len) for split in ("train", "val"))
    else:
        path = source.path or Path(f"pydoc_data.topics of Python {platform.python_version()}")
        text = read_text(source.path) if source.path else python_documentation()
        if tokenizer_state["name"] == "char" and not characters_known:
            tokenizer = CharTokenizer("".join(sorted(set(text))))
        else:
            tokenizer = tokenizer_from_state(tokenizer_state)
        train, val = split_text(path, text, tokenizer.encode(text), seq_len)
    fingerprints = [train.fingerprint(), val.fingerprint()]
    if dist.broadcast(fingerprints) != fingerprints:
        what = f"rank {dist.rank} sees other data than rank 0 in {train.name}"
        raise UserError(what, "give every machine the same files", one_rank_only=True)
    return Data(tokenizer, train, val, source.reason)


def check_model_reads(config: "GPTConfig", seq_len: int, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model cannot read windows of this length, or ids of this tokenizer."""
    if seq_len > config.block_size:
        what = f"--seq-len {seq_len} is more than the model's block size {config.block_size}"
        raise UserError(what, "use a smaller --seq-len")
    check_vocab_size(tokenizer, config.vocab_size)


def python_documentation() -> str:
    """The language reference inside Python's standard library, about 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
