"""Both tokenizers: their ids, round trips, and a damaged merge table."""

from __future__ import annotations

import hashlib
import lzma
import os
import random
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from utils import tokenizer as tokenizer_module
from utils.command_line import UserError
from utils.tokenizer import (
    MERGES_PATH,
    CharTokenizer,
    GPT2Tokenizer,
    check_vocab_size,
    gpt2_encoding,
    load_merges,
    read_merges,
    tokenizer_from_state,
)

CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
TEXTS = [
    "Hello, I'm a language model,",
    "  leading and   inner spaces, a tab\there, trailing ones   ",
    "line\nbreaks\r\n\n\nand more\n",
    "Zażółć gęślą jaźń — 日本語 русский язык 🙂👩‍👩‍👧",
    "it's they'll WE'RE 1234567890 3.14159 x_1 = {'a': [1, 2]};",
    "",
    "\x00\x01\xff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_round_trip(text):
    """Decoding the ids returns any text unchanged."""
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text


def test_known_ids_of_gpt2():
    """The ids that OpenAI's encoder gives; the special token only where it is allowed; the sizes."""
    tokenizer = GPT2Tokenizer()
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == ids
    assert tokenizer.encode("<|endoftext|>", allow_special=True).tolist() == [50256]
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size, tokenizer.end_of_text) == (50257, 50304, 50256)


@pytest.mark.skipif(not CACHE.exists(), reason="needs tiktoken's own files")
def test_ids_equal_those_of_tiktokens_own_gpt2(monkeypatch):
    """The same table and ids as `tiktoken.get_encoding("gpt2")`, for texts and random strings."""
    import tiktoken

    monkeypatch.setitem(os.environ, "TIKTOKEN_CACHE_DIR", str(CACHE))
    theirs, ours = tiktoken.get_encoding("gpt2"), GPT2Tokenizer()
    assert theirs._mergeable_ranks == load_merges()
    rng = random.Random(0)
    alphabet = "abcDEF 019 '\t\n\r.,!é日🙂\u00a0\u2003"
    strings = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(3000)]
    for text in [*TEXTS, *strings, Path(__file__).read_text(encoding="utf-8")]:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


def test_the_merge_table_is_the_published_one():
    """The file unpacks to the bytes whose SHA-256 tiktoken pins; no token is missing."""
    digest = hashlib.sha256(lzma.decompress(MERGES_PATH.read_bytes())).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert len(load_merges()) == 50256


def test_a_changed_merge_table_is_refused(tmp_path):
    """One more byte is an error with both checksums, a truncated file one with the reason."""
    path = tmp_path / "vocab.bpe.xz"
    path.write_bytes(lzma.compress(lzma.decompress(MERGES_PATH.read_bytes()) + b" "))
    with pytest.raises(UserError, match="1ce16647"):
        read_merges(path)
    path.write_bytes(MERGES_PATH.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read .*vocab.bpe.xz"):
        read_merges(path)


def test_characters_round_trip_and_unknown_ones_are_reported(capsys):
    """The vocabulary is the text's sorted characters; others are left out with a warning."""
    tokenizer = CharTokenizer(" dehlorw")
    assert tokenizer.vocab_size == tokenizer.padded_vocab_size == 8
    assert tokenizer.decode(tokenizer.encode("hold")) == "hold"
    assert tokenizer.decode(tokenizer.encode("he!lo?")) == "helo"
    printed = capsys.readouterr()
    assert "warning: 2 characters" in printed.err and printed.out == ""
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_text_that_tiktoken_cannot_split_is_an_error(allow_special, capfd):
    """Two megabytes of white space overflow its regular expressions: two lines.

    Newer versions of tiktoken print no Rust backtrace.
    """
    with pytest.raises(UserError, match="cannot split a text of 2,000,001 characters"):
        GPT2Tokenizer().encode(" " * 2_000_000 + "x", allow_special)
    panics = version("tiktoken").startswith(("0.6.", "0.7.", "0.8.", "0.9."))
    assert panics or capfd.readouterr().err == ""


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_long_text_is_encoded_in_pieces_with_the_ids_of_the_whole(monkeypatch, allow_special):
    """Wherever it is cut: white space of all kinds, special tokens, punctuation, no white space at all."""
    text = (
        "".join(TEXTS)
        + "a  b\u3000\n c\t\x1c d\x1f \x85 e<|endoftext|> \n<|endoftext|>'s it's \r\n\r\n x " * 20
    )
    expected = tokenizer_module._encode_piece(gpt2_encoding(), text, allow_special)
    calls = []
    real = tokenizer_module._encode_piece
    monkeypatch.setattr(
        tokenizer_module,
        "_encode_piece",
        lambda encoding, piece, allow: calls.append(piece) or real(encoding, piece, allow),
    )
    for size in (1, 2, 3, 7, 50, 1 << 20):
        monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", size)
        calls.clear()
        assert GPT2Tokenizer().encode(text, allow_special).tolist() == expected
        assert "".join(calls) == text and (len(calls) > 1) == (size < len(text))
    assert GPT2Tokenizer().encode("", allow_special).tolist() == []


def test_the_calls_for_a_long_text_are_short(monkeypatch):
    """Between two of them a signal is handled: none gets more than about a megabyte."""
    sizes = []
    monkeypatch.setattr(
        tokenizer_module, "_encode_piece", lambda encoding, piece, _: sizes.append(len(piece)) or []
    )
    GPT2Tokenizer().encode("It was the best of times. " * 200_000)
    assert len(sizes) == 5 and max(sizes) < 1.1e6


def test_only_rank_0_reports_unknown_characters(capsys, monkeypatch):
    """The other ranks of a job print nothing."""
    monkeypatch.setenv("RANK", "1")
    CharTokenizer(" dehlorw").encode("he!lo?")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), CharTokenizer(" dehnt")])
def test_a_tokenizer_is_restored_from_its_state(tokenizer):
    """The plain values of state() are enough."""
    again = tokenizer_from_state(tokenizer.state())
    assert type(again) is type(tokenizer)
    assert again.encode("the").tolist() == tokenizer.encode("the").tolist()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    """Fewer are fine: the rest of the vocabulary is padding."""
    check_vocab_size(CharTokenizer("abc"), 3)
    check_vocab_size(CharTokenizer("abc"), 128)
    with pytest.raises(UserError, match="has 3 tokens, the model only 2"):
        check_vocab_size(CharTokenizer("abc"), 2)
