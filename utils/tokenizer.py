"""Text to token ids and back: GPT-2's byte-pair encoding, and single characters for the smallest experiments.

GPT-2's byte-level BPE: Radford et al. 2019, section 2.2. Its constants are defined only here. Newly
trained BPEs, and other projects' tokenizers, are in utils/tokenizer_json.py.
"""

import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.command_line import UserError
from utils.console import warn

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256  # the last one: 256 bytes and 50,000 merges come before it
GPT2_VOCAB_SIZE = 50257
PADDED_GPT2_VOCAB = 50304  # 393 x 128: padded for efficient matmuls; the 47 extra ids are never sampled

MERGES_PATH = Path(__file__).with_name("gpt2_bpe") / "vocab.bpe.xz"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # tiktoken pins the same
# GPT-2's split pattern with possessive quantifiers (++): the same pieces without backtracking.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# It always splits between a character that is not white space and one that is. Python's \S excludes a few
# more characters than tiktoken's, which is the safe side.
CUT = re.compile(r"\S(?=[ \t\r\n])")
PIECE_CHARACTERS = 1 << 20  # per call of tiktoken: a fraction of a second, in which no signal is handled


class Tokenizer(Protocol):
    """What every tokenizer has."""

    name: str  # "gpt2", "char", a kind of utils/tokenizer_json.py, or "folder" (a transformers folder)
    vocab_size: int  # ids are 0..vocab_size-1
    padded_vocab_size: int  # vocabulary size of a model trained with it
    end_of_text: int | None  # id of <|endoftext|>, or of what another project uses for it
    ranks: dict[bytes, int] | None  # of a BPE with GPT-2's split pattern: the id of each token's bytes

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of a text, 1-D int64; <|endoftext|> is ordinary text unless `allow_special`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """Number of bytes that each token stands for, (vocab_size,); 0 for <|endoftext|>."""

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, from which `tokenizer_from_state` restores the tokenizer."""


class GPT2Tokenizer:
    """GPT-2's BPE through tiktoken, from the merges in utils/gpt2_bpe/: no download, no cache."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    padded_vocab_size = PADDED_GPT2_VOCAB
    end_of_text = END_OF_TEXT_ID

    def __init__(self):
        self.encoding = gpt2_encoding()

    @property
    def ranks(self) -> dict[bytes, int]:
        return load_merges()

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        return encode_text(self.encoding, text, allow_special).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        return np.array(
            [len(self.encoding.decode_single_token_bytes(i)) for i in range(END_OF_TEXT_ID)] + [0]
        )

    def state(self) -> dict[str, Any]:
        return {"name": self.name}


class CharTokenizer:
    """One id per character: its index in `characters`."""

    name = "char"
    end_of_text = ranks = None

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = self.padded_vocab_size = len(characters)
        self._id_of = {character: i for i, character in enumerate(characters)}

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of a text, 1-D int64; unknown characters are left out, with a warning."""
        unknown = sorted(set(text) - self._id_of.keys())
        if unknown:
            from utils.distributed import environment_rank  # here: tokenizing shards needs no torch

            if environment_rank() == 0:
                some, count = "".join(unknown[:20]), len(unknown)
                warn(f"{count} characters are not in the vocabulary and left out: {some!r}")
        return np.fromiter((self._id_of[c] for c in text if c in self._id_of), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(character.encode("utf-8")) for character in self.characters])

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer with this `state()`. Raises UserError for a "folder", which has no tokenizer.json."""
    if state["name"] == "char":
        return CharTokenizer(state["characters"])
    if state["name"] == "folder":
        what = "the model's folder has a tokenizer of its own that cannot be written as a tokenizer.json"
        raise UserError(what, "only eval_hellaswag.py can use such a tokenizer")
    if "json" in state:
        from utils.tokenizer_json import JsonTokenizer  # here: it imports this module

        return JsonTokenizer(state)
    return GPT2Tokenizer()


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of ids: uint16, or uint32 where the vocabulary needs it."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def valid_text(text: str) -> str:
    """The text with lone surrogates, which JSON can hold and UTF-8 cannot, as U+FFFD: tiktoken's rule."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_vocab_size(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises UserError if the tokenizer has ids that the model does not have."""
    if tokenizer.vocab_size > model_vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model_vocab_size}"
        raise UserError(what, "use the tokenizer that the model was trained with")


