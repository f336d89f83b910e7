"""HellaSwag's examples as tokens: four rows that begin alike, kept as a prefix tree."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch

from utils.distributed import Distributed
from utils.errors import UserError
from utils.hellaswag.dataset import NUM_ENDINGS, choose_directory, find_or_download, harness_text, read_rows
from utils.tokenizer import GPT2Tokenizer
from utils.weights.pretrained import FolderTokenizer


def tokenize(
    example: dict[str, Any], tokenizer, style: str = "completion"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the context and of the four endings, each with the space before it.

    Args:
        style: "completion" takes the text as it is, "lm-eval" words it as the lm-evaluation-harness does.
    """
    if style == "completion":
        context, endings, spaces = example["ctx"], example["endings"], ""
    else:
        context, endings = harness_text(example)
        # The harness gives white space at the end of a context to the ending: GPT-2's words begin with their
        # space, so that context and ending, tokenized apart, are the tokens of the whole.
        spaces = context[len(context.rstrip()) :]
        context = context.rstrip()
    return tokenizer.encode(context), [tokenizer.encode(f"{spaces} {ending}") for ending in endings]


def crop_rows(
    context: np.ndarray, endings: list[np.ndarray], block_size: int | None
) -> tuple[list[np.ndarray], list[int]]:
    """Four rows of ids, each its last block_size tokens, and where in them the ending starts."""
    rows = [np.concatenate((context, ending)) for ending in endings]
    cuts = [max(0, len(row) - (block_size or len(row))) for row in rows]
    return [row[cut:] for row, cut in zip(rows, cuts)], [max(0, len(context) - cut) for cut in cuts]


class Example(NamedTuple):
    """A tokenized example as a prefix tree in one row: each distinct beginning of its rows is a position."""

    index: int  # row of the file, from 0
    label: int | None
    tokens: np.ndarray  # (T,) what a position reads
    positions: np.ndarray  # (T,) its place in the rows that it belongs to
    owners: np.ndarray  # (T,) uint8: bit e is set where ending e's row goes through it
    predictors: np.ndarray  # (U,) positions that predict a token of an ending
    predicted_by: np.ndarray  # (S,) for each scored token, which of the U
    targets: np.ndarray  # (S,) the scored tokens
    endings: np.ndarray  # (S,) whose they are, 0..3
    divisors: np.ndarray  # (4,) what acc_norm divides by: scored tokens, or characters in lm-eval style
    num_shortened: int  # rows that did not fit the block


def make_example(
    row: dict[str, Any], index: int, tokenizer, block_size: int, style: str = "completion"
) -> Example:
    """The prefix tree of a row of the data set."""
    context, endings = tokenize(row, tokenizer, style)
    rows, starts = crop_rows(context, endings, block_size)
    inputs = [ids[:-1].tolist() for ids in rows]  # nothing is predicted after the last token
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * NUM_ENDINGS
    previous: list[int] = []
    path = np.empty(0, dtype=np.int64)
    # In sorted order, what a row shares with any earlier one it shares with the one just before it.
    for ending in sorted(range(NUM_ENDINGS), key=inputs.__getitem__):
        ids = inputs[ending]
        shared = _common_length(previous, ids)
        new = np.arange(len(tokens), len(tokens) + len(ids) - shared)
        path = np.concatenate((path[:shared], new))
        tokens += ids[shared:]
        positions += range(shared, len(ids))
        paths[ending], previous = path, ids
    owners = np.zeros(len(tokens), dtype=np.uint8)
    for ending, path in enumerate(paths):
        owners[path] |= 1 << ending
    # A row that is all ending has no position before its first token: that one cannot be scored.
    firsts = [max(start, 1) for start in starts]
    scored_from = np.concatenate([path[first - 1 :] for path, first in zip(paths, firsts)])
    predictors, predicted_by = np.unique(scored_from, return_inverse=True)
    counts = [len(ids) - first for ids, first in zip(rows, firsts)]
    divisors = counts if style == "completion" else [len(ending) for ending in harness_text(row)[1]]
    return Example(
        index=index,
        label=row["label"],
        tokens=np.array(tokens),
        positions=np.array(positions),
        owners=owners,
        predictors=predictors,
        predicted_by=predicted_by.reshape(-1),
        targets=np.concatenate([ids[first:] for ids, first in zip(rows, firsts)]).astype(np.int64),
        endings=np.repeat(np.arange(NUM_ENDINGS), counts),
        divisors=np.maximum(divisors, 1).astype(np.float64),
        num_shortened=sum(len(context) + len(ending) > block_size for ending in endings),
    )


