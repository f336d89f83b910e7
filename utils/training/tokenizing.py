"""Chooses the tokenizer of a run, and encodes texts with it."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from utils.command_line import UserError
from utils.console import announced, warn
from utils.data_loader import TRAIN_SHARE
from utils.distributed import Distributed
from utils.shards.encoder import encode_one_by_one
from utils.shards.format import find_all_shards
from utils.shards.token_files import names_tokenizer
from utils.shards.tokenizer import tokenizer_of
from utils.suggestions import similar_file
from utils.text_files import quoted
from utils.tokenizer import END_OF_TEXT, Tokenizer, has_tiktoken, pieces_of, tokenizer_from_state
from utils.tokenizer_json import read_tokenizer, train_bpe
from utils.weights.checkpoint import Checkpoint


def available_tokenizer(requested: str, dist: Distributed) -> str:
    """The requested kind, "gpt2" or "char"; "char" with a warning where tiktoken is not installed."""
    if requested == "gpt2" and not has_tiktoken():
        if dist.is_master:
            warn("tiktoken is not installed, training on characters instead (pip install tiktoken)")
        return "char"
    return requested


def requested_tokenizer(
    requested: str | None, checkpoint: Checkpoint | None, dist: Distributed
) -> dict[str, Any] | None:
    """State of the tokenizer that `--tokenizer` names; None without the flag: the data decides.

    {"name": "char"}, and {"name": "bpe", "vocab_size": N}, say what to make of the text. A resumed run takes
    from its checkpoint what was trained for it, or read from a file that is gone. Rank 0 reads a file.
    """
    if requested in (None, "gpt2", "char"):
        return requested and {"name": available_tokenizer(requested, dist)}
    if requested.startswith("bpe:"):
        new = {"name": "bpe", "vocab_size": int(requested.removeprefix("bpe:"))}
        return recorded_tokenizer(requested, checkpoint) or new

    def read() -> dict[str, Any]:
        path = Path(requested)
        if state := recorded_tokenizer(requested, checkpoint):
            return state
        if not os.path.exists(path) and (close := similar_file(path)):
            raise UserError(f"no file {path}", f"did you mean --tokenizer {quoted(close)}?")
        return read_tokenizer(path)

    return dist.on_master(read)


def recorded_tokenizer(requested: str | None, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """State of a checkpoint's tokenizer, if its run had the same `--tokenizer` and that names no file now."""
    if checkpoint is None or checkpoint.state["train_args"].get("tokenizer") != requested:
        return None
    return None if requested is None or os.path.exists(requested) else checkpoint.model["tokenizer"]


def fits_request(requested: str, state: dict[str, Any]) -> bool:
    """Whether a model's tokenizer is the one that `--tokenizer` names."""
    if requested in ("gpt2", "char"):
        return state["name"] == requested
    if requested.startswith("bpe:"):
        return "json" in state and f"bpe:{tokenizer_from_state(state).vocab_size}" == requested
    return read_tokenizer(Path(requested)) == state


def tokenizer_of_shards(folder: Path, state: dict[str, Any] | None, dist: Distributed) -> Tokenizer:
    """The tokenizer of a folder of shards. Raises UserError if `state` is given and is another one's.

    Token files of other programs are GPT-2's unless `state` is a tokenizer.json, or one lies in the folder.
    """
    found = dist.on_master(lambda: tokenizer_of(folder))
    if found["name"] == "gpt2" and not find_all_shards(folder):
        if state and "json" in state:
            return tokenizer_from_state(state)
        name = names_tokenizer(folder)
        if state is None and name and not os.path.basename(name).startswith("gpt2") and dist.is_master:
            warn(f"{folder}: read as GPT-2's tokens; datatrove calls the tokenizer {name} (see --tokenizer)")
    if state not in (None, found):
        if state["name"] == "folder":
            tokenizer_from_state(state)  # raises
        if found["name"] == "gpt2" or state.get("vocab_size") != tokenizer_from_state(found).vocab_size:
            what = f"{folder} holds {_tokens_of(found)}, not {_tokens_of(state)}"
            if state["name"] == "char":
                other = "a model trained on them" if "characters" in state else "use --tokenizer gpt2"
                raise UserError(what, f"give --data a text file, or {other}")
            hint = "omit --tokenizer to train on them; a loaded model needs shards of its own tokenizer"
            raise UserError(what, hint)
    return tokenizer_from_state(found)


