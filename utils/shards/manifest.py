"""manifest.json: what a folder of shards was made from and how far the work has come.

It is written before the first shard and again after each, always whole, so that a build which was stopped at
any moment goes on where its last finished shard ends, and any shard can be checked or built again on its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from utils.errors import UserError
from utils.files import sha256_of, whole_file
from utils.shards.documents import Position
from utils.shards.format import find_shards, read_header, shard_name, unfinished_name

FILE_NAME = "manifest.json"
FORMAT, VERSION = "minigpt-shards", 1
CHECK_TOKENS = 1 << 22  # tokens that --verify holds at a time


class Manifest:
    """The state of a build.

    Attributes:
        settings: everything that decides the bytes of the shards, as plain values.
        shards: one record for each finished shard, in order: name, tokens, sha256, documents (begun up to its
            end), next (file, position in it and tokens to leave out, where the next shard starts).
        complete: the corpus is used up.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.shards: list[dict[str, Any]] = []
        self.complete = False

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, or None if it has none. Raises UserError if it cannot be understood."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"format {content['format']} {content['version']}")
            manifest = cls(folder, content["settings"])
            manifest.shards, manifest.complete = content["shards"], content["complete"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read {path}: {error!r} (expected {FORMAT} {VERSION})",
                "use another --output-dir, or move this folder's shards and manifest away",
            ) from error
        return manifest

    def save(self) -> None:
        """Writes the file under a temporary name, then renames it. Raises OSError if that fails."""
        path = self.folder / FILE_NAME
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "complete": self.complete,
            "tokens": self.num_tokens,
            "shards": self.shards,
        }
        with whole_file(path, temporary=unfinished_name(path), durable=True) as file:
            json.dump(content, file, indent=1)

    @property
    def num_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def add(self, sha256: str, tokens: int, documents: int, position: Position) -> None:
        """Records the next shard as finished, and saves."""
        record = dict(name=self.next_name(), tokens=tokens, sha256=sha256, documents=documents)
        self.shards.append({**record, "next": list(position)})
        self.save()

    def next_name(self) -> str:
        """File name of the shard that comes after the finished ones."""
        return shard_name("train" if self.shards else "val", len(self.shards))

    def start_of(self, index: int) -> tuple[Position, int]:
        """Where shard number `index` starts in the corpus, and how many documents begin before."""
        if index == 0:
            return Position(), 0
        before = self.shards[index - 1]
        return Position(*before["next"]), before["documents"]

    def check_settings(self, asked: dict[str, Any]) -> None:
        """Raises UserError if the folder was built with other settings than these; names what differs."""
        names = sorted(asked.keys() | self.settings.keys())
        different = [name for name in names if asked.get(name) != self.settings.get(name)]
        if different:
            changes = "; ".join(
                _difference(name, self.settings.get(name), asked.get(name)) for name in different
            )
            raise UserError(
                f"{self.folder} was built with other settings: {changes}",
                "use another --output-dir, or the settings of this one (nothing was changed)",
            )

    def check_folder(self, goes_on: bool) -> None:
        """Raises UserError if shards are there that this build did not write: training would read them.

        Args:
            goes_on: the next shard is written anew, so it does not matter if a kill left one unrecorded.
        """
        known = {shard["name"] for shard in self.shards} | ({self.next_name()} if goes_on else set())
        for path in find_shards(self.folder, "val") + find_shards(self.folder, "train"):
            if path.name not in known:
                hint = "move it away, or use another --output-dir for this build"
                if path.name == self.next_name():
                    hint = "run the build again if it was killed: it writes the file anew; else move it away"
                raise UserError(f"{path} is not in {FILE_NAME}", hint)

    def missing(self) -> Iterator[int]:
        """Numbers of recorded shards that are not on the disk, or not with their size."""
        for index, shard in enumerate(self.shards):
            try:
                if read_header(self.folder / shard["name"]).num_tokens == shard["tokens"]:
                    continue
            except UserError:
                pass
            yield index

    def verify(self, vocab_size: int) -> Iterator[tuple[str, str | None]]:
        """Reads every recorded shard again.

        Yields:
            (name, problem), problem None where the file is the one that was written.
        """
        for record in self.shards:
            yield record["name"], _problem(self.folder / record["name"], record, vocab_size)


def _problem(path: Path, record: dict[str, Any], vocab_size: int) -> str | None:
    if not path.exists():
        return "missing"
    try:
        shard = read_header(path)
    except UserError as error:
        return str(error)
    if shard.num_tokens != record["tokens"]:
        return f"{shard.num_tokens:,} tokens (expected {record['tokens']:,})"
    if sha256_of(path) != record["sha256"]:
        return f"SHA-256 is not {record['sha256']}: other bytes than were written"
    for start in range(0, shard.num_tokens, CHECK_TOKENS):
        offset = shard.data_offset + start * shard.dtype.itemsize
        tokens = np.fromfile(path, shard.dtype, CHECK_TOKENS, offset=offset)
        if tokens.max() >= vocab_size:
            place = int(np.argmax(tokens >= vocab_size))
            return f"token {tokens[place]} >= vocab_size {vocab_size} at position {start + place}"
    return None


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):  # the source: name the entries, not all their files
        inner = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return "; ".join(_difference(f"{name} {key}", old.get(key), new.get(key)) for key in inner)
    if isinstance(old, list) and isinstance(new, list):
        changed = [entry[0] for entry in (*old, *new) if entry not in old or entry not in new]
        names = ", ".join(dict.fromkeys(changed[:4])) or "other order"
        return f"{name}: {len(old)} there, {len(new)} here ({names})"
    return f"{name} {old} there, {new} here"
