"""Files that should hold text: told apart from other kinds by their first bytes, and decoded."""

import codecs
import shlex
from pathlib import Path

# How files begin, and what they are called in a message. The longer beginning stands before the shorter one.
BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",  # a checkpoint of torch.save is one, too
    b"PK\x05\x06": "an empty zip archive",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Microsoft Office file",
    b"SQLite format 3\x00": "an SQLite database",
    b"GGUF": "a GGUF model",
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19": "a file of torch.save before PyTorch 1.6",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


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
    return "binary data" if b"\x00" in data[:1024] else None


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, enough for `kind_of_bytes`. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(1024)


def quoted(path: Path | str) -> str:
    """A path or an argument as a shell takes it: every printed command can be pasted."""
    text = str(path)
    # In double quotes where they suffice: easier to read, and valid on Windows as well.
    easy = "'" in text and set(text).isdisjoint('"$`\\!')
    return f'"{text}"' if easy else shlex.quote(text)
