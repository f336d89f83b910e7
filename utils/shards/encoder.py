"""Documents to GPT-2 tokens, by two backends with the same result.

`encode_one_by_one` is the reference: one call of tiktoken for each document. `encode_in_batches` is about
twice as fast. Most of tiktoken's time goes into its split pattern, whose one lookahead, `\\s+(?!\\S)`, keeps
the regular expression engine from running as an automaton. All the lookahead does is to split off the last
character of a run of white space if a word follows. Here those few places are found with numpy and marked
with a control character that tiktoken treats as a special token, so that a plain pattern remains. A second
control character separates documents, so that one call encodes a whole batch and returns an array: no Python
int is ever created.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from utils.tokenizer import END_OF_TEXT_ID, GPT2_VOCAB_SIZE, encode_text, load_merges

BATCH_CHARACTERS = 1 << 18  # per call of tiktoken: its working set stays in the processor's cache
LONG_BATCH_CHARACTERS = 1 << 24  # a longer document is encoded in pieces, which takes less memory

# Control characters that ordinary text does not contain; a batch that does is encoded one by one.
DOCUMENT_MARK, CUT_MARK = "\x1c", "\x1d"
MARKS = frozenset((DOCUMENT_MARK, CUT_MARK))
CUT_ID = GPT2_VOCAB_SIZE  # the first id that is not a token; removed from the result

# GPT-2's pattern without its lookahead (utils/tokenizer.py has the whole one).
PLAIN_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+"

# What `\s` matches in tiktoken: Unicode's White_Space property, which is not quite Python's str.isspace.
WHITE_SPACE = (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))
WHITE_SPACE += (0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
IS_SPACE = np.zeros(0x3002, dtype=bool)  # by code point; the last entry stands for all larger ones
IS_SPACE[list(WHITE_SPACE)] = True


def encode_one_by_one(documents: Sequence[str]) -> np.ndarray:
    """Tokens of all documents in order, an <|endoftext|> before each; 1-D uint16. The reference."""
    end_of_text = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    arrays = [array for text in documents for array in (end_of_text, encode_text(text))]
    return np.concatenate([end_of_text[:0], *arrays])


def encode_in_batches(documents: Sequence[str]) -> np.ndarray:
    """The same tokens as `encode_one_by_one`, by the fast method."""
    return np.concatenate([np.zeros(0, dtype=np.uint16), *map(_encode_batch, _batches(documents))])


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


def _encode_batch(documents: list[str]) -> np.ndarray:
    text = DOCUMENT_MARK + DOCUMENT_MARK.join(documents)
    if len(text) > LONG_BATCH_CHARACTERS:
        return encode_one_by_one(documents)
    if text.count(DOCUMENT_MARK) != len(documents) or CUT_MARK in text:
        return encode_one_by_one(documents)
    try:
        marked = mark_cuts(text)
    except UnicodeEncodeError:
        # Lone surrogates (JSON can hold them, UTF-8 cannot) become U+FFFD, as in tiktoken.
        marked = mark_cuts(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    ids = _plain_encoding().encode_to_numpy(marked, allowed_special=MARKS, disallowed_special=())
    return ids[ids != CUT_ID].astype(np.uint16)


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
def _plain_encoding() -> Any:
    """tiktoken's Encoding with the plain pattern, for text prepared by `mark_cuts`."""
    import tiktoken

    return tiktoken.Encoding(
        name="gpt2_plain_pattern",
        pat_str=PLAIN_PATTERN,
        mergeable_ranks=load_merges(),
        special_tokens={DOCUMENT_MARK: END_OF_TEXT_ID, CUT_MARK: CUT_ID},
    )
