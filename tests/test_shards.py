"""The shard builder: the right bytes, whatever the input and however often it is killed; clear words else."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from build_fineweb_edu_shards import main
from tests.conftest import OFFLINE, ROOT, run
from utils.batch_encoder import BatchEncoder, agrees_with_reference
from utils.corpus import LocalFiles, Position, parts_from, read_documents
from utils.download import sha256_of
from utils.errors import Unfinished, UserError
from utils.manifest import Manifest
from utils.shard_format import find_shards
from utils.token_feed import Block, TokenQueue, blocks_from
from utils.tokenizer import gpt2_encoding

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
    """The ancestor's way: one document after the other."""
    encoding = gpt2_encoding()
    return np.array([i for text in documents for i in [50256, *encoding.encode_ordinary(text)]], np.uint16)


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_parquet(path: Path, documents: list[str], row_group_size: int = 7) -> Path:
    """One document a row, another column beside it."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    table = pa.table({"id": list(range(len(documents))), "text": documents})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def shards_of(folder: Path) -> list[Path]:
    """All shards, val first."""
    return find_shards(folder, "val") + find_shards(folder, "train")


def tokens_of(folder: Path) -> np.ndarray:
    """All tokens of a folder in order."""
    return np.concatenate([np.load(path) for path in shards_of(folder)])


def build(folder: Path, *inputs: object, workers: int = 1, **flags: object) -> int:
    """Runs the script's main in this process."""
    arguments = ["--input", *map(str, inputs), "--output-dir", str(folder), "--num-workers", str(workers)]
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    return main(arguments)


# ----------------------------------------------------------------------------------------------------------
# Ids


def test_the_fast_encoder_gives_tiktokens_ids_for_every_character():
    """Every code point of the first planes in six places, and random strings of spaces, marks and letters."""
    codes = [
        *range(0xD800),
        *range(0xE000, 0x20000),
        *range(0x20000, 0x110000, 97),
    ]  # few beyond have a meaning
    characters = [chr(code) for code in codes]  # beyond the first planes next to none has a meaning
    texts = []
    for start in range(0, len(characters), 4096):
        texts.append("".join(f"x{c}{c}y {c} \n{c}7{c}'s" for c in characters[start : start + 4096]))
    draw = random.Random(1)
    alphabet = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\x85",
        "\x1c",
        "\x1d",
        "a",
        "'ll",
        "9",
        "é",
        "-",
        "😀",
    ]
    texts += ["".join(draw.choices(alphabet, k=draw.randint(0, 30))) for _ in range(20_000)]
    assert agrees_with_reference(texts[::2]) and agrees_with_reference(texts[1::2])


def test_lone_surrogates_and_the_encoders_own_marks_are_encoded_as_tiktoken_does():
    """JSON can hold half a character, and control characters; neither may change a token elsewhere."""
    for texts in (["a \ud800  b", "c"], ["\x1c", "a \x1d\x1d b"], ["", "  ", "\n\n"], ["<|endoftext|>\n\nx"]):
        assert BatchEncoder().encode(texts).tolist() == expected_tokens(texts).tolist()
    assert len(BatchEncoder().encode([])) == 0


# ----------------------------------------------------------------------------------------------------------
# Packing


