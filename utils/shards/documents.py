"""The text files of a corpus, and how each is divided into parts that processes can read independently.

What a document is:
    .parquet            a row; its text is the column `--text-field`
    .jsonl              a line that is not blank; its text is the field of that name
    .json               the same, or an array: an element of it, an object with that field or a string
    .txt                the whole file, or the text between lines that read <|endoftext|>, unless blank

The last three may be packed: .gz, .zst. `train_gpt.py --data` reads the same kinds of files, with the
functions of this module.

A part is a few megabytes: rows of parquet or JSON, or a section of a text that starts at white space after a
word, where GPT-2's pattern always splits the text, so that the tokens are those of the whole document.
Positions in a file count rows of parquet, bytes of .jsonl and of text (unpacked), lines of packed JSON,
elements of an array.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from utils.command_line import UserError
from utils.shards.rows import (
    TEXT_FIELD_HINT,
    BadRow,
    Span,
    array_elements,
    json_text,
    parquet_rows,
    parquet_spans,
    too_long,
)
from utils.text_files import (
    MAX_LINE_BYTES,
    decode_text,
    encoding_hint,
    first_bytes,
    free_name,
    kind_of_bytes,
    lines_of,
    open_unpacked,
    quoted,
    read_errors,
    wrong_kind,
)
from utils.tokenizer import END_OF_TEXT

PART_BYTES = 4 << 20  # text per part: large enough to hide the cost of sending it to a process
ROW_GROUP_BYTES = 32 << 20  # a larger row group is read by the parent process, a few rows at a time
SEARCH_BYTES = 1 << 16  # read at a time in search of a place to cut

PACKERS = {".gz": "gzip", ".zst": "zstd"}  # and what the first bytes show


def _with_packed(kinds: dict[str, str]) -> dict[str, str]:
    """The kinds, and their packed forms: ".txt" is "text", ".txt.gz" is "text.gz"."""
    return {suffix + end: kind + end for suffix, kind in kinds.items() for end in ("", *PACKERS)}


KINDS = {".parquet": "parquet", **_with_packed({".jsonl": "jsonl", ".txt": "text"})}
# Read only when named: in a folder, such a file often holds something else, as a description of the data.
KINDS_IF_NAMED = _with_packed({".json": "json", ".ndjson": "jsonl"})
TEXT_FIELD = "text"  # FineWeb-Edu's
# A part may end after these. Text: a character that is not white space, before white space; '>' might end a
# separator line and does not count.
CUT_AFTER = {
    "jsonl": re.compile(rb"\n"),
    "text": re.compile(rb"(?:[!-=?-~]|[\xe4-\xe9][\x80-\xbf]{2}|\xe3\x80[\x81-\xbf])(?=[ \t\r\n])"),
}
SEPARATOR_LINE = re.compile(rf"^{re.escape(END_OF_TEXT)}\r?(?:\n|\Z)", re.MULTILINE)

# Rough rates for the estimate before a build: file size by kind, and FineWeb-Edu's length of documents.
BYTES_PER_TOKEN = {"": 4.5, ".gz": 1.7, ".zst": 1.6, "parquet": 2.9}  # by the end of the kind
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
    kind: str  # "parquet", "text", "jsonl", "packed jsonl", "array": what `start` and `stop` count
    start: int
    stop: int
    data: bytes | None = None  # its content if only the parent process can read it

    @property
    def continues_document(self) -> bool:
        """Whether its first text continues the last document of the part before."""
        return self.kind == "text" and self.start > 0


class DocumentSource(Protocol):
    """The files of a corpus, in order: `LocalFiles`, or `HubFiles` of utils/shards/hub.py."""

    kinds: list[str]  # the kind of each file, a value of KINDS or KINDS_IF_NAMED

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
    """The kind of a file by its name, a value of KINDS or KINDS_IF_NAMED; None if it has no such name."""
    kinds = KINDS | KINDS_IF_NAMED
    return next((kinds[suffix] for suffix in kinds if path.name.lower().endswith(suffix)), None)


def is_text(kind: str) -> bool:
    """Whether a file of this kind is a text, packed or not, rather than rows."""
    return kind.startswith("text")


def check_kind(path: Path, kind: str) -> None:
    """Raises UserError, with what the file is instead, if its first bytes are not those of its kind."""
    with read_errors(path):
        head = first_bytes(path)
    expected = "parquet" if kind == "parquet" else PACKERS.get(Path(kind).suffix)
    if kind_of_bytes(head) != expected:
        raise wrong_kind(path, head, expected or "UTF-8 text")


def bytes_per_token(kind: str) -> float:
    """Roughly, of a file of this kind."""
    return BYTES_PER_TOKEN["parquet" if kind == "parquet" else Path(kind).suffix]


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
                spans = parquet_spans(path, text_field, start, PART_BYTES, ROW_GROUP_BYTES)
            else:
                kind, spans = _spans(path, kind, start)
            for span in spans:
                yield Part(index, path, kind, *span)


def _spans(path: Path, kind: str, start: int) -> tuple[str, Iterator[Span]]:
    """The kind of a file's parts, and the parts, from `start` on.

    A packed file, and an array, can only be read from the beginning, so the parent process reads them.
    """
    content, packed = Path(kind).stem, Path(kind).suffix
    with open_unpacked(path) as file:
        head = file.read(1024)
    if packed and (found := kind_of_bytes(head)):
        expected = {"text": "UTF-8 text", "json": "JSON", "jsonl": "JSON lines"}
        what = f"{path} holds {found} inside {PACKERS[packed]} (expected {expected[content]})"
        raise UserError(what, "unpack it, and give the files that are in it")
    if content == "json":
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return "array", _array_spans(path, start)
        content = "jsonl"
    if not packed:
        return content, _byte_spans(path, CUT_AFTER[content], start)
    if content == "text":
        return "text", _packed_text_spans(path, start)
    return "packed jsonl", _packed_line_spans(path, start)


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
            raise _no_cut(file.name, place, target, file.tell())
    return file.tell()


def _no_cut(name: Path | str, place: str, start: int, stop: int) -> UserError:
    return too_long(f"{name}: no {place} from byte {start:,} to byte {stop:,}", MAX_LINE_BYTES)


def _packed_text_spans(path: Path, start: int) -> Iterator[Span]:
    """The sections that the text would have if it were not packed."""
    position, data = 0, b""
    with open_unpacked(path) as file:
        while more := file.read(PART_BYTES):
            data += more
            while match := CUT_AFTER["text"].search(data, PART_BYTES):
                stop = position + match.end()
                if stop > start:
                    yield max(position, start), stop, data[max(0, start - position) : match.end()]
                position, data = stop, data[match.end() :]
            if len(data) > PART_BYTES + MAX_LINE_BYTES:
                end = position + len(data)
                raise _no_cut(path, "white space after a word", position + PART_BYTES, end)
    if data and position + len(data) > start:
        yield max(position, start), position + len(data), data[max(0, start - position) :]


def _packed_line_spans(path: Path, start: int) -> Iterator[Span]:
    line = 0
    with open_unpacked(path) as file:
        while data := file.read(PART_BYTES):
            rest = file.readline(MAX_LINE_BYTES + 1)
            data += rest
            stop = line + data.count(b"\n") + (not data.endswith(b"\n"))
            if len(rest) > MAX_LINE_BYTES:
                what = f"{path}:{stop}: a line of more than {MAX_LINE_BYTES:,} bytes"
                raise too_long(what, MAX_LINE_BYTES)
            if line < start < stop:
                data = data.split(b"\n", start - line)[-1]
            if stop > start:
                yield max(line, start), stop, data
            line = stop


def _array_spans(path: Path, start: int) -> Iterator[Span]:
    """Elements, each as a line."""
    rows, size, number = [], 0, 0
    with open_unpacked(path) as file:
        for number, row in enumerate(array_elements(path, file, PART_BYTES, MAX_LINE_BYTES), 1):
            if number > start:
                rows.append(row)
                size += len(row)
            if size >= PART_BYTES:
                yield number - len(rows), number, b"\n".join(rows)
                rows, size = [], 0
    if rows:
        yield number - len(rows), number, b"\n".join(rows)


def read_documents(part: Part, text_field: str, *, bad_rows: str = "stop") -> list[str]:
    """The texts of a part, one per document, see `read_rows`."""
    return [text for text in read_rows(part, text_field, bad_rows=bad_rows) if text is not None]


def read_rows(part: Part, text_field: str, *, bad_rows: str = "stop") -> list[str | None]:
    """The texts of a part, one per document; None for a row without text if `bad_rows` is "skip".

    If it is "stop", such a row is a UserError that names its place. A row that is not UTF-8 is one without
    text; a file of text that is not UTF-8 is always a UserError.
    """
    texts: list[str | None] = []
    with read_errors(part.path):
        for number, row in _numbered_rows(part, text_field):
            if isinstance(row, BadRow):
                if bad_rows == "stop":
                    raise _row_error(part, number, row) from row
                row = None
            texts.append(row)
    return texts


def _numbered_rows(part: Part, text_field: str) -> Iterator[tuple[int, str | BadRow]]:
    """The rows of a part, each with its number in the part, from 0."""
    if part.kind == "parquet":
        yield from enumerate(parquet_rows(part.path, text_field, part.start, part.stop, part.data))
        return
    data = part.data
    if data is None:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
    if part.kind == "text":
        yield from enumerate(_text_documents(part, data))
        return
    for number, line in lines_of(data):
        if line.strip():
            try:
                yield number - 1, json_text(line, text_field, in_array=part.kind == "array")
            except BadRow as error:
                yield number - 1, error


def _row_error(part: Part, number: int, row: BadRow) -> UserError:
    """The error for a row of a part, with its place in the file."""
    hint = f"correct or remove the line, or build shards with --bad-rows skip; {TEXT_FIELD_HINT}"
    if part.kind == "parquet":
        place, hint = f"{part.path}: row {part.start + number}", hint.replace("line", "row")
    elif part.kind == "array":
        place, hint = f"{part.path}: element {part.start + number + 1}", hint.replace("line", "element")
    else:
        before = _count_lines(part.path, part.start) if part.kind == "jsonl" else part.start
        place = f"{part.path}:{before + number + 1}"
        if part.start == number == 0 and row.data.startswith(b"["):
            array = re.sub(r"\.(jsonl|ndjson)(?=$|\.)", ".json", part.path.name, flags=re.IGNORECASE)
            new = quoted(free_name(part.path.with_name(array)))
            hint = f"if it is one array, run: mv {quoted(part.path)} {new}; then use {new}"
    if isinstance(cause := row.__cause__, UnicodeDecodeError):
        hint = encoding_hint(part.path, row.data, cause)
    return UserError(f"{place}: {row}", hint)


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
