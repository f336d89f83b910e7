"""Started without PyTorch, from another folder or by its path: a script works, or says what to type."""

from __future__ import annotations

import shlex
import sys

import pytest

from tests.conftest import ROOT, run
from utils import installation

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "gpt_model.py")
PROGRAMS = ("utils/training/plotting.py", "utils/training/report.py", "utils/weights/export.py")


@pytest.mark.parametrize("script", [*SCRIPTS, *PROGRAMS])
def test_a_python_without_torch_is_answered_in_two_lines(script):
    """Exit code 2, the Python's path, and a command; -S is a Python without any installed package."""
    process = run("-S", ROOT / script, "--help")
    error, hint = process.stderr.splitlines()
    assert process.returncode == 2 and process.stdout == ""
    assert error == f"error: torch and numpy not installed in this Python, {sys.executable}"
    assert hint.startswith("hint: ") and ("requirements.txt" in hint or "/activate" in hint)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project elsewhere, in whose folder the command is typed, with a Python outside an environment."""
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    return tmp_path


def test_the_command_is_the_one_that_helps(root, monkeypatch):
    """Make an environment; or activate the one that is there; or install into the active one."""
    create = "python3 -m venv .venv && source .venv/bin/activate && pip install -r requirements.txt"
    assert installation.how_to_install() == create
    (root / ".venv" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    assert installation.how_to_install() == create  # an environment without torch
    (root / ".venv" / "lib" / "python3.11" / "site-packages" / "torch").mkdir()
    assert installation.how_to_install() == "activate the environment: source .venv/bin/activate"
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    assert (
        installation.how_to_install() == f"{shlex.quote(sys.executable)} -m pip install -r requirements.txt"
    )


def test_the_command_is_true_in_any_folder(root, monkeypatch):
    """Below the project relative, elsewhere absolute, and quoted."""
    spaced = root / "a b"
    (spaced / "log").mkdir(parents=True)
    monkeypatch.setattr(installation, "ROOT", spaced)
    assert "-r 'a b/requirements.txt'" in installation.how_to_install()
    monkeypatch.chdir(spaced / "log")
    assert f"-r '{spaced}/requirements.txt'" in installation.how_to_install()


@pytest.mark.parametrize(("missing", "named"), [("torch", "torch"), ("numpy", "numpy")])
def test_one_missing_package_is_named(missing, named, capsys, monkeypatch):
    """A package whose import was blocked counts as missing; nothing is said where all are there."""
    installation.require_packages("torch", "numpy")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        installation.require_packages("torch", "numpy")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {named} not installed in ")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.slow
def test_a_program_of_utils_starts_by_its_path_in_any_folder(program, tmp_path):
    """Its own errors, and a hint with the path by which it was started."""
    process = run(ROOT / program, cwd=tmp_path)
    assert process.returncode == 2 and "the following arguments are required" in process.stderr
    assert f"hint: python {ROOT / program} --help lists" in process.stderr
