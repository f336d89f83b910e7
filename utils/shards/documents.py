"""The text files of a corpus, and how each is cut into parts that processes can read on their own.

What a document is:
    .parquet            a row; its text is the column `--text-field`
    .jsonl, .jsonl.gz   a line that is not blank; its text is the field of that name
    .txt                the whole file, or what lies between lines that read <|endoftext|>, unless blank

A part is a few megabytes: rows of parquet, lines of jsonl, or a stretch of a text file that starts at white
space behind a word, where GPT-2's tokenizer always parts the text, so that the tokens are those of the whole
document. A position in a file counts rows of parquet, bytes of .jsonl and .txt, lines of .jsonl.gz.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

from utils.errors import UserError

PART_BYTES = 4 << 20  # text in a part: large enough to hide the cost of handing it over, small in memory
ROW_GROUP_BYTES = 32 << 20  # a larger row group is read by one process, which hands out its rows
PROBE_BYTES = 1 << 16  # of either end of a file, for its fingerprint

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".txt": "text"}
# A byte that is no white space, before one that is. A '>' might end the separator line, so it does not count.
SAFE_CUT = re.compile(rb"(?:[!-=?-~]|[\xe4-\xe9][\x80-\xbf]{2}|\xe3\x80[\x81-\xbf])(?=[ \t\r\n])")
SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)


class Position(NamedTuple):
    """Where the next token of a corpus comes from: file, position in it, tokens to leave out after that."""

    file: int = 0
    start: int = 0
    skip: int = 0


class Part(NamedTuple):
    """A stretch of one file.

    start, stop: positions in the file.
    data: its content where only the parent process can read on from here, else None.
    """

    file: int
    path: Path
    kind: str
    start: int
    stop: int
    data: bytes | None = None


class LocalFiles:
    """Files on this machine's disk.

    Args:
        paths: in the order of the documents.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.kinds = [kind_of(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.paths[index]

    def describe(self) -> dict:
        """What identifies the input, as plain values: other files may not continue a build."""
        return {"kind": "files", "files": [_fingerprint(path) for path in self.paths]}


def kind_of(path: Path) -> str:
    """Which sort of file this is. Raises UserError for one that cannot be read as documents."""
    for suffix, kind in KINDS.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise UserError(f"{path} is no corpus file (expected {', '.join(KINDS)})", "convert it or leave it out")


def find_files(arguments: list[str]) -> list[Path]:
    """The files that `--input` names: files, globs, or folders, in the order given, sorted within each.

    Raises UserError for a name that leads nowhere and for empty files.
    """
    found: dict[Path, Path] = {}  # resolved -> as given; a file named twice counts once
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = [
                file
                for file in sorted(path.rglob("*"))
                if file.name.lower().endswith(tuple(KINDS))
                and not any(name.startswith(".") for name in file.relative_to(path).parts)
            ]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise UserError(
                f"--input {argument}: no such file", f"give files, globs or folders: {', '.join(KINDS)}"
            )
        for match in matches:
            found.setdefault(match.resolve(), match)
    for path in found.values():
        kind_of(path)
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)", "leave it out of --input")
    return list(found.values())


def _fingerprint(path: Path) -> list:
    """Name, bytes, and SHA-256 of both ends: enough to notice another file without reading all of it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        digest.update(file.read(PROBE_BYTES))
    return [path.name, size, digest.hexdigest()]


def parts_from(source, text_field: str, position: Position) -> Iterator[Part]:
    """The parts of a corpus in order, from the one that starts at `position` on.

    Args:
        source: LocalFiles, or HubFiles, which downloads a file when its turn comes.
        text_field: column of parquet files.

    Raises:
        UserError: a damaged file; a parquet file without that column.
    """
    for index in range(position.file, len(source)):
        path, kind = source.path(index), source.kinds[index]
        start = position.start if index == position.file else 0
        for part in _parts_of_file(path, kind, text_field, start):
            yield part._replace(file=index)


def _parts_of_file(path: Path, kind: str, text_field: str, start: int) -> Iterator[Part]:
    try:
        if kind == "parquet":
            yield from _parquet_parts(path, text_field, start)
        elif kind == "jsonl.gz":
            yield from _gzip_parts(path, start)
        else:
            find_cut = _after_line if kind == "jsonl" else _at_safe_cut
            size = path.stat().st_size
            with open(path, "rb") as file:
                while start < size:
                    stop = min(find_cut(file, start + PART_BYTES), size)
                    yield Part(0, path, kind, start, stop)
                    start = stop
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}", "is the file whole? copy it once more") from error


def _after_line(file, target: int) -> int:
    """The first position after `target` - 1 that follows a newline, or the end of the file."""
    file.seek(target - 1)
    file.readline()
    return file.tell()


def _at_safe_cut(file, target: int) -> int:
    """The first position after `target` where a text may be cut without changing a token, or the end."""
    file.seek(target)
    window = b""
    while True:
        more = file.read(PROBE_BYTES)
        window = window[-3:] + more  # a match may lie across two reads
        match = SAFE_CUT.search(window)
        if match:
            return file.tell() - len(window) + match.end()
        if not more:
            return file.tell()


def _gzip_parts(path: Path, start: int) -> Iterator[Part]:
    """Lines of a compressed file. Only from its beginning can it be read, so the parent does so."""
    line = 0
    with gzip.open(path, "rb") as file:
        while True:
            data = file.read(PART_BYTES)
            if not data:
                return
            data += file.readline()
            stop = line + data.count(b"\n") + (not data.endswith(b"\n"))
            if line < start < stop:
                data = data.split(b"\n", start - line)[-1]
            if stop > start:
                yield Part(0, path, "jsonl.gz", max(line, start), stop, data)
            line = stop


def _parquet_parts(path: Path, text_field: str, start: int) -> Iterator[Part]:
    """Row groups: several in a part if they are small, one in several parts if it is large."""
    file = open_parquet(path, text_field)
    column = [file.schema.column(i).path for i in range(len(file.schema))].index(text_field)
    first_row = pending_start = start
    pending_bytes = row = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        next_row = row + metadata.num_rows
        size = metadata.column(column).total_uncompressed_size
        if next_row > first_row:
            large = size > ROW_GROUP_BYTES or row < first_row  # or the position is inside the group
            if pending_bytes and (large or pending_bytes + size > PART_BYTES):
                yield Part(0, path, "parquet", pending_start, row)
                pending_bytes = 0
            if large:
                rows = max(1, metadata.num_rows * PART_BYTES // max(1, size))
                yield from _row_group_parts(path, text_field, group, row, first_row, rows)
                pending_start = next_row
            else:
                pending_start = pending_start if pending_bytes else row
                pending_bytes += max(1, size)
        row = next_row
    if pending_bytes:
        yield Part(0, path, "parquet", pending_start, row)


def _row_group_parts(
    path: Path, text_field: str, group: int, row: int, first_row: int, rows: int
) -> Iterator[Part]:
    import pyarrow as pa

    for batch in open_parquet(path, text_field).iter_batches(rows, row_groups=[group], columns=[text_field]):
        stop = row + batch.num_rows
        if stop > first_row:
            batch = batch.slice(max(0, first_row - row))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Part(0, path, "parquet", stop - batch.num_rows, stop, sink.getvalue().to_pybytes())
        row = stop


def open_parquet(path: Path, text_field: str):
    """pyarrow's ParquetFile. Raises UserError if it is none or lacks the column."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"pyarrow cannot be used: {error}", "pip install -U pyarrow, or use .jsonl"
        ) from error
    try:
        # Buffered: without it a whole column of a row group comes into memory at once.
        file = pq.ParquetFile(path, buffer_size=1 << 20)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file: {error}", "is it whole? copy it once more") from error
    names, hint = file.schema_arrow.names, "name the one that holds the text: --text-field NAME"
    if text_field not in names:
        raise UserError(f"{path}: no column {text_field!r} (found {', '.join(names)})", hint)
    found = str(file.schema_arrow.field(text_field).type)
    if "string" not in found or "<item" in found or found.startswith(("list", "struct", "map")):
        raise UserError(f"{path}: column {text_field!r} holds {found} (expected strings)", hint)
    return file


