"""Checkpoints: a crash while writing leaves the old file or the new one, reading a bad file does no harm.

`model_{step:05d}.pt` holds what one shares: weights, configuration, tokenizer; `optimizer_{step:05d}.pt` what
resuming also needs. Both hold plain values and tensors only, so `torch.load(..., weights_only=True)` reads
them, and names of weights carry no `module.` or `_orig_mod.`.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.distributed import environment_rank
from utils.errors import UserError
from utils.files import sync_folder, temporary_name
from utils.weights.foreign_checkpoints import conversion_command, convert, is_foreign

FORMAT, VERSION = "minigpt-ckpt", 1


def model_path(log_dir: Path, step: int) -> Path:
    """Where the model after `step` updates is saved."""
    return log_dir / f"model_{step:05d}.pt"


def state_path(model_file: Path) -> Path:
    """The twin of a model file: what resuming also needs."""
    return model_file.with_name(model_file.name.replace("model_", "optimizer_", 1))


def model_files(log_dir: Path) -> list[Path]:
    """The models in a log directory, by step."""
    return sorted((path for path in log_dir.glob("model_*.pt") if step_of(path) >= 0), key=step_of)


def newest_model_file(log_dir: Path) -> Path | None:
    """The model of the latest step in a log directory, or None."""
    return next(reversed(model_files(log_dir)), None)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name; -1 if there is none."""
    number = path.stem.partition("_")[2]
    return int(number) if number.isdigit() else -1


def torch_version() -> tuple[int, ...]:
    """Major and minor number of this PyTorch."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def versions() -> dict[str, str]:
    """What computed the weights, for the record."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def model_content(
    model: torch.nn.Module, config: dict, step: int, val_loss: float | None, tokenizer_state: dict
) -> dict[str, Any]:
    """What a model file holds.

    Args:
        model: the raw module, neither compiled nor wrapped.
        config: GPTConfig's fields.
        step: updates done.
        val_loss: the last one measured, in nats.
        tokenizer_state: what `tokenizer_from_state` reads.
    """
    return {
        "model": model.state_dict(),
        "config": config,
        "step": step,
        "val_loss": val_loss,
        "tokenizer": tokenizer_state,
        "versions": versions(),
    }


def save_pair(log_dir: Path, step: int, model: dict[str, Any], state: dict[str, Any]) -> Path:
    """Writes both files of a checkpoint, under one random id.

    The state goes first: a model file that has its twin is a complete point to resume from.

    Raises:
        OSError, RuntimeError: the disk is full or the like; earlier files are untouched.
    """
    head = {"format": FORMAT, "version": VERSION, "save_id": uuid.uuid4().hex}
    path = model_path(log_dir, step)
    save_atomically({state_path(path): {**head, **state}, path: {**head, **model}})
    return path


def free_space(log_dir: Path, model: torch.nn.Module) -> str:
    """Free space beside what a pair needs: weights, two moments, all float32."""
    need = 3 * 4 * sum(p.numel() for p in model.parameters())
    return f"free {shutil.disk_usage(log_dir).free / 1e6:,.1f} MB, need {need / 1e6:,.1f} MB"


def prune(
    log_dir: Path, keep_pairs: int, keep_every: int, final_step: int, resumed_from: Path | None
) -> None:
    """Deletes old checkpoints, after a new one is safe.

    Kept: the newest `keep_pairs` pairs, models at multiples of `keep_every`, the final model, and what this
    run resumed from.
    """
    pairs = [path for path in model_files(log_dir) if state_path(path).exists()]
    recent = set(pairs[-keep_pairs:])
    for state in log_dir.glob("optimizer_*.pt"):
        model = model_path(log_dir, step_of(state))
        if step_of(state) < 0 or model in recent or model == resumed_from:
            continue
        milestone = step_of(state) == final_step or (keep_every and step_of(state) % keep_every == 0)
        if model.exists() and not milestone:
            model.unlink()
        state.unlink()


