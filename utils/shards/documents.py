"""The text files of a corpus, and how each is divided into parts that processes can read independently.

What a document is:
    .parquet            a row; its text is the column `--text-field`
    .jsonl, .jsonl.gz   a line that is not blank; its text is the field of that name
    .txt                the whole file, or the text between lines that read <|endoftext|>, unless blank

`train_gpt.py --data` reads the same kinds of files, with the functions of this module.

A part is a few megabytes: rows of parquet, lines of jsonl, or a section of a text file that starts at white
space after a word, where GPT-2's pattern always splits the text, so that the tokens are those of the whole
document. Positions in a file count rows of parquet, bytes of .jsonl and .txt, lines of .jsonl.gz.
"""

import gzip
import json
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from utils.command_line import UserError
from utils.text_files import (
    MAX_LINE_BYTES,
    decode_text,
    encoding_hint,
    first_bytes,
    free_name,
    kind_of_bytes,
    lines_of,
    quoted,
    wrong_kind,
)
from utils.tokenizer import END_OF_TEXT

PART_BYTES = 4 << 20  # text per part: large enough to hide the cost of sending it to a process
ROW_GROUP_BYTES = 32 << 20  # a larger row group is read by the parent process, a few rows at a time
SEARCH_BYTES = 1 << 16  # read at a time in search of a place to cut

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".txt": "text"}
# Read only when named: in a folder, such a file often holds something else, as a description of the data.
KINDS_IF_NAMED = {".json": "jsonl", ".ndjson": "jsonl", ".json.gz": "jsonl.gz", ".ndjson.gz": "jsonl.gz"}
FIRST_BYTES = {"parquet": "parquet", "jsonl.gz": "gzip"}  # what they show of each kind; None of the others
TEXT_FIELD = "text"  # FineWeb-Edu's
TEXT_FIELD_HINT = "name the one that contains the text: build_fineweb_edu_shards.py --text-field NAME"
# A part may end after these. Text: a character that is not white space, before white space; '>' might end a
# separator line and does not count.
CUT_AFTER = {
    "jsonl": re.compile(rb"\n"),
    "text": re.compile(rb"(?:[!-=?-~]|[\xe4-\xe9][\x80-\xbf]{2}|\xe3\x80[\x81-\xbf])(?=[ \t\r\n])"),
}
SEPARATOR_LINE = re.compile(rf"^{re.escape(END_OF_TEXT)}\r?(?:\n|\Z)", re.MULTILINE)

# Rough rates for the estimate before a build: file size by kind, and FineWeb-Edu's length of documents.
BYTES_PER_TOKEN = {"parquet": 2.9, "jsonl": 4.5, "jsonl.gz": 1.7, "text": 4.5}
TOKENS_PER_DOCUMENT = 1030


class Position(NamedTuple):
    """Where the next token of a corpus is: file, position in it, number of tokens to skip after that."""

    file: int = 0
    start: int = 0
    skip: int = 0


class Part(NamedTuple):
    """A section of one file; `start` and `stop` are positions in it."""

    file: int
    path: Path
    kind: str
    start: int
    stop: int
    data: bytes | None = None  # its content if only the parent process can read it

    @property
    def continues_document(self) -> bool:
        """Whether its first text continues the last document of the part before."""
        return self.kind == "text" and self.start > 0


Span = tuple[int, int, bytes | None]  # start, stop and data of a Part


class DocumentSource(Protocol):
    """The files of a corpus, in order: `LocalFiles`, or `HubFiles` of utils/shards/hub.py."""

    kinds: list[str]  # the kind of each file, a value of KINDS

    def __len__(self) -> int:
        """Number of files."""

    def path(self, index: int) -> Path:
        """File number `index` on this machine's disk, downloaded first if necessary."""

    def describe(self) -> dict[str, Any]:
        """Plain values that identify the input: a build continues only with the same ones."""

    def estimate(self, text_field: str) -> tuple[int, int]:
        """Rough numbers of tokens and documents. Raises UserError if a local file cannot be used."""

    def checksums(self) -> list[dict[str, Any]] | None:
        """Path, bytes and SHA-256 of each file; None where a revision pins the content."""


def kind_of(path: Path) -> str | None:
    """The kind of a file, a value of KINDS, by its name; None if it has no such name."""
    kinds = KINDS | KINDS_IF_NAMED
    return next((kinds[suffix] for suffix in kinds if path.name.lower().endswith(suffix)), None)


