"""manifest.json: what the shards of a folder were built from, and how far the build has come.

It is written atomically before the first shard and after each one, so that a build that was stopped at any
moment continues where its last finished shard ends, and any shard can be verified or rebuilt on its own.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.command_line import UserError
from utils.files import sha256_of, whole_file
from utils.shards.documents import Position
from utils.shards.format import find_all_shards, find_invalid_token, read_header, shard_name, write_errors
from utils.shards.hub import SAFE_NAME

FILE_NAME = "manifest.json"
FORMAT, VERSION = "minigpt-shards", 1
CHECK_TOKENS = 1 << 22  # number of tokens that --verify reads at a time


class Either(NamedTuple):
    """Of a schema: one of two."""

    first: Any
    second: Any


# What a valid file contains, see `check_schema`.
COUNT, POSITIVE = range(1 << 63), range(1, 1 << 63)
SHA256, COMMIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9A-Za-z]{1,64}")
LOCAL_FILES = {"kind": "files", "files": [(str, COUNT, SHA256)]}
HUB_FILES = {"kind": "hub", "dataset": str, "subset": str, "revision": COMMIT, "files": [(SAFE_NAME, COUNT)]}
SETTINGS = {
    "tokenizer": str,
    "shard_tokens": POSITIVE,
    "val_tokens": Either(POSITIVE, None),
    "text_field": Either(str, None),
    "bad_rows": Either("stop", "skip"),
    "source": Either(LOCAL_FILES, HUB_FILES),
}
SCHEMA = {
    "format": FORMAT,
    "version": VERSION,
    # Of GPT-2's tokenizer, or of the tokenizer.json in the folder.
    "settings": Either({**SETTINGS, "merges_sha256": SHA256}, {**SETTINGS, "tokenizer_sha256": SHA256}),
    "inputs": Either([{"path": str, "bytes": COUNT, "sha256": SHA256}], None),
    "complete": bool,
    "tokens": COUNT,
    "skipped_rows": COUNT,
    "shards": list,  # of records, which `load` checks one after the other
}


class Manifest:
    """The state of a build.

    Attributes:
        settings: everything that determines the bytes of the shards, as plain values.
        inputs: path, bytes and SHA-256 of each local file, before the build read it; None for a data set on
            the hub, whose revision is in the settings, and for builds of earlier versions.
        shards: one record per finished shard, in order: name, tokens, sha256, documents (number of documents
            started up to its end), skipped_rows (left out up to its end), next (where the next shard starts:
            the values of a Position).
        complete: whether the whole corpus is in the shards.
        skipped_rows: number of rows without text that are left out of the shards.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], inputs: list[dict[str, Any]] | None = None):
        self.folder, self.settings, self.inputs = folder, settings, inputs
        self.shards: list[dict[str, Any]] = []
        self.complete = False
        self.skipped_rows = 0

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder, or None if it has none.

        Raises UserError unless the file is what `save` writes.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes().decode("utf-8"))
            _add_defaults(content)
            check_schema(content, SCHEMA, "")
            manifest = cls(folder, content["settings"], content["inputs"])
            for number, record in enumerate(content["shards"]):
                check_schema(record, manifest.next_schema(), f"shards[{number}]")
                manifest.shards.append(record)
            check_schema(content["tokens"], manifest.num_tokens, "tokens")
            manifest.complete, manifest.skipped_rows = content["complete"], content["skipped_rows"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            hint = "use another --output-dir, or move this folder's shards and manifest away"
            raise UserError(f"cannot read {path}: {error} (expected {FORMAT} {VERSION})", hint) from error
        return manifest

    def save(self) -> None:
        """Writes the file atomically. Raises Unfinished if the disk is full or similar."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "inputs": self.inputs,
            "complete": self.complete,
            "tokens": self.num_tokens,
            "skipped_rows": self.skipped_rows,
            "shards": self.shards,
        }
        text, path = json.dumps(content, indent=1), self.folder / FILE_NAME
        with write_errors(path, len(text)), whole_file(path, durable=True) as file:
            file.write(text)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the finished shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def add(
        self, sha256: str, tokens: int, documents: int, position: Position, skipped_rows: int = 0
    ) -> None:
        """Records the next shard as finished, and saves."""
        record = dict(name=self.next_name(), tokens=tokens, sha256=sha256, documents=documents)
        self.shards.append({**record, "skipped_rows": skipped_rows, "next": list(position)})
        self.skipped_rows = skipped_rows
        self.save()

    def next_name(self) -> str:
        """File name of the shard after the finished ones."""
        return shard_name("train" if self.shards else "val", len(self.shards))

    def next_schema(self) -> dict[str, Any]:
        """What the record of the next shard must be: its name leads to no other folder."""
        return {
            "name": self.next_name(),
            "tokens": range(1, self.settings["shard_tokens"] + 1),
            "sha256": SHA256,
            "documents": range(self.shards[-1]["documents"] if self.shards else 0, COUNT.stop),
            "skipped_rows": range(self.shards[-1]["skipped_rows"] if self.shards else 0, COUNT.stop),
            "next": (range(len(self.settings["source"]["files"])), COUNT, COUNT),
        }

    def start_of(self, index: int) -> tuple[Position, int, int]:
        """Where shard number `index` starts; how many documents start, and rows are left out, before it."""
        if index == 0:
            return Position(), 0, 0
        before = self.shards[index - 1]
        return Position(*before["next"]), before["documents"], before["skipped_rows"]

    def check_settings(self, requested: dict[str, Any]) -> None:
        """Raises UserError if the folder was built with other settings; names the differences."""
        if differences := _differences("", self.settings, requested):
            what = f"{self.folder} was built with other settings: {differences}"
            raise UserError(
                what, "use another --output-dir, or the settings of this one (nothing was changed)"
            )

    def check_folder(self, *, next_allowed: bool) -> None:
        """Raises UserError if there are shards that this build did not write: training would read them.

        `next_allowed` accepts an unrecorded next shard, which a killed build may have left: the build that
        continues overwrites it.
        """
        known = {shard["name"] for shard in self.shards} | ({self.next_name()} if next_allowed else set())
        for path in find_all_shards(self.folder):
            if path.name not in known:
                hint = "move it away, or use another --output-dir for this build"
                if path.name == self.next_name():
                    hint = "if it was killed, run the build again, which overwrites it; else move it away"
                raise UserError(f"{path} is not in {FILE_NAME}", hint)

    def missing(self) -> list[int]:
        """Numbers of the recorded shards that are missing or do not have their recorded size."""
        return [number for number, record in enumerate(self.shards) if self._problem_of_size(record)]

    def _problem_of_size(self, record: dict[str, Any]) -> str | None:
        path = self.folder / record["name"]
        if not path.exists():
            return "missing"
        try:
            num_tokens = read_header(path).num_tokens
        except UserError as error:
            return str(error)
        same = num_tokens == record["tokens"]
        return None if same else f"{num_tokens:,} tokens (expected {record['tokens']:,})"

    def find_problem(self, record: dict[str, Any], vocab_size: int) -> str | None:
        """Reads a recorded shard again and says how it differs from what was written, or returns None."""
        if problem := self._problem_of_size(record):
            return problem
        path = self.folder / record["name"]
        if sha256_of(path) != record["sha256"]:
            return f"SHA-256 is not {record['sha256']}: the content has changed"
        shard = read_header(path)
        for start in range(0, shard.num_tokens, CHECK_TOKENS):
            offset = shard.data_offset + start * shard.dtype.itemsize
            tokens = np.fromfile(path, shard.dtype, CHECK_TOKENS, offset=offset)
            if problem := find_invalid_token(tokens, vocab_size, start):
                return problem
        return None


def _add_defaults(content: Any) -> None:
    """Adds what earlier versions did not write."""
    if isinstance(content, dict):
        content.setdefault("inputs", None)
        content.setdefault("skipped_rows", 0)
        if isinstance(content.get("settings"), dict):
            content["settings"].setdefault("bad_rows", "stop")
        records = content.get("shards")
        for record in records if isinstance(records, list) else []:
            if isinstance(record, dict):
                record.setdefault("skipped_rows", 0)


def check_schema(value: Any, schema: Any, place: str) -> None:
    """Raises ValueError, with the place, unless a value of JSON is what the schema says.

    A schema is a type, a range of integers, a pattern of strings, a constant, `Either`, a dict with exactly
    these keys, a list of any number of equal entries, or a tuple, which is a list of that length.
    """
    if isinstance(schema, Either):
        try:
            return check_schema(value, schema.first, place)
        except ValueError as error:
            try:
                return check_schema(value, schema.second, place)
            except ValueError:
                raise error from None
    if isinstance(schema, dict):
        valid = isinstance(value, dict) and value.keys() == schema.keys()
        inner = [(value[key], schema[key], f"{place}.{key}".strip(".")) for key in schema] if valid else []
    elif isinstance(schema, (list, tuple)):
        valid = isinstance(value, list) and (isinstance(schema, list) or len(value) == len(schema))
        schemas = (schema * len(value) if isinstance(schema, list) else schema) if valid else []
        inner = [(*pair, f"{place}[{i}]") for i, pair in enumerate(zip(value, schemas))] if valid else []
    else:
        inner = []
        if isinstance(schema, type):
            valid = type(value) is schema
        elif isinstance(schema, range):
            valid = type(value) is int and value in schema
        elif isinstance(schema, re.Pattern):
            valid = isinstance(value, str) and schema.fullmatch(value) is not None
        else:
            valid = type(value) is type(schema) and value == schema
    if not valid:
        raise ValueError(f"{place or 'the content'} is {str(value)[:100]!r}")
    for arguments in inner:
        check_schema(*arguments)


def _differences(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):  # the settings, and the source: entries that differ
        inner = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return "; ".join(_differences(f"{name} {key}".strip(), old.get(key), new.get(key)) for key in inner)
    if isinstance(old, list) and isinstance(new, list):  # the source's files
        changed = [entry[0] for entry in (*old, *new) if entry not in old or entry not in new]
        names = ", ".join(dict.fromkeys(changed[:4])) or "in another order"
        return f"{name}: {len(old)} there, {len(new)} here ({names})"
    return f"{name} {old} there, {new} here"
