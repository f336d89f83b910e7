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
        ("a.txt", "caf\xe9".encode("utf-16"), r"a.txt is UTF-16 \(expected UTF-8 text\)"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), r"a.jsonl is UTF-16LE \(expected"),
        ("a.parquet", b"<html>404", r"a.parquet is HTML \(expected parquet\)"),
        ("a.parquet", gzip.compress(b"x"), r"a.parquet is gzip \(expected parquet\)"),
        ("a.jsonl.gz", b'{"text": "x"}\n', r"a.jsonl.gz is text \(expected gzip\)"),
        ("a.jsonl.gz", gzip.compress(b"\x89PNG"), r"holds a PNG picture inside gzip \(expected JSON lines\)"),
        ("a.json", b'[{"text": "x"}]', r"a.json:1: list"),
        ("a.jsonl", b'{"a\\nb\\u001b": "x"}', r"no field 'text' \(found 'a\\nb\\x1b'\)"),
        ("a.doc", b"x", r"is not a corpus file \(expected .parquet"),
    ],
)  # fmt: skip
def test_an_error_in_the_input_is_reported_with_its_place(tmp_path, name, content, message):
    """File, line or byte, what was expected and what was found."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", tmp_path / name)


def test_the_hint_for_a_json_array_makes_lines_of_it(tmp_path):
    """One element a line, by jq, into a file that is not there yet."""
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "x"},\n{"text": "y"}\n]')
    with pytest.raises(UserError, match="a.json:1: not JSON") as caught:
        blocks_of(path)
    assert caught.value.hint == f"of an array, run: jq -c '.[]' < {path} > {path}l; then use {path}l"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_byte_order_marks_crlf_and_blank_lines_change_nothing(tmp_path, suffix):
    """Also where files with marks were joined; a text file has one at its start."""
    lines = [b'\xef\xbb\xbf{"text": "some words"}', b"", b'\xef\xbb\xbf{"text": "more"}', b"", b"  "]
    data = b"\r\n".join(lines)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == "jsonl.gz" else data)
    (tokens,) = (block.tokens for block in blocks_of(path))
    assert np.array_equal(tokens, expected_tokens(["some words", "more"]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    """As that of a compressed file of a few bytes may be; with the limit. A line within it is read."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 1000)
    monkeypatch.setattr("utils.shards.documents.SEARCH_BYTES", 100)
    monkeypatch.setattr("utils.shards.documents.MAX_LINE_BYTES", 20_000)
    for length in (19_000, 60_000):
        data = b"x" * length if name == "a.txt" else b'{"text": "%s"}' % (b"x" * length)
        data = b"before \n" + data if name == "a.txt" else b'{"text": "before"}\n' + data
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        if length < 20_000:
            assert sum(len(block.tokens) for block in blocks_of(tmp_path / name)) > 1000
    with pytest.raises(UserError, match=r"at most 20,000 bytes") as caught:
        blocks_of(tmp_path / name)
    assert caught.value.hint == "divide it into lines or documents"


def test_a_damaged_page_of_parquet_is_found_by_its_checksum(tmp_path):
    """One bit of an uncompressed text: without the check, another token is read in silence."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, options = tmp_path / "a.parquet", dict(compression="none", use_dictionary=False)
    pq.write_table(pa.table({"text": ["some words"] * 9}), path, write_page_checksum=True, **options)
    assert len(blocks_of(path)) == 1
    data = path.read_bytes()
    value = b"\x0a\x00\x00\x00some words"  # with its length: not in the statistics
    path.write_bytes(data.replace(value, value[:-1] + b"z", 1))
    with pytest.raises(UserError, match="cannot read .*a.parquet: .*CRC"):
        blocks_of(path)


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
