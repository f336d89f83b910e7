"""Rows of parquet and of JSON: how files of them are divided, and the text in each row.

Rows of JSON are lines, or the elements of one array. What is wrong with a row is a `BadRow`; what is wrong
with a file, a `UserError`.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

from utils.command_line import UserError
from utils.text_files import read_errors

TEXT_FIELD_HINT = "name the one that contains the text: build_fineweb_edu_shards.py --text-field NAME"

Span = tuple[int, int, bytes | None]  # start, stop and data of a Part of utils/shards/documents.py

# What divides an array: commas count between its elements only. Escapes in a string are passed over a
# thousand at a time, because the regular expression engine remembers each of them.
BETWEEN_ELEMENTS = re.compile(rb'["\[\]{},]')
INSIDE_ELEMENT = re.compile(rb'["\[\]{}]')
REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,1000}("?)', re.DOTALL)


class BadRow(ValueError):
    """A row without text; `data` is that of JSON."""

    def __init__(self, problem: str, data: bytes = b""):
        super().__init__(problem)
        self.data = data


# ------------------------------------------------------------------------------------------------------------
# Parquet


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


def parquet_spans(
    path: Path, text_field: str, start: int, part_bytes: int, row_group_bytes: int
) -> Iterator[Span]:
    """Rows of consecutive row groups, up to `part_bytes`; a row group above `row_group_bytes` in several."""
    file = open_parquet(path, text_field)
    column = [file.schema.column(i).path for i in range(len(file.schema))].index(text_field)
    rows = _row_starts(file)
    num_bytes = 0  # of the rows from `start` up to the row group
    for group in range(file.num_row_groups):
        if rows[group + 1] <= start:
            continue
        size = file.metadata.row_group(group).column(column).total_uncompressed_size
        if start < rows[group] and num_bytes + size > part_bytes:
            yield start, rows[group], None
            start, num_bytes = rows[group], 0
        num_bytes += size
        if size > row_group_bytes:
            # The parent reads it, a few rows at a time: no process ever holds all of it.
            num_rows = max(1, (rows[group + 1] - rows[group]) * part_bytes // size)
            row = rows[group]
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=[text_field]):
                row += batch.num_rows
                if row > start:
                    batch = batch.slice(max(0, batch.num_rows - (row - start)))
                    yield row - batch.num_rows, row, _to_bytes(batch)
            start, num_bytes = row, 0
    if start < rows[-1]:
        yield start, rows[-1], None


def parquet_rows(
    path: Path, text_field: str, start: int, stop: int, data: bytes | None
) -> list[str | BadRow]:
    """Rows `start` to `stop`, from `data` in Arrow's stream format if it is there."""
    import pyarrow as pa

    if data is not None:
        table = pa.ipc.open_stream(data).read_all()
    else:
        file = open_parquet(path, text_field)
        rows = _row_starts(file)
        groups = range(bisect_right(rows, start) - 1, bisect_left(rows, stop))
        table = file.read_row_groups(list(groups), columns=[text_field], use_threads=False)
        table = table.slice(start - rows[groups[0]], stop - start)
    column = table.column(text_field)
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_text_of(scalar) for scalar in column]
    return [BadRow(f"no {text_field!r} (null)") if value is None else value for value in values]


def _text_of(scalar: Any) -> str | BadRow | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadRow(f"a text is not UTF-8 ({error})")


def _to_bytes(batch: Any) -> bytes:
    """A batch of rows in Arrow's stream format."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _row_starts(file: Any) -> list[int]:
    """The number of the first row of each row group, and the number of rows."""
    return [0, *accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]


# ------------------------------------------------------------------------------------------------------------
# JSON


def json_text(data: bytes, text_field: str, *, in_array: bool) -> str:
    """The text of a line, or of an element, which may be a string itself. Raises BadRow if there is none."""
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise BadRow(f"not JSON: {error}", data) from error
    if in_array and isinstance(record, str):
        return record
    if not isinstance(record, dict):
        problem = f"{type(record).__name__} (expected an object{' or a string' * in_array})"
    elif isinstance(text := record.get(text_field), str):
        return text
    elif text_field in record:
        problem = f"{type(text).__name__} in field {text_field!r} (expected a string)"
    else:
        problem = f"no field {text_field!r} (found {_listed(record)})"
    raise BadRow(problem, data)


def array_elements(path: Path, file: BinaryIO, num_bytes: int, max_bytes: int) -> Iterator[bytes]:
    """The elements of the JSON array that a file holds, unparsed, in one line each.

    `num_bytes` are read at a time; an element has at most `max_bytes`. Raises UserError for an array that
    does not end, is not the only one, or has an element too long or empty.
    """
    buffer = file.read(num_bytes).lstrip(b"\xef\xbb\xbf \t\r\n")[1:]  # without the opening bracket
    count = start = at = 0  # elements; in the buffer: start of the next one, and place reached
    depth, in_string = 1, False
    while True:
        if in_string:
            match = REST_OF_STRING.match(buffer, at)
            at, in_string = match.end(), not match[1]
            if not in_string or at < len(buffer) - 1:
                continue
        elif match := (BETWEEN_ELEMENTS if depth == 1 else INSIDE_ELEMENT).search(buffer, at):
            at, mark = match.end(), match[0]
            if depth == 1 and mark in b",]":
                element = buffer[start : at - 1].strip()
                if element or count or mark == b",":
                    count += 1
                    yield _checked_element(path, element, count, max_bytes)
                start = at
                if mark == b"]":
                    return _check_end(path, buffer[at:] + file.read(num_bytes), count)
            in_string = mark == b'"'
            depth += (mark in b"[{") - (mark in b"]}" and depth > 1)
            continue
        else:
            at = len(buffer)
        more = file.read(num_bytes)
        if not more:
            what = f"{path}: the array has no end (after {count:,} elements)"
            raise UserError(what, "is the file complete? copy it again")
        buffer, at, start = buffer[start:] + more, at - start, 0
        if len(buffer) > max_bytes + 2 * num_bytes:
            _checked_element(path, buffer, count + 1, max_bytes)


def _checked_element(path: Path, element: bytes, number: int, max_bytes: int) -> bytes:
    if not element:
        what = f"{path}: element {number} is empty: a comma too many"
        raise UserError(what, "remove the comma")
    if len(element) > max_bytes:
        raise too_long(f"{path}: element {number} has more than {max_bytes:,} bytes", max_bytes)
    # A line break between the parts of an element is white space to JSON, as is a carriage return; within a
    # string, neither is allowed.
    return element.replace(b"\n", b"\r")


def _check_end(path: Path, data: bytes, count: int) -> None:
    if rest := data.strip():
        what = f"{path}: {rest[:20]!r} after the end of the array ({count:,} elements)"
        raise UserError(what, "keep one array; lines of JSON need the suffix .jsonl")


def too_long(what: str, max_bytes: int) -> UserError:
    """The error for what would have to be read into memory at once."""
    return UserError(f"{what} (at most {max_bytes:,} bytes)", "divide it into lines or documents")


def _listed(names: Iterable[str]) -> str:
    """Names from a file for an error of one line."""
    return ", ".join(name if name.isprintable() else repr(name) for name in islice(names, 20)) or "none"
