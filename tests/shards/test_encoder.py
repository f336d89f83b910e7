"""The two encoding backends: both give tiktoken's own tokens for any text; the choice between them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.shards.test_build import build, expected_tokens, make_documents, tokens_of, write_jsonl
from utils.shards import encoder
from utils.shards.encoder import encode_in_batches, encode_one_by_one
from utils.shards.workers import Backend
from utils.tokenizer_json import JsonTokenizer, train_bpe

each_backend = pytest.mark.parametrize("backend", [encode_in_batches, encode_one_by_one])
# Several kinds of white space, the encoder's own marks, contractions, digits, letters of several scripts.
ALPHABET = [
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\u200b", "\x1c", "\x1d"),
    *("a", "'ll", "'S", "9", "½", "é", "e\u0301", "-", "…", "’", "漢", "한", "the", "<|endoftext|>", "😀"),
]


def texts_with(characters: list[str], size: int) -> list[str]:
    """Texts in which each character occurs in five contexts; `size` characters per text."""
    return [
        "".join(f"x{c}{c}y {c} \n{c}7{c}'s" for c in characters[start : start + size])
        for start in range(0, len(characters), size)
    ]


def random_texts(count: int) -> list[str]:
    """Short texts of the alphabet; deterministic."""
    draw = random.Random(1)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 30))) for _ in range(count)]


def test_every_character_gets_tiktokens_ids():
    """Every code point of the first planes in five contexts; random strings of spaces, marks and letters."""
    # Hardly any code point beyond the first planes has a meaning.
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97)]
    texts = texts_with(list(map(chr, codes)), 4096) + random_texts(20_000)
    for half in (texts[::2], texts[1::2]):
        assert np.array_equal(encode_in_batches(half), encode_one_by_one(half))


@each_backend
def test_lone_surrogates_and_the_encoders_own_marks_are_encoded_as_tiktoken_does(backend: Backend):
    """JSON can hold half a character, and control characters; neither may change a token elsewhere."""
    for texts in (["a \ud800  b", "c"], ["\x1c", "a \x1d\x1d b"], ["", "  ", "\n\n"], ["<|endoftext|>\n\nx"]):
        assert backend(texts).tolist() == expected_tokens(texts).tolist()
    assert backend([]).dtype == np.uint16 and len(backend([])) == 0


def test_a_build_uses_the_reference_with_a_warning_if_the_fast_backend_differs(tmp_path, monkeypatch, capsys):
    """Each build compares the backends on its first documents; here the fast one does not find its cuts."""
    documents = make_documents(30)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    build(tmp_path / "good", source)
    output = capsys.readouterr()
    assert "encoding in batches: compared with tiktoken on the first 30 documents" in output.out
    assert "warning" not in output.err

    monkeypatch.setattr("utils.shards.encoder.mark_cuts", lambda text: text)
    assert not np.array_equal(encode_in_batches(documents), expected_tokens(documents))
    build(tmp_path / "out", source)
    output = capsys.readouterr()
    assert "warning: batches differ from tiktoken" in output.err
    assert "encoding document by document: compared with tiktoken on the first 30 documents" in output.out
    for name in ("good", "out"):
        assert np.array_equal(tokens_of(tmp_path / name), expected_tokens(documents))


def test_a_bpe_of_ones_own_gets_the_ids_of_the_tokenizers_library():
    """Both backends, on every kind of character in five contexts, random strings, and half characters."""
    library = pytest.importorskip("tokenizers")
    codes = [*range(0x3100), *range(0x3100, 0xD800, 17), *range(0xE000, 0x110000, 397)]
    texts = [*texts_with(list(map(chr, codes)), 64), *random_texts(3000), "a \ud800  b"]
    state = train_bpe(texts, 700)
    reference = library.Tokenizer.from_str(state["json"])
    reference.encode_special_tokens = True
    tokenizer, expected = JsonTokenizer(state), []
    for encoding in reference.encode_batch([*texts[:-1], "a \ufffd  b"]):
        expected += [tokenizer.end_of_text, *encoding.ids]
    for backend in (encode_in_batches, encode_one_by_one):
        tokens = backend(texts, tokenizer)
        assert tokens.dtype == np.uint16 and tokens.tolist() == expected


def test_without_tiktoken_the_method_is_not_said_to_be_compared_with_it(monkeypatch):
    """A BPE of one's own is then encoded by the tokenizers library."""
    pytest.importorskip("tokenizers")
    tokenizer = JsonTokenizer(train_bpe(["some words " * 20], 260))
    assert encoder.choose_method(["some words"], tokenizer)[1].startswith(
        "in batches: compared with tiktoken"
    )
    monkeypatch.setattr(encoder, "has_tiktoken", lambda: False)
    method, line = encoder.choose_method(["some words"], tokenizer)
    assert method is encode_one_by_one and line.startswith("document by document, by tokenizer.json")
