"""The shard builder: the same bytes for every input format and after any interruption, clear errors."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import build_fineweb_edu_shards
from build_fineweb_edu_shards import main, parse_arguments
from tests.conftest import OFFLINE, ROOT, run
from utils.command_line import Unfinished, UserError
from utils.files import locked, sha256_of
from utils.shards.documents import Position
from utils.shards.encoder import encode_in_batches
from utils.shards.format import find_all_shards
from utils.shards.local_files import LocalFiles
from utils.shards.workers import Block, TokenizerPool, TokenQueue
from utils.tokenizer import END_OF_TEXT_ID, gpt2_encoding

SCRIPT = ROOT / "build_fineweb_edu_shards.py"
DOCUMENTS = [
    "Hello world",
    "",
    "It's  a \n\n test — naïve\n",
    "<|endoftext|> is text",
    "日本語 text\u3000\u3000x",
    "a" * 90,
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of random words, spaces and lines; deterministic."""
    draw = random.Random(seed)
    words = [
        "the ",
        "shard",
        " of",
        "\n",
        "\n\n",
        "  ",
        " token's",
        " 123",
        "é",
        " 日本",
        "!? ",
        " and",
        "\t",
    ]
    return ["".join(draw.choices(words, k=draw.randint(1, 400))) for _ in range(count)]


def expected_tokens(documents: list[str]) -> np.ndarray:
    """build-nanogpt's method: one document after the other."""
    encoding = gpt2_encoding()
    ids = [id for text in documents for id in (END_OF_TEXT_ID, *encoding.encode_ordinary(text))]
    return np.array(ids, dtype=np.uint16)


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """One document per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_parquet(path: Path, documents: list[str], row_group_size: int = 7) -> Path:
    """One document per row, and another column."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    table = pa.table({"id": list(range(len(documents))), "text": documents})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def tokens_of(folder: Path) -> np.ndarray:
    """All tokens of a folder in order."""
    return np.concatenate([np.load(path) for path in find_all_shards(folder)])


def blocks_of(path: Path, start: int = 0, num_workers: int = 1) -> list[Block]:
    """The tokens of a file from a position on, block by block."""
    with TokenizerPool(num_workers) as pool:
        return list(pool.blocks(LocalFiles([path]), "text", Position(0, start), encode_in_batches))


def build(folder: Path, *inputs: object, workers: int = 1, **flags: object) -> int:
    """Runs the script's main in this process."""
    arguments = ["--input", *map(str, inputs), "--output-dir", str(folder), "--num-workers", str(workers)]
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    return main(arguments)


# ------------------------------------------------------------------------------------------------------------
# Packing


def test_documents_are_packed_in_order_into_shards_of_ten_tokens(tmp_path, monkeypatch):
    """Cut without a gap, a document across several shards, the last shard shorter; numpy.save's bytes."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 10)  # val waits for two shards, not for one part
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert build(tmp_path / "out", source, **{"shard-tokens": 10}) == 0
    expected = expected_tokens(DOCUMENTS)
    paths = find_all_shards(tmp_path / "out")
    assert paths[0].name == "edufineweb_val_000000.npy"
    assert paths[1].name == "edufineweb_train_000001.npy"
    for number, path in enumerate(paths):
        tokens = np.load(path)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == expected[number * 10 : number * 10 + 10].tolist()
    assert len(paths) == -(-len(expected) // 10)
    np.save(tmp_path / "by_numpy.npy", expected[:10])
    assert paths[0].read_bytes() == (tmp_path / "by_numpy.npy").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "large row group", "txt"])
def test_every_format_gives_the_same_tokens_wherever_it_is_divided(tmp_path, monkeypatch, kind):
    """Parts of a few kilobytes, so that each file has many; reading can continue from any of them."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 3000)
    documents = make_documents(60)
    if kind == "txt":
        documents = [text.strip() + "\n" for text in documents if text.strip()]
        path = tmp_path / "a.txt"
        path.write_text("<|endoftext|>\n".join(documents), encoding="utf-8", newline="")
    elif kind == "jsonl.gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", documents).read_bytes()))
    elif kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", documents)
    else:
        path = write_parquet(tmp_path / "a.parquet", documents, 7 if kind == "parquet" else 1000)
        monkeypatch.setattr("utils.shards.documents.ROW_GROUP_BYTES", 1 << 20 if kind == "parquet" else 100)
    blocks = blocks_of(path)
    assert len(blocks) > 5
    expected = expected_tokens(documents)
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), expected)
    # The next run may divide the files differently, and row groups may be read by either process.
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 2500)
    for row_group_bytes in (100, 1 << 20):
        monkeypatch.setattr("utils.shards.documents.ROW_GROUP_BYTES", row_group_bytes)
        for i in range(1, len(blocks)):
            rest = np.concatenate([block.tokens for block in blocks_of(path, blocks[i].start)])
            assert np.array_equal(rest, expected[sum(len(block.tokens) for block in blocks[:i]) :])


