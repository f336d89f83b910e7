"""Rows without text: a build stops at the first, or skips and counts them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.shards.test_build import build, checksums, expected_tokens, make_documents, tokens_of, write_jsonl
from utils.command_line import UserError
from utils.shards.format import find_all_shards
from utils.shards.manifest import Manifest

GOOD = [text or "x" for text in make_documents(100, seed=9)]
BAD_LINES = [
    b'{"text": null}',
    b'{"body": "x"}',
    b'{"text": 7}',
    b'["x"]',
    b'{"text": "caf\xe9"}',
    b"7",
    b"{,}",
]
END_ROWS = 300  # bad ones after the last document: some parts hold nothing else
BAD_VALUES = [None, b"caf\xe9"]


def write_rows(path: Path, groups: list[int]) -> Path:
    """The good documents, with as many bad rows before each as `groups` says, and END_ROWS at the end."""
    draw = random.Random(8)
    is_parquet = path.suffix == ".parquet"
    good = [text if is_parquet else json.dumps({"text": text}) for text in GOOD]
    rows = []
    for row, count in zip([*good, None], [*groups, END_ROWS]):
        rows += draw.choices(BAD_VALUES if is_parquet else BAD_LINES, k=count)
        rows += [row.encode()] if row is not None else []
    if is_parquet:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"text": pa.array(rows, pa.binary()).view(pa.string())})
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",".join(rows) + b"]")
    else:
        path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(b"\n".join(rows)))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, monkeypatch, capsys, kind):
    """The shards are those of the other rows; each record counts what is skipped up to its end.

    The same counts with small parts, some of which have no document, and in any number of builds.
    """
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 1500)
    draw = random.Random(4)
    groups = [draw.choice((0, 0, 1, 2, 3)) for _ in GOOD]
    path = write_rows(tmp_path / f"a.{kind}", groups)
    flags = {"shard-tokens": 2500, "bad-rows": "skip"}
    with pytest.raises(UserError, match=f"a.{kind}"):
        build(tmp_path / "stopped", path, **{**flags, "bad-rows": "stop"})
    build(tmp_path / "whole", path, **flags)
    total = sum(groups) + END_ROWS
    assert f"{total} rows without text skipped" in capsys.readouterr().out
    assert np.array_equal(tokens_of(tmp_path / "whole"), expected_tokens(GOOD))
    manifest = Manifest.load(tmp_path / "whole")
    assert manifest.skipped_rows == total and manifest.settings["bad_rows"] == "skip"
    counts = [record["skipped_rows"] for record in manifest.shards]
    before = np.cumsum(groups)  # bad rows before each document's first token
    for record, count in zip(manifest.shards, counts):
        assert before[record["documents"] - 1] <= count <= [*before, total][record["documents"]]
    for shards in range(1, len(counts), 2):
        build(tmp_path / "pieces", path, **flags, **{"max-shards": shards})
        assert Manifest.load(tmp_path / "pieces").skipped_rows == counts[shards - 1]
    build(tmp_path / "pieces", path, workers=2 if kind == "jsonl" else 1, **flags)
    assert checksums(tmp_path / "pieces") == checksums(tmp_path / "whole")
    capsys.readouterr()
    build(tmp_path / "pieces", path, **flags)
    assert f"nothing to do: {len(counts)} shards" in (output := capsys.readouterr().out)
    assert f"{total} rows without text skipped" in output
    (tmp_path / "pieces" / "edufineweb_train_000002.npy").unlink()
    build(tmp_path / "pieces", path, **flags)
    assert checksums(tmp_path / "pieces") == checksums(tmp_path / "whole")


def test_a_build_that_stopped_at_a_bad_row_continues_without_it(tmp_path):
    """As its hint says: what it has written has none. The other way round would leave unnamed gaps."""
    lines = [json.dumps({"text": text}) for text in GOOD]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:80], "{", *lines[80:]]))
    out, flags = tmp_path / "out", {"shard-tokens": 1500}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.shards.documents.PART_BYTES", 1500)
        with pytest.raises(UserError, match="a.jsonl:81: not JSON") as caught:
            build(out, path, **flags)
        assert "build shards with --bad-rows skip" in caught.value.hint
        assert len(find_all_shards(out)) > 3
        build(out, path, **flags, **{"bad-rows": "skip"})
        build(tmp_path / "whole", path, **flags, **{"bad-rows": "skip"})
    assert checksums(out) == checksums(tmp_path / "whole")
    with pytest.raises(UserError, match="built with other settings: bad_rows skip there, stop here"):
        build(out, path, **flags)


def test_nothing_but_bad_rows_is_an_error_that_counts_them(tmp_path):
    """And what is no row is never skipped: a text that is not UTF-8, an array that does not end."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BAD_LINES))
    with pytest.raises(UserError, match=rf"contains no documents \({len(BAD_LINES)} rows without text\)"):
        build(tmp_path / "out", tmp_path / "a.jsonl", **{"bad-rows": "skip"})
    for name, content in (("a.txt", b"caf\xe9"), ("a.json", b'["x", ')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not UTF-8|has no end"):
            build(tmp_path / "out", tmp_path / name, **{"bad-rows": "skip"})


def test_a_tokenizer_is_trained_on_the_rows_that_have_a_text(tmp_path):
    """Rows without text are skipped there as well, and counted with its own end-of-text token."""
    path = write_rows(tmp_path / "a.jsonl", [1] * len(GOOD))
    flags = {"shard-tokens": 3000, "bad-rows": "skip", "tokenizer": "bpe:300"}
    build(tmp_path / "bad", path, **flags)
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    build(tmp_path / "good", tmp_path / "good.jsonl", **flags)
    assert np.array_equal(tokens_of(tmp_path / "bad"), tokens_of(tmp_path / "good"))
    for record in Manifest.load(tmp_path / "bad").shards:
        assert record["documents"] <= record["skipped_rows"] <= record["documents"] + END_ROWS
