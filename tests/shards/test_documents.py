"""Errors for input and folders that a build cannot use."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.shards.test_build import (
    blocks_of,
    build,
    expected_tokens,
    make_documents,
    tokens_of,
    write_jsonl,
    write_parquet,
)
from utils.command_line import UserError
from utils.shards.documents import Position, parts_from, read_documents
from utils.shards.local_files import LocalFiles
from utils.shards.rows import array_elements
from utils.text_files import open_unpacked


def zstd(data: bytes) -> bytes:
    """A frame of zstd."""
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


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
        ("a.jsonl", b'[{"text": "x"}]', r"a.jsonl:1: list"),
        ("a.json", b'[{"text": "x"}, {"body": 1}]', r"a.json: element 2: no field 'text' \(found body\)"),
        ("a.json", b' [\n{"text": "x"},\n{"text": 7}]', r"a.json: element 2: int in field 'text'"),
        ("a.json", b'["x", 7]', r"a.json: element 2: int \(expected an object or a string\)"),
        ("a.json", b'["x", {"text": "y" "z"}]', r"a.json: element 2: not JSON: Expecting ',' delimiter"),
        ("a.json", b'["a\nb"]', r"a.json: element 1: not JSON: Invalid control character"),
        ("a.json", b'["x" "y"]', r"a.json: element 1: not JSON: Extra data"),
        ("a.json", b'["x", }, "y"]', r"a.json: element 2: not JSON"),
        ("a.json", b'["x", "caf\xe9"]', r"a.json: element 2: not JSON: 'utf-8'"),
        ("a.json", b'["x", "y"', r"a.json: the array has no end \(after 1 elements\)"),
        ("a.json", b'["x", "y]\\', r"a.json: the array has no end"),
        ("a.json", b'["x",, "y"]', r"a.json: element 2 is empty: a comma too many"),
        ("a.json", b'["x",]', r"a.json: element 2 is empty"),
        ("a.json", b'["x"]\n["y"]', r"""a.json: b'\["y"\]' after the end of the array \(1 elements\)"""),
        ("a.json", b"[ ]", r"no documents"),
        ("a.json", b'{"text": \n"x"}', r"a.json:1: not JSON"),
        ("a.json.gz", gzip.compress(b"\xff\xfe[\0"), r"holds UTF-16 inside gzip \(expected JSON\)"),
        ("a.json.gz", gzip.compress(b'["x", "y"]')[:-6], r"cannot read .*a.json.gz"),
        ("a.jsonl.zst", b'{"text": "x"}\n', r"a.jsonl.zst is text \(expected zstd\)"),
        ("a.jsonl.zst", zstd(b'{"text": "x"}\n{"x": 1}'), r"a.jsonl.zst:2: no field 'text'"),
        ("a.jsonl.zst", zstd(b'{"text": "some words"}\n')[:-3], r"cannot read .*zst: Truncated"),
        ("a.txt.gz", gzip.compress(b"some words")[:-5], r"cannot read .*a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"caf\xe9"), r"byte 0xe9 at offset 3 is not UTF-8"),
        ("a.txt.zst", zstd(b"%PDF-1.4"), r"a.txt.zst holds a PDF inside zstd \(expected UTF-8 text\)"),
        ("a.jsonl", b'{"a\\nb\\u001b": "x"}', r"no field 'text' \(found 'a\\nb\\x1b'\)"),
        ("a.doc", b"x", r"is not a corpus file \(expected .parquet"),
    ],
)  # fmt: skip
def test_an_error_in_the_input_is_reported_with_its_place(tmp_path, name, content, message):
    """File, line or byte, what was expected and what was found."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON.gz"])
