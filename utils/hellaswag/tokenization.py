"""HellaSwag's rows as token ids: the text of either style, and the tokenizer that fits the model."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from utils.command_line import UserError
from utils.tokenizer import Tokenizer, check_vocab_size, tokenizer_from_state
from utils.weights.pretrained import FolderTokenizer


def tokenizer_for(source: str | Path, tokenizer_state: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The model's tokenizer. Raises UserError for characters or too small a vocabulary."""
    if tokenizer_state["name"] == "char":
        what = f"{source} has a character tokenizer (HellaSwag needs GPT-2's BPE)"
        raise UserError(what, "train a model with --tokenizer gpt2")
    is_folder = tokenizer_state["name"] == "folder"
    tokenizer = FolderTokenizer(Path(source)) if is_folder else tokenizer_from_state(tokenizer_state)
    check_vocab_size(tokenizer, vocab_size)
    return tokenizer


def tokenize(
    row: dict[str, Any], tokenizer: Tokenizer, style: str = "completion"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the context and of the four endings, each with the space before it; `style` is of STYLES."""
    if style == "completion":
        context, endings, spaces = row["ctx"], row["endings"], ""
    else:
        context, endings = harness_text(row)
        # The harness moves white space at the end of a context to the ending. GPT-2's BPE puts a space at the
        # start of a token, so context and ending, tokenized apart, give the tokens of the whole.
        spaces = context[len(context.rstrip()) :]
        context = context.rstrip()
    return tokenizer.encode(context), [tokenizer.encode(f"{spaces} {ending}") for ending in endings]


def crop_rows(
    context: np.ndarray, endings: list[np.ndarray], block_size: int | None
) -> tuple[list[np.ndarray], list[int]]:
    """Returns four rows of ids, each cropped to its last block_size tokens, and where their endings start."""
    rows = [np.concatenate((context, ending)) for ending in endings]
    if block_size is not None:
        rows = [row[-block_size:] for row in rows]
    return rows, [max(0, len(row) - len(ending)) for row, ending in zip(rows, endings)]


def harness_text(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Context and endings as cleaned by EleutherAI's lm-evaluation-harness (task `hellaswag`, version 1).

    The activity comes first, the second sentence of the context starts with a capital, and the bracketed
    markers of WikiHow are removed. White space that this leaves around the endings stays: the harness scores
    and counts it. Raises ValueError if a key that only this style needs is missing, or an ending is empty.
    """
    missing = [key for key in ("activity_label", "ctx_a") if key not in row]
    if missing:
        raise ValueError(f"missing key {', '.join(map(repr, missing))} (--style completion does not need it)")
    second = row.get("ctx_b", "").capitalize()  # also turns the rest into lower case, as the harness does
    context = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {second}")
    endings = [_without_brackets(ending) for ending in row["endings"]]
    if "" in endings:
        raise ValueError(f"ending {endings.index('')} is empty without its brackets (use --style completion)")
    return context, endings


def _without_brackets(text: str) -> str:
    """Removes markers in the harness's order of steps: "[title]" ends a sentence, others vanish."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
