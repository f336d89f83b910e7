"""Finds the model that a name refers to: a GPT-2 size, a checkpoint, a run's or a transformers folder."""

import math
import os
from collections.abc import Collection
from pathlib import Path

from utils.command_line import UserError
from utils.console import say
from utils.distributed import environment_rank
from utils.suggestions import similar
from utils.text_files import quoted
from utils.weights.checkpoint import (
    best_path,
    missing_file,
    newest_model_file,
    optimizer_file,
    saved_step,
    similar_model,
    step_of,
)
from utils.weights.file_kinds import WHAT_TO_GIVE


def find_model(source: str | Path, sizes: Collection[str]) -> str | Path:
    """What `source` refers to, without reading it: one of the `sizes`, a model file or a transformers folder.

    The folder of a run stands for its checkpoint of the highest step, which is named on stderr. Raises
    UserError for a name that matches nothing, and for an optimizer file.
    """
    if str(source) in sizes:
        return str(source)
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises where a folder may not be read
        return path if (path / "config.json").exists() else newest_of_run(path)
    if os.path.exists(path):
        if path.name.startswith("optimizer_") and step_of(path) >= 0:
            raise optimizer_file(path)
        return path
    if path.suffix == ".pt" or os.sep in str(source):
        if path.name in sizes and not os.path.isdir(path.parent):  # as openai-community/gpt2 of the hub
            raise UserError(f"no checkpoint at {path}", f"did you mean {path.name}?")
        raise missing_file(path)
    close = similar(path.name, sizes) or similar_model(path)
    meant = f"did you mean {quoted(close)}? " if close else ""
    hint = f"{meant}or give a checkpoint (log/model_*.pt) or a transformers folder"
    raise UserError(f"unknown model {str(source)!r}; choose {', '.join(sizes)}", hint)


def newest_in(folder: Path) -> Path | None:
    """The checkpoint of the highest step in the folder of a run, else its model_best.pt, else None."""
    best = best_path(folder)
    return newest_model_file(folder) or (best if best.exists() else None)


def newest_of_run(folder: Path) -> Path:
    """The checkpoint of the highest step in the folder of a run. Raises UserError if there is none.

    Names it on stderr, with model_best.pt if that is of another step.
    """
    best, path = best_path(folder), newest_in(folder)
    if path is None:
        runs = sorted({file.parent for file in folder.glob("*/model_*.pt")})
        hint = f"it holds runs: give {' or '.join(map(quoted, runs[:4]))}" if runs else WHAT_TO_GIVE
        what = (
            f"{folder} is a folder without config.json, so not a transformers folder, and without model_*.pt"
        )
        raise UserError(what, hint)
    text = f"model: {path}"
    step = saved_step(best) if best.exists() else math.inf  # infinite also for a damaged file
    if path != best and step not in (step_of(path), math.inf):
        text += f" (the lowest val loss was at step {step}: {best})"
    if environment_rank() == 0:
        say(text, stream="stderr", wrap=False)
    return path


def newest_run(root: Path) -> Path | None:
    """Of log/ and the folders in runs/, the one with the newest checkpoint; None if there is none."""
    folders = (root / "log", *(root / "runs").glob("*"))
    newest = {folder: path for folder in folders if (path := newest_in(folder))}
    return max(newest, key=lambda folder: newest[folder].stat().st_mtime, default=None)
