"""The layout of the project: imports go downwards only, and some facts have one home.

Read with ast from the sources, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = {"train_gpt", "generate", "eval_hellaswag", "build_fineweb_edu_shards"}
# A package may import packages of a lower number, and the files in the root of utils.
LEVELS = {"shards": 1, "weights": 1, "hellaswag": 2, "training": 3}
VOCABULARY = ("50256", "50257", "50304")

UTILS = sorted((ROOT / "utils").rglob("*.py"))
SOURCES = [*sorted(ROOT.glob("*.py")), *UTILS]


def package_of(path: Path, root: Path = ROOT) -> str | None:
    """The package of utils that a module belongs to; None for a file in the root of utils."""
    parts = path.relative_to(root / "utils").parts
    return parts[0] if len(parts) > 1 else None


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """All imports in a tree: (statement, dotted name); `from a import b` is a.b, `from . import b` is .b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def forbidden_imports(source: str, package: str | None) -> list[str]:
    """Imports of a module of utils that do not go downwards."""
    tree = ast.parse(source)
    found = []
    for _, name in imported(tree):
        parts = name.split(".")
        if name.startswith(".") or parts[0] in SCRIPTS:  # a relative import hides its target
            found.append(name)
        elif parts[0] == "utils" and len(parts) > 1 and parts[1] in LEVELS and parts[1] != package:
            if package is None or LEVELS[parts[1]] >= LEVELS[package]:
                found.append(name)
    return found


def model_imports(source: str) -> list[int]:
    """Lines that import gpt_model neither under `if TYPE_CHECKING:` nor inside a function `main`."""
    tree = ast.parse(source)
    allowed = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (isinstance(node, ast.FunctionDef) and node.name == "main")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return [
        statement.lineno
        for statement, name in imported(tree)
        if name.split(".")[0] == "gpt_model" and id(statement) not in allowed
    ]


def untyped_parameters(source: str) -> list[str]:
    """Parameters without an annotation, and those named `run` that are no `Run`, of functions and methods."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
            found += [
                f"{node.name}({argument.arg})"
                for argument in every
                if (argument.annotation is None and argument.arg not in ("self", "cls", "ctx"))
                or (argument.arg == "run" and ast.unparse(argument.annotation) != "Run")
            ]
    return found


def vocabulary_literals(source: str) -> list[str]:
    """Numbers of GPT-2's vocabulary in code: as integers, or inside texts that are no docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in docstrings
        if any(number in str(node.value) for number in VOCABULARY)
    ]


# ------------------------------------------------------------------------------------------------------------
# The project


def test_every_folder_of_utils_is_walked():
    """The files of all packages are found, and every package has a level."""
    packages = {path.parent.name for path in (ROOT / "utils").rglob("__init__.py")} - {"utils"}
    assert packages == LEVELS.keys()
    assert {package_of(path) for path in UTILS} == {None, *LEVELS}
    assert len(UTILS) > 30


@pytest.mark.parametrize("path", UTILS, ids=lambda path: str(path.relative_to(ROOT)))
def test_utils_import_downwards_only(path):
    """Root files no package, packages lower ones, nobody a script; gpt_model for types and programs only."""
    source = path.read_text(encoding="utf-8")
    assert forbidden_imports(source, package_of(path)) == []
    assert model_imports(source) == []


@pytest.mark.parametrize("path", UTILS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_parameter_in_utils_is_annotated(path):
    """And what is named `run` is the class of that name, no loose bundle."""
    assert untyped_parameters(path.read_text(encoding="utf-8")) == []


def test_the_numbers_of_the_vocabulary_have_one_home():
    """50256, 50257 and 50304 are in the code of utils/tokenizer.py and of no other module."""
    home = ROOT / "utils" / "tokenizer.py"
    found = {path: vocabulary_literals(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(found[home]) >= 3
    elsewhere = {
        str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines and path != home
    }
    assert elsewhere == {}


# ------------------------------------------------------------------------------------------------------------
# The checks themselves


@pytest.mark.parametrize(
    ("package", "source", "allowed"),
    [
        (None, "from utils.files import locked", True),
        (None, "from utils.shards.format import MAGIC", False),
        (None, "def f():\n    import utils.training.flags", False),
        ("shards", "from utils.shards import format", True),
        ("shards", "from utils.weights.checkpoint import step_of", False),
        ("weights", "from utils import shards", False),
        ("hellaswag", "from utils.weights.checkpoint import step_of", True),
        ("hellaswag", "from utils.training.flags import Flags", False),
        ("training", "from utils.hellaswag import results", True),
        ("training", "def f():\n    from train_gpt import update", False),
        ("training", "import generate", False),
        ("training", "from . import flags", False),
    ],
)
def test_an_import_upwards_is_found(package, source, allowed):
    """Also inside functions, of whole packages, and relative ones."""
    assert (forbidden_imports(source, package) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("if TYPE_CHECKING:\n    from gpt_model import GPT", True),
        ("def main():\n    from gpt_model import GPT", True),
        ("from gpt_model import GPT", False),
        ("def load():\n    import gpt_model", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import gpt_model", False),
    ],
)
def test_an_import_of_the_model_is_found(source, allowed):
    """Unless it is for types, or for a program's `main`."""
    assert (model_imports(source) == []) is allowed


def test_a_missing_annotation_is_found():
    """Of every kind of parameter; self, cls and ctx need none; `run` is found even if it is annotated."""
    source = (
        "class A:\n    def f(self, a, /, b: int, *c, d=1, **e): ...\n    def g(cls, ctx): ...\n"
        "def h(run: int):\n    def inner(x): ..."
    )
    names = ["f(a)", "f(d)", "f(c)", "f(e)", "h(run)", "inner(x)"]
    assert sorted(untyped_parameters(source)) == sorted(names)


def test_a_vocabulary_number_is_found():
    """As a number or in a text; not in a docstring, a comment or a longer number's neighbour 50258."""
    source = (
        '"""Of 50257 tokens."""\nA = 50304  # 50304\nB = "50_256 or 50256"\nC = f"{A} of 50257"\nD = 50258'
    )
    assert [line.split(":")[0] for line in vocabulary_literals(source)] == ["line 2", "line 3", "line 4"]
