"""A BPE of one's own and other tokenizer.json: round trips, the library's ids, determinism, damaged files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run
from utils import tokenizer_json
from utils.command_line import UserError
from utils.tokenizer import END_OF_TEXT, GPT2Tokenizer, read_merges, token_strings, tokenizer_from_state
from utils.tokenizer_json import (
    GPT2_PRE_TOKENIZER,
    JsonTokenizer,
    find_json_problem,
    identity,
    read_tokenizer,
    tokenizer_name,
    train_bpe,
    write_tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")

CHINESE = "第一条 人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。\n"
ARABIC = "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً.\n"
EMOJI = "😀😃 family: 👨‍👩‍👧‍👦, flags: 🇨🇳🇪🇬, skin: 👍🏽\n"
ENGLISH = "All human beings are born free and equal in dignity and rights. It's 1948, they'll say.\n"
CORPUS = [(ENGLISH + CHINESE + ARABIC + EMOJI) * 3, ENGLISH * 5]
TEXTS = [
    *(CHINESE, ARABIC, EMOJI, ENGLISH, "", " ", "\n\n\n", "  leading,   inner \t\t and trailing \r\n  "),
    "never seen: Zażółć gęślą jaźń, русский, हिन्दी, ไทย, 한국어, \u200f\u202e\ufeff\U0010ffff",
    "<|endoftext|> is text, <|endof text|> too",
    *("\x00\x01\x1c\x1d\x7f\x85\xff", "'s 'S it's they'LL \u2019s", "e\u0301 \u00e9 \u212b \ufb01 ½"),
]


@pytest.fixture(scope="module")
def state() -> dict:
    """That of a BPE of 500 tokens."""
    return train_bpe(CORPUS, 500)


def by_library(state: dict) -> tokenizers.Tokenizer:
    """The tokenizer as the library itself reads it, with special tokens as ordinary text."""
    library = tokenizers.Tokenizer.from_str(state["json"])
    library.encode_special_tokens = True
    return library


def changed(state: dict, **changes: object) -> dict:
    """A state whose tokenizer.json has other entries."""
    return {**state, "json": json.dumps({**json.loads(state["json"]), **changes})}


def word_tokenizer(num_words: int) -> dict:
    """The content of a tokenizer.json of another kind: words between white space, no end-of-text token."""
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(num_words)}, unk_token="w0")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return json.loads(library.to_str())


# ------------------------------------------------------------------------------------------------------------
# A BPE of one's own


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("size", [257, 500])
def test_every_text_is_returned_unchanged_and_its_bytes_counted(text, size):
    """Any language, with and without merges: decoding inverts encoding; `token_bytes` sum to UTF-8's."""
    tokenizer = JsonTokenizer(train_bpe(CORPUS, size))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes().shape == (size,) == (tokenizer.vocab_size,)


def test_the_vocabulary_has_all_bytes_and_the_end_of_text(state):
    """257 tokens are 256 bytes and <|endoftext|>, recognised by `allow_special`; a model is padded."""
    smallest = JsonTokenizer(train_bpe(CORPUS, 257))
    end = smallest.end_of_text
    assert sorted(smallest.token_bytes().tolist()) == [0] + [1] * 256 and smallest.token_bytes()[end] == 0
    assert smallest.padded_vocab_size == 384
    tokenizer = JsonTokenizer(state)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.padded_vocab_size) == ("bpe", 500, 512)
    assert tokenizer.encode("a<|endoftext|>", allow_special=True).tolist()[1:] == [tokenizer.end_of_text]
    assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_ids_are_those_of_the_library(state):
    """By tiktoken, which is used, and by the library, which transformers uses: for every kind of text."""
    ours, library = JsonTokenizer(state), by_library(state)
    assert ours.ranks is not None and len(ours.ranks) == 499
    for text in [*TEXTS, *CORPUS, Path(__file__).read_text(encoding="utf-8")]:
        assert ours.encode(text).tolist() == library.encode(text).ids


def test_training_is_deterministic(state):
    """Other processes, with another order of hashes and another number of threads, train the same one."""
    code = "import sys; from utils.tokenizer_json import *; print(identity(train_bpe(sys.argv[1:], 500)))"
    for seed, threads in (("1", "1"), ("2", "3")):
        process = run("-c", code, *CORPUS, PYTHONHASHSEED=seed, RAYON_NUM_THREADS=threads)
        assert process.stdout.strip() == identity(state), process.stderr


def test_a_long_text_is_trained_on_in_pieces_with_the_same_result(state, monkeypatch):
    """Where it is cut does not matter, as in encoding."""
    monkeypatch.setattr("utils.tokenizer.PIECE_CHARACTERS", 50)
    assert train_bpe(CORPUS, 500) == state
    assert train_bpe(["".join(CORPUS)], 500)["json"] != train_bpe([ARABIC], 300)["json"]


def test_a_text_that_is_too_short_gives_a_smaller_vocabulary_with_a_warning(capsys):
    """A pair that occurs once is no token."""
    assert JsonTokenizer(train_bpe(["ab ab abc"], 1000)).vocab_size == 259
    assert "too short for a BPE of 1,000 tokens: it has 259" in capsys.readouterr().err


