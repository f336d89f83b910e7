"""Results of a HellaSwag evaluation: one record per example, accuracies, comparisons of two models."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.command_line import UserError
from utils.files import check_writable, whole_file
from utils.text_files import lines_of


class Accuracy(NamedTuple):
    """Fractions of correct answers; None where none has been published."""

    acc_norm: float | None = None
    acc: float | None = None


# Results by others for OpenAI's weights on all 10,042 validation examples: completion style by build-nanogpt
# and llm.c, lm-eval style by EleutherAI's lm-evaluation-harness.
PUBLISHED_GPT2 = {
    "completion": {
        "gpt2": Accuracy(0.2955, 0.2859),
        "gpt2-medium": Accuracy(0.3752),
        "gpt2-large": Accuracy(0.4320),
        "gpt2-xl": Accuracy(0.4893, 0.3842),
    },
    "lm-eval": {"gpt2": Accuracy(0.3114, 0.2892), "gpt2-xl": Accuracy(0.5089, 0.4004)},
}

# The key of a record that holds the answer which each accuracy counts.
ANSWER_KEYS = {"acc_norm": "prediction_norm", "acc": "prediction"}

# Both conventions, as printed beside the accuracies.
STYLES = {
    "completion": "text as it is; acc_norm: lowest mean loss per token, acc: summed",
    "lm-eval": "text cleaned as by lm-evaluation-harness; acc_norm: lowest loss per character, acc: summed",
}


def standard_error(accuracy: float, num_examples: int) -> float:
    """Standard error of an accuracy, by the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / num_examples)


def make_record(
    index: int, label: int | None, style: str, loss_sum: np.ndarray, divisors: np.ndarray
) -> dict[str, Any]:
    """What `--output` holds of an example: summed losses (4,), in nats, and those over `divisors` (4,)."""
    loss_mean = loss_sum / divisors
    return {
        "index": index,
        "label": label,
        "style": style,
        "loss_sum": loss_sum.round(6).tolist(),
        "loss_mean": loss_mean.round(6).tolist(),
        "prediction": int(loss_sum.argmin()),
        "prediction_norm": int(loss_mean.argmin()),
    }


def correct_answers(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Whether each labelled record's answer, "prediction" or "prediction_norm", is right, (N,) bool."""
    return np.array([record[key] == record["label"] for record in records])


def _with_error(correct: np.ndarray) -> str:
    return f"{correct.mean():.4f} +- {standard_error(correct.mean(), len(correct)):.4f}"


def summary(style: str, records: Sequence[dict[str, Any]], model_name: str) -> str:
    """Both accuracies of labelled records in three lines, with the published ones for OpenAI's models."""
    lines = [f"{style} style ({STYLES[style]}), {len(records):,} examples"]
    for (name, key), other in zip(ANSWER_KEYS.items(), PUBLISHED_GPT2[style].get(model_name, Accuracy())):
        published = f"   published for {model_name}, all 10,042: {other:.4f}" if other else ""
        lines.append(f"  {name:8} {_with_error(correct_answers(records, key))}{published}")
    return "\n".join(lines)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes to `path`, into a UserError."""
    try:
        yield
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise UserError(what, "give --output another file") from error


def check_output(path: Path) -> None:
    """Raises UserError now if `write_results` would fail later; an existing file is untouched."""
    with _writing(path):
        check_writable(path)


def write_results(path: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    """Writes one JSON line per example, from the records of each style, when all are complete.

    The second of two styles is nested under its name, without the shared keys. Raises UserError on failure.
    """
    first, *others = records
    lines = [dict(record) for record in records[first]]
    for style in others:
        for line, other in zip(lines, records[style]):
            line[style] = {key: other[key] for key in other if key not in ("index", "label", "style")}
    with _writing(path), whole_file(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads labelled records that `write_results` wrote. Raises UserError with file and line."""
    hint, records = "give two files that --output wrote", []
    try:
        for _, line in lines_of(path.read_bytes()):
            record = json.loads(line.decode("utf-8"))
            if not all(isinstance(record[key], int) for key in ("index", "label", *ANSWER_KEYS.values())):
                raise ValueError("label or prediction is not an integer")
            records.append(record)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}:{len(records) + 1}: not a scored example ({error})", hint) from error
    if not records:
        raise UserError(f"{path} is empty", hint)
    return records


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's paired test (McNemar 1947).

    Of the examples that only one of two models answers correctly, `only_a` and `only_b` belong to each. If
    neither is better, each is a fair coin toss: the probability of a split at least as uneven.
    """
    tosses = only_a + only_b
    tail = sum(math.comb(tosses, heads) for heads in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**tosses)  # integers until here, so no count is too large


def compare(path_a: Path, path_b: Path) -> str:
    """Both files' accuracies and McNemar's test. Raises UserError unless they scored the same examples."""
    a, b = read_results(path_a), read_results(path_b)
    same = {"index": "the same split and --limit", "label": "the same data", "style": "the same --style"}
    for key, hint in same.items():
        if [record.get(key) for record in a] != [record.get(key) for record in b]:
            what = f"{len(a)} and {len(b)} examples" if len(a) != len(b) else f"column {key!r} differs"
            raise UserError(f"cannot compare {path_a} with {path_b}: {what}", f"score both with {hint}")
    lines = [f"{len(a):,} examples, {a[0].get('style')} style; A = {path_a}, B = {path_b}"]
    for name, key in ANSWER_KEYS.items():
        correct_a, correct_b = correct_answers(a, key), correct_answers(b, key)
        only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
        lines.append(
            f"{name:8} A {_with_error(correct_a)}   B {_with_error(correct_b)}   "
            f"B - A {correct_b.mean() - correct_a.mean():+.4f}   "
            f"only A right {only_a}, only B right {only_b}   "
            f"McNemar p = {mcnemar_p_value(only_a, only_b):.4g}"
        )
    return "\n".join(lines)
