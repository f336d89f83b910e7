"""HellaSwag's files: found or downloaded once, complete or an error; no malformed row is skipped."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from eval_hellaswag import iter_examples
from tests.conftest import ROOT
from tests.test_eval_hellaswag import FIXTURE, FIXTURES, HELLO
from utils.command_line import UserError
from utils.files import temporary_name
from utils.hellaswag import dataset
from utils.hellaswag.dataset import choose_directory, find_or_download, read_rows

MALFORMED = {
    "not JSON": "{broken",
    "a blank line": "",
    "not an object": "[1, 2]",
    "nested too deeply": "[" * 200_000,
    "no label": json.dumps({key: value for key, value in HELLO.items() if key != "label"}),
    "no context": json.dumps({key: value for key, value in HELLO.items() if key != "ctx"}),
    "three endings": json.dumps(dict(HELLO, endings=["a", "b", "c"])),
    "five endings": json.dumps(dict(HELLO, endings=["a", "b", "c", "d", "e"])),
    "an empty ending": json.dumps(dict(HELLO, endings=["a", "", "c", "d"])),
    "a blank ending": json.dumps(dict(HELLO, endings=["a", "b", " \t", "d"])),
    "endings that are not a list": json.dumps(dict(HELLO, endings=4)),
    "an ending that is not a string": json.dumps(dict(HELLO, endings=["a", "b", 3, "d"])),
    "an empty context": json.dumps(dict(HELLO, ctx=" ")),
    "a label out of range": json.dumps(dict(HELLO, label=4)),
    "an empty label": json.dumps(dict(HELLO, label="")),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_row_is_an_error_with_file_and_line(fault, tmp_path):
    """Whatever is wrong with a row, the error names file and line; it is never skipped."""
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join([json.dumps(HELLO), MALFORMED[fault], json.dumps(HELLO)]), encoding="utf-8")
    with pytest.raises(UserError, match=r"hellaswag_val\.jsonl:2: "):
        read_rows(path, "val")


@pytest.mark.parametrize("fault", ["no activity", "brackets only"])
def test_rows_without_text_for_the_harness_are_errors_in_its_style_only(fault, tmp_path):
    """A key that only lm-eval style needs, or an ending that its cleaning empties: file, line and hint."""
    harness_row = dict(HELLO, activity_label="Talk", ctx_a="Hello, I'm a")
    bad = HELLO if fault == "no activity" else dict(harness_row, endings=["a", "[step]", "c", "d"])
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps(harness_row) + "\n" + json.dumps(bad), encoding="utf-8")
    assert len(read_rows(path, "val")) == 2
    with pytest.raises(UserError, match=r"hellaswag_val\.jsonl:2: .*--style completion"):
        read_rows(path, "val", for_harness=True)


def test_invalid_utf8_and_an_empty_file_are_errors(tmp_path):
    """Neither ends in a traceback."""
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_bytes(json.dumps(HELLO).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=r":2: .*utf-8"):
        read_rows(path, "val")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_rows(path, "val")


@pytest.mark.parametrize(("before", "end"), [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"", b"\n\n \r\n")])
def test_byte_order_marks_crlf_and_blank_last_lines_are_accepted(tmp_path, before, end):
    """As by every other reader of lines; the rows are the same."""
    path = tmp_path / "hellaswag_val.jsonl"
    lines = FIXTURE.read_bytes().splitlines()
    path.write_bytes(before + (b"\r\n" if end == b"\r\n" else b"\n").join(lines) + end)
    assert read_rows(path, "val") == read_rows(FIXTURE, "val")


@pytest.mark.parametrize(
    ("data", "kind"), [("{}".encode("utf-16"), "UTF-16"), (b"PK\x03\x04", "a zip archive")]
)
def test_another_kind_of_file_is_named(tmp_path, data, kind):
    """Instead of a wrong byte in its first line."""
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"is {kind} \(expected JSON lines\)"):
        read_rows(path, "val")


def test_the_folder_is_the_flag_else_the_variable_else_that_of_the_repository(tmp_path, monkeypatch):
    """The flag overrides HELLASWAG_DIR; an empty variable, which names no folder, is an error."""
    monkeypatch.setenv("HELLASWAG_DIR", str(FIXTURES))
    assert choose_directory(tmp_path) == tmp_path
    assert choose_directory(None) == FIXTURES
    monkeypatch.delenv("HELLASWAG_DIR")
    assert choose_directory(None) == ROOT / "hellaswag"
    monkeypatch.setenv("HELLASWAG_DIR", "")
    assert choose_directory(tmp_path) == tmp_path
    with pytest.raises(UserError, match="environment variable HELLASWAG_DIR is empty"):
        choose_directory(None)


def test_an_existing_file_is_used_without_a_download(monkeypatch, capsys):
    """Seven rows instead of 10,042, and no network: used, with one line that states rows and checksum."""
    monkeypatch.setenv("HELLASWAG_DIR", str(FIXTURES))
    rows = list(iter_examples("val"))
    assert [row["label"] for row in rows] == [2, 0, 1, 3, 0, 1, 2]  # one of them is "0" in the file
    output = capsys.readouterr().out
    digest = hashlib.sha256(FIXTURE.read_bytes()).hexdigest()
    assert output.count("\n") == 1 and "7 val examples" in output and digest in output
    assert "not the published file" in output


# ------------------------------------------------------------------------------------------------------------
# Downloads


class Server:
    """An HTTP server on this machine; `answers` are sent one after the other: bytes, or a status."""

    def __init__(self, *answers, delay_seconds: float = 0):
        self.requests: list[str] = []
        remaining = list(answers)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                time.sleep(delay_seconds)
                answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                self.send_response(200 if isinstance(answer, bytes) else answer)
                self.end_headers()  # no Content-Length: a short body looks complete
                self.wfile.write(answer if isinstance(answer, bytes) else b"<html>sorry</html>")

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.urls = tuple(f"http://127.0.0.1:{self.http.server_port}/{name}/" for name in ("first", "second"))


@pytest.fixture
def serve(monkeypatch):
    """Makes downloads use a server with the given answers, and the fixture the published file."""
    servers = []

    def start(*answers, **options) -> Server:
        servers.append(Server(*answers, **options))
        data = FIXTURE.read_bytes()
        monkeypatch.setattr(dataset, "BASE_URLS", servers[-1].urls)
        monkeypatch.setitem(dataset.PUBLISHED_SHA256, "val", hashlib.sha256(data).hexdigest())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def test_a_missing_file_is_downloaded_once(serve, tmp_path):
    """One request, the right bytes under the right name; what a killed process left is gone.

    The second call finds the file.
    """
    server = serve(FIXTURE.read_bytes())
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    leftover = temporary_name(folder / "hellaswag_val.jsonl").with_suffix(".tmp-123")
    leftover.write_bytes(b"of a killed process")
    for _ in range(2):
        path = find_or_download(folder, "val")
        assert path.read_bytes() == FIXTURE.read_bytes()
    assert server.requests == ["/first/hellaswag_val.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "hellaswag_val.jsonl",
        "hellaswag_val.jsonl.lock",
    ]


def test_of_several_processes_one_downloads_while_the_others_wait(serve, tmp_path):
    """Four callers, a slow server: one request, and all four get the complete file.

    Threads suffice: a lock belongs to the open file, and each caller opens its own.
    """
    server = serve(FIXTURE.read_bytes(), delay_seconds=0.3)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: find_or_download(tmp_path, "val"), range(4)))
    assert all(path.read_bytes() == FIXTURE.read_bytes() for path in paths)
    assert len(server.requests) == 1


@pytest.mark.parametrize("bad", [404, 429, b"<html>200, but sorry</html>", "truncated", "one byte changed"])
def test_after_a_bad_download_the_second_url_is_tried(serve, tmp_path, bad):
    """Error pages, a body cut short, a wrong byte: the checksum detects each of them."""
    data = FIXTURE.read_bytes()
    bad = {"truncated": data[:-100], "one byte changed": data[:-9] + b"X" + data[-8:]}.get(bad, bad)
    server = serve(bad, data)
    assert find_or_download(tmp_path, "val").read_bytes() == data
    assert server.requests == ["/first/hellaswag_val.jsonl", "/second/hellaswag_val.jsonl"]


@pytest.mark.parametrize("bad", [404, b"half"])
def test_two_bad_downloads_are_an_error_that_says_where_to_put_the_file(serve, tmp_path, bad):
    """Exactly two tries, nothing left that looks like data; the hint names folder, flag and variable."""
    server = serve(bad)
    with pytest.raises(UserError, match="cannot download hellaswag_val.jsonl") as caught:
        find_or_download(tmp_path, "val")
    assert len(server.requests) == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert all(word in caught.value.hint for word in (str(tmp_path), "--hellaswag-dir", "HELLASWAG_DIR"))
