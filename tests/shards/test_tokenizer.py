"""Shards of other tokenizers: a BPE trained on the corpus, a tokenizer.json, and what a build checks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import build_fineweb_edu_shards
from tests.shards.test_build import make_documents, tokens_of, write_jsonl
from tests.test_tokenizer_json import ARABIC, CHINESE, EMOJI, ENGLISH, word_tokenizer
from utils.command_line import UserError, run_script
from utils.files import sha256_of
from utils.shards import tokenizer as shards_tokenizer
from utils.shards.documents import SEPARATOR_LINE
from utils.shards.format import find_all_shards
from utils.shards.tokenizer import tokenizer_of
from utils.tokenizer import Tokenizer, tokenizer_from_state

pytest.importorskip("tokenizers")

DOCUMENTS = [*make_documents(60), ENGLISH * 3, CHINESE * 3, ARABIC * 3, EMOJI * 3, "<|endoftext|> is text"]


def build(folder: Path, *inputs: Path, workers: int = 1, **flags: object) -> int:
    """Runs the script's main in this process; small shards, a BPE of 400 tokens unless `flags` differ."""
    flags = {"tokenizer": "bpe:400", "shard-tokens": 3000, "num-workers": workers, **flags}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return build_fineweb_edu_shards.main(
        ["--input", *map(str, inputs), "--output-dir", str(folder), *arguments]
    )


def tokens_by(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    """Document after document, each as a whole."""
    return [id for text in documents for id in (tokenizer.end_of_text, *tokenizer.encode(text).tolist())]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """DOCUMENTS in a file of JSON lines."""
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


def fail_to_train(texts: object, vocab_size: int) -> None:
    """In the place of `train_bpe`."""
    raise AssertionError("a tokenizer was trained again")


# ------------------------------------------------------------------------------------------------------------
# A BPE of one's own


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_of_a_bpe_of_ones_own(corpus, tmp_path, workers, capsys):
    """tokenizer.json lies beside the shards, which hold its tokens; --verify checks both."""
    folder = tmp_path / "out"
    assert build(folder, corpus, workers=workers) == 0
    tokenizer = tokenizer_from_state(tokenizer_of(folder))
    assert tokenizer.vocab_size == 400 and tokens_of(folder).dtype == np.uint16
    assert tokens_of(folder).tolist() == tokens_by(tokenizer, DOCUMENTS)
    assert len(find_all_shards(folder)) > 2
    printed = capsys.readouterr().out
    assert "training a BPE of 400 tokens on up to 200,000,000 characters" in printed
    assert "encoding in batches: compared with tiktoken on the first" in printed
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert settings["tokenizer"] == "bpe:400" and settings["tokenizer_sha256"] in printed
    assert build_fineweb_edu_shards.main(["--verify", "--output-dir", str(folder)]) == 0


@pytest.mark.parametrize("separated", [True, False])
def test_a_text_has_the_same_tokens_wherever_it_is_divided(tmp_path, monkeypatch, separated):
    """Parts of a few hundred bytes of a .txt: as tokenized whole, cuts beside all kinds of white space."""
    documents = [ENGLISH + "a \n\n b\t\tc  \r\n  d!  \n" + CHINESE + ARABIC + EMOJI] * 9
    text = "<|endoftext|>\n".join(documents) if separated else "".join(documents)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 300)
    assert build(tmp_path / "out", path) == 0
    tokenizer = tokenizer_from_state(tokenizer_of(tmp_path / "out"))
    whole = SEPARATOR_LINE.split(text)
    assert tokens_of(tmp_path / "out").tolist() == tokens_by(tokenizer, whole)