@pytest.mark.parametrize("newline", ["\n", "\r\n", " ", "\u3000\n\u3000 "])
def test_a_long_text_file_is_one_document_wherever_it_is_cut(tmp_path, monkeypatch, newline):
    """The tokens are those of the whole text, with one <|endoftext|> at the start."""
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 100)
    monkeypatch.setattr("utils.shards.documents.SEARCH_BYTES", 5)
    text = newline.join(make_documents(30, seed=3)) + "終わり。\n\n次の段落"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    blocks = blocks_of(path)
    assert len(blocks) > 20
    assert np.array_equal(np.concatenate([b.tokens for b in blocks]), expected_tokens([text]))


def test_a_queue_can_continue_from_any_position():
    """After every take, the position leads to the next token, also with parts of another size."""
    tokens = np.arange(40, dtype=np.uint16)
    tokens[::7] = END_OF_TEXT_ID

    def blocks_from(start: int, size: int) -> Iterator[Block]:
        return (Block(0, i, min(40, i + size), tokens[i : i + size]) for i in range(start, 40, size))

    for taken in range(41):
        queue = TokenQueue(blocks_from(0, 10), Position())
        queue.fill(taken)
        assert np.array_equal(np.concatenate([[], *queue.take(taken)]), tokens[:taken])
        assert queue.documents == np.count_nonzero(tokens[:taken] == END_OF_TEXT_ID)
        position = queue.position
        rest = TokenQueue(blocks_from(position.start, 5), position, queue.documents)
        left = rest.fill(100)
        starts = taken + rest.document_starts()
        assert starts.tolist() == [i for i in range(taken, 40) if tokens[i] == END_OF_TEXT_ID]
        assert np.array_equal(np.concatenate([[], *rest.take(left)]), tokens[taken:])


def test_a_small_corpus_gives_val_its_first_documents(tmp_path):
    """Up to 1 % of the tokens, one document at least; --val-tokens sets it; a single document is cut."""
    documents = ["one two three"] * 1000
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    length = len(expected_tokens(documents[:1]))
    for name, flags, val in [
        ("a", {}, 10),
        ("b", {"val-tokens": 3 * length + 1}, 3),
        ("c", {"val-tokens": 1}, 1),
    ]:
        assert build(tmp_path / name, source, **flags) == 0
        assert [len(np.load(path)) for path in find_all_shards(tmp_path / name)] == [
            val * length,
            (1000 - val) * length,
        ]
        assert np.array_equal(tokens_of(tmp_path / name), expected_tokens(documents))
    (tmp_path / "book.txt").write_text("one two three " * 500)
    assert build(tmp_path / "d", tmp_path / "book.txt") == 0
    val, train = (len(np.load(path)) for path in find_all_shards(tmp_path / "d"))
    assert val == (val + train) // 100


# ------------------------------------------------------------------------------------------------------------
# Interruptions


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that is not hidden."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("[!.]*"))}


