"""Checkpoints: written so that a crash leaves the old file or the new one, and read so that a bad file cannot
do harm.

`model_{step:05d}.pt` holds what one shares: weights, configuration, tokenizer. It holds plain values and
tensors only, so
`torch.load(..., weights_only=True)` reads it, and its names carry no `module.` or `_orig_mod.`.
"""

from __future__ import annotations

import os
import platform
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError

FORMAT, VERSION = "minigpt-ckpt", 1


def model_path(log_dir: Path, step: int) -> Path:
    """Where the model after `step` updates is saved."""
    return log_dir / f"model_{step:05d}.pt"


def newest_model_file(log_dir: Path) -> Path | None:
    """The model of the latest step in a log directory, or None."""
    found = [
        (int(path.stem[len("model_") :]), path)
        for path in log_dir.glob("model_*.pt")
        if path.stem[6:].isdigit()
    ]
    return max(found)[1] if found else None


def versions() -> dict[str, str]:
    """What computed the weights, for the record."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_model_file(
    path: Path, model: torch.nn.Module, config: dict, step: int, val_loss: float | None, tokenizer_state: dict
) -> None:
    """Writes a model to share.

    Args:
        path: where it appears when it is complete.
        model: the raw module, neither compiled nor wrapped.
        config: GPTConfig's fields.
        step: updates done.
        val_loss: the last one measured, in nats.
        tokenizer_state: what `tokenizer_from_state` reads.

    Raises:
        OSError, RuntimeError: the disk is full or the like; an earlier file of the name is untouched.
    """
    save_atomically(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": model.state_dict(),
            "config": config,
            "step": step,
            "val_loss": val_loss,
            "tokenizer": tokenizer_state,
            "versions": versions(),
        },
        path,
    )


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save to a temporary name, flushed to the disk and read back, then renamed over `path`."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        damaged = zipfile.ZipFile(temporary).testzip()
        if damaged is not None:
            raise OSError(f"{temporary} came back damaged from the disk ({damaged})")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename survives a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_model_file(path: str | Path) -> dict[str, Any]:
    """Reads a model file.

    Returns:
        dict with model (state dict), config (dict), step, val_loss, tokenizer (state dict) and versions.

    Raises:
        UserError: missing, damaged, or not a checkpoint of this project.
    """
    content = load_checked(Path(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project", "give a model_*.pt that train_gpt.py wrote"
        )
    return content


def load_checked(path: Path) -> Any:
    """torch.load of plain values and tensors, after the archive's checksums have been compared.

    torch.load itself compares none: a flipped byte would load as a wrong weight.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}", "python train_gpt.py writes log/model_*.pt; ls log/ lists them"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
        damaged = "no archive"
    if damaged is not None:
        raise UserError(
            f"checkpoint {path} is damaged (truncated or not fully copied)",
            "copy it again or use an earlier one",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError for code, RuntimeError for other archives
        # In our words: torch's would suggest to switch the protection off.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"contains code ({code.group(1)})" if code else "is no archive of plain values and tensors"
        raise UserError(
            f"refusing to load {path}: {what}", "use a checkpoint that train_gpt.py wrote"
        ) from error
