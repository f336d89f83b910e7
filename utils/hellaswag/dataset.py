"""HellaSwag's files: downloaded once, checked before they count, every row well formed or an error.

HellaSwag (Zellers et al. 2019): a context and four endings, one of which is how the text really went on.
A third of the contexts caption videos (ActivityNet), two thirds come from WikiHow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

from utils.download import download
from utils.errors import UserError

DEFAULT_DIR = Path(__file__).resolve().parents[2] / "hellaswag"
NUM_ENDINGS = 4

# The second address is tried where the first one fails or sends something else.
BASE_URLS = (
    "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e/data/",
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/",
)


class PublishedFile(NamedTuple):
    """What the authors' file of a split must be."""

    num_bytes: int
    sha256: str


PUBLISHED = {
    "train": PublishedFile(47_496_131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": PublishedFile(12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "test": PublishedFile(11_752_147, "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261"),
}


def choose_directory(requested: str | Path | None) -> Path:
    """Where the files are: `--hellaswag-dir`, else $HELLASWAG_DIR, else hellaswag/ beside the code."""
    return Path(requested or os.environ.get("HELLASWAG_DIR") or DEFAULT_DIR)


def find_or_download(directory: Path, split: str) -> Path:
    """The file of a split ("train", "val" or "test"). One process downloads it while others wait.

    A file that is there is returned as it is: somebody put it there, or an earlier download was checked.

    Raises:
        UserError: it is not there and cannot be had; no part of a download is left behind.
    """
    path = directory / f"hellaswag_{split}.jsonl"
    if path.exists():
        return path
    from filelock import FileLock  # torch depends on it

    hint = f"put {path.name} into {directory}, or name its folder with --hellaswag-dir or HELLASWAG_DIR"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():  # nobody else was faster
                for part in directory.glob(f"{path.name}.*.part"):
                    part.unlink()  # a killed process left it
                _download_checked(path, PUBLISHED[split])
    except OSError as error:  # every network error is one; so is a folder that cannot be written
        raise UserError(f"cannot download {path.name}: {error}", hint) from error
    return path


def _download_checked(path: Path, published: PublishedFile) -> None:
    """Fetches a file, and once more, from the other address, if what came is not the published file."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false"):
        raise OSError("no network (HF_HUB_OFFLINE is set)")
    errors = []
    for base_url in BASE_URLS:
        try:
            return download(base_url + path.name, path, published.sha256, published.num_bytes)
        except OSError as error:
            errors.append(str(error))
    raise OSError("; ".join(dict.fromkeys(errors)))  # the same reason twice is said once


def read_rows(path: Path, split: str, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """All rows of a file, checked, in file order.

    Args:
        split: "test" has no labels: there `label` is None.
        say: is given one line with the number of rows and the checksum.

    Returns:
        One dict a row, as in the file; `label` is an int or None, `endings` four strings with something in
        them.

    Raises:
        UserError: the file cannot be read, or a row is malformed; names file and line. A row is never
            skipped, because that would silently change the accuracy.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = "name its folder with --hellaswag-dir"
        raise UserError(f"cannot read {path}: {error.strerror}", hint) from error
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows.append(_checked_row(line, labelled=split != "test"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are, too
            hint = f"fetch the file again (delete it first), or correct line {number}"
            raise UserError(f"{path}:{number}: {error}", hint) from error
    if not rows:
        raise UserError(f"{path} is empty", "delete it, and it is downloaded again")
    digest = hashlib.sha256(data).hexdigest()
    words = "" if digest == PUBLISHED[split].sha256 else "not "
    say(f"hellaswag: {len(rows):,} {split} examples in {path}, SHA-256 {digest} ({words}the published file)")
    return rows


def _checked_row(line: bytes, labelled: bool) -> dict[str, Any]:
    """A row from its line of JSON. Raises ValueError in words if it is not one."""
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an example (expected an object, found {type(row).__name__})")
    missing = [key for key in ("ctx", "endings", *(["label"] if labelled else [])) if key not in row]
    if missing:
        raise ValueError(f"missing key {', '.join(map(repr, missing))}")
    for key in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key!r} is not text (found {row[key]!r})")
    if not row["ctx"].strip():
        raise ValueError("the context is empty")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != NUM_ENDINGS:
        found = len(endings) if isinstance(endings, list) else repr(endings)
        raise ValueError(f"not four endings (found {found})")
    for number, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise ValueError(f"ending {number} is empty (found {ending!r})")
    row["label"] = _checked_label(row["label"]) if labelled else None
    return row


def _checked_label(label: Any) -> int:
    """0..3 as an int; the copy of the data set on the Hugging Face hub has it as text."""
    if str(label) in ("0", "1", "2", "3"):
        return int(label)
    raise ValueError(f"label {label!r} (expected 0, 1, 2 or 3)")


def harness_text(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Context and endings as the lm-evaluation-harness words them (its task `hellaswag`, version 1).

    The activity is put in front, the second sentence of the context starts with a capital, and the brackets
    that WikiHow's headings left behind go. White space that this leaves at the ends of the endings stays:
    the harness scores and counts it.

    Raises:
        ValueError: a key that only this wording needs is missing, or nothing is left of an ending.
    """
    missing = [key for key in ("activity_label", "ctx_a") if key not in row]
    if missing:
        raise ValueError(f"missing key {', '.join(map(repr, missing))}, which --style lm-eval needs")
    second = row.get("ctx_b", "").capitalize()  # of the first word alone; the rest becomes lower case
    context = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {second}")
    endings = [_without_brackets(ending) for ending in row["endings"]]
    for number, ending in enumerate(endings):
        if not ending:
            raise ValueError(f"ending {number} is nothing but brackets (found {row['endings'][number]!r})")
    return context, endings


def _without_brackets(text: str) -> str:
    """Each step in the harness's order, as the result shows it: "[title]" ends a sentence, others vanish."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