def has_tiktoken() -> bool:
    """Whether GPT-2's BPE can be used here."""
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def gpt2_encoding() -> Any:
    """tiktoken's Encoding for GPT-2. Raises UserError if tiktoken or the merges are missing."""
    if not has_tiktoken():
        raise UserError("tiktoken is not installed", "pip install tiktoken, or use --tokenizer char")
    return make_encoding("gpt2", load_merges(), {END_OF_TEXT: END_OF_TEXT_ID})


def make_encoding(name: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Any:
    """tiktoken's Encoding for a BPE with GPT-2's split pattern; see `Tokenizer.ranks`."""
    import tiktoken

    return tiktoken.Encoding(
        name=name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def encode_text(encoding: Any, text: str, allow_special: bool = False) -> np.ndarray:
    """Ids of a text by a tiktoken Encoding of `make_encoding`, 1-D unsigned integers.

    Raises UserError for white space that tiktoken cannot split.
    """
    dtype = token_dtype(encoding.n_vocab)
    pieces = [
        np.array(_encode_piece(encoding, piece, allow_special), dtype=dtype) for piece in pieces_of(text)
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces whose ids, one after the other, are those of the whole."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (cut := CUT.search(text, start + PIECE_CHARACTERS - 1)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _encode_piece(encoding: Any, text: str, allow_special: bool) -> list[int]:
    allowed = "all" if allow_special else set()
    try:
        # The same ids as encode_ordinary's, which panics with a Rust backtrace where this raises.
        return encoding.encode(text, allowed_special=allowed, disallowed_special=())
    except BaseException as error:
        # Older versions of tiktoken panic here as well, and Rust's PanicException is not an Exception.
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        what = f"tiktoken cannot split a text of {len(text):,} characters ({str(error)[:100]})"
        hint = "shorten its runs of white space: a million characters in a row are too many"
        raise UserError(what, hint) from error


def byte_alphabet() -> dict[str, int]:
    """The byte of each character that stands for a byte in GPT-2's files, in the order of ids 0..255.

    Printable bytes stand for themselves and come first; the other 68 are written as U+0100 onwards.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()]
    others = [byte for byte in range(256) if byte not in printable]
    names = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return dict(zip(names, printable + others))


@cache
def read_merges(path: Path = MERGES_PATH) -> str:
    """GPT-2's merges: a version line, then a pair per line, by rank. Raises UserError if they are damaged."""
    hint = "restore the file: git checkout -- utils/gpt2_bpe"
    try:
        data = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {error}", hint) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != MERGES_SHA256:
        raise UserError(f"{path} has SHA-256 {digest} (expected {MERGES_SHA256})", hint)
    return data.decode("utf-8")


def token_strings() -> list[str]:
    """The 50,256 ordinary tokens by id, each byte written as its character of `byte_alphabet`."""
    return [*byte_alphabet(), *read_merges().replace(" ", "").split("\n")[1:-1]]


def bytes_of(tokens: Iterable[str]) -> list[bytes]:
    """What tokens stand for that are written in `byte_alphabet`."""
    table = {ord(character): byte for character, byte in byte_alphabet().items()}
    return [token.translate(table).encode("latin-1") for token in tokens]


@cache
def load_merges() -> dict[bytes, int]:
    """The merge table as tiktoken takes it: the bytes of each token and its id."""
    return {token: rank for rank, token in enumerate(bytes_of(token_strings()))}