class Documents(NamedTuple):
    """What a part holds. `continues`: the first text goes on with the document of the part before."""

    texts: list[str]
    continues: bool = False


def read_documents(part: Part, text_field: str) -> Documents:
    """Reads a part.

    Raises:
        UserError: text that is no UTF-8, a line that is no JSON, a missing or empty field; with its place.
    """
    if part.kind == "parquet":
        return Documents(_parquet_texts(part, text_field))
    data = part.data
    if data is None:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
    if part.start == 0:
        data = data[3:] if data.startswith(codecs.BOM_UTF8) else data
    if part.kind == "text":
        return _text_documents(part, data)
    lines = data.split(b"\n")
    return Documents(
        [_json_text(part, i, lines[i], text_field) for i in range(len(lines)) if lines[i].strip()]
    )


def _parquet_texts(part: Part, text_field: str) -> list[str]:
    import pyarrow as pa

    if part.data is not None:
        table = pa.ipc.open_stream(part.data).read_all()
    else:
        file = open_parquet(part.path, text_field)
        groups, row = [], 0
        for group in range(file.num_row_groups):
            if part.start <= row < part.stop:
                groups.append(group)
            row += file.metadata.row_group(group).num_rows
        try:
            table = file.read_row_groups(groups, columns=[text_field], use_threads=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {part.path}: {error}", "is it whole? copy it once more") from error
    column = table.column(text_field)
    if column.null_count:
        row = part.start + column.is_null().to_pylist().index(True)
        raise UserError(
            f"{part.path}: row {row} has no {text_field!r} (null)",
            "drop such rows, or give another --text-field",
        )
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        rows = f"rows {part.start} to {part.stop - 1}"
        raise UserError(f"{part.path}: {rows}: a text is not UTF-8 ({error})", "mend or drop it") from error


def _json_text(part: Part, line: int, data: bytes, text_field: str) -> str:
    """The text of one line of jsonl; `line` counts from the part's first."""
    try:
        record = json.loads(data.decode("utf-8"))
        problem = None if isinstance(record, dict) else f"{type(record).__name__} (expected an object)"
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
        problem = f"not JSON: {error}"
    if problem is None:
        text = record.get(text_field)
        if isinstance(text, str):
            return text
        found = (
            f"{type(text).__name__} in it" if text_field in record else f"found {', '.join(record) or 'none'}"
        )
        problem = f"no text in field {text_field!r} ({found})"
    number = 1 + line + part.start
    if part.kind == "jsonl":  # there a position is a byte
        number = 1 + line + _count_lines(part.path, part.start)
    raise UserError(f"{part.path}:{number}: {problem}", "mend or drop the line, or give another --text-field")


def _count_lines(path: Path, stop: int) -> int:
    """Newlines before a byte of a file."""
    count = 0
    with open(path, "rb") as file:
        while file.tell() < stop:
            count += file.read(min(PART_BYTES, stop - file.tell())).count(b"\n")
    return count


def _text_documents(part: Part, data: bytes) -> Documents:
    """A stretch of a text file, cut at lines that read <|endoftext|>.

    A part never starts or ends beside such a line, so its first text goes on with a document unless the file
    starts there.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = part.stop - len(data) + error.start
        raise UserError(
            f"{part.path}: byte 0x{data[error.start]:02x} at offset {offset} is not UTF-8",
            f"convert it: iconv -f latin1 -t utf-8 {part.path} > utf8.txt",
        ) from error
    texts = SEPARATOR_LINE.split(text)
    continues = part.start > 0
    kept = [text for i, text in enumerate(texts) if text.strip() or (continues and i == 0)]
    return Documents(kept, continues)
