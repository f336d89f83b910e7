"""The logs of a run read back, and the published results that they are compared with."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from utils.command_line import UserError
from utils.console import warn
from utils.hellaswag.results import PUBLISHED_GPT2
from utils.schema import (
    Optional,
    Rule,
    Schema,
    check,
    count,
    duration,
    is_int,
    is_number,
    number,
    or_none,
    plain_dict,
    positive,
    text,
)

T = TypeVar("T")

# acc_norm, completion style, of the models that a 124M run is compared with.
HELLASWAG_REFERENCES = {
    "GPT-2 124M": PUBLISHED_GPT2["completion"]["gpt2"].acc_norm,
    "GPT-3 124M": 0.337,  # Brown et al. 2020, table H.1
}
# Val losses that users of build-nanogpt published for its recipe, which is that of the preset gpt2.
PUBLISHED_VAL_LOSSES = {250: 6.163, 1000: 4.153, 1250: 3.952, 19073: 3.04}
PUBLISHED_RECIPE = dict(
    n_layer=12, n_head=12, n_embd=768, seq_len=1024, total_batch_tokens=524288, max_steps=19073,
    warmup_steps=715, max_lr=6e-4, min_lr=6e-5, weight_decay=0.1, grad_clip=1.0,
)  # fmt: skip
PUBLISHED_KINDS = dict(tokenizer="gpt2", init_from=None, optimizer="adamw", schedule="cosine", dropout=0.0)


share = Rule("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
# Of `Progress`, at each start: a run that is resumed in another log directory leaves its validations behind.
BEST: Schema = {"best_loss": or_none(number), "best_step": count, "since_best": count}
# What the records of metrics.jsonl must hold to be used, by their kind.
RECORDS: dict[str, Schema] = {
    "run": {
        "settings": plain_dict,
        "parameters": count,
        "step": Optional(count),
        "best": Optional(BEST),
        "environment": Optional(plain_dict),
        "reasons": Optional(plain_dict),
        "model": Optional(plain_dict),
    },
    "train": {
        "step": count,
        "lr": number,
        "muon_lr": Optional(number),
        "norm": Optional(or_none(number)),
        "seconds": Optional(duration),
        "mfu": Optional(or_none(number)),
        "memory": Optional(or_none(number)),
    },
    "val": {
        "step": count,
        "loss": number,
        "bits_per_byte": Optional(or_none(number)),
        "tokens": Optional(count),
        "seconds": Optional(duration),
    },
    "hella": {"step": count, "accuracy": share, "examples": positive},
}
UPDATE = b'{"kind": "train"'  # how the record of an update starts
_warned: set[tuple[Path, int]] = set()  # (file, first line left out): a run reads its logs again and again


def read_log(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Reads log.txt as {kind: (steps, values)}, without an incomplete last line; see `_parsed_lines`."""

    def parse(line: str) -> tuple[int, str, float]:
        step, kind, value = line.split()
        parsed = int(step), kind, float(value)
        if not (is_int(parsed[0]) and is_number(parsed[2]) and (kind != "hella" or share.holds(parsed[2]))):
            raise ValueError("not a step and a finite number")
        return parsed

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, kind, value in _parsed_lines(path, parse):
        steps, values = curves.setdefault(kind, ([], []))
        steps.append(step)
        values.append(value)
    return curves


def read_metrics(path: Path, *, most_updates: int | None = None) -> list[dict[str, Any]]:
    """Reads the records of metrics.jsonl, without an incomplete last line; see `_parsed_lines`.

    With `most_updates`, those of updates are thinned out evenly in a longer file: parsing them takes longest.
    """

    def parse(line: str) -> dict[str, Any]:
        record = json.loads(line)
        check(record, {"kind": text})
        check(record, RECORDS.get(record["kind"], {}))
        return record

    return list(_parsed_lines(path, parse, most_updates))


def _parsed_lines(path: Path, parse: Callable[[str], T], most_updates: int | None = None) -> Iterator[T]:
    """Parses the complete lines of a file, none if it is missing. Raises UserError if it cannot be read.

    What people or a full disk have damaged is left out, with one warning: a log is no reason to stop.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give the log directory of a run") from error
    every = math.ceil(len(lines) / most_updates) if lines and most_updates else 1
    bad: list[tuple[int, str]] = []
    for line_number, line in enumerate(lines, 1):
        if line_number % every and line.startswith(UPDATE):
            continue
        try:
            if line.strip():
                yield parse(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, not such a record
            bad.append((line_number, str(error).split("\n")[0][:100]))
    if bad and (path, bad[0][0]) not in _warned:
        _warned.add((path, bad[0][0]))
        warn(f"{path}:{bad[0][0]}: {bad[0][1]}; {len(bad):,} of {len(lines):,} lines are left out")


def tokens_trained(records: list[dict[str, Any]], step: int) -> int | None:
    """Training tokens of the run up to `step`, without those before its first record; None if unknown."""
    starts = [r for r in records if r["kind"] == "run" and is_int(r["settings"].get("total_batch_tokens"))]
    if not starts:
        return None
    # Validations have counted the tokens: the batch may have changed at a resume.
    counted = [(r["step"], r["tokens"]) for r in records if r["kind"] == "val" and "tokens" in r]
    start = starts[0].get("step", 0), 0
    known, tokens = max((point for point in counted if point[0] <= step), default=start)
    return tokens + max(step - known, 0) * starts[-1]["settings"]["total_batch_tokens"]


def published_val_losses(records: list[dict[str, Any]]) -> dict[int, float]:
    """{step: val loss} that others published for the recipe of this run; empty for any other recipe.

    They belong to FineWeb-Edu: on other shards they are a reference, not an expectation.
    """
    settings = next((record["settings"] for record in records if record["kind"] == "run"), {})
    found = {name: settings.get(name) for name in PUBLISHED_RECIPE}
    # isclose: the default of min_lr is max_lr / 10, which is not 6e-5 to the last bit.
    same = all(is_number(found[name]) and math.isclose(found[name], PUBLISHED_RECIPE[name]) for name in found)
    same = same and all(settings.get(name) in (None, value) for name, value in PUBLISHED_KINDS.items())
    return PUBLISHED_VAL_LOSSES if same else {}
