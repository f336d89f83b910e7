"""Scripts started with a Python that has no PyTorch, such as that of the system: what to type instead."""

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def require_packages(*names: str) -> None:
    """Exits with code 2, after an error and a hint, unless these packages are installed."""
    missing = []
    for name in names:
        try:
            found = find_spec(name)
        except (ImportError, ValueError):
            found = None
        missing += [] if found else [name]
    if missing:
        what = f"{' and '.join(missing)} not installed in this Python, {sys.executable}"
        print(f"error: {what}\nhint: {how_to_install()}", file=sys.stderr)
        sys.exit(2)


def how_to_install() -> str:
    """A command that makes the project's packages available, for the current folder."""

    def path(name: str) -> str:
        relative = os.path.relpath(ROOT / name)
        return shlex.quote(str(ROOT / name) if relative.startswith("..") else relative)

    if any((ROOT / ".venv").glob("lib/python*/site-packages/torch")) and sys.prefix != str(ROOT / ".venv"):
        return f"activate the environment: source {path('.venv/bin/activate')}"
    install = f"pip install -r {path('requirements.txt')}"
    if sys.prefix != sys.base_prefix:
        return f"{shlex.quote(sys.executable)} -m {install}"
    create, activate = f"python3 -m venv {path('.venv')}", f"source {path('.venv/bin/activate')}"
    return f"{create} && {activate} && {install}"