def newest_complete(log_dir: Path, say=print) -> tuple[Path, dict, dict] | None:
    """The newest checkpoint that can be resumed from, or None; damaged ones are named and passed over.

    Returns:
        (path of the model file, its content, content of its twin).
    """
    for path in reversed(model_files(log_dir)):
        if not state_path(path).exists():
            continue
        try:
            return (path, *load_pair(path))
        except UserError as error:
            say(f"warning: {error}; trying the one before")
    if model_files(log_dir):
        raise UserError(
            f"none of the {len(model_files(log_dir))} model files in {log_dir} can be resumed from "
            "(damaged, or without their optimizer_*.pt)",
            "copy one back with its twin, or start anew without --resume",
        )
    return None


def load_pair(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads both files of a checkpoint. Raises UserError unless both are whole and belong together."""
    model, state = load_model_file(path, warn=False), load_checked(state_path(path))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{state_path(path)} is not a checkpoint of this project", "resume from another one")
    if model.get("save_id") != state.get("save_id"):
        raise UserError(
            f"{path} and {state_path(path).name} were not saved together", "resume from another checkpoint"
        )
    return model, state


def save_atomically(contents: dict[Path, dict[str, Any]]) -> None:
    """torch.save of several files to temporary names, flushed and read back; only then renamed, in order.

    So only a kill between two renames can leave one file of a new pair beside one of the old.
    """
    temporary = {path: temporary_name(path) for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            damaged = zipfile.ZipFile(temporary[path]).testzip()
            if damaged is not None:
                raise OSError(f"{temporary[path]} came back damaged from the disk ({damaged})")
        for path in contents:
            os.replace(temporary[path], path)
            sync_folder(path.parent)
    finally:
        for path in contents:
            temporary[path].unlink(missing_ok=True)


def load_model_file(path: str | Path, warn: bool = True) -> dict[str, Any]:
    """Reads a model file.

    Args:
        warn: print a warning where this PyTorch is known to run code from files that only pretend to be
            plain.

    Returns:
        dict with model (state dict), config (dict), step, val_loss, tokenizer (what `tokenizer_from_state`
        reads) and versions.

    Checkpoints of nanoGPT and build-nanogpt become such a dict, too.

    Raises:
        UserError: missing, damaged, or not a checkpoint that can be read here.
    """
    if warn and environment_rank() == 0 and torch_version() < (2, 10):
        print(
            f"warning: torch {torch.__version__} has known holes in weights_only (CVE-2025-32434 below 2.6, "
            "CVE-2026-24747 below 2.10); only load checkpoints of your own"
        )
    content = load_checked(Path(path))
    if isinstance(content, dict) and content.get("format") == FORMAT and "config" in content:
        if content.get("version") != VERSION:
            what = f"{path} is of format version {content.get('version')} (expected {VERSION})"
            raise UserError(what, "use the version of this project that wrote it")
        return content
    if is_foreign(content):
        return convert(content, Path(path))
    raise UserError(
        f"{path} is not a checkpoint of this project", "give a model_*.pt that train_gpt.py wrote"
    )


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
            # No checksum covers this bit: torch reads nothing into a tensor that is marked as a folder.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            damaged = damaged or next(iter(folders), None)
    except Exception as error:  # damaged headers fail in many ways
        # One of them sends zipfile to a place before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(
                f"cannot read checkpoint {path}: {error.strerror or error}", "look at its owner and its disk"
            ) from error
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
        if code and code.group(1) == "__main__.GPTConfig":
            raise UserError(
                f"refusing to load {path}: its config is a pickled object (__main__.GPTConfig)",
                f"convert it, if it is build-nanogpt's (torch 2.4 or newer): {conversion_command(path)}",
            ) from error
        what = f"contains code ({code.group(1)})" if code else "is no archive of plain values and tensors"
        raise UserError(
            f"refusing to load {path}: {what}", "use a checkpoint that train_gpt.py wrote"
        ) from error