def test_the_hint_for_an_array_under_another_name_is_true_when_followed(tmp_path, suffix):
    """Its name decides how a file is read: it is renamed, to a name that is free, and read."""
    path = tmp_path / f"my data{suffix}"
    path.write_bytes(PACK.get(path.suffix, bytes)(b'[\n{"text": "x"},\n{"text": "y"}\n]'))
    with pytest.raises(UserError, match=":1: not JSON") as caught:
        blocks_of(path)
    command = caught.value.hint.removeprefix("if it is one array, run: ").split("; then use ")[0]
    subprocess.run(command, shell=True, check=True)
    new = Path(shlex.split(command)[-1])
    assert np.array_equal(blocks_of(new)[0].tokens, expected_tokens(["x", "y"]))


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("form", ["lines", "one line", "indented", "strings", "lines of an array"])
def test_json_is_read_however_it_is_written(tmp_path, monkeypatch, pack, form):
    """An array or lines, packed or not, in parts of a few hundred bytes; continued from any part."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 700)
    documents = [*make_documents(40), 'quotes " and \\ and [brackets], {too}', "", "é 漢 \u2028 \\" * 300]
    records = [{"id": [1, {"x": "]"}], "text": text, "tags": ["a", "b"]} for text in documents]
    data = {
        "lines": "\n".join(json.dumps(record) for record in records),
        "one line": json.dumps(records),
        "indented": "\ufeff\n " + json.dumps(records, indent=2, ensure_ascii=False) + "\r\n\n",
        "strings": json.dumps(documents, ensure_ascii=False),
        "lines of an array": "[\n" + ",\r\n".join(json.dumps(record) for record in records) + "]",
    }[form]
    path = tmp_path / f"a.json{pack}"
    path.write_bytes(PACK[pack](data.encode()))
    blocks = blocks_of(path)
    assert len(blocks) > 5
    expected = expected_tokens(documents)
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), expected)
    for i in range(1, len(blocks), 3):
        rest = np.concatenate([block.tokens for block in blocks_of(path, blocks[i].start)])
        assert np.array_equal(rest, expected[sum(len(block.tokens) for block in blocks[:i]) :])


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 1000, 100_000])
def test_an_array_is_divided_alike_wherever_a_read_ends(tmp_path, num_bytes):
    """In the middle of an escape, of a character, of a run of escapes longer than is matched at once."""
    texts = ["\\" * 3000, '\\"' * 5, "漢\n" * 3, "[,]{}", ""]
    elements = [json.dumps(text, ensure_ascii=False).encode() for text in texts] + [b'{"a": [1, [2, "]"]]}']
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b" ,\n".join(elements) + b"\n]")
    with open_unpacked(path) as file:
        assert list(array_elements(path, file, num_bytes, 10_000)) == elements


@pytest.mark.parametrize("pack", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_packed_file_has_the_tokens_of_what_it_holds(tmp_path, monkeypatch, pack, kind):
    """Of several members or frames, one of them to be skipped; the same from any part on, and by a build."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 900)
    documents = [text.strip() + "\n" for text in make_documents(40) if text.strip()]
    plain = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(plain, documents)
    else:
        plain.write_text("\ufeff" + "<|endoftext|>\n".join(documents), encoding="utf-8", newline="")
    data = plain.read_bytes()
    path = tmp_path / f"a.{kind}{pack}"
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc" if pack == ".zst" else b""
    path.write_bytes(skipped + PACK[pack](data[:5000]) + PACK[pack](data[5000:]))
    expected = expected_tokens(documents)
    blocks = blocks_of(path)
    assert len(blocks) > 5
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), expected)
    if kind == "txt":  # the same parts, too
        assert [block[:3] for block in blocks] == [block[:3] for block in blocks_of(plain)]
    for i in range(1, len(blocks)):
        rest = blocks_of(path, blocks[i].start)
        assert [block[:3] for block in rest] == [block[:3] for block in blocks[i:]]
        expected_rest = expected[sum(len(block.tokens) for block in blocks[:i]) :]
        assert np.array_equal(np.concatenate([block.tokens for block in rest]), expected_rest)
    build(tmp_path / "out", path, **{"shard-tokens": 1000, "max-shards": 2})
    build(tmp_path / "out", path, **{"shard-tokens": 1000})
    assert np.array_equal(tokens_of(tmp_path / "out"), expected)


@pytest.mark.parametrize(("name", "unpack"), [("a.txt.gz", "gunzip -c"), ("b.jsonl.zst", "unzstd -c")])
def test_the_hint_for_a_packed_text_of_another_encoding_unpacks_it_first(tmp_path, name, unpack):
    """iconv cannot read what is packed; where the commands are installed, they make a readable file."""
    path = tmp_path / name
    path.write_bytes(PACK[path.suffix](b'{"text": "caf\xe9"}'))
    with pytest.raises(UserError, match="0xe9") as caught:
        blocks_of(path)
    command = caught.value.hint.removeprefix("if it is latin1, run: ").split("; else")[0]
    assert command.startswith(f"{unpack} < {path} | iconv -f latin1 -t utf-8 > ")
    if shutil.which(unpack.split()[0]) and shutil.which("iconv"):
        subprocess.run(command, shell=True, check=True)
        assert len(blocks_of(Path(shlex.split(command)[-1]))) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_hint_for_a_text_that_is_not_packed_renames_it(tmp_path, suffix):
    """Its name decides how a file is read; the renamed one is read."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b'{"text": "x"}')
    with pytest.raises(UserError, match=f"{path} is text") as caught:
        blocks_of(path)
    new = tmp_path / "a.jsonl"
    assert caught.value.hint == f"run: mv {path} {new}; then use {new}"
    path.rename(new)
    assert np.array_equal(blocks_of(new)[0].tokens, expected_tokens(["x"]))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_byte_order_marks_crlf_and_blank_lines_change_nothing(tmp_path, suffix):
    """Also where files with marks were joined; a text file has one at its start."""
    lines = [b'\xef\xbb\xbf{"text": "some words"}', b"", b'\xef\xbb\xbf{"text": "more"}', b"", b"  "]
    data = b"\r\n".join(lines)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == "jsonl.gz" else data)
    (tokens,) = (block.tokens for block in blocks_of(path))
    assert np.array_equal(tokens, expected_tokens(["some words", "more"]))


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.json", "a.json.zst"]
)
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    """As that of a compressed file of a few bytes may be; with the limit. A line within it is read."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 1000)
    monkeypatch.setattr("utils.shards.documents.SEARCH_BYTES", 100)
    monkeypatch.setattr("utils.shards.documents.MAX_LINE_BYTES", 20_000)
    for length in (19_000, 60_000):
        before = {"t": b"before \n", "j": b'["before",'}[name[2]]
        data = before + b"x" * length if name[2] == "t" else before + b'{"text": "%s"}]' % (b"x" * length)
        if "jsonl" in name:
            data = b'{"text": "before"}\n{"text": "%s"}' % (b"x" * length)
        path = tmp_path / name
        path.write_bytes(PACK.get(path.suffix, bytes)(data))
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
    """With the existing columns, the row of the null, and that of bytes that are not UTF-8."""
    path = write_parquet(tmp_path / "a.parquet", ["x", "y"])
    with pytest.raises(UserError, match=r"no column 'body' \(found id, text\)"):
        build(tmp_path / "out", path, **{"text-field": "body"})
    with pytest.raises(UserError, match=r"'id' holds int64"):
        build(tmp_path / "out", path, **{"text-field": "id"})
    path = write_parquet(tmp_path / "c.parquet", latin_1_strings())
    with pytest.raises(UserError, match="c.parquet: row 1: a text is not UTF-8"):
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
