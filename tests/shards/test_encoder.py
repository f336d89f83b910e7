"""Documents to ids in three ways: all give tiktoken's own, whatever the text."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.shards.test_build import build, expected_tokens, make_documents, tokens_of, write_jsonl
from utils.shards.encoder import (
    GIGATOKEN,
    PLAIN_TIKTOKEN,
    TIKTOKEN,
    BatchEncoder,
    agrees_with_reference,
    gigatoken_encoding,
    is_well_known,
    ways_here,
    well_known_characters,
)
from utils.shards import encoder as batch_encoder

# The optional package is installed and tested where .ci/run has come to it.
with_gigatoken = pytest.mark.skipif(gigatoken_encoding() is None, reason="gigatoken is not installed")
each_way = pytest.mark.parametrize(
    "way", [TIKTOKEN, PLAIN_TIKTOKEN, pytest.param(GIGATOKEN, marks=with_gigatoken)]
)
# Several kinds of white space, the encoder's own marks, contractions, digits, letters of several scripts.
ALPHABET = [
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\u200b", "\x1c", "\x1d"),
    *("a", "'ll", "'S", "9", "½", "é", "e\u0301", "-", "…", "’", "漢", "한", "the", "<|endoftext|>", "😀"),
]


def texts_with(characters: list[str], size: int) -> list[str]:
    """Texts that have each character in five places, `size` characters a text."""
    return [
        "".join(f"x{c}{c}y {c} \n{c}7{c}'s" for c in characters[start : start + size])
        for start in range(0, len(characters), size)
    ]


def random_texts(count: int) -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 30))) for _ in range(count)]


@each_way
def test_every_character_gets_tiktokens_ids(way):
    """Every code point of the first planes in five places, random strings of spaces, marks and letters."""
    # Beyond the first planes next to none has a meaning.
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97)]
    texts = texts_with(list(map(chr, codes)), 4096) + random_texts(20_000)
    assert agrees_with_reference(texts[::2], way) and agrees_with_reference(texts[1::2], way)


@with_gigatoken
def test_gigatoken_itself_agrees_on_all_well_known_characters():
    """In texts of such characters only, which it is really asked about, and in long runs."""
    known = [chr(code) for code in np.flatnonzero(well_known_characters())]
    draw = random.Random(2)
    texts = texts_with(known, 256) + [c * 5000 for c in (" ", "\n", "a", "é", "漢", "7", "=")]
    texts += ["".join(draw.choices(known, k=40)) for _ in range(20_000)]
    texts += [text for text in random_texts(20_000) if is_well_known(text)]
    assert len(known) > 50_000 and all(map(is_well_known, texts))
    assert agrees_with_reference(texts, GIGATOKEN)


@each_way
def test_lone_surrogates_and_the_encoders_own_marks_are_encoded_as_tiktoken_does(way):
    """JSON can hold half a character, and control characters; neither may change a token elsewhere."""
    for texts in (["a \ud800  b", "c"], ["\x1c", "a \x1d\x1d b"], ["", "  ", "\n\n"], ["<|endoftext|>\n\nx"]):
        assert BatchEncoder(way).encode(texts).tolist() == expected_tokens(texts).tolist()
    assert len(BatchEncoder(way).encode([])) == 0


@pytest.fixture
def wrong_gigatoken(monkeypatch) -> list[str]:
    """A gigatoken that makes token 1 of every text; the texts that it is asked about."""
    asked: list[str] = []
    fake = SimpleNamespace(
        encode=lambda text: asked.append(text) or np.array([1], dtype=np.uint32), num_characters=0
    )
    monkeypatch.setattr(batch_encoder, "gigatoken_encoding", lambda: fake)
    return asked


def test_gigatoken_is_not_asked_about_characters_that_are_new_to_unicode(wrong_gigatoken):
    """Emoji, letters of 2025, surrogates, unassigned ones: tiktoken's ids; all others are gigatoken's."""
    old, new = ["a", "naïve “quotes” 日本 한국"], ["x😀", "\U00033448", "\ud800", "\u0378"]
    found = BatchEncoder(GIGATOKEN).encode([*old, *new])
    assert wrong_gigatoken == old
    assert found.tolist() == [50256, 1] * 2 + expected_tokens(new).tolist()


def test_a_way_that_differs_is_left_with_a_warning_and_the_bytes_stay_right(
    wrong_gigatoken, tmp_path, capsys
):
    """Each build compares its first documents with tiktoken's ids."""
    documents = make_documents(30)
    assert ways_here() == [GIGATOKEN, PLAIN_TIKTOKEN, TIKTOKEN]
    build(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", documents))
    assert wrong_gigatoken  # it was tried
    assert tokens_of(tmp_path / "out").tolist() == expected_tokens(documents).tolist()
    output = capsys.readouterr()
    assert "warning: gigatoken and tiktoken differ here" in output.err
    assert "encoder: tiktoken's batches, compared with tiktoken on the first 30 documents" in output.out


def raises(error: Exception):
    raise error


def fake_module(load) -> SimpleNamespace:
    """A module gigatoken whose Tokenizer.from_tiktoken is `load`."""
    return SimpleNamespace(Tokenizer=SimpleNamespace(from_tiktoken=load))


@with_gigatoken
def test_gigatoken_starts_anew_before_its_memory_has_grown(monkeypatch):
    """Fresh for every batch that is long enough; the ids stay right, also where it cannot be loaded again."""
    texts, loaded, load = make_documents(50), [], batch_encoder.Gigatoken.__init__

    def counting(self):
        assert len(loaded) < 5, "no room for the merges"
        loaded.append(load(self))

    monkeypatch.setattr(batch_encoder.Gigatoken, "__init__", counting)
    monkeypatch.setattr(batch_encoder, "GIGATOKEN_CHARACTERS", 2000)
    monkeypatch.setattr(batch_encoder, "BATCH_CHARACTERS", 3000)
    gigatoken_encoding.cache_clear()
    assert agrees_with_reference(texts, GIGATOKEN) and len(loaded) == 5
    gigatoken_encoding.cache_clear()


@pytest.mark.parametrize(
    "module",
    [
        None,  # not installed
        SimpleNamespace(),
        fake_module(lambda ranks, scheme: None),
        fake_module(lambda *arguments: raises(RuntimeError("a scheme it does not know"))),
        fake_module(lambda *arguments: SimpleNamespace(encode=lambda text: [15496, 995])),
        fake_module(lambda *arguments: SimpleNamespace(encode=lambda text: np.array([1], np.uint32))),
    ],
)
def test_without_gigatoken_or_with_another_version_of_it_tiktoken_does_the_work(module, monkeypatch):
    """Another interface, other results: found before a document is encoded."""
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    assert gigatoken_encoding.__wrapped__() is None
    monkeypatch.setattr(batch_encoder, "gigatoken_encoding", gigatoken_encoding.__wrapped__)
    assert ways_here() == [PLAIN_TIKTOKEN, TIKTOKEN]
