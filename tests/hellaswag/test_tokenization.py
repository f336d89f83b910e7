"""HellaSwag's rows as tokens: the harness's text, and the tokenizer that fits a model."""

from __future__ import annotations

import json
import re

import pytest

from eval_hellaswag import make_example
from tests.test_eval_hellaswag import HELLO, fixture_rows
from utils.command_line import UserError
from utils.hellaswag.tokenization import harness_text, tokenizer_for
from utils.tokenizer import GPT2_VOCAB_SIZE, GPT2Tokenizer, byte_alphabet, tokenizer_from_state
from utils.weights.pretrained import tokenizer_state_of


def test_the_harness_text_is_that_of_its_source():
    """Activity first, second sentence capitalized, brackets removed, the spaces around them left."""
    rows = fixture_rows()
    context, endings = harness_text(rows[2])
    assert context == "Home and Garden: How to water a cactus. Wait until the soil is dry."
    assert endings[0] == "A cactus likes rain. Sing to it."
    assert endings[3] == " Water it every hour. Then water it again."
    assert harness_text(rows[0])[0] == "Baking bread: A woman stands in a kitchen. She"
    assert harness_text(rows[4])[0].endswith("sew They sew all day. the needle")


def test_context_and_ending_apart_are_the_tokens_of_the_whole():
    """The harness tokenizes both at once; as GPT-2's tokens start with their space, that is the same."""
    tokenizer = GPT2Tokenizer()
    # "[title]" at the end of the context leaves a space there.
    trailing_space = dict(HELLO, activity_label="Talk", ctx_a="Hi [title]", ctx_b="")
    for row in [*fixture_rows(), trailing_space]:
        context, endings = harness_text(row)
        example = make_example(dict(row, label=0), 0, tokenizer, 1024, "lm-eval")
        for number, ending in enumerate(endings):
            whole = tokenizer.encode(f"{context} {ending}").tolist()
            inputs = example.tokens[example.row_sets >> number & 1 == 1].tolist()
            assert inputs == whole[:-1]
            scored = example.targets[example.endings == number].tolist()
            assert scored == whole[len(tokenizer.encode(context.rstrip())) :]


def test_a_transformers_folder_is_evaluated_with_its_own_tokenizer(tmp_path, monkeypatch):
    """Files of another tokenizer beside the weights are used; without any, or with GPT-2's: GPT-2's BPE.

    A vocabulary smaller than the tokenizer's is an error.
    """
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("gpt2", tmp_path):
        found = tokenizer_for(source, tokenizer_state_of(source), GPT2_VOCAB_SIZE)
        assert isinstance(found, GPT2Tokenizer)
    words = sorted(
        {word for row in fixture_rows() for word in re.findall(r"\w+|\S", " ".join(row["endings"]))}
    )
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(tmp_path)
    state = tokenizer_state_of(tmp_path)
    found = tokenizer_for(tmp_path, state, GPT2_VOCAB_SIZE)
    assert found.vocab_size == len(vocabulary)
    assert found.encode("puts the oven").tolist() == [vocabulary[word] for word in ("puts", "the", "oven")]
    with pytest.raises(UserError, match="the model only 50"):
        tokenizer_for(tmp_path, state, 50)
    assert tokenizer_from_state(state).encode("puts").tolist() == found.encode("puts").tolist()


def test_a_tokenizer_that_is_no_tokenizer_json_is_for_hellaswag_only(tmp_path, monkeypatch):
    """One that transformers has in Python only; sampling and training refuse it."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "vocab.json").write_text(json.dumps({"hello": 0, "world": 1, "<unk>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e 1\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    assert not hasattr(transformers.AutoTokenizer.from_pretrained(tmp_path), "backend_tokenizer")
    state = tokenizer_state_of(tmp_path)
    assert state == {"name": "folder"}
    assert tokenizer_for(tmp_path, state, 3).encode("<unk>").tolist() == [2]
    with pytest.raises(UserError, match="a tokenizer of its own"):
        tokenizer_from_state(state)


def test_a_tokenizer_in_other_files_becomes_a_tokenizer_json(tmp_path, monkeypatch):
    """What transformers can make one of, here vocab.json and merges.txt, is used everywhere."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokens = [*byte_alphabet(), "he", "hel", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    state = tokenizer_state_of(tmp_path)
    tokenizer = tokenizer_from_state(state)
    assert state["name"] == "bpe" and tokenizer.end_of_text == 258
    assert tokenizer.encode("hello").tolist() == [257, *(tokens.index(letter) for letter in "lo")]
    assert tokenizer.decode(tokenizer.encode("\u4f60\u597d hello")) == "\u4f60\u597d hello"
