"""The tokenizer of a folder of shards: read from its tokenizer.json, or trained on the corpus."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.command_line import UserError
from utils.console import say
from utils.shards.documents import DocumentSource, Position, bytes_per_token, parts_from, read_documents
from utils.shards.format import write_errors
from utils.shards.manifest import FILE_NAME, Manifest
from utils.text_files import quoted
from utils.tokenizer import MERGES_SHA256, tokenizer_from_state
from utils.tokenizer_json import CONFIG_NAME, identity, read_tokenizer, train_bpe, write_tokenizer
from utils.tokenizer_json import FILE_NAME as TOKENIZER_FILE

TRAINING_CHARACTERS = 200_000_000  # of the corpus: more do not change a vocabulary much
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer reaches on a text


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """State of the tokenizer that a folder's shards were built with: its tokenizer.json's, else GPT-2's.

    Raises UserError if the file is damaged, or not the one that the manifest records. A folder may have no
    manifest: shards may be copied, and other programs write them.
    """
    path = folder / TOKENIZER_FILE
    try:
        recorded = json.loads((folder / FILE_NAME).read_bytes())["settings"].get("tokenizer_sha256")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        recorded = None
    if recorded is None and not path.exists():
        return {"name": "gpt2"}
    state = read_tokenizer(path)
    if recorded not in (None, identity(state)):
        what = f"{path} is not the tokenizer that the shards were built with"
        what = f"{what}: SHA-256 {identity(state)}, in {FILE_NAME} {recorded}"
        raise UserError(what, "restore it, or build the shards again in a new folder")
    return state


def recorded_as(state: dict[str, Any]) -> dict[str, str]:
    """What a manifest records of a tokenizer's content."""
    if state["name"] == "gpt2":
        return {"merges_sha256": MERGES_SHA256}
    return {"tokenizer_sha256": identity(state)}


def choose_tokenizer(
    requested: str, folder: Path, manifest: Manifest | None, train: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """State of the tokenizer for shards in a folder; `train(N)` is called for a first start with bpe:N.

    Raises UserError for a tokenizer.json without an end-of-text token, and for one that lies in the folder
    without being of a build there: training would use it.
    """
    own = folder / TOKENIZER_FILE
    recorded = manifest is not None and "tokenizer_sha256" in manifest.settings
    started = manifest is not None and manifest.shards
    if own.exists() and not recorded and Path(requested) not in (own, folder):
        hint = f"move it away, use another --output-dir, or use it: --tokenizer {quoted(own)}"
        raise UserError(f"{own} is not of a build in this folder", hint)
    if requested.startswith("bpe:"):
        return tokenizer_of(folder) if started else train(int(requested.removeprefix("bpe:")))
    state = {"name": "gpt2"} if requested == "gpt2" else read_tokenizer(Path(requested))
    if state["name"] == "gpt2" and recorded and not started:  # of an attempt that this one replaces
        own.unlink(missing_ok=True)
        own.with_name(CONFIG_NAME).unlink(missing_ok=True)
    if tokenizer_from_state(state).end_of_text is None:
        what = f"{requested} has no end-of-text token, which starts every document of the shards"
        raise UserError(what, f'name one of its tokens in {CONFIG_NAME} beside it: {{"eos_token": "..."}}')
    return state


def store_tokenizer(folder: Path, state: dict[str, Any]) -> None:
    """Writes a tokenizer beside the shards, unless the folder has it: what its user added to it stays.

    Raises Unfinished if the disk is full or similar.
    """
    is_there = (folder / TOKENIZER_FILE).exists() and read_tokenizer(folder) == state
    if state["name"] != "gpt2" and not is_there:
        with write_errors(folder / TOKENIZER_FILE, len(state["json"])):
            write_tokenizer(folder, state)


def train_on_corpus(
    source: DocumentSource, text_field: str, bad_rows: str, vocab_size: int, num_tokens: int, val_tokens: int
) -> dict[str, Any]:
    """State of a BPE trained on TRAINING_CHARACTERS of a corpus, after those that become val.

    `num_tokens` and `val_tokens` are the expected sizes of the corpus and of val. Raises UserError for
    damaged files, or without a text.
    """
    half = int(num_tokens * bytes_per_token("text") / 2)
    skip = min(val_tokens * CHARACTERS_PER_TOKEN, half)
    say(f"training a BPE of {vocab_size:,} tokens on up to {TRAINING_CHARACTERS:,} characters")
    counts = {"skipped": 0, "used": 0}
    parts = parts_from(source, text_field, Position())
    texts = (text for part in parts for text in read_documents(part, text_field, bad_rows=bad_rows))
    state = train_bpe(_texts_after(texts, skip, counts), vocab_size)
    say(
        f"{TOKENIZER_FILE}: trained on {counts['used']:,} characters, after the first {counts['skipped']:,}, "
        f"which hold val; SHA-256 {identity(state)}"
    )
    return state


def _texts_after(texts: Iterable[str], skip: int, counts: dict[str, int]) -> Iterator[str]:
    """Texts of a corpus after its first one, and after `skip` characters; of a single text, its end."""
    text = ""
    for text in texts:
        if counts["skipped"] == 0 or counts["skipped"] < skip:
            counts["skipped"] += len(text)
            continue
        counts["used"] += len(text)
        yield text
        if counts["used"] >= TRAINING_CHARACTERS:
            return
    if counts["used"] == 0:
        used = text[min(skip, len(text) // 2) :]
        counts["used"], counts["skipped"] = len(used), counts["skipped"] - len(used)
        yield used
