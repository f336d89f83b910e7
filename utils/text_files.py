"""Files that should hold text: told apart from other kinds by their first bytes, decoded, divided into lines.

Every reader of text, JSON lines and result files uses what is here, so that all accept the same files (UTF-8,
with or without a byte order mark, LF or CRLF) and describe every other one alike.
"""

import codecs
import gzip
import io
import re
import shlex
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.command_line import UserError

MAX_LINE_BYTES = 256 << 20  # of a corpus: memory stays bounded, whatever a compressed file unpacks to

# How files begin, and what they are called in a message. The longer beginning stands before the shorter one.
BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",  # a checkpoint of torch.save is one, too
    b"PK\x05\x06": "an empty zip archive",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a frame to be skipped, with which pzstd begins
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Microsoft Office file",
    b"SQLite format 3\x00": "an SQLite database",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a Git LFS pointer",
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19": "a file of torch.save before PyTorch 1.6",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# What makes a usable file of a kind: {old} is its path, {new} a free one beside it, both quoted.
SOLUTIONS = {
    **dict.fromkeys(("UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32"), "iconv -f {kind} -t utf-8 < {old} > {new}"),
    "gzip": "gunzip -c < {old} > {new}",
    "bzip2": "bunzip2 -c < {old} > {new}",
    "xz": "unxz -c < {old} > {new}",
    "zstd": "unzstd -c < {old} > {new}",
    "a zip archive": "unzip {old} -d {new}",
    "a 7z archive": "7z x {old} -o{new}",
    "a tar archive": "mkdir {new} && tar -xf {old} -C {new}",
    "text with zero bytes": "tr -d '\\000' < {old} > {new}",
    "a Git LFS pointer": "get the file that it stands for: git lfs pull",
    "a NumPy array": "of token shards, give the folder",
    "HTML": "download it again: a web page was saved in its place",
}
UNPACK = {".gz": "gunzip -c", ".zst": "unzstd -c"}  # commands for what `open_unpacked` reads
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")
CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


def kind_of_bytes(data: bytes) -> str | None:
    """What a file is, by its first bytes; None for text, and for anything unknown."""
    for beginning, kind in BEGINNINGS.items():
        if data.startswith(beginning):
            return kind
    if len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 1 << 27:
        return "safetensors"  # the length of a JSON header, then the header
    if data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05":
        return "a pickle"
    if data[257:262] == b"ustar":
        return "a tar archive"
    if b"\x00" not in (head := data[:1024]):
        return None
    # UTF-16 without byte order mark: every second byte of Western text is zero, and no other one.
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if min(zeros) == 0 and max(zeros) > 0.4 * len(head):
        return "UTF-16LE" if zeros[1] else "UTF-16BE"
    rest = head.replace(b"\x00", b"")
    return "binary data" if _is_binary(rest) else "text with zero bytes"


def _is_binary(data: bytes) -> bool:
    """Whether there are more control characters than in any text, of whatever one-byte encoding."""
    return 100 * len(CONTROL_BYTES.findall(data)) > len(data)


def describe_bytes(data: bytes) -> str:
    """The name of a file's kind for messages, by its first bytes; also of text and of nothing."""
    if not data:
        return "empty"
    is_html = data.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
    return kind_of_bytes(data) or ("HTML" if is_html else "text")


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, enough for `kind_of_bytes`. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(1024)