def test_lone_surrogates_become_replacement_characters(state):
    """JSON can hold half a character; training and encoding take it as tiktoken does."""
    ours = JsonTokenizer(state)
    assert ours.decode(ours.encode("a\ud800b \udc00")) == "a\ufffdb \ufffd"
    other = JsonTokenizer(changed(state, normalizer={"type": "NFC"}))
    assert other.ranks is None and other.decode(other.encode("a\ud800b")) == "a\ufffdb"
    train_bpe(["a\ud800b " * 9], 300)


def test_a_tokenizer_is_restored_from_its_state(state):
    """Plain values, also after JSON, give the same ids."""
    again = tokenizer_from_state(json.loads(json.dumps(state)))
    assert again.state() == state
    assert again.encode(CHINESE).tolist() == JsonTokenizer(state).encode(CHINESE).tolist()


# ------------------------------------------------------------------------------------------------------------
# Tokenizers of others


def test_gpt2s_own_file_is_gpt2(tmp_path, state):
    """Its vocabulary and merges as a tokenizer.json; with a space before each text it is another one."""
    merges = [tuple(line.split(" ")) for line in read_merges().split("\n")[1:-1]]
    vocabulary = {token: i for i, token in enumerate([*token_strings(), END_OF_TEXT])}
    gpt2 = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    gpt2.add_special_tokens([END_OF_TEXT])
    content = {**json.loads(gpt2.to_str())}
    content.update({key: json.loads(state["json"])[key] for key in ("pre_tokenizer", "decoder")})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_tokenizer(tmp_path) == {"name": "gpt2"}
    library = JsonTokenizer({"name": "bpe", "json": json.dumps(content), "end_of_text": END_OF_TEXT})
    assert library.ranks == GPT2Tokenizer().ranks  # OpenAI's table, too, passes the proof
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_tokenizer(tmp_path)["name"] == "bpe"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {**GPT2_PRE_TOKENIZER, "trim_offsets": True, "use_regex": False}},
    ],
    ids=str,
)
def test_a_bpe_that_splits_otherwise_is_run_by_the_library(change, state):
    """No ranks, so that no text gets other ids than the library's."""
    other = changed(state, **change)
    ours, library = JsonTokenizer(other), by_library(other)
    assert ours.ranks is None
    for text in TEXTS:
        assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("fault", ["order", "two rules", "unreachable", "ignore_merges"])
def test_a_bpe_for_which_tiktoken_would_give_other_ids_is_run_by_the_library(fault, state):
    """Ids that are not in the order of merges, a token with two rules, one that no rule reaches."""
    model = json.loads(state["json"])["model"]
    first, second = ("".join(model["merges"][i]) for i in (100, 101))
    if fault == "order":
        model["vocab"][first], model["vocab"][second] = model["vocab"][second], model["vocab"][first]
    elif fault == "two rules":
        model["merges"].append(model["merges"][0])
    elif fault == "unreachable":
        model["merges"] = [["a", "b"], ["a", "bc"], ["b", "c"]]
        characters = {token: i for token, i in model["vocab"].items() if i <= 256}
        model["vocab"] = {**characters, "ab": 257, "abc": 258, "bc": 259}
    else:
        model["ignore_merges"] = True
    other = changed(state, model=model)
    ours, library = JsonTokenizer(other), by_library(other)
    assert ours.ranks is None
    for text in ("abc ab bc", ENGLISH):
        assert ours.encode(text).tolist() == library.encode(text).ids


def test_token_bytes_exist_for_byte_level_tokenizers_only(state):
    """Added tokens count as their text, special ones as nothing; of words nothing is known."""
    library = by_library(state)
    library.add_tokens(["naïve"])
    library.add_special_tokens(["<pad>"])
    tokenizer = JsonTokenizer({**state, "json": library.to_str()})
    assert tokenizer.token_bytes()[-2:].tolist() == [6, 0] and tokenizer.vocab_size == 502
    assert tokenizer.token_bytes()[tokenizer.encode("a naïve text")].sum() == len("a naïve text".encode())
    words = JsonTokenizer({"name": "wordlevel", "json": json.dumps(word_tokenizer(9)), "end_of_text": None})
    assert words.token_bytes().tolist() == [0] * 9 and words.end_of_text is None
    assert words.encode("w3 w8 other").tolist() == [3, 8, 0]