@pytest.mark.slow
def test_builds_killed_at_random_moments_end_with_the_same_bytes(tmp_path):
    """Builds with two processes, killed by SIGKILL until one ends; all files equal those of one process."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(12_000))
    build(tmp_path / "whole", source, **{"shard-tokens": 8000})
    command = [sys.executable, SCRIPT, "--input", source, "--shard-tokens", 8000, "--num-workers", 2]
    command = [*map(str, command), "--output-dir", str(tmp_path / "killed")]
    quiet = dict(env={**os.environ, **OFFLINE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    draw = random.Random(5)
    for num_shards in (0, 1, 9, 17, 25):  # of about 500: the build is far from its end at the last kill
        child = subprocess.Popen(command, **quiet)
        while child.poll() is None and len(find_all_shards(tmp_path / "killed")) < num_shards:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        assert child.poll() is None, "the build finished before it was killed"
        child.kill()
        child.wait()
    assert subprocess.run(command, timeout=600, **quiet).returncode == 0
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp*"))


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("call", range(1, 14))
def test_a_kill_before_or_after_any_rename_loses_nothing(tmp_path, monkeypatch, call):
    """The build dies at its n-th rename; the next run writes the same files and removes temporary ones.

    Those of the former scheme of names (`.NAME.tmp`) too, but no file of another program.
    """
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    flags = {"shard-tokens": 2000}
    build(tmp_path / "whole", source, **flags)
    real, seen = os.replace, []

    def replace(old, new):
        seen.append(new)
        if len(seen) == call:
            if call % 2:
                real(old, new)
            raise Killed
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        build(tmp_path / "killed", source, **flags)
    monkeypatch.undo()
    names = ["edufineweb_train_000009.npy.tmp", "manifest.json.tmp"]
    for name in (*names, *(f"{name}-77" for name in names), "probe.tmp-77", "probe.77.tmp"):
        (tmp_path / "killed" / f".{name}").write_bytes(b"half")
    others = [".notes.tmp", ".notes.tmp-77"]
    for name in others:
        (tmp_path / "killed" / name).write_text("of another program")
    assert build(tmp_path / "killed", source, **flags) == 0
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").glob(".*.tmp*")) == others


def test_a_complete_build_has_nothing_to_do_and_other_settings_are_refused(tmp_path, capsys):
    """Both leave every file as it is; --max-shards may be raised, and the result has the same bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out, flags = tmp_path / "out", {"shard-tokens": 2000}
    assert build(out, source, **flags, **{"max-shards": 2}) == 0
    assert len(find_all_shards(out)) == 2
    assert build(out, source, **flags, **{"max-shards": 2}) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert build(out, source, **flags, **{"max-shards": 4}) == 0
    assert build(out, source, **flags) == 0
    before = checksums(out)
    assert build(out, source, **flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = write_jsonl(tmp_path / "b.jsonl", make_documents(41))
    for inputs, changed in [([source], {"shard-tokens": 1999}), ([other], flags), ([source, other], flags)]:
        with pytest.raises(UserError, match="built with other settings"):
            build(out, *inputs, **changed)
    with pytest.raises(UserError, match=r"was built from 1 files \(a.jsonl\)"):
        main(["--output-dir", str(out)])  # without a request to the network
    assert checksums(out) == before
    build(tmp_path / "whole", source, **flags)
    assert before == checksums(tmp_path / "whole")


def test_two_builds_in_one_folder_are_refused(tmp_path):
    """While another process holds the lock; after its end the build works."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(3))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock"):
        with pytest.raises(UserError, match="another build is at work in .*out"):
            build(tmp_path / "out", source)
    assert build(tmp_path / "out", source) == 0


def test_a_lock_file_that_cannot_be_written_is_held_all_the_same(tmp_path):
    """As that of another user: two builds still exclude each other, and one alone works."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(3))
    (tmp_path / "out" / ".lock").mkdir(parents=True)  # root may write every file, but no folder
    with locked(tmp_path / "out" / ".lock"):
        with pytest.raises(UserError, match="another build is at work in .*out"):
            build(tmp_path / "out", source)
    assert build(tmp_path / "out", source) == 0


def test_a_shard_that_is_not_in_the_manifest_is_refused_or_overwritten(tmp_path):
    """A kill before the manifest is saved leaves one: the build overwrites it if it continues."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out, flags = tmp_path / "out", {"shard-tokens": 2000}
    build(out, source, **flags, **{"max-shards": 2})
    manifest = (out / "manifest.json").read_bytes()
    build(out, source, **flags, **{"max-shards": 3})
    before = checksums(out)
    (out / "manifest.json").write_bytes(manifest)
    for arguments in (["--input", str(source), "--shard-tokens", "2000", "--max-shards", "2"], ["--verify"]):
        with pytest.raises(UserError, match="edufineweb_train_000002.npy is not in manifest.json") as caught:
            main([*arguments, "--output-dir", str(out)])
        assert "run the build again" in caught.value.hint
    with open(out / "edufineweb_train_000001.npy", "ab") as damaged:
        damaged.write(b"x")
    with pytest.raises(UserError, match="1 of 2 shards are damaged: edufineweb_train_000001.npy"):
        main(["--verify", "--output-dir", str(out)])
    build(out, source, **flags, **{"max-shards": 3})
    assert checksums(out) == before


def test_a_file_system_without_locks_causes_a_warning_only(tmp_path, monkeypatch, capsys):
    """As on Lustre mounted without them."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", make_documents(5))) == 0
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_number_of_processes_out_of_all_proportion_is_refused(monkeypatch):
    """Before one is started; several for each core are accepted."""
    monkeypatch.setattr(build_fineweb_edu_shards, "num_cores", lambda: 3)
    assert parse_arguments(["--num-workers", "24"]).num_workers == 24
    with pytest.raises(UserError, match="--num-workers 25 is above 24, 8 for each core"):
        parse_arguments(["--num-workers", "25"])


