"""Schemas: every kind accepts what it describes; a message has the key, the value and what was expected."""

from __future__ import annotations

import pytest

from utils.schema import Exactly, Optional, count, find_problem, one_of, or_none, text, variants

SCHEMA = {
    "done": Optional(or_none(text)),
    "pairs": [(text, count)],
    "head": Exactly(version=one_of(1, 2)),
    "source": variants("kind", files={"path": text}, hub={}),
}
VALID = {"pairs": [["a", 1], ["b", 2]], "head": {"version": 2}, "source": {"kind": "files", "path": "a"}}
PROBLEMS = {
    "key done is 1 (expected a text or None)": {"done": 1},
    "key pairs is a dict of 0 (expected a list)": {"pairs": {}},
    "key pairs[0] is 'ab' (expected a list of 2)": {"pairs": ["ab"]},
    "key pairs[1] is a list of 3 (expected a list of 2)": {"pairs": [["a", 1], ["b", 2, 3]]},
    "key pairs[0][1] is True (expected a whole number, zero or above)": {"pairs": [["a", True]]},
    "key head.version is missing": {"head": {}},
    "key head.version is True (expected 1 or 2)": {"head": {"version": True}},
    "key head has the unknown 'a', 5": {"head": {"version": 1, "a": 1, 5: 2}},
    "key source is None (expected a dict)": {"source": None},
    "key source.kind is missing": {"source": {"path": "a"}},
    "key source.kind is a list of 0 (expected 'files' or 'hub')": {"source": {"kind": []}},
    "key source.path is missing": {"source": {"kind": "files"}},
    "key source has the unknown 'path'": {"source": {"kind": "hub", "path": "a"}},
}


def test_what_a_schema_describes_is_accepted():
    """Also without an optional key, and with unknown ones where the schema is no `Exactly`."""
    for change in ({}, {"done": None}, {"pairs": []}, {"source": {"kind": "hub"}}, {"more": 1}):
        assert find_problem({**VALID, **change}, SCHEMA) is None


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_difference_is_named_with_its_place(problem):
    """The first one."""
    assert find_problem({**VALID, **PROBLEMS[problem]}, SCHEMA) == problem
    assert find_problem([], SCHEMA) == "the content is a list of 0 (expected a dict)"