def _common_length(a: list[int], b: list[int]) -> int:
    """How many elements two lists have in common at their beginning."""
    for length, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return length
    return min(len(a), len(b))


def load_examples(
    directory: str | Path | None, split: str, limit: int | None, tokenizer, block_size: int,
    style: str = "completion", dist: Distributed | None = None, say: Callable[[str], None] = print,
) -> list[Example]:  # fmt: skip
    """Finds or downloads a split and tokenizes it, once a process.

    Args:
        directory: None for the default (see `choose_directory`).
        limit: the first so many examples, or None for all.
        block_size: of the model.
        dist: the ranks that all call this; one process a machine downloads. Either all of them return or all
            raise.
        say: is given one line about the file.

    Raises:
        UserError: the file is not there and cannot be had, a row is malformed, or the block has no room for a
            token and one before it.
    """
    if block_size < 2:
        raise UserError(f"HellaSwag needs a block of 2 tokens (found {block_size})", "give another model")
    dist = dist or Distributed(torch.device("cpu"))
    directory = choose_directory(directory)
    if dist.local_rank == 0:
        _all_or_none(dist, lambda: find_or_download(directory, split))
    else:
        _all_or_none(dist, lambda: None)

    def read() -> list[Example]:
        path = find_or_download(directory, split)
        rows = read_rows(path, split, say)[:limit]
        return [_numbered(path, row, index, tokenizer, block_size, style) for index, row in enumerate(rows)]

    return _all_or_none(dist, read)


def examples_for_training(args: Namespace, tokenizer, block_size: int, dist: Distributed) -> list[Example]:
    """What train_gpt.py's --hellaswag flags ask for; none, with one warning, where it cannot be had."""
    if not args.hellaswag_every:
        return []
    say = print if dist.is_master else lambda line: None
    if tokenizer.name == "char":
        say("warning: HellaSwag is off: it is made of words, and this model reads characters")
        return []
    try:
        limit = args.hellaswag_examples
        return load_examples(args.hellaswag_dir, "val", limit, tokenizer, block_size, dist=dist, say=say)
    except UserError as error:
        if dist.local_rank == 0:  # of every machine: only the one that failed knows why
            print(f"warning: HellaSwag is off: {error}")
        return []


def _all_or_none(dist: Distributed, action: Callable[[], Any]) -> Any:
    """Does something on this rank; if it failed on any, raises UserError on all, so that none waits."""
    result, error = None, None
    try:
        result = action()
    except UserError as caught:
        error = caught
    if dist.max_number(error is not None):
        raise error or UserError("HellaSwag cannot be read on another rank", "its own message says why")
    return result


def _numbered(path: Path, row: dict[str, Any], index: int, tokenizer, block_size: int, style: str) -> Example:
    try:
        return make_example(row, index, tokenizer, block_size, style)
    except UserError:
        raise
    except ValueError as error:
        hint = "use --style completion, or correct the line"
        raise UserError(f"{path}:{index + 1}: {error}", hint) from error


# ------------------------------------------------------------------------------------------------------------
# Which tokenizer a model reads with


def choose_tokenizer(model, source: str | Path):
    """The tokenizer that fits a model: GPT-2's BPE, or that of its folder if it brings another one.

    Args:
        model: a GPT.
        source: what it was loaded from.

    Raises:
        UserError: the model reads characters, or fewer words than the tokenizer has.
    """
    name = model.tokenizer_state["name"]
    if name == "char":
        raise UserError(
            f"{source} reads characters, HellaSwag needs GPT-2's BPE", "train a model with --tokenizer gpt2"
        )
    tokenizer = FolderTokenizer(Path(source)) if name == "folder" else GPT2Tokenizer()
    if tokenizer.num_words > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.num_words} words, {source} only {model.config.vocab_size}",
            "give the model a folder that holds its own tokenizer files",
        )
    return tokenizer
