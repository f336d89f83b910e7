"""Errors for input and folders that a build cannot use."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.shards.test_build import blocks_of, build, expected_tokens, tokens_of, write_parquet
from utils.command_line import UserError
from utils.shards.documents import Position, parts_from, read_documents
from utils.shards.local_files import LocalFiles


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x", "id": 1}\n', r":2: no field 'text' \(found body, id\)"),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1: NoneType in field 'text'"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl:1: list \(expected an object\)"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl:1: not JSON: 'utf-8'"),
        ("a.jsonl", b"", r"a.jsonl is empty"),
        ("a.jsonl", b"\n \n", r"no documents"),
        ("a.txt", b"caf\xe9", r"byte 0xe9 at offset 3 is not UTF-8"),
        ("a.txt", b" \n\n", r"no documents"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"x": 1}', mtime=0), r"a.jsonl.gz:2: no field 'text'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], r"cannot read .*a.jsonl.gz"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 200_000, r"a.jsonl:1: not JSON"),
        ("a.parquet", b"PAR1 not really", r"is not a parquet file"),
        ("a.doc", b"x", r"is not a corpus file \(expected .parquet"),
    ],
)  # fmt: skip
def test_an_error_in_the_input_is_reported_with_its_place(tmp_path, name, content, message):
    """File, line or byte, what was expected and what was found."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", tmp_path / name)


def test_bad_lines_are_counted_across_parts(tmp_path, monkeypatch):
    """The line number is that of the file, not of the part; error and hint arrive from a worker process."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n' * 50 + "{\n")
    with pytest.raises(UserError, match="a.jsonl:51: not JSON") as caught:
        blocks_of(path, num_workers=2)
    assert "correct or remove the line" in caught.value.hint


def latin_1_strings() -> object:
    """A column of strings whose second one is not UTF-8, as writers in other languages may create it."""
    pa = pytest.importorskip("pyarrow")
    return pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())


def test_a_missing_column_and_a_null_are_reported(tmp_path):
    """With the existing columns, the row of the null, the rows around bytes that are not UTF-8."""
    path = write_parquet(tmp_path / "a.parquet", ["x", "y"])
    with pytest.raises(UserError, match=r"no column 'body' \(found id, text\)"):
        build(tmp_path / "out", path, **{"text-field": "body"})
    with pytest.raises(UserError, match=r"'id' holds int64"):
        build(tmp_path / "out", path, **{"text-field": "id"})
    path = write_parquet(tmp_path / "c.parquet", latin_1_strings())
    with pytest.raises(UserError, match="c.parquet: rows 0 to 2: a text is not UTF-8"):
        build(tmp_path / "out", path)
    path = write_parquet(tmp_path / "b.parquet", ["x"] * 9 + [None])
    part = list(parts_from(LocalFiles([path]), "text", Position()))[-1]
    with pytest.raises(UserError, match="row 9"):
        read_documents(part, "text")


def test_inputs_are_read_in_the_order_given_and_unusable_folders_are_refused(tmp_path):
    """Sorted within a folder, hidden files left out; no such file or folder and foreign shards are errors."""
    (tmp_path / "in").mkdir()
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / "in" / name).write_text(f"text of {name}")
    (tmp_path / "in" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "in" / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("hidden")
    build(tmp_path / "out", tmp_path / "in" / "c.txt", tmp_path / "in", **{"shard-tokens": 3})
    expected = expected_tokens([f"text of {name}" for name in ("c.txt", "a.txt", "b.txt")])
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)
    with pytest.raises(UserError, match="no such file"):
        build(tmp_path / "out", tmp_path / "*.none")
    with pytest.raises(UserError, match="cannot write to output dir"):
        build(Path("/dev/null/out"), tmp_path / "in")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest.json"):
        build(tmp_path / "out", tmp_path / "in")
    with pytest.raises(UserError, match="more than a shard"):
        build(tmp_path / "new", tmp_path / "in", **{"shard-tokens": 3, "val-tokens": 4})