def test_what_becomes_val_is_not_trained_on(corpus, tmp_path, monkeypatch):
    """The tokenizer sees documents after those of the val shard only; of a single text, only its end."""
    seen: list[str] = []
    real = shards_tokenizer.train_bpe
    monkeypatch.setattr(
        shards_tokenizer, "train_bpe", lambda texts, size: real([seen.append(t) or t for t in texts], size)
    )
    assert build(tmp_path / "out", corpus, **{"val-tokens": 300}) == 0
    val = np.load(find_all_shards(tmp_path / "out")[0])
    tokenizer = tokenizer_from_state(tokenizer_of(tmp_path / "out"))
    num_val = int((val == tokenizer.end_of_text).sum())
    assert 1 <= num_val and 20 < len(seen) <= len(DOCUMENTS) - num_val
    assert seen == DOCUMENTS[-len(seen) :]

    seen.clear()
    path = tmp_path / "one.txt"
    path.write_text(ENGLISH * 50)
    assert build(tmp_path / "one", path, **{"shard-tokens": 100_000}) == 0
    val = np.load(find_all_shards(tmp_path / "one")[0])
    start = tokenizer_from_state(tokenizer_of(tmp_path / "one")).decode(val[1:])
    assert len(seen) == 1 and (ENGLISH * 50).endswith(seen[0]) and len(seen[0]) > 40 * len(ENGLISH)
    assert len(start) <= 50 * len(ENGLISH) - len(seen[0])


def test_a_stopped_build_continues_with_its_tokenizer(corpus, tmp_path, monkeypatch):
    """Nothing is trained again; the result is that of an undisturbed build. So are missing shards."""
    assert build(tmp_path / "whole", corpus) == 0
    assert build(tmp_path / "out", corpus, **{"max-shards": 2}) == 0
    monkeypatch.setattr(shards_tokenizer, "train_bpe", fail_to_train)
    assert build(tmp_path / "out", corpus) == 0
    find_all_shards(tmp_path / "out")[1].unlink()
    assert build(tmp_path / "out", corpus) == 0
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names >= {"tokenizer.json"}
    for name in names:
        assert sha256_of(tmp_path / "out" / name) == sha256_of(tmp_path / "whole" / name), name


def test_other_tokenizers_and_changed_files_are_refused(corpus, tmp_path, monkeypatch):
    """Another size, GPT-2's; tokenizer.json edited, cut or deleted; nothing is trained to find that out."""
    folder = tmp_path / "out"
    assert build(folder, corpus, **{"max-shards": 2}) == 0
    monkeypatch.setattr(shards_tokenizer, "train_bpe", fail_to_train)
    for name, message in (("bpe:401", "bpe:400 there, bpe:401 here"), ("gpt2", "bpe:400 there, gpt2 here")):
        with pytest.raises(UserError, match=message):
            build(folder, corpus, tokenizer=name)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    faults = {
        text.replace('"merges":[', '"merges":[["a","b"],', 1): "is not a tokenizer.json",
        text.replace("<|endoftext|>", "<|endofdata|>"): "not the tokenizer that the shards were built with",
        text[:-100]: "is not a tokenizer.json",
        None: "cannot read",
    }
    for fault, message in faults.items():
        path.unlink() if fault is None else path.write_text(fault, encoding="utf-8")
        for use in (
            lambda: build(folder, corpus),
            lambda: build_fineweb_edu_shards.main(["--verify", "--output-dir", str(folder)]),
            lambda: tokenizer_of(folder),
        ):
            with pytest.raises(UserError, match=message):
                use()
    path.write_text(text, encoding="utf-8")
    assert build(folder, corpus) == 0


def test_an_attempt_without_a_shard_is_replaced(corpus, tmp_path):
    """With another tokenizer as well: no tokenizer.json of the first one remains beside GPT-2 tokens."""
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    folder = tmp_path / "out"
    for name in ("bpe:300", "gpt2"):
        empty.write_text("\n")
        with pytest.raises(UserError, match="no documents"):
            build(folder, empty, tokenizer=name)
        assert (folder / "tokenizer.json").exists() is (name != "gpt2")
    assert build(folder, corpus, tokenizer="gpt2") == 0
    assert tokenizer_of(folder) == {"name": "gpt2"}


