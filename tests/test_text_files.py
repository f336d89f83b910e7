"""Files that should hold text: every kind is named, its hint works as printed, lines are always the same."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from utils.command_line import UserError
from utils.text_files import decode_text, describe_bytes, free_name, kind_of_bytes, lines_of, read_text

TEXT = "Être, ou ne pas être: c’est la question.\n" * 40
NOISE = random.Random(0).randbytes(4000)
WESTERN = TEXT.replace("’", "'")


def tar_of(name: str, data: bytes) -> bytes:
    """A tar archive of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(name: str, data: bytes) -> bytes:
    """A zip archive of one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (TEXT.encode("utf-16"), "UTF-16"),
        (WESTERN.encode("utf-16-le"), "UTF-16LE"),
        (WESTERN.encode("utf-16-be"), "UTF-16BE"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (lzma.compress(b"x"), "xz"),
        (bz2.compress(b"x"), "bzip2"),
        (zip_of("a", b"x"), "a zip archive"),
        (tar_of("a", b"x"), "a tar archive"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"PAR1\x15\x04", "parquet"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (pickle.dumps([1, 2]), "a pickle"),
        ((40).to_bytes(8, "little") + b'{"a": 1}', "safetensors"),
        (bytes(range(256)), "binary data"),
        (b"a line\x00\n" * 9, "text with zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
        (b"", "empty"),
        (TEXT.encode(), "text"),
        (TEXT.encode("latin-1", "replace"), "text"),
        ("\ufeff日本語".encode(), "text"),
    ],
)
def test_a_file_is_told_by_its_first_bytes(data, kind):
    """Of all kinds that are given by mistake; a text of any one-byte encoding, and HTML, may be meant."""
    assert describe_bytes(data[:1024]) == kind
    assert kind_of_bytes(data[:1024]) == (None if kind in ("text", "HTML", "empty") else kind)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", TEXT.encode("utf-16"), TEXT),
        ("a b's.txt", WESTERN.encode("utf-16-le"), WESTERN),
        ("-a.txt", TEXT.encode("utf-32"), TEXT),
        ("a.txt", WESTERN.encode("latin-1"), WESTERN),
        ("a.txt", ("“Oui”\n" * 9).encode("cp1252"), "“Oui”\n" * 9),
        ("a.txt", TEXT.encode() + b"\xff" + TEXT.encode(), TEXT + TEXT),
        ("a.txt", b"one\x00\ntwo\x00\n", "one\ntwo\n"),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0), TEXT),
        ("a", gzip.compress(TEXT.encode(), mtime=0), TEXT),
        ("a.xz", lzma.compress(TEXT.encode()), TEXT),
        ("a.bz2", bz2.compress(TEXT.encode()), TEXT),
        ("a.tar", tar_of("in.txt", TEXT.encode()), TEXT),
        ("-a.zip", zip_of("in.txt", TEXT.encode()), TEXT),
    ],
)
def test_a_hint_is_true_when_followed(tmp_path, monkeypatch, name, data, expected):
    """The printed command, in a shell, makes the text, beside the file and over no other one."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    for taken in ("a", "a_converted.txt"):
        if taken != name:
            Path(taken).write_text("untouched")
    with pytest.raises(UserError) as caught:
        read_text(Path(name))
    command = re.search(r"((gunzip|unxz|bunzip2|iconv|tr|unzip|mkdir) [^;]*)", caught.value.hint)[1]
    if not all(shutil.which(word) for word in re.findall("^[a-z0-9]+|(?<=&& )[a-z]+", command)):
        pytest.skip(f"not on this machine: {command}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    subprocess.run(["bash", "-c", command], check=" -c " not in command, capture_output=True)
    (new,) = (path for path in tmp_path.iterdir() if path not in before)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert read_text(new / "in.txt" if new.is_dir() else new) == expected


@pytest.mark.parametrize(
    "data",
    [NOISE, b"abc " * 400 + NOISE, b"\x89PNG" + bytes(99)],
    ids=["noise", "noise after text", "picture"],
)
def test_binary_data_is_never_sent_through_iconv(tmp_path, data):
    """Whatever its first bytes: the result would be noise that is valid UTF-8."""
    path = tmp_path / "a.txt"
    path.write_bytes(data.replace(b"\x00", b"\x01"))
    with pytest.raises(UserError) as caught:
        read_text(path)
    assert "iconv" not in caught.value.hint and "tr " not in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is empty", "with text in it"),
        (b"  \n ", "is empty", "with text in it"),
        (b"\xef\xbb\xbf", "is empty", "with text in it"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8", "iconv -f latin1 -t utf-8"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at offset 6 is not UTF-8", "iconv -f latin1 -t utf-8"),
        (b"\x93NUMPY\x01", r"is a NumPy array \(expected UTF-8 text\)", "give the folder"),
        (b"PAR1" * 4, r"is parquet \(expected", "input.parquet"),
        (None, "cannot read .*No such file", "give --data a file that exists"),
    ],
)
def test_an_unreadable_text_file_is_an_error(tmp_path, content, message, hint):
    """Empty, of another kind, not UTF-8 or missing: one error each, with a hint."""
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(path)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("path", "message"), [("a\0b", "null byte"), ("/dev/zero", "a device"), ("/", "a folder")]
)
def test_what_is_no_file_is_an_error(path, message):
    """A name that no file can have; a device, which may never end; a folder."""
    with pytest.raises(UserError, match=message) as caught:
        read_text(Path(path), "-p FILE:")
    assert caught.value.hint.startswith("give -p FILE: a")


def test_a_pipe_can_be_read(tmp_path):
    """As the shell's `<(zcat a.gz)` is one."""
    reader, writer = os.pipe()
    os.write(writer, TEXT.encode())
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == TEXT
    os.close(reader)


def test_a_byte_order_mark_is_removed_at_the_start_of_a_file_only(tmp_path):
    """Some editors write one there; elsewhere it is a character of the text."""
    path = tmp_path / "input.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(path) == "hello"
    assert decode_text(path, b"\xef\xbb\xbfhello", offset=4) == "\ufeffhello"


def test_lines_are_the_same_for_every_reader():
    """Ends, blank lines at the end and byte order marks vanish, nothing else; numbers count blank lines."""
    expected = [(1, b"a"), (2, b""), (3, b"b \x0c\xe2\x80\xa8c")]
    for data in (b"a\n\nb \x0c\xe2\x80\xa8c", b"\xef\xbb\xbfa\r\n\r\nb \x0c\xe2\x80\xa8c\r\n \n\n"):
        assert list(lines_of(data)) == expected
    assert list(lines_of(b"a\n\xef\xbb\xbfb")) == [(1, b"a"), (2, b"b")]
    assert list(lines_of(b"")) == list(lines_of(b"\xef\xbb\xbf\r\n")) == []


def test_a_free_name_is_not_that_of_a_file_or_of_a_broken_link(tmp_path):
    """A printed command must overwrite nothing."""
    (tmp_path / "a.txt").touch()
    (tmp_path / "a_2.txt").symlink_to("nothing")
    assert free_name(tmp_path / "a.txt") == tmp_path / "a_2_2.txt"
