"""Documents to tokens, by two backends with the same result.

`encode_one_by_one` is the reference: the tokenizer's own method for each document. `encode_in_batches` is
about twice as fast for a BPE with GPT-2's split pattern, which is GPT-2's or one's own. Most of tiktoken's
time goes into that pattern, whose one lookahead, `\\s+(?!\\S)`, keeps the regular expression engine from
running as an automaton. All the lookahead does is to split off the last character of a run of white space if
a word follows. Here those few places are found with numpy and marked with a control character that tiktoken
treats as a special token, so that a plain pattern remains. A second control character separates documents, so
that one call encodes a whole batch and returns an array: no Python int is ever created.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from utils.console import warn
from utils.tokenizer import (
    GPT2Tokenizer,
    Tokenizer,
    has_tiktoken,
    token_dtype,
    tokenizer_from_state,
    valid_text,
)
from utils.tokenizer_json import FILE_NAME, read_tokenizer

Backend = Callable[..., np.ndarray]  # documents, and perhaps a tokenizer, to tokens

BATCH_CHARACTERS = 1 << 18  # per call of tiktoken: its working set stays in the processor's cache
LONG_BATCH_CHARACTERS = 1 << 24  # a longer document is encoded in pieces, which takes less memory

# Control characters that ordinary text does not contain; a batch that does is encoded one by one.
DOCUMENT_MARK, CUT_MARK = "\x1c", "\x1d"
MARKS = frozenset((DOCUMENT_MARK, CUT_MARK))

# GPT-2's pattern without its lookahead (utils/tokenizer.py has the whole one).
PLAIN_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+"

# What `\s` matches in tiktoken: Unicode's White_Space property, which is not quite Python's str.isspace.
WHITE_SPACE = (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
WHITE_SPACE += (0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
IS_SPACE = np.zeros(0x3002, dtype=bool)  # by code point; the last entry stands for all larger ones
IS_SPACE[list(WHITE_SPACE)] = True


def encode_one_by_one(documents: Iterable[str], tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Tokens of all documents in order, the end-of-text token before each; 1-D unsigned integers.

    The reference. The tokenizer, GPT-2's by default, must have an end-of-text token.
    """
    tokenizer = tokenizer or _gpt2()
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.end_of_text], dtype=dtype)
    arrays = [array for text in documents for array in (end_of_text, tokenizer.encode(text).astype(dtype))]
    return np.concatenate([end_of_text[:0], *arrays])


def encode_in_batches(documents: Sequence[str], tokenizer: Tokenizer | None = None) -> np.ndarray:
    """The same tokens as `encode_one_by_one`, by the fast method where there is one."""
    tokenizer = tokenizer or _gpt2()
    if tokenizer.ranks is None or not has_tiktoken():
        return encode_one_by_one(documents, tokenizer)
    arrays = [_encode_batch(batch, tokenizer) for batch in _batches(documents)]
    return np.concatenate([np.zeros(0, dtype=token_dtype(tokenizer.vocab_size)), *arrays])


def choose_method(sample: list[str], tokenizer: Tokenizer) -> tuple[Backend, str]:
    """The fast method if it gives the tokenizer's own tokens for a sample, and a line about it."""
    if tokenizer.ranks is None or not has_tiktoken():
        return encode_one_by_one, f"document by document, by {FILE_NAME} and the tokenizers library"
    method, name = encode_in_batches, "in batches"
    if not np.array_equal(encode_in_batches(sample, tokenizer), encode_one_by_one(sample, tokenizer)):
        warn("batches differ from tiktoken's own tokens on this input")
        method, name = encode_one_by_one, "document by document"
    return method, f"{name}: compared with tiktoken on the first {len(sample)} documents"


def backend_of(method: Backend, tokenizer: Tokenizer, folder: Path) -> Backend:
    """`method` with the tokenizer of a folder, as a function of documents that can be sent to a process."""
    return method if tokenizer.name == "gpt2" else partial(_encode_with, folder, method)


def _encode_with(folder: Path, method: Backend, documents: Sequence[str]) -> np.ndarray:
    return method(documents, _tokenizer_in(folder))


@cache
def _gpt2() -> Tokenizer:
    return GPT2Tokenizer()


@cache
def _tokenizer_in(folder: Path) -> Tokenizer:
    return tokenizer_from_state(read_tokenizer(folder))


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode_batch(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    text = DOCUMENT_MARK + DOCUMENT_MARK.join(documents)
    if len(text) > LONG_BATCH_CHARACTERS:
        return encode_one_by_one(documents, tokenizer)
    if text.count(DOCUMENT_MARK) != len(documents) or CUT_MARK in text:
        return encode_one_by_one(documents, tokenizer)
    try:
        marked = mark_cuts(text)
    except UnicodeEncodeError:
        marked = mark_cuts(valid_text(text))
    encoding, cut_id = _plain_encoding(tokenizer), tokenizer.vocab_size
    ids = encoding.encode_to_numpy(marked, allowed_special=MARKS, disallowed_special=())
    return ids[ids != cut_id].astype(token_dtype(tokenizer.vocab_size))


def mark_cuts(text: str) -> str:
    """Puts CUT_MARK before the last character of every run of two or more white spaces before a word.

    A run at the end of a document, before DOCUMENT_MARK or the end of `text`, stays whole, as in GPT-2's
    pattern. Raises UnicodeEncodeError if `text` contains surrogates.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    space = IS_SPACE.take(codes, mode="clip")
    before_word = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:])
    cuts = before_word[codes[before_word + 2] != ord(DOCUMENT_MARK)] + 1
    borders = [0, *cuts.tolist(), len(text)]
    return CUT_MARK.join([text[start:stop] for start, stop in pairwise(borders)])


@cache
def _plain_encoding(tokenizer: Tokenizer) -> Any:
    """tiktoken's Encoding with the plain pattern, for text prepared by `mark_cuts`."""
    import tiktoken

    return tiktoken.Encoding(
        name="plain_pattern",
        pat_str=PLAIN_PATTERN,
        mergeable_ranks=tokenizer.ranks,
        special_tokens={DOCUMENT_MARK: tokenizer.end_of_text, CUT_MARK: tokenizer.vocab_size},
    )
