"""manifest.json: what the shards of a folder were built from, and how far the build has come.

It is written atomically before the first shard and after each one, so that a build that was stopped at any
moment continues where its last finished shard ends, and any shard can be verified or rebuilt on its own.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from utils.command_line import UserError
from utils.files import sha256_of, whole_file
from utils.schema import (
    Exactly,
    Optional,
    Rule,
    a_list,
    check,
    count,
    one_of,
    or_none,
    positive,
    text,
    variants,
    whole,
)
from utils.shards.documents import Position
from utils.shards.format import find_all_shards, find_invalid_token, read_header, shard_name, write_errors
from utils.shards.hub import SAFE_NAME

FILE_NAME = "manifest.json"
FORMAT, VERSION = "minigpt-shards", 1
CHECK_TOKENS = 1 << 22  # number of tokens that --verify reads at a time


def _matching(pattern: re.Pattern, expected: str) -> Rule:
    return Rule(expected, lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None)


# What a valid file contains, and nothing else.
sha256 = _matching(re.compile("[0-9a-f]{64}"), "64 hexadecimal digits")
commit = _matching(re.compile("[0-9A-Za-z]{1,64}"), "a commit")
safe_name = _matching(SAFE_NAME, "a path in the data set")
SETTINGS = {
    "tokenizer": text,
    "shard_tokens": positive,
    "val_tokens": or_none(positive),
    "text_field": or_none(text),
    "bad_rows": Optional(one_of("stop", "skip")),  # an earlier version did not have what is optional
    "source": variants(
        "kind",
        files={"files": [(text, count, sha256)]},
        hub={"dataset": text, "subset": text, "revision": commit, "files": [(safe_name, count)]},
    ),
}
SCHEMA = Exactly(
    format=one_of(FORMAT),
    version=one_of(VERSION),
    # The checksum is that of GPT-2's merges, or of the tokenizer.json in the folder.
    settings=lambda settings: Exactly(
        {**SETTINGS, "tokenizer_sha256" if "tokenizer_sha256" in settings else "merges_sha256": sha256}
    ),
    inputs=Optional(or_none(a_list)),  # of INPUTS
    complete=one_of(True, False),
    tokens=count,
    skipped_rows=Optional(count),
    shards=a_list,  # see `Manifest.next_schema`
)
INPUTS = [Exactly(path=text, bytes=count, sha256=sha256)]


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
            check(content, SCHEMA)
            content["settings"].setdefault("bad_rows", "stop")
            manifest = cls(folder, content["settings"], content.get("inputs"))
            check(manifest.inputs or [], INPUTS, "inputs")
            for number, record in enumerate(content["shards"]):
                check(record, manifest.next_schema(), f"shards[{number}]")
                record.setdefault("skipped_rows", 0)
                manifest.shards.append(record)
            check(content["tokens"], one_of(manifest.num_tokens), "tokens")
            manifest.complete, manifest.skipped_rows = content["complete"], content.get("skipped_rows", 0)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            hint = "use another --output-dir, or move this folder's shards and manifest away"
            raise UserError(f"cannot read {path} as {FORMAT} {VERSION}: {error}", hint) from error
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
        path, dumped = self.folder / FILE_NAME, json.dumps(content, indent=1)
        with write_errors(path, len(dumped)), whole_file(path, durable=True) as file:
            file.write(dumped)

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

    def next_schema(self) -> Exactly:
        """What the record of the next shard must be: its name leads to no other folder."""
        before = self.shards[-1] if self.shards else {"documents": 0, "skipped_rows": 0}
        skipped_rows = whole(before["skipped_rows"])
        return Exactly(
            name=one_of(self.next_name()),
            tokens=whole(1, self.settings["shard_tokens"]),
            sha256=sha256,
            documents=whole(before["documents"]),
            skipped_rows=skipped_rows if before["skipped_rows"] else Optional(skipped_rows),
            next=(whole(0, len(self.settings["source"]["files"]) - 1), count, count),
        )

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

    def find_damage(self, record: dict[str, Any], vocab_size: int) -> str | None:
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


def _differences(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):  # the settings, and the source: entries that differ
        inner = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return "; ".join(_differences(f"{name} {key}".strip(), old.get(key), new.get(key)) for key in inner)
    if isinstance(old, list) and isinstance(new, list):  # the source's files
        changed = [entry[0] for entry in (*old, *new) if entry not in old or entry not in new]
        names = ", ".join(dict.fromkeys(changed[:4])) or "in another order"
        return f"{name}: {len(old)} there, {len(new)} here ({names})"
    return f"{name} {old} there, {new} here"