def test_verify_names_damaged_shards_and_the_next_build_repairs_them(tmp_path, capsys):
    """A flipped bit, a truncated file and a missing one are found and built again, with the same bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out = tmp_path / "out"
    build(out, source, **{"shard-tokens": 2000})
    before = checksums(out)
    assert main(["--verify", "--output-dir", str(out)]) == 0
    flipped, truncated, missing, intact = find_all_shards(out)[:4]
    data = bytearray(flipped.read_bytes())
    data[1000] ^= 1
    flipped.write_bytes(data)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    missing.unlink()
    with pytest.raises(UserError, match=f"{flipped.name}, {truncated.name}, {missing.name}$"):
        main(["--verify", "--output-dir", str(out)])
    assert f"{intact.name}: ok" in capsys.readouterr().out
    flipped.unlink()
    assert build(out, source, **{"shard-tokens": 2000}) == 0
    assert checksums(out) == before


def test_a_dead_worker_ends_the_build(tmp_path, monkeypatch):
    """SIGKILL of a tokenizing process: an error that says so, and no hang."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(400))
    monkeypatch.setattr("utils.shards.documents.PART_BYTES", 10_000)
    with TokenizerPool(2) as pool:
        blocks = pool.blocks(LocalFiles([source]), "text", Position(), encode_in_batches)
        next(blocks)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(Unfinished, match="process died"):
            list(blocks)


def test_the_builder_and_its_workers_do_not_import_torch():
    """Each process would take a second and 200 MB more to start: the script imports all they need."""
    code = "import sys, build_fineweb_edu_shards; sys.exit('torch' in sys.modules)"
    assert run("-c", code).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
def test_a_full_disk_leaves_no_incomplete_file(tmp_path):
    """A limit on file sizes stands for it: exit code 1 with the free space; with room, a rerun completes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(400))
    out = tmp_path / "out"
    arguments = [SCRIPT, "--input", source, "--shard-tokens", 20_000, "--num-workers", 1, "--output-dir", out]
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run("-c", code, *arguments)
    assert result.returncode == 1, result.stderr
    assert "error: cannot write" in result.stderr and "free" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(out.glob(".*.tmp*")) and not find_all_shards(out)
    assert run(*arguments).returncode == 0