def open_unpacked(path: Path) -> BinaryIO:
    """A file for reading, unpacked if its name ends in .gz or .zst. Raises OSError."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            what = f"cannot import pyarrow, which unpacks {path}: {error}"
            raise UserError(what, "pip install -U pyarrow, or unpack the file: unzstd") from error
        return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression="zstd"))
    return open(path, "rb")


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns what Python and pyarrow raise for a damaged file into UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}", "is the file complete? copy it again") from error


def quoted(path: Path | str) -> str:
    """A path or an argument as a shell takes it: every printed command can be pasted."""
    is_like_a_flag = isinstance(path, Path) and str(path).startswith("-")
    text = f"./{path}" if is_like_a_flag else str(path)
    # In double quotes where they suffice: easier to read, and valid on Windows as well.
    easy = "'" in text and set(text).isdisjoint('"$`\\!')
    return f'"{text}"' if easy else shlex.quote(text)


def free_name(path: Path) -> Path:
    """This path if nothing is there, else one like it: a printed command must overwrite no file."""
    while path.exists() or path.is_symlink():
        path = path.with_name(f"{path.stem}_2{path.suffix}")
    return path


def wrong_kind(path: Path, data: bytes, expected: str) -> UserError:
    """The error for a file that begins with `data` and is not `expected`; the hint solves it for its kind."""
    kind = describe_bytes(data)
    packed = path.suffix.lower() in PACKED
    new = path.with_suffix("") if packed else path.with_name(f"{path.stem}_converted{path.suffix}")
    if kind == "parquet":
        hint = "mv {old} {new}"  # its name decides how a file is read
        new = path.with_suffix(".parquet")
    elif kind == "text" and expected in ("gzip", "zstd"):
        hint = "mv {old} {new}"
    else:
        hint = SOLUTIONS.get(kind, f"give a file of {expected} instead")
    new = free_name(new)
    if "{new}" in hint:
        hint = f"run: {hint}; then use {{new}}"
    hint = hint.format(old=quoted(path), new=quoted(new), kind=kind.lower())
    return UserError(f"{path} is {kind} (expected {expected})", hint)


def encoding_hint(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    """What to do about bytes that are not UTF-8: damaged UTF-8, text of one byte a character, or no text."""
    is_packed = path.suffix.lower() in UNPACK
    around = data[max(0, error.start - (1 << 16)) : error.start + (1 << 16)]
    if _is_binary(around):
        return "this is binary data: give a text instead"
    plain = path.with_suffix("") if is_packed else path
    new = free_name(plain.with_name(f"{plain.stem}_converted{plain.suffix}"))
    source, files = "", f"-t utf-8 < {quoted(path)} > {quoted(new)}"
    if is_packed:
        source, files = f"{UNPACK[path.suffix.lower()]} < {quoted(path)} | ", f"-t utf-8 > {quoted(new)}"
    text = around.decode("utf-8", "replace")
    if sum(character > "\x7f" for character in text) > 2 * text.count("\ufffd"):
        return f"the rest is UTF-8; to leave out its damaged bytes: {source}iconv -c -f utf-8 {files}"
    # Latin-1 has control characters where Windows-1252 has quotation marks.
    encoding = "cp1252" if re.search(b"[\x80-\x9f]", around) else "latin1"
    return f"if it is {encoding}, run: {source}iconv -f {encoding} {files}; else name its encoding after -f"


def decode_text(path: Path, data: bytes, offset: int = 0) -> str:
    """The text of a file, or of a section that begins at `offset`, without byte order mark.

    Raises UserError for another kind of file, and for bytes that are not UTF-8.
    """
    if offset == 0:
        if kind_of_bytes(data[:1024]) is not None:
            raise wrong_kind(path, data[:1024], "UTF-8 text")
        if data.startswith(codecs.BOM_UTF8):
            offset = len(codecs.BOM_UTF8)
            data = data[offset:]
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"{path}: byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8"
        raise UserError(what, encoding_hint(path, data, error)) from error


def read_text(path: Path, flag: str = "--data") -> str:
    """Reads a text file. Raises UserError if it is missing, empty or not UTF-8; hints name `flag`."""
    try:
        mode = path.stat().st_mode
        special = "a folder" if stat.S_ISDIR(mode) else None
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            special = "a device"
        data = b"" if special else path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        hint = f"give {flag} a file that exists and may be read"
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", hint) from error
    if special:
        raise UserError(f"{path} is {special} (expected a text file)", f"give {flag} a text file")
    text = decode_text(path, data)
    if not text.strip():
        raise UserError(f"{path} is empty", f"give {flag} a file with text in it")
    return text


def lines_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, or of a section of it, without their ends, and their numbers, from 1.

    Blank lines at the end are left out, and byte order marks, which begin any line where files were joined.
    """
    data = data.removeprefix(codecs.BOM_UTF8).rstrip()
    for number, line in enumerate(data.split(b"\n") if data else (), 1):
        yield number, line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\r")