def check_kind(path: Path, kind: str) -> None:
    """Raises UserError, with what the file is instead, if its first bytes are not those of its kind."""
    with read_errors(path):
        head = first_bytes(path)
    if kind_of_bytes(head) != FIRST_BYTES.get(kind):
        raise wrong_kind(path, head, FIRST_BYTES.get(kind, "UTF-8 text"))


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns what Python and pyarrow raise for a damaged file into UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}", "is the file complete? copy it again") from error


def parts_from(source: DocumentSource, text_field: str, position: Position) -> Iterator[Part]:
    """The parts of a corpus in order, starting with one that begins at `position`.

    Raises UserError for a damaged file, or a parquet file without the column `text_field`.
    """
    for index in range(position.file, len(source)):
        path, kind = source.path(index), source.kinds[index]
        start = position.start if index == position.file else 0
        check_kind(path, kind)
        with read_errors(path):
            if kind == "parquet":
                spans = _parquet_spans(path, text_field, start)
            elif kind == "jsonl.gz":
                spans = _gzip_spans(path, start)
            else:
                spans = _byte_spans(path, CUT_AFTER[kind], start)
            for span in spans:
                yield Part(index, path, kind, *span)


def _byte_spans(path: Path, cut_after: re.Pattern[bytes], start: int) -> Iterator[Span]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        while start < size:
            stop = min(_find_cut(file, cut_after, start + PART_BYTES), size)
            yield start, stop, None
            start = stop


def _find_cut(file: BinaryIO, cut_after: re.Pattern[bytes], target: int) -> int:
    """The end of the first match from `target` on, or the end of the file."""
    file.seek(target)
    window = b""
    while more := file.read(SEARCH_BYTES):
        window = window[-3:] + more  # a match may span two reads
        if match := cut_after.search(window):
            return file.tell() - len(window) + match.end()
        if file.tell() - target > MAX_LINE_BYTES:
            place = "end of a line" if cut_after is CUT_AFTER["jsonl"] else "white space after a word"
            raise _too_long(f"{file.name}: no {place} from byte {target:,} to byte {file.tell():,}")
    return file.tell()


def _too_long(what: str) -> UserError:
    return UserError(f"{what} (at most {MAX_LINE_BYTES:,} bytes)", "divide it into lines or documents")


def _gzip_spans(path: Path, start: int) -> Iterator[Span]:
    """Lines of a compressed file. It can only be read from its beginning, so the parent process does so."""
    line = 0
    with gzip.open(path, "rb") as file:
        while data := file.read(PART_BYTES):
            if line == 0 and (kind := kind_of_bytes(data[:1024])):
                what = f"{path} holds {kind} inside gzip (expected JSON lines)"
                raise UserError(what, "unpack it, and give the files that are in it")
            rest = file.readline(MAX_LINE_BYTES + 1)
            data += rest
            stop = line + data.count(b"\n") + (not data.endswith(b"\n"))
            if len(rest) > MAX_LINE_BYTES:
                raise _too_long(f"{path}:{stop}: a line of more than {MAX_LINE_BYTES:,} bytes")
            if line < start < stop:
                data = data.split(b"\n", start - line)[-1]
            if stop > start:
                yield max(line, start), stop, data
            line = stop


def _parquet_spans(path: Path, text_field: str, start: int) -> Iterator[Span]:
    """Rows of consecutive row groups, up to PART_BYTES; a large row group in several spans."""
    file = open_parquet(path, text_field)
    column = [file.schema.column(i).path for i in range(len(file.schema))].index(text_field)
    rows = _row_starts(file)
    num_bytes = 0  # of the rows from `start` up to the row group
    for group in range(file.num_row_groups):
        if rows[group + 1] <= start:
            continue
        size = file.metadata.row_group(group).column(column).total_uncompressed_size
        if start < rows[group] and num_bytes + size > PART_BYTES:
            yield start, rows[group], None
            start, num_bytes = rows[group], 0
        num_bytes += size
        if size > ROW_GROUP_BYTES:
            # The parent reads it, a few rows at a time: no process ever holds all of it.
            num_rows = max(1, (rows[group + 1] - rows[group]) * PART_BYTES // size)
            row = rows[group]
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=[text_field]):
                row += batch.num_rows
                if row > start:
                    batch = batch.slice(max(0, batch.num_rows - (row - start)))
                    yield row - batch.num_rows, row, _to_bytes(batch)
            start, num_bytes = row, 0
    if start < rows[-1]:
        yield start, rows[-1], None


