"""Text to token ids and back: GPT-2's byte-pair encoding, and single characters for the smallest experiments.

Both tokenizers have the same few members:
    name            "gpt2" or "char"
    num_words       ids that exist, 0..num_words-1
    vocab_size      num_words, padded for the model where that pays
    end_of_text     id of <|endoftext|>, or None
    encode(text, allow_special=False)
                    -> 1-D numpy array of ids, uint16, or uint32 where ids need it; <|endoftext|> is text
                    like any other unless special tokens are allowed
    decode(ids)     -> text
    state()         -> plain dict for a checkpoint; `tokenizer_from_state` reads it
"""

from __future__ import annotations

import codecs
import hashlib
import lzma
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Iterable

import numpy as np

from utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# 393 x 128: matrix products like multiples of 128; the 47 extra words are never sampled.
PADDED_GPT2_VOCAB = 50304
MERGES_PATH = Path(__file__).with_name("gpt2_bpe") / "vocab.bpe.xz"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # pinned by tiktoken, too
# How GPT-2 cuts text into pieces before it merges bytes, with possessive quantifiers (++): same pieces, no
# backtracking.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class GPT2Tokenizer:
    """GPT-2's BPE through tiktoken, from the merges that travel with the project: no download, no cache."""

    name = "gpt2"
    num_words = 50257
    vocab_size = PADDED_GPT2_VOCAB
    end_of_text = 50256

    def __init__(self):
        self.encoding = gpt2_encoding()

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of `text`, uint16.

        The letters "<|endoftext|>" are text like any other unless `allow_special`.
        """
        return np.array(encode_text(text, allow_special), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def state(self) -> dict:
        return {"name": self.name}


class CharTokenizer:
    """One id a character. The vocabulary is the sorted set of a text's characters."""

    name = "char"
    end_of_text = None

    def __init__(self, characters: str):
        self.characters = characters
        self.num_words = self.vocab_size = len(characters)
        self._id_of = {character: i for i, character in enumerate(characters)}

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        return cls("".join(sorted(set(text))))

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of `text`; characters outside the vocabulary are left out, with one line that names them."""
        unknown = sorted(set(text) - self._id_of.keys())
        if unknown:
            from utils.distributed import environment_rank  # here: tokenizing shards needs no torch

            if environment_rank() == 0:
                print(
                    f"warning: {len(unknown)} characters are not in the vocabulary and left out: "
                    f"{''.join(unknown[:20])!r}"
                )
        dtype = np.uint16 if self.num_words <= 1 << 16 else np.uint32
        return np.array(
            [self._id_of[character] for character in text if character in self._id_of], dtype=dtype
        )

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def state(self) -> dict:
        return {"name": self.name, "characters": self.characters}


def tokenizer_from_state(state: dict) -> GPT2Tokenizer | CharTokenizer:
    """The tokenizer whose `state()` a checkpoint holds.

    Raises UserError for that of a folder of transformers, unless it is GPT-2's.
    """
    if state["name"] == "char":
        return CharTokenizer(state["characters"])
    if state["name"] == "folder":
        raise UserError(
            "the model's folder holds a tokenizer of its own, not GPT-2's BPE",
            "only eval_hellaswag.py reads with such a tokenizer",
        )
    return GPT2Tokenizer()


def tiktoken_is_installed() -> bool:
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return False
    return True


@lru_cache(maxsize=None)
def gpt2_encoding():
    """tiktoken's Encoding for GPT-2, built from the merges under utils/gpt2_bpe/.

    Raises UserError if it cannot be.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(
            "tiktoken is not installed", "pip install tiktoken, or use --tokenizer char"
        ) from error
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=load_merges(),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def encode_text(text: str, allow_special: bool = False) -> list[int]:
    """tiktoken's own ids of a text. Raises UserError for one whose white space it cannot split."""
    encoding = gpt2_encoding()
    allowed = {END_OF_TEXT} if allow_special else set()
    try:
        # The ids of its encode_ordinary, which would panic, with Rust's backtrace, where this one raises.
        return encoding.encode(text, allowed_special=allowed, disallowed_special=())
    except BaseException as error:
        # Older ones panic here, too, and Rust's PanicException is no Exception.
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"tiktoken cannot split a text of {len(text):,} characters ({str(error)[:100]})",
            "shorten its runs of white space: a million in a row are too many",
        ) from error


@lru_cache(maxsize=None)
def load_merges(path: Path = MERGES_PATH) -> dict[bytes, int]:
    """Reads the merge table into bytes -> id. Raises UserError unless its SHA-256 is the published one."""
    try:
        data = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        hint = "restore the file: git checkout -- utils/gpt2_bpe"
        raise UserError(f"cannot read {path}: {error}", hint) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != MERGES_SHA256:
        raise UserError(
            f"{path} has SHA-256 {digest} (expected {MERGES_SHA256})",
            "restore the file: git checkout -- utils/gpt2_bpe",
        )
    # The file writes each byte as a printable character: printable bytes as themselves, the other 68 as
    # U+0100 onwards. Ids 0..255 are the bytes in that order, printable ones first.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    character_of = {byte: chr(byte) for byte in printable}
    character_of.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    to_byte = codecs.charmap_build("".join(character_of[byte] for byte in range(256)))
    # The first line is a version, the last one empty; each of the others is a pair.
    words = data.decode("utf-8").replace(" ", "").split("\n")[1:-1]
    joined, _ = codecs.charmap_encode("".join(words), "strict", to_byte)
    ends = list(accumulate(map(len, words), initial=0))
    tokens = [bytes([byte]) for byte in printable + others]
    tokens += [joined[start:end] for start, end in zip(ends, ends[1:])]
    return {token: rank for rank, token in enumerate(tokens)}
