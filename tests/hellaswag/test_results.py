"""HellaSwag's results: files that appear complete or not at all, and McNemar's test of two of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.conftest import run
from utils.command_line import UserError
from utils.hellaswag.results import compare, mcnemar_p_value, write_results


def results_file(path: Path, correct: list[bool], style: str = "completion") -> Path:
    """Writes a file of records with the given answers; all labels are 1."""
    records = [
        {"index": i, "label": 1, "style": style, "prediction": 1, "prediction_norm": 1 if is_correct else 0}
        for i, is_correct in enumerate(correct)
    ]
    write_results(path, {"completion": records})
    return path


def test_mcnemar_p_values_are_those_of_a_coin_toss():
    """Against sums computed by hand, and finite where 2 ** n exceeds a float."""
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(7, 7) == 1.0
    assert mcnemar_p_value(1, 9) == mcnemar_p_value(9, 1) == 2 * (1 + 10) / 1024
    assert mcnemar_p_value(0, 5) == 2 / 32
    assert mcnemar_p_value(2400, 2600) == pytest.approx(
        math.erfc(199 / math.sqrt(5000) / math.sqrt(2)), rel=1e-2
    )


def test_two_result_files_are_compared_example_by_example(tmp_path):
    """Accuracies, standard errors, the two counts that matter and the p-value, also from the shell.

    Files about other examples or in another style, missing or malformed ones are errors.
    """
    a = results_file(tmp_path / "a.jsonl", [True] * 10 + [False] * 10)
    b = results_file(tmp_path / "b.jsonl", [True] * 9 + [False] + [True] * 9 + [False])
    expected = "A 0.5000 +- 0.1118   B 0.9000 +- 0.0671   B - A +0.4000   only A right 1, only B right 9"
    assert f"{expected}   McNemar p = 0.02148" in compare(a, b)
    process = run("eval_hellaswag.py", "--compare", a, b)
    assert process.returncode == 0 and expected in process.stdout
    for other, message in (
        (results_file(tmp_path / "c.jsonl", [True] * 19), "20 and 19 examples"),
        (results_file(tmp_path / "d.jsonl", [True] * 20, "lm-eval"), "column 'style' differs"),
        (tmp_path / "none.jsonl", "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            compare(a, other)
    expected = compare(a, b)
    a.write_bytes(b"\xef\xbb\xbf" + a.read_bytes().replace(b"\n", b"\r\n") + b"\n \n")
    assert compare(a, b) == expected
    a.write_text(a.read_text(encoding="utf-8-sig").rstrip() + "\n{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:21: not a scored example"):
        compare(a, b)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    """A failure while writing leaves the earlier file and nothing beside it."""
    path = results_file(tmp_path / "a.jsonl", [True])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, {"completion": [{"index": 0}, {"index": 1, "label": object()}]})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
