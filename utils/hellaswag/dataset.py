"""HellaSwag's files: downloaded once, verified by checksum, every row checked.

A row is a context and four endings, one of which is the true continuation. A third of the contexts caption
videos (ActivityNet), two thirds come from WikiHow.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.command_line import UserError
from utils.console import announced, say
from utils.files import download, locked, remove_temporary_files
from utils.hellaswag.tokenization import harness_text
from utils.text_files import kind_of_bytes, lines_of, wrong_kind

DEFAULT_DIR = Path(__file__).resolve().parents[2] / "hellaswag"
NUM_ENDINGS = 4

# The second URL is tried if the first one fails or sends anything but the published file.
BASE_URLS = (
    "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e/data/",
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/",
)
PUBLISHED_SHA256 = {
    "train": "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
    "val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "test": "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261",
}


def choose_directory(requested: str | Path | None) -> Path:
    """`--hellaswag-dir` if given, else $HELLASWAG_DIR, else hellaswag/ at the repository root.

    Raises UserError if the variable is set to an empty text, which names no folder.
    """
    from_environment = os.environ.get("HELLASWAG_DIR")
    if requested is None and from_environment == "":
        what = "environment variable HELLASWAG_DIR is empty (expected a folder)"
        raise UserError(what, "correct it, or remove it: unset HELLASWAG_DIR")
    return Path(requested or from_environment or DEFAULT_DIR)


def find_or_download(directory: Path, split: str) -> Path:
    """Returns the file of a split ("train", "val" or "test"); if it is missing, one process downloads it.

    An existing file is used without a check: a user put it there, or an earlier download was verified. Raises
    UserError if it is missing and cannot be downloaded; no part of a download is left behind.
    """
    path = directory / f"hellaswag_{split}.jsonl"
    try:
        if path.exists():
            return path
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / f"{path.name}.lock", wait=True):
            if not path.exists():  # another process may have downloaded it meanwhile
                remove_temporary_files(directory, path.name)
                _download(path, PUBLISHED_SHA256[split])
    except OSError as error:  # all network errors, and a folder without permission
        hint = f"put {path.name} into {directory}, or name its folder with --hellaswag-dir or HELLASWAG_DIR"
        raise UserError(f"cannot download {path.name}: {error}", hint) from error
    return path


def _download(path: Path, sha256: str) -> None:
    """Downloads a file from the first URL that sends the expected one. Raises OSError if none does."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false"):
        raise OSError("HF_HUB_OFFLINE is set")
    errors = []
    for base_url in BASE_URLS:
        try:
            return download(base_url + path.name, path, sha256)
        except OSError as error:
            errors.append(str(error))
    raise OSError("; ".join(dict.fromkeys(errors)))  # identical reasons once


@announced("reading HellaSwag")
def read_rows(path: Path, split: str, *, for_harness: bool = False) -> list[dict[str, Any]]:
    """Reads and checks all rows of a file; prints their number and the checksum.

    `for_harness` also checks what `harness_text` needs. Returns one dict per row, as in the file, but `label`
    is an int, or None in the split "test". Raises UserError that names file and line if a row is malformed:
    none is skipped, because that would silently change the accuracy.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check --hellaswag-dir") from error
    if kind_of_bytes(data[:1024]) is not None:
        raise wrong_kind(path, data[:1024], "JSON lines")
    rows = []
    for number, line in lines_of(data):
        try:
            rows.append(_checked_row(line, labelled=split != "test"))
            if for_harness:
                harness_text(rows[-1])
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, no example
            hint = f"delete the file to download it again, or correct line {number}"
            raise UserError(f"{path}:{number}: {error}", hint) from error
    if not rows:
        raise UserError(f"{path} is empty", "delete the file to download it again")
    digest = hashlib.sha256(data).hexdigest()
    verdict = "the published file" if digest == PUBLISHED_SHA256[split] else "not the published file"
    say(f"hellaswag: {len(rows):,} {split} examples in {path}, SHA-256 {digest} ({verdict})")
    return rows


def _checked_row(line: bytes, *, labelled: bool) -> dict[str, Any]:
    """Parses a line of JSON. Raises ValueError if it is not an example."""
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an example (expected an object, found {type(row).__name__})")
    missing = [key for key in ("ctx", "endings", *(["label"] if labelled else [])) if key not in row]
    if missing:
        raise ValueError(f"missing key {', '.join(map(repr, missing))}")
    for key in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key!r} is not a string (found {row[key]!r})")
    if not row["ctx"].strip():
        raise ValueError("the context is empty")
    endings = row["endings"] if isinstance(row["endings"], list) else []
    if len(endings) != NUM_ENDINGS or not all(isinstance(text, str) and text.strip() for text in endings):
        raise ValueError(f"expected {NUM_ENDINGS} endings that are not empty (found {row['endings']!r})")
    label = str(row["label"]) if labelled else None  # the copy on the Hugging Face hub has strings
    if labelled and label not in ("0", "1", "2", "3"):
        raise ValueError(f"label {row['label']!r} (expected 0, 1, 2 or 3)")
    row["label"] = int(label) if labelled else None
    return row
