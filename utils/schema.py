"""What the content of a file must be, as data: schemas, and the rules of plain values that they consist of.

A schema is a `Rule`; a dict of schemas by key, which leaves out unknown keys (a later version may add some)
unless it is `Exactly`; `[schema]`, for a list of any length; a tuple of schemas, for a list of that length; a
function that chooses the schema of a dict by its content.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from utils.command_line import LARGEST_INT, LARGEST_NUMBER, shown


class Rule(NamedTuple):
    """What a value must be."""

    expected: str  # continues "expected"
    holds: Callable[[Any], bool]


class Optional(NamedTuple):
    """The schema of a key that may be missing."""

    schema: Any


class Exactly(dict[str, "Schema | Optional"]):
    """A schema of a dict that has no other keys."""


Schema = Rule | Mapping[str, Any] | list["Schema"] | tuple["Schema", ...] | Callable[[dict], "Schema"]


def find_problem(value: Any, schema: Schema, place: str = "") -> str | None:
    """Says at which key a value differs from its schema, and how; None if it does not."""
    here = f"key {place}" if place else "the content"
    if callable(schema):
        schema = schema(value) if isinstance(value, dict) else a_dict
    if isinstance(schema, Rule):
        return None if schema.holds(value) else f"{here} is {shown(value)} (expected {schema.expected})"
    if not isinstance(schema, Mapping):
        length = f" of {len(schema)}" if isinstance(schema, tuple) else ""
        if not isinstance(value, list) or (length and len(value) != len(schema)):
            return f"{here} is {shown(value)} (expected a list{length})"
        schemas = schema if length else schema * len(value)
        problems = (find_problem(*pair, f"{place}[{i}]") for i, pair in enumerate(zip(value, schemas)))
        return next(filter(None, problems), None)
    if not isinstance(value, dict):
        return find_problem(value, a_dict, place)
    for key, inner in schema.items():
        name = f"{place}.{key}" if place else key
        is_optional = isinstance(inner, Optional)
        if key not in value:
            if not is_optional:
                return f"key {name} is missing"
        elif problem := find_problem(value[key], inner.schema if is_optional else inner, name):
            return problem
    unknown = [shown(key) for key in value if key not in schema] if isinstance(schema, Exactly) else []
    return f"{here} has the unknown {', '.join(unknown[:3])}" if unknown else None


def check(value: Any, schema: Schema, place: str = "") -> None:
    """Raises ValueError with what `find_problem` says."""
    if problem := find_problem(value, schema, place):
        raise ValueError(problem)


# ------------------------------------------------------------------------------------------------------------
# Values


def is_int(value: Any, lowest: int = 0, largest: int = LARGEST_INT) -> bool:
    """Whether it is a whole number in this range; True and False are not."""
    return type(value) is int and lowest <= value <= largest


def is_number(value: Any) -> bool:
    """Whether it is a finite number that is not too large to calculate with."""
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether it is None, a number, a text, or a list or dict of these, nested at most `depth` deep."""
    if isinstance(value, (list, tuple, dict)):
        values = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(is_plain(entry, depth - 1) for entry in values)
    return value is None or isinstance(value, (bool, str)) or is_number(value)


count = Rule("a whole number, zero or above", is_int)
positive = Rule("a whole number above zero", lambda value: is_int(value, 1))
number = Rule("a finite number", is_number)
duration = Rule("a number of seconds", lambda value: is_number(value) and value >= 0)
text = Rule("a text", lambda value: isinstance(value, str))
a_list = Rule("a list", lambda value: isinstance(value, list))
a_dict = Rule("a dict", lambda value: isinstance(value, dict))
plain_dict = Rule(
    "a dict of plain values",
    lambda value: isinstance(value, dict) and all(map(text.holds, value)) and is_plain(value),
)


def whole(lowest: int, largest: int = LARGEST_INT) -> Rule:
    """A whole number in this range."""
    expected = f"a whole number from {lowest:,} to {largest:,}"
    return Rule(expected, lambda value: is_int(value, lowest, largest))


def one_of(*constants: str | int) -> Rule:
    """One of these values, of the same type: True is not 1."""
    expected = " or ".join(map(repr, constants))
    return Rule(expected, lambda value: any(type(value) is type(c) and value == c for c in constants))


def or_none(rule: Rule) -> Rule:
    """The same rule for a value that may be None."""
    return Rule(f"{rule.expected} or None", lambda value: value is None or rule.holds(value))


def variants(key: str, **schemas: Mapping[str, Schema]) -> Callable[[dict], Schema]:
    """A dict that has one of these names under `key`, and else exactly what that name's schema says."""
    name = one_of(*schemas)
    return lambda value: Exactly({key: name, **(schemas[value[key]] if name.holds(value.get(key)) else {})})
