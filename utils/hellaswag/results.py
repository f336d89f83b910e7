"""What a HellaSwag evaluation leaves: accuracies with their errors, a line an example, comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from utils.errors import UserError
from utils.files import temporary_name, whole_file


class Accuracy(NamedTuple):
    """Shares of right answers; None where nobody has published one."""

    acc_norm: float | None
    acc: float | None


# What others measured for OpenAI's weights on all 10,042 validation examples: completion style by build-
# nanogpt and llm.c, lm-eval style by the lm-evaluation-harness.
PUBLISHED_GPT2 = {
    "completion": {
        "gpt2": Accuracy(0.2955, 0.2859),
        "gpt2-medium": Accuracy(0.3752, None),
        "gpt2-large": Accuracy(0.4320, None),
        "gpt2-xl": Accuracy(0.4893, 0.3842),
    },
    "lm-eval": {"gpt2": Accuracy(0.3114, 0.2892), "gpt2-xl": Accuracy(0.5089, 0.4004)},
}

# The two conventions in words, for whoever reads a number.
STYLES = {
    "completion": "text as it is; acc_norm: lowest mean loss per token, acc: summed",
    "lm-eval": "text cleaned as by lm-evaluation-harness; acc_norm: lowest loss per character, acc: summed",
}


def standard_error(share: float, num_examples: int) -> float:
    """Of a share of right answers, by the binomial distribution."""
    return math.sqrt(share * (1 - share) / num_examples)


def summary(style: str, num_correct_norm: int, num_correct: int, num_examples: int, model_name: str) -> str:
    """The accuracies in three lines, the published ones beside them where the model is one of OpenAI's."""
    published = PUBLISHED_GPT2[style].get(model_name, Accuracy(None, None))
    lines = [f"{style} style ({STYLES[style]}), {num_examples:,} examples"]
    for name, correct, other in (
        ("acc_norm", num_correct_norm, published.acc_norm),
        ("acc", num_correct, published.acc),
    ):
        share = correct / num_examples
        line = f"  {name:8} {share:.4f} +- {standard_error(share, num_examples):.4f}"
        lines.append(line + (f"   published for {model_name}, all 10,042: {other:.4f}" if other else ""))
    return "\n".join(lines)


def batch_records(batch, loss_sum, by_sum, by_mean, style: str) -> list[dict[str, Any]]:
    """What `--output` holds of each example.

    Args:
        batch: R examples, with index, label and divisors.
        loss_sum: (R, 4) summed losses of their endings, in nats.
        by_sum, by_mean: (R,) endings with the lowest summed and with the lowest divided loss.
    """
    return [
        {
            "index": example.index,
            "label": example.label,
            "style": style,
            "loss_sum": losses.round(6).tolist(),
            "loss_mean": (losses / example.divisors).round(6).tolist(),  # per character in lm-eval style
            "prediction": int(prediction),
            "prediction_norm": int(prediction_norm),
        }
        for example, losses, prediction, prediction_norm in zip(batch, loss_sum, by_sum, by_mean)
    ]


def merge_styles(records: dict[str, list[dict]]) -> list[dict]:
    """One record an example; of two styles the second one goes under its name, without what both have."""
    first, *others = records
    merged = [dict(record) for record in records[first]]
    for style in others:
        for record, other in zip(merged, records[style]):
            shared = ("index", "label", "style")
            record[style] = {key: value for key, value in other.items() if key not in shared}
    return merged


def check_writable(path: Path) -> None:
    """Raises UserError now if `write_results` could not write later; an existing file is untouched."""
    if path.exists() and not path.is_file():  # a folder, or /dev/null: the rename would fail, or replace it
        raise UserError(f"cannot write {path}: it is not a plain file", "give --output another file")
    probe = temporary_name(path)
    try:
        probe.open("w").close()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "give --output another file") from error


def write_results(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON line a record; the file appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with whole_file(path) as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "give --output another file") from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `write_results` wrote, with labels. Raises UserError with file and line."""
    hint = "give two files that --output wrote"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", hint) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            values = [record[key] for key in ("index", "label", "prediction", "prediction_norm")]
            if not all(isinstance(value, int) for value in values):
                raise ValueError("no label or no prediction")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a scored example ({error})", hint) from error
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty", hint)
    return records


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's paired test.

    Only examples that one model gets right and the other wrong tell them apart. If neither is better, each of
    these is a fair coin: the p-value is the chance of a split at least as uneven. Whole numbers until the
    last division, so any count is exact.
    """
    tosses = only_a + only_b
    ways = tail = 1  # to get no heads; from each number of heads follows the next
    for heads in range(min(only_a, only_b)):
        ways = ways * (tosses - heads) // (heads + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**tosses)


def compare(path_a: Path, path_b: Path) -> str:
    """Both files' accuracies and McNemar's test, in words.

    Raises:
        UserError: a file is malformed, or they are not about the same examples in the same style.
    """
    a, b = read_results(path_a), read_results(path_b)
    same = {"index": "the same split and --limit", "label": "the same data", "style": "the same --style"}
    for key, hint in same.items():
        found_a, found_b = ([record.get(key) for record in records] for records in (a, b))
        if found_a != found_b:
            what = f"{len(a)} and {len(b)} examples" if len(a) != len(b) else f"column {key!r} differs"
            raise UserError(f"cannot compare {path_a} with {path_b}: {what}", f"score both with {hint}")
    lines = [f"{len(a):,} examples, {a[0].get('style')} style; A = {path_a}, B = {path_b}"]
    for name, key in (("acc_norm", "prediction_norm"), ("acc", "prediction")):
        right_a, right_b = ([record[key] == record["label"] for record in records] for records in (a, b))
        shares = [sum(right) / len(a) for right in (right_a, right_b)]
        errors = [standard_error(share, len(a)) for share in shares]
        only_a = sum(x and not y for x, y in zip(right_a, right_b))
        only_b = sum(y and not x for x, y in zip(right_a, right_b))
        lines.append(
            f"{name:8} A {shares[0]:.4f} +- {errors[0]:.4f}   B {shares[1]:.4f} +- {errors[1]:.4f}   "
            f"B - A {shares[1] - shares[0]:+.4f}   only A right {only_a}, only B right {only_b}   "
            f"McNemar p = {mcnemar_p_value(only_a, only_b):.4g}"
        )
    return "\n".join(lines)