def test_a_tokenizer_json_of_unknown_origin_is_not_overwritten(corpus, tmp_path):
    """Training would take it for the shards' tokenizer; the hint, followed, uses it."""
    assert build(tmp_path / "first", corpus) == 0
    folder = tmp_path / "out"
    folder.mkdir()
    text = (tmp_path / "first" / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name in ("gpt2", "bpe:300"):
        with pytest.raises(UserError, match="is not of a build in this folder") as caught:
            build(folder, corpus, tokenizer=name)
        assert f"--tokenizer {folder / 'tokenizer.json'}" in caught.value.hint
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == text
    config = '{"eos_token": "<|endoftext|>", "chat_template": "kept"}'
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    assert build(folder, corpus, tokenizer=folder / "tokenizer.json") == 0
    assert (folder / "tokenizer_config.json").read_text(encoding="utf-8") == config
    assert np.array_equal(tokens_of(folder), tokens_of(tmp_path / "first"))


# ------------------------------------------------------------------------------------------------------------
# Tokenizers of others


def test_a_tokenizer_json_is_stored_with_the_shards(corpus, tmp_path, capsys):
    """From a file or a folder; what tiktoken cannot run is run by the library, in processes as well."""
    assert build(tmp_path / "first", corpus) == 0
    content = json.loads((tmp_path / "first" / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "NFC"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for folder, workers, path in (("a", 1, "other"), ("b", 2, "other/tokenizer.json")):
        assert build(tmp_path / folder, corpus, workers=workers, tokenizer=tmp_path / path) == 0
        assert "encoding document by document" in capsys.readouterr().out
        tokenizer = tokenizer_from_state(tokenizer_of(tmp_path / folder))
        assert tokens_of(tmp_path / folder).tolist() == tokens_by(tokenizer, DOCUMENTS)
    assert sha256_of(tmp_path / "a" / "manifest.json") == sha256_of(tmp_path / "b" / "manifest.json")


def test_a_vocabulary_above_65536_takes_four_bytes(tmp_path):
    """uint32 shards, whose ids are those of the tokenizer; the hash and the check of --verify included."""
    content = word_tokenizer(70_000)
    content["model"]["vocab"]["<|endoftext|>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    source = write_jsonl(tmp_path / "a.jsonl", ["w1 w69999 w2", "w65536 w65535 w3 w4"] * 30)
    assert build(tmp_path / "out", source, tokenizer=tmp_path / "tokenizer.json") == 0
    tokens = tokens_of(tmp_path / "out")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [70_000, 1, 69_999, 2, 70_000, 65_536, 65_535, 3, 4] * 30
    assert build_fineweb_edu_shards.main(["--verify", "--output-dir", str(tmp_path / "out")]) == 0


def test_a_tokenizer_without_an_end_of_text_is_refused(corpus, tmp_path, capsys):
    """Documents need it; the hint, followed, names one of its tokens."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(word_tokenizer(9)))
    with pytest.raises(UserError, match="has no end-of-text token"):
        build(tmp_path / "out", corpus, tokenizer=path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w8"}')
    assert build(tmp_path / "out", corpus, tokenizer=path) == 0
    assert tokenizer_from_state(tokenizer_of(tmp_path / "out")).end_of_text == 8


@pytest.mark.parametrize("name", ["char", "bpe:1", "bpe:many", "nothing.json"])
def test_a_name_that_is_no_tokenizer_is_an_error_of_two_lines(name, corpus, tmp_path, capsys):
    """Exit code 2; characters are not for shards."""
    assert run_script(lambda: build(tmp_path / "out", corpus, tokenizer=name)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: argument --tokenizer: ") and lines[1].startswith("hint: ")
    assert len(lines) == 2 and not (tmp_path / "out").exists()