def _tokens_of(state: dict[str, Any]) -> str:
    if state["name"] in ("gpt2", "char"):
        return {"gpt2": "GPT-2 tokens", "char": "characters"}[state["name"]]
    size = state.get("vocab_size") or tokenizer_from_state(state).vocab_size
    return f"tokens of a {state['name']} tokenizer of {size:,} tokens"


def train_share(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The first 90 % of the characters of texts, and the rest, which begins with the rest of a text."""
    texts = list(texts)
    border = int(sum(map(len, texts)) * TRAIN_SHARE)
    before: list[str] = []
    for index, text in enumerate(texts):
        if len(text) > border:
            return [*before, text[:border]], [text[border:], *texts[index + 1 :]]
        before.append(text)
        border -= len(text)
    return before, [""]


def has_end_of_text(state: dict[str, Any]) -> bool:
    """Whether a tokenizer, or the one to be made, has a token that starts a document."""
    return state["name"] != "char" and state.get("end_of_text", END_OF_TEXT) is not None


def _counted(texts: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    """The same texts; `advance` is called with the length of each after its use."""
    for text in texts:
        yield text
        advance(len(text))


def encode_texts(
    texts: Iterable[str], state: dict[str, Any], dist: Distributed, *, are_documents: bool
) -> tuple[Tokenizer, np.ndarray, int | None]:
    """Returns a tokenizer, the tokens of the texts, 1-D, and how many of them are train, None for 90 %.

    With a tokenizer.json, or a BPE that rank 0 trains here, the split is by characters: it is the same for
    every tokenizer, and the BPE never sees val. With `are_documents` each text is a document and begins with
    the end-of-text token; otherwise there is one text.
    """

    def encode(texts: Iterable[str]) -> list[np.ndarray]:
        in_steps = are_documents or tokenizer.ranks is not None or knows_all
        is_read = isinstance(texts, list)  # else its length is not known yet
        total = sum(map(len, texts)) if in_steps and is_read else None
        with announced("tokenizing", total, " characters", shown=dist.is_master) as advance:
            if are_documents:
                return [encode_one_by_one(_counted(texts, advance), tokenizer)]
            # A text in pieces, for the progress bar, where that is known to give the same ids.
            pieces = chain.from_iterable(map(pieces_of, texts)) if in_steps else texts
            return [*map(tokenizer.encode, _counted(pieces, advance))]

    # A vocabulary made from this text has all its characters, so no piece of it warns of unknown ones.
    knows_all = state["name"] == "char" and "characters" not in state
    if "json" not in state and "vocab_size" not in state:
        if knows_all:
            state = {**state, "characters": "".join(sorted(set(*texts)))}
        tokenizer = tokenizer_from_state(state)
        return tokenizer, np.concatenate(encode(texts)), None
    train, val = train_share(texts)
    if "json" not in state:
        size = state["vocab_size"]
        with announced(f"training a BPE of {size:,} tokens", shown=dist.is_master):
            state = dist.on_master(lambda: train_bpe(train, size))
    tokenizer = tokenizer_from_state(state)
    parts = encode(train)
    border = sum(map(len, parts))
    with announced("tokenizing", shown=dist.is_master):
        rest = tokenizer.encode(val[0])  # of a text that begins in train
    return tokenizer, np.concatenate([*parts, rest, *encode(val[1:])]), border
