"""What the figures of every part begin with, and the file that --json names."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

from utils.command_line import UserError
from utils.files import whole_file
from utils.runtime import device_name


def header(part: str) -> dict[str, Any]:
    """Part, date, versions and processor of a measurement."""
    return {
        "part": part,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
    }


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes figures to a file, which appears whole; to none where `path` is None. Raises UserError."""
    if path is None:
        return
    try:
        with whole_file(path) as file:
            file.write(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", "give --json another file"
        ) from error