def test_the_end_of_text_is_that_of_the_configuration(tmp_path, state):
    """eos_token, as a text or as transformers' object, else <|endoftext|>, else none."""
    content = json.loads(state["json"])
    content["added_tokens"].append({**content["added_tokens"][0], "content": "</s>", "id": 500})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = []
    for config in (None, {}, {"eos_token": "</s>"}, {"eos_token": {"content": "</s>"}}, {"eos_token": "no"}):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        found.append(read_tokenizer(tmp_path)["end_of_text"])
    assert found == ["<|endoftext|>", "<|endoftext|>", "</s>", "</s>", "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_tokenizer(9)), encoding="utf-8")
    assert read_tokenizer(tmp_path / "tokenizer.json")["end_of_text"] is None
    for damaged in ("[1]", "{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(UserError, match="cannot read .*tokenizer_config.json"):
            read_tokenizer(tmp_path)


def test_what_pads_cuts_or_surrounds_a_text_is_not_used(tmp_path, state):
    """truncation, padding and a post-processor of the file change no ids here."""
    library = by_library(state)
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path) == state
    (tmp_path / "again").mkdir()
    write_tokenizer(tmp_path / "again", state)
    assert read_tokenizer(tmp_path / "again") == state


# ------------------------------------------------------------------------------------------------------------
# What users may do wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bpe:100", "has 100 tokens .expected from 257"),
        ("bpe:256", "has 256 tokens"),
        ("bpe:262145", "to 262,144 tokens"),
        ("bpe:abc", "expected bpe:N"),
        ("bpe:", "expected bpe:N"),
        ("bpe:-5", "expected bpe:N"),
        ("bpe:1_000", "expected bpe:N"),
        ("bpe:²", "expected bpe:N"),
        ("bpe:" + "9" * 5000, "expected bpe:N"),
        ("gtp2", "no file gtp2 .expected gpt2, char, bpe:N, or the path of a tokenizer.json"),
        ("n" * 5000, "File name too long"),
        ("a\0b", "NUL"),
    ],
)
def test_a_name_that_is_none_is_refused(text, message):
    """With what was expected, before anything is read."""
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        tokenizer_name(text)


def test_names_are_normalised(tmp_path):
    """gpt2, char where it is allowed, a number of tokens, a file, a folder that has one."""
    assert [tokenizer_name(text) for text in ("gpt2", "char", "bpe:0500")] == ["gpt2", "char", "bpe:500"]
    with pytest.raises(argparse.ArgumentTypeError, match="expected gpt2, bpe:N"):
        tokenizer_name("char", ("gpt2",))
    (tmp_path / "x").mkdir()
    (tmp_path / "xy").touch()  # a similar name is no suggestion for a folder that exists
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"no file .*/x/tokenizer.json \(.*tokenizer.json\)$"
    ):
        tokenizer_name(str(tmp_path / "x"))
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_name(str(tmp_path)) == str(tmp_path)


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "no object": "[1, 2]",
    "no model": "{}",
    "nested": "[" * 100_000,
    "nested objects": '{"model": ' * 3000 + "1" + "}" * 3000,
    "text for a model": '{"model": "BPE"}',
    "half a character": '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
    "no text": 7,
    "None": None,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_tokenizer_json_is_found(text):
    """In one line, without a traceback."""
    problem = find_json_problem(text)
    assert problem and "\n" not in problem and len(problem) <= 200


@pytest.mark.parametrize(
    "model",
    [
        {"vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"vocab": {"a": -1}, "merges": []},
        {"vocab": {"a": 4_000_000_000}, "merges": []},
        {"vocab": {"a": 2**24}, "merges": []},
        {"vocab": {}, "merges": []},
        {"vocab": {"a": 0}, "merges": ["a"]},
        {"vocab": None, "merges": []},
        {"type": "Nothing"},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_one_is_found(model, state):
    """Merges of unknown tokens, ids that no model has, no token at all; also in `JsonTokenizer`."""
    content = {**json.loads(state["json"]), "added_tokens": [], "model": {"type": "BPE", **model}}
    assert find_json_problem(json.dumps(content))


def test_a_damaged_file_is_an_error_that_names_it(tmp_path, state):
    """Truncated, replaced by another kind of file, missing."""
    path = tmp_path / "tokenizer.json"
    for data, message in (
        (state["json"][:5000].encode(), "is not a tokenizer.json: "),
        (b"\x1f\x8b\x08 gzip", "is gzip"),
        (b"", "is empty"),
        (None, "cannot read"),
    ):
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            read_tokenizer(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_old_library_is_named(monkeypatch, state):
    """Training and reading need it; the check of a checkpoint does not."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for use in (lambda: train_bpe(CORPUS, 500), lambda: JsonTokenizer(state)):
        with pytest.raises(UserError, match="tokenizers is not installed") as caught:
            use()
        assert caught.value.hint == "pip install tokenizers"
    assert find_json_problem(state["json"]) is None and find_json_problem("{") is not None
    monkeypatch.undo()
    monkeypatch.delattr(tokenizers.Tokenizer, "encode_special_tokens", raising=False)
    if not hasattr(tokenizers.Tokenizer, "encode_special_tokens"):
        with pytest.raises(UserError, match="too old"):
            train_bpe(CORPUS, 500)


def test_without_tiktoken_the_library_encodes(monkeypatch, state):
    """Slower, with the same ids; a tokenizer of one's own needs no tiktoken."""
    expected = JsonTokenizer(state).encode(CHINESE).tolist()
    monkeypatch.setattr(tokenizer_json, "has_tiktoken", lambda: False)
    monkeypatch.setattr(tokenizer_json, "make_encoding", None)
    assert JsonTokenizer(state).encode(CHINESE).tolist() == expected