def _to_bytes(batch: Any) -> bytes:
    """A batch of rows in Arrow's stream format."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def open_parquet(path: Path, text_field: str) -> Any:
    """pyarrow's ParquetFile. Raises UserError if the file is damaged or has no such column of strings."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"cannot import pyarrow: {error}", "pip install -U pyarrow, or use .jsonl") from error
    with read_errors(path):
        # Buffered: otherwise a whole column of a row group is read into memory at once.
        file = pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
    names, hint = file.schema_arrow.names, TEXT_FIELD_HINT
    if text_field not in names:
        raise UserError(f"{path}: no column {text_field!r} (found {_listed(names)})", hint)
    found = str(file.schema_arrow.field(text_field).type)
    if "string" not in found or "<item" in found or found.startswith(("list", "struct", "map")):
        raise UserError(f"{path}: column {text_field!r} holds {found} (expected strings)", hint)
    return file


def _row_starts(file: Any) -> list[int]:
    """The number of the first row of each row group, and the number of rows."""
    return [0, *accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]


def read_documents(part: Part, text_field: str) -> list[str]:
    """The texts of a part, one per document.

    Raises UserError that names the place of text that is not UTF-8, a line that is not JSON, a missing field.
    """
    with read_errors(part.path):
        if part.kind == "parquet":
            return _parquet_texts(part, text_field)
        data = part.data
        if data is None:
            with open(part.path, "rb") as file:
                file.seek(part.start)
                data = file.read(part.stop - part.start)
    if part.kind == "text":
        return _text_documents(part, data)
    return [_json_text(part, n, line, text_field) for n, line in lines_of(data) if line.strip()]


def _parquet_texts(part: Part, text_field: str) -> list[str]:
    import pyarrow as pa

    if part.data is not None:
        table = pa.ipc.open_stream(part.data).read_all()
    else:
        file = open_parquet(part.path, text_field)
        rows = _row_starts(file)
        groups = range(bisect_right(rows, part.start) - 1, bisect_left(rows, part.stop))
        table = file.read_row_groups(list(groups), columns=[text_field], use_threads=False)
        table = table.slice(part.start - rows[groups[0]], part.stop - part.start)
    column = table.column(text_field)
    if column.null_count:
        row = part.start + column.is_null().to_pylist().index(True)
        what = f"{part.path}: row {row} has no {text_field!r} (null)"
        raise UserError(what, "remove such rows, or give another --text-field")
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        problem = f"{part.path}: rows {part.start} to {part.stop - 1}: a text is not UTF-8 ({error})"
        raise UserError(problem, "correct or remove it") from error


def _json_text(part: Part, line: int, data: bytes, text_field: str) -> str:
    """The text of one line of jsonl; `line` counts from 1, the first line of the part."""
    hint = f"correct or remove the line; if it is the wrong field, {TEXT_FIELD_HINT}"
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        problem = f"not JSON: {error}"
        if isinstance(error, UnicodeDecodeError):
            hint = encoding_hint(part.path, data, error)
    else:
        if not isinstance(record, dict):
            problem = f"{type(record).__name__} (expected an object)"
        elif isinstance(text := record.get(text_field), str):
            return text
        elif text_field in record:
            problem = f"{type(text).__name__} in field {text_field!r} (expected a string)"
        else:
            problem = f"no field {text_field!r} (found {_listed(record)})"
    if part.start == 0 and line == 1 and data.startswith(b"["):
        new = quoted(free_name(part.path.with_suffix(".jsonl")))
        hint = f"of an array, run: jq -c '.[]' < {quoted(part.path)} > {new}; then use {new}"
    # A position in .jsonl is a byte, one in .jsonl.gz is a line.
    lines_before = _count_lines(part.path, part.start) if part.kind == "jsonl" else part.start
    raise UserError(f"{part.path}:{lines_before + line}: {problem}", hint)


def _listed(names: Iterable[str]) -> str:
    """Names from a file for an error of one line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in islice(names, 20)) or "none"


def _count_lines(path: Path, stop: int) -> int:
    """Number of newlines before byte `stop` of a file."""
    count = 0
    with open(path, "rb") as file:
        while file.tell() < stop:
            count += file.read(min(PART_BYTES, stop - file.tell())).count(b"\n")
    return count


def _text_documents(part: Part, data: bytes) -> list[str]:
    """A section of a text file, cut at lines that read <|endoftext|>; a part never starts or ends at one."""
    first, *others = split_at_separators(decode_text(part.path, data, part.start))
    # Blank texts are not documents, but a blank continuation belongs to the document before.
    kept = [first] if first.strip() or part.continues_document else []
    return kept + [text for text in others if text.strip()]


def split_at_separators(text: str) -> list[str]:
    """The texts before, between and after lines that read <|endoftext|>, blank ones included."""
    return SEPARATOR_LINE.split(text) if END_OF_TEXT in text else [text]  # `in` is much faster
