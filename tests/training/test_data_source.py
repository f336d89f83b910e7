"""Which data a run trains on when none, or some, is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch

import build_fineweb_edu_shards
from tests.conftest import FileServer
from tests.shards.test_build import build, make_documents, tokens_of, write_jsonl, write_parquet
from tests.shards.test_documents import zstd
from tests.small_runs import Killed, assert_same_run, kill_in_update, train
from utils import tokenizer_json
from utils.command_line import UserError
from utils.distributed import Distributed
from utils.tokenizer import gpt2_encoding
from utils.training import data_source
from utils.training.data_source import Data, choose_source, fetch, open_data

ALONE = Distributed(torch.device("cpu"))


@pytest.fixture(autouse=True)
def empty_repository(tmp_path, monkeypatch) -> None:
    """Neither shards nor input.txt."""
    monkeypatch.setattr(data_source, "TEXT_PATH", tmp_path / "input.txt")
    monkeypatch.setattr(data_source, "SHARDS_DIR", tmp_path / "shards")


def test_tiny_shakespeare_is_downloaded_once(server: FileServer, tmp_path, monkeypatch):
    """To input.txt, which the next run uses without the network."""
    body = b"First Citizen:\nSpeak, speak.\n" * 100
    server.files = {"/input.txt": body}
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_URL", f"{server.url}/input.txt")
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_BYTES", len(body))
    source = fetch(None, ALONE)
    assert (source.kind, source.path) == ("text", tmp_path / "input.txt")
    assert fetch(None, ALONE).reason == "no shards in shards/"
    assert server.num_requests == 1


def test_without_a_network_the_text_is_the_documentation_of_python(tmp_path, monkeypatch, capsys):
    """The quick start always has data; a warning and the reason say which."""
    monkeypatch.setattr(data_source, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    source = fetch(None, ALONE)
    assert source.kind == "pydoc" and "no network" in source.reason
    assert "warning: cannot download Tiny Shakespeare" in capsys.readouterr().err
    tokenizer, train, _, reason = open_data(source, {"name": "gpt2"}, 64, ALONE)
    assert reason == source.reason
    assert "pydoc_data.topics of Python 3" in train.name and train.num_tokens > 50_000
    assert "statement" in tokenizer.decode(train.read(0, 20_000))
    assert list(tmp_path.iterdir()) == []


def test_the_order_in_which_data_is_looked_for(tmp_path, monkeypatch):
    """--data, then shards, then input.txt, then a download."""
    monkeypatch.setattr(data_source, "SHARDS_DIR", tmp_path)
    assert choose_source(None).kind == "download"
    (tmp_path / "input.txt").touch()
    assert choose_source(None).kind == "text"
    (tmp_path / "edufineweb_train_000001.npy").touch()
    assert choose_source(None).kind == "shards"
    assert choose_source("other.txt").path == Path("other.txt")
    assert choose_source(str(tmp_path)).kind == "shards"


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "0.ds", "edufineweb_val_000000.npy"])
def test_a_token_file_is_answered_with_its_folder(name, tmp_path, monkeypatch):
    """Which holds the other split, too; in any folder."""
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / name).write_bytes(bytes(range(100)))
    with pytest.raises(UserError, match=f"{name} is a file of tokens") as caught:
        fetch(str(tmp_path / "my data" / name), ALONE)
    assert caught.value.hint == f"give its folder: --data '{tmp_path}/my data'"
    monkeypatch.chdir(tmp_path / "my data")
    with pytest.raises(UserError) as caught:
        fetch(name, ALONE)
    assert caught.value.hint == "give its folder: --data ."


def test_shards_cannot_be_read_as_characters(tmp_path):
    """They hold GPT-2 tokens; the hint depends on whether a model was loaded."""
    source = choose_source(str(tmp_path))
    for state, hint in (
        ({"name": "char"}, "use --tokenizer gpt2"),
        ({"name": "char", "characters": "ab"}, "a"),
    ):
        with pytest.raises(UserError, match="holds GPT-2 tokens, not characters") as caught:
            open_data(source, state, 16, ALONE)
        assert f"give --data a text file, or {hint}" in caught.value.hint


def test_a_rank_with_other_data_is_named(text_file):
    """The fingerprints of all ranks are compared before the first step."""

    class OtherRank(Distributed):
        def broadcast(self, value: list) -> list:
            return [{**entry, "sha256": "that of rank 0"} for entry in value]

    other = OtherRank(torch.device("cpu"), rank=1, world_size=2)
    source = choose_source(str(text_file))
    assert open_data(source, {"name": "char"}, 16, ALONE).train.name == str(text_file)
    with pytest.raises(UserError, match="rank 1 sees other data than rank 0 in .*text.txt") as caught:
        open_data(source, {"name": "char"}, 16, other)
    assert caught.value.one_rank_only  # rank 0 does not see the error


# ------------------------------------------------------------------------------------------------------------
# One file, one meaning

STORIES = [
    "Once upon a time\n\nthere was a cat. ",
    "It's  here;\tthe end\n",
    "<|endoftext|> is text",
    "日本語\u3000 x",
]


def write_stories(path: Path, kind: str) -> Path:
    """The same documents in a file of any kind; those of text end in a line break."""
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in STORIES).encode()
    if kind == "array":
        lines = json.dumps([{"text": STORIES[0]}, *STORIES[1:]], indent=1).encode()
    elif kind in ("jsonl.gz", "jsonl.zst"):
        lines = (zstd if kind == "jsonl.zst" else gzip.compress)(lines)
    elif kind == "parquet":
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        pq.write_table(pa.table({"id": range(len(STORIES)), "text": STORIES}), path, row_group_size=2)
        return path
    elif kind.startswith("text"):
        end = "\r\n" if "CRLF" in kind else "\n"
        text = f"{end}<|endoftext|>{end}".join(STORIES)
        text = {"text, first": f"<|endoftext|>{end}{text}", "text, last": f"{text}{end}<|endoftext|>"}.get(
            kind, text
        )
        lines = (b"\xef\xbb\xbf" if "mark" in kind else b"") + text.encode()
        lines = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(lines)
    path.write_bytes(lines)
    return path


def tokens_of_data(path: Path, name: str = "gpt2") -> tuple[list[int], Data]:
    """All tokens of a file that is given to --data."""
    data = open_data(choose_source(str(path)), {"name": name}, 4, ALONE)
    return [
        id for stream in (data.train, data.val) for id in stream.read(0, stream.num_tokens).tolist()
    ], data


@pytest.mark.parametrize(
    "kind",
    ["text", "text, CRLF", "text, mark", "text, first", "text, last", "text.gz", "text.zst", "jsonl",
     "jsonl.gz", "jsonl.zst", "JSONL", "json", "array", "parquet"],
)  # fmt: skip
def test_the_trainer_reads_the_documents_of_the_shard_builder(tmp_path, kind, capsys):
    """The same ids in the same order, for every format; what of a record is not used is said."""
    suffix = {"text.gz": "txt.gz", "text.zst": "txt.zst", "array": "json"}.get(kind, kind)
    path = write_stories(tmp_path / f"a.{'txt' if suffix.startswith('text') else suffix}", kind)
    build(tmp_path / "out", path)
    capsys.readouterr()
    tokens, data = tokens_of_data(path)
    assert tokens == tokens_of(tmp_path / "out").tolist()
    assert data.reason == f"--data, {len(STORIES)} documents"
    assert ("only the field 'text' is used" in capsys.readouterr().err) == (not kind.startswith("text"))


@pytest.mark.parametrize("text", ["a\nb <|endoftext|>\nc " * 9, " <|endoftext|>\n" * 9, "\n\nwords " * 30])
def test_a_text_without_separator_lines_is_one_stream(tmp_path, text):
    """Its ids have no <|endoftext|> at the start, and checkpoints of earlier versions recognise the data."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    tokens, data = tokens_of_data(path)
    assert tokens == gpt2_encoding().encode_ordinary(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert data.train.fingerprint() == {"bytes": len(text.encode()), "sha256": digest}
    assert data.reason == "--data"


@pytest.mark.parametrize("kind", ["text", "text, CRLF", "text, first", "text, last", "jsonl", "parquet"])
def test_a_character_model_gets_documents_joined_by_blank_lines(tmp_path, kind, capsys):
    """It has no token that separates them; a warning says so, and no separator is trained on."""
    path = write_stories(tmp_path / f"a.{'txt' if kind.startswith('text') else kind}", kind)
    tokens, data = tokens_of_data(path, "char")
    assert data.tokenizer.decode(tokens) == "\n\n".join(text.strip("\n") for text in STORIES)
    assert "joined by blank lines" in capsys.readouterr().err


def test_a_surrogate_of_json_becomes_a_replacement_character(tmp_path):
    """JSON can hold half of one, UTF-8 cannot: with both tokenizers."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some \\ud800 words"}\n' * 99)
    for name in ("gpt2", "char"):
        tokens, data = tokens_of_data(path, name)
        assert "some \ufffd words" in data.tokenizer.decode(tokens)


def test_documents_have_another_identity_than_the_same_bytes_as_one_text(tmp_path):
    """A checkpoint of an earlier version, which trained on the raw file, is not resumed on other tokens."""
    path = write_stories(tmp_path / "a.txt", "text")
    fingerprint = tokens_of_data(path)[1].train.fingerprint()
    assert fingerprint.keys() == {"documents", "sha256"}
    assert fingerprint["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest()
    other = write_stories(tmp_path / "b.txt", "text, last")
    assert (
        tokens_of_data(other)[1].train.fingerprint() != fingerprint
    )  # the last document ends in a line break


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a"])
def test_another_kind_of_file_is_named(tmp_path, name):
    """Before the first step, by its first bytes."""
    (tmp_path / name).write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=rf"{name} is gzip \(expected") as caught:
        tokens_of_data(tmp_path / name)
    assert "gunzip -c < " in caught.value.hint


def test_a_missing_field_names_the_builders_flag(tmp_path):
    """train_gpt.py has no such flag."""
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: no field 'text' \(found body\)") as caught:
        tokens_of_data(tmp_path / "a.jsonl")
    assert "build_fineweb_edu_shards.py --text-field NAME" in caught.value.hint


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_a_packed_text_has_the_ids_of_the_text(tmp_path, monkeypatch, suffix, name):
    """Also of several parts, and one without separator lines."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 500)
    text = "\ufeff" + "\n".join(make_documents(20))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    packed = tmp_path / f"a.txt{suffix}"
    packed.write_bytes((zstd if suffix == ".zst" else gzip.compress)(text.encode()))
    tokens, data = tokens_of_data(tmp_path / "a.txt", name)
    packed_tokens, packed_data = tokens_of_data(packed, name)
    assert packed_tokens == tokens and packed_data.train.fingerprint() == data.train.fingerprint()


# ------------------------------------------------------------------------------------------------------------
# A folder of texts


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A folder with files of every kind, one of them in several parts, and some that are left out."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 500)
    folder = tmp_path / "my data"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", make_documents(9))
    (folder / "c.jsonl.zst").write_bytes(zstd(b'{"text": "packed words"}\n' * 9))
    write_parquet(folder / "sub" / "d.parquet", make_documents(9, seed=1))
    (folder / "a.TXT").write_text("A long text of many words. " * 200 + "\n<|endoftext|>\nAnother one")
    (folder / "z.txt").write_text("The last one")
    (folder / "notes.docx").touch()
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def test_a_folder_of_texts_has_the_ids_of_its_shards(corpus, tmp_path, capsys):
    """All files that the builder takes, in its order; what is left out is said as it says it."""
    build(tmp_path / "out", corpus)
    left_out = capsys.readouterr().out.splitlines()[0]
    assert "1 hidden (.hidden.txt), 1 of other kinds (notes.docx)" in left_out
    tokens, data = tokens_of_data(corpus)
    output = capsys.readouterr()
    assert tokens == tokens_of(tmp_path / "out").tolist()
    assert output.out.splitlines() == [left_out.replace("--input", "--data")]
    assert "only the field 'text' is used" in output.err
    assert data.reason == f"--data, {tokens.count(50256)} documents"
    assert data.train.num_tokens == int(0.9 * len(tokens))


def test_a_character_model_gets_the_texts_of_a_folder_joined_by_blank_lines(tmp_path, monkeypatch, capsys):
    """A text of several parts is not divided."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 50)
    (tmp_path / "b.txt").write_text("one two three " * 40 + "\n")
    (tmp_path / "a.txt").write_text("four five")
    tokens, data = tokens_of_data(tmp_path, "char")
    assert data.tokenizer.decode(tokens) == "four five\n\n" + "one two three " * 40
    assert "joined by blank lines" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokens.npy", "0.ds", "train.bin", "val.bin"])
def test_a_folder_with_token_files_is_not_read_as_texts(corpus, name):
    """Not even if they are incomplete: nanoGPT's folders hold the text as well, and a README is no corpus."""
    (corpus / "manifest.json").touch()  # of another program, or of a build that has no shard yet
    assert choose_source(str(corpus)).kind == "texts"
    (corpus / name).touch()
    assert choose_source(str(corpus)).kind == "shards"


def test_a_folder_that_is_too_large_gets_the_command_that_builds_its_shards(corpus, tmp_path, monkeypatch):
    """Which works when it is followed as printed: a new folder, although one of that name is there."""
    (tmp_path / "my data_shards").mkdir()
    size = sum(len(text) for text in read_all(corpus))
    monkeypatch.setattr(data_source, "MAX_CHARACTERS", size)
    tokens, _ = tokens_of_data(corpus)
    monkeypatch.setattr(data_source, "MAX_CHARACTERS", size - 1)
    with pytest.raises(UserError, match=f"my data has more than {size - 1:,} characters") as caught:
        tokens_of_data(corpus)
    command, flag = caught.value.hint.removeprefix("make shards of its texts: ").split("; then ")
    _, script, *arguments = shlex.split(command)
    assert script == "build_fineweb_edu_shards.py"
    assert build_fineweb_edu_shards.main([*arguments, "--num-workers", "1"]) == 0
    new = Path(shlex.split(flag)[1])
    assert new == tmp_path / "my data_shards_2"
    assert sorted(tokens_of_data(new)[0]) == sorted(tokens)  # val comes first there


def test_the_shards_of_a_folder_that_is_too_large_have_the_tokenizer_of_the_run(corpus, monkeypatch):
    """Then the same command trains on them; of characters, which have no shards, one file may be larger."""
    pytest.importorskip("tokenizers")
    size = sum(len(text) for text in read_all(corpus))
    monkeypatch.setattr(data_source, "MAX_CHARACTERS", size - 1)
    own, state = {"name": "bpe", "vocab_size": 260}, tokenizer_json.train_bpe(["a text"], 258)
    hints = []
    for tokenizer_state in (own, {"name": "char"}, state):
        with pytest.raises(UserError) as caught:
            open_data(choose_source(str(corpus)), tokenizer_state, 4, ALONE)
        hints.append(caught.value.hint)
    command, flag = hints[0].removeprefix("make shards of its texts: ").split("; then --data ")
    assert build_fineweb_edu_shards.main([*shlex.split(command)[2:], "--num-workers", "1"]) == 0
    (folder,) = shlex.split(flag)
    assert open_data(choose_source(folder), own, 4, ALONE).tokenizer.vocab_size == 260
    assert hints[1].startswith("characters have no shards: ")
    one = corpus.parent / "one.txt"
    one.write_text("a text " * size)
    assert open_data(choose_source(str(one)), {"name": "char"}, 4, ALONE).train.num_tokens > 0
    assert " --tokenizer FILE (your tokenizer.json; " in hints[2]


def read_all(folder: Path) -> list[str]:
    """The documents of a folder."""
    return data_source.read_folder(folder, {"name": "gpt2"}, ALONE)


def test_an_unusable_file_in_a_folder_is_named_with_the_trainers_flag(corpus):
    """There is no --input."""
    (corpus / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty \(0 bytes\)") as caught:
        tokens_of_data(corpus)
    assert caught.value.hint == "remove it from --data"


def test_a_run_on_a_folder_of_texts_resumes_bitwise(tmp_path, monkeypatch, no_pictures):
    """Killed and resumed, it ends with the same bits; a new file in the folder is other data."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"The quick brown fox number {number}. " * 40)
    assert train(folder, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        kill_in_update(patch, 11)
        with pytest.raises(Killed):
            train(folder, tmp_path / "log")
    (folder / "5.txt").write_text("fox")
    with pytest.raises(UserError, match="made on other data"):
        train(folder, tmp_path / "log", "--resume")
    (folder / "5.txt").unlink()
    assert train(folder, tmp_path / "log", "--resume") == 0
    assert_same_run(tmp_path / "log", tmp_path / "whole")