def test_packing_by_hand_at_ten_tokens_a_shard(tmp_path):
    """Documents in order, cut without a gap, a document over several shards, the last shard shorter."""
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert build(tmp_path / "out", source, **{"shard-tokens": 10}) == 0
    expected = expected_tokens(DOCUMENTS)
    paths = shards_of(tmp_path / "out")
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
def test_every_format_gives_the_same_tokens_however_it_is_cut(tmp_path, monkeypatch, kind):
    """Parts of a few hundred bytes, so that each file is cut often; from a part on, the rest is the same."""
    monkeypatch.setattr("utils.corpus.PART_BYTES", 700)
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
        monkeypatch.setattr("utils.corpus.ROW_GROUP_BYTES", 1 << 20 if kind == "parquet" else 100)
    blocks = list(blocks_from(LocalFiles([path]), "text", Position(), 1))
    assert len(blocks) > 5
    expected = expected_tokens(documents)
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), expected)
    monkeypatch.setattr("utils.corpus.PART_BYTES", 500)  # a rerun may cut otherwise
    for i in range(1, len(blocks), 1 + len(blocks) // 12):
        rest = blocks_from(LocalFiles([path]), "text", Position(0, blocks[i].start), 1)
        before = sum(len(block.tokens) for block in blocks[:i])
        assert np.array_equal(np.concatenate([block.tokens for block in rest]), expected[before:])


@pytest.mark.parametrize("newline", ["\n", "\r\n", " ", "\u3000\n\u3000 "])
def test_a_long_text_file_is_one_document_wherever_it_is_cut(tmp_path, monkeypatch, newline):
    """The tokens are those of the whole text, with one <|endoftext|> at its start."""
    monkeypatch.setattr("utils.corpus.PART_BYTES", 100)
    text = newline.join(make_documents(30, seed=3)) + "終わり。\n\n次の段落"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    blocks = list(blocks_from(LocalFiles([path]), "text", Position(), 1))
    assert len(blocks) > 20
    assert np.array_equal(np.concatenate([b.tokens for b in blocks]), expected_tokens([text]))


def test_the_queue_goes_on_from_any_position():
    """After every take the position leads back to the next token, also with parts of another size."""
    tokens = np.arange(40, dtype=np.uint16)
    tokens[::7] = 50256
    cut = lambda size: [Block(0, i, min(40, i + size), tokens[i : i + size]) for i in range(0, 40, size)]  # noqa: E731
    for taken in range(41):
        queue = TokenQueue(iter(cut(10)), Position())
        queue.fill(taken)
        assert np.array_equal(np.concatenate([[], *queue.take(taken)]), tokens[:taken])
        assert queue.documents == np.count_nonzero(tokens[:taken] == 50256)
        position = queue.position
        blocks = (b for b in cut(5) if b.start >= position.start)
        rest = TokenQueue(blocks, position, queue.documents)
        left = rest.fill(100)
        starts = taken + rest.document_starts(left)
        assert starts.tolist() == [i for i in range(taken, 40) if tokens[i] == 50256]
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
        assert [len(np.load(path)) for path in shards_of(tmp_path / name)] == [
            val * length,
            (1000 - val) * length,
        ]
        assert np.array_equal(tokens_of(tmp_path / name), expected_tokens(documents))
    (tmp_path / "book.txt").write_text("one two three " * 500)
    assert build(tmp_path / "d", tmp_path / "book.txt") == 0
    val, train = (len(np.load(path)) for path in shards_of(tmp_path / "d"))
    assert val == (val + train) // 100


# ----------------------------------------------------------------------------------------------------------
# Interrupted


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a user sees."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("[!.]*"))}


def test_spawned_workers_give_the_same_bytes_and_kills_change_nothing(tmp_path):
    """Builds of two processes, killed by SIGKILL at random moments until one ends; all files are compared."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(3000))
    build(tmp_path / "whole", source, **{"shard-tokens": 20_000})
    command = [
        SCRIPT,
        "--input",
        source,
        "--shard-tokens",
        20_000,
        "--num-workers",
        2,
        "--output-dir",
        tmp_path / "killed",
    ]
    draw, kills = random.Random(5), 0
    for attempt in range(12):
        child = subprocess.Popen(
            [sys.executable, *map(str, command)], env={**os.environ, **OFFLINE}, stderr=subprocess.DEVNULL
        )
        try:
            child.wait(timeout=30 if attempt == 11 else draw.uniform(0.3, 1.0) + 0.15 * attempt)
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    assert kills > 0
    assert child.returncode == 0
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))


class Killed(BaseException):
    """Stands for SIGKILL between two lines."""


@pytest.mark.parametrize("call", range(1, 14))
def test_a_kill_between_any_two_renames_loses_nothing(tmp_path, monkeypatch, call):
    """The build dies right before or after its n-th rename; the next run makes the same files."""
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
    (tmp_path / "killed" / ".edufineweb_train_000009.npy.tmp").write_bytes(b"half")
    assert build(tmp_path / "killed", source, **flags) == 0
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))


def test_a_complete_build_has_nothing_to_do_and_other_settings_are_refused(tmp_path, capsys):
    """Both leave every file as it is; --max-shards may grow, and ends in the same bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out, flags = tmp_path / "out", {"shard-tokens": 2000}
    assert build(out, source, **flags, **{"max-shards": 2}) == 0
    assert len(shards_of(out)) == 2
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
    assert checksums(out) == before
    build(tmp_path / "whole", source, **flags)
    assert before == checksums(tmp_path / "whole")


def test_verify_names_damaged_shards_and_the_next_build_mends_them(tmp_path, capsys):
    """A flipped byte, a cut file and a missing one are found and built again, to the same bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out = tmp_path / "out"
    build(out, source, **{"shard-tokens": 2000})
    before = checksums(out)
    assert main(["--verify", "--output-dir", str(out)]) == 0
    flipped, cut, gone, intact = shards_of(out)[:4]
    data = bytearray(flipped.read_bytes())
    data[1000] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    with pytest.raises(UserError, match=f"{flipped.name}, {cut.name}, {gone.name}$"):
        main(["--verify", "--output-dir", str(out)])
    assert f"{intact.name}: ok" in capsys.readouterr().out
    flipped.unlink()
    assert build(out, source, **{"shard-tokens": 2000}) == 0
    assert checksums(out) == before


def test_a_dead_worker_ends_the_build(tmp_path, monkeypatch):
    """kill -9 of a tokenizing process: an error that says so, within seconds, and no hang."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(400))
    monkeypatch.setattr("utils.corpus.PART_BYTES", 10_000)
    blocks = blocks_from(LocalFiles([source]), "text", Position(), 2)
    next(blocks)
    import multiprocessing

    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(Unfinished, match="process died"):
        list(blocks)


def test_workers_do_not_import_torch():
    """Each process would take a second and 200 MB more to start."""
    code = "import sys, build_fineweb_edu_shards; sys.exit('torch' in sys.modules)"
    assert run("-c", code).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on file sizes stands for it: exit 1 with the free space; with room the rerun completes."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(400))
    out = tmp_path / "out"
    arguments = [SCRIPT, "--input", source, "--shard-tokens", 20_000, "--num-workers", 1, "--output-dir", out]
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run("-c", code, *arguments)
    assert result.returncode == 1, result.stderr
    assert "error: cannot write" in result.stderr and "free" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(out.glob(".*.tmp")) and not shards_of(out)
    assert run(*arguments).returncode == 0


# ----------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x", "id": 1}\n', r":2: no text .*'text' \(found body, id\)"),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1: .*NoneType"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl:1: list \(expected an object\)"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl:1: not JSON: 'utf-8'"),
        ("a.jsonl", b"", r"a.jsonl is empty"),
        ("a.jsonl", b"\n \n", r"no documents"),
        ("a.txt", b"caf\xe9", r"byte 0xe9 at offset 3 is not UTF-8"),
        ("a.txt", b" \n\n", r"no documents"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"x": 1}'), r"a.jsonl.gz:2: no text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-9], r"cannot read .*a.jsonl.gz"),
        ("a.parquet", b"PAR1 not really", r"is not a parquet file"),
        ("a.doc", b"x", r"is no corpus file \(expected .parquet"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_place(tmp_path, name, content, message):
    """File, line or byte, what was expected and what was found."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", tmp_path / name)


def test_bad_lines_are_counted_across_parts(tmp_path, monkeypatch):
    """The line number is that of the file, not of the part, also from a worker process."""
    monkeypatch.setattr("utils.corpus.PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n' * 50 + "{\n")
    with pytest.raises(UserError, match="a.jsonl:51: not JSON"):
        list(blocks_from(LocalFiles([path]), "text", Position(), 2))


def test_a_missing_column_and_a_null_are_named(tmp_path):
    """With the columns that are there, and the row of the null."""
    path = write_parquet(tmp_path / "a.parquet", ["x", "y"])
    with pytest.raises(UserError, match=r"no column 'body' \(found id, text\)"):
        build(tmp_path / "out", path, **{"text-field": "body"})
    with pytest.raises(UserError, match=r"'id' holds int64"):
        build(tmp_path / "out", path, **{"text-field": "id"})
    path = write_parquet(tmp_path / "b.parquet", ["x"] * 9 + [None])
    part = list(parts_from(LocalFiles([path]), "text", Position()))[-1]
    with pytest.raises(UserError, match="row 9"):
        read_documents(part, "text")


def test_globs_folders_and_folders_that_cannot_be_used(tmp_path):
    """Inputs in the order given, sorted within; no such file, no such folder and foreign shards end in 2."""
    (tmp_path / "in").mkdir()
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / "in" / name).write_text(f"text of {name}")
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


# ----------------------------------------------------------------------------------------------------------
# The hub, on loopback


class Hub(http.server.BaseHTTPRequestHandler):
    """The few addresses of the hub that a build asks for. `trouble`: what to do wrong, request by request."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    trouble: list[str] = []
    requests: list[str] = []
    commit = "a" * 40

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        trouble = self.trouble.pop(0) if self.trouble else ""
        if trouble == "drop":
            self.close_connection = True
            self.connection.close()
        elif trouble:
            self.answer(int(trouble), b"trouble")
        elif self.path.startswith("/api/datasets/some/data"):
            self.answer(200, json.dumps(self.info()).encode(), Content_Type="application/json")
        elif self.path.startswith(f"/datasets/some/data/resolve/{self.commit}/"):
            name = self.path.split(self.commit + "/")[1]
            self.answer(200, self.files[name], ETag=f'"{name}"', X_Repo_Commit=self.commit)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.files.items()
        ]
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def info(self) -> dict:
        configs = [{"config_name": "small", "data_files": [{"split": "train", "path": "sample/S/*"}]}]
        return {
            "id": "some/data",
            "sha": self.commit,
            "siblings": [{"rfilename": name} for name in [*self.files, "README.md"]],
            "cardData": {"configs": configs},
        }

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A data set of three files, one outside the subset, and a function that builds from it in a child."""
    pytest.importorskip("huggingface_hub")
    documents = make_documents(90)
    Hub.trouble, Hub.requests, Hub.files = [], [], {}
    for name, start in (("sample/S/001.parquet", 30), ("sample/S/000.parquet", 0), ("other/000.parquet", 60)):
        Hub.files[name] = write_parquet(tmp_path / "f.parquet", documents[start : start + 30]).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Waits are cut short in the child: the client's own add up to half a minute.
    code = "import sys, time; real = time.sleep; time.sleep = lambda s: real(min(s, 0.01)); "
    code += "import build_fineweb_edu_shards as b; sys.exit(b.run_script(b.main))"

    def start(*flags: object, **environment: str) -> subprocess.CompletedProcess:
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        common = ["--dataset", "some/data", "--subset", "small", "--shard-tokens", 2000, "--num-workers", 1]
        return run("-c", code, *common, "--output-dir", tmp_path / "out", *flags, **settings)

    yield start, documents[:60], tmp_path / "out"
    server.shutdown()
    server.server_close()


def test_the_hubs_files_come_in_order_through_hiccups(hub):
    """429, 503 and dropped connections are waited out; the revision is pinned; the rerun asks for nothing."""
    start, documents, out = hub
    Hub.trouble = ["429", "", "503", "drop", ""]
    result = start()
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens_of(out), expected_tokens(documents))
    source = Manifest.load(out).settings["source"]
    assert source["revision"] == Hub.commit
    assert [name for name, _ in source["files"]] == ["sample/S/000.parquet", "sample/S/001.parquet"]
    Hub.requests.clear()
    assert "nothing to do" in start().stdout
    assert not Hub.requests


def test_a_lasting_failure_keeps_progress_and_the_rerun_completes(hub):
    """The second file fails for good: exit 1 and what to do; offline, what is in the cache is used."""
    start, documents, out = hub
    assert start("--max-shards", 2).returncode == 0
    progress = checksums(out)
    Hub.trouble = ["503"] * 500
    result = start()
    assert result.returncode == 1, result.stderr
    assert "error: the hub keeps failing" in result.stderr and "run the same command again" in result.stderr
    assert progress.items() <= {**checksums(out), "manifest.json": progress["manifest.json"]}.items()
    Hub.trouble = []
    result = start()
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens_of(out), expected_tokens(documents))


def test_without_a_network_or_a_data_set_the_error_says_so(hub):
    """Offline and dead connections: 2 with a hint; so do a data set or subset that is not there."""
    start, _, out = hub
    started = time.perf_counter()
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = start(**environment)
        assert result.returncode == 2, result.stderr
        assert "no network" in result.stderr and "hint: run once where" in result.stderr
    assert time.perf_counter() - started < 60
    assert "cannot get some/none" in start("--dataset", "some/none").stderr
    assert "its subsets: small" in start("--subset", "large").stderr
    assert not shards_of(out)
