"""Checkpoints: written atomically, verified when they are read.

`model_{step:05d}.pt` is the file to share: weights, configuration, tokenizer; `optimizer_{step:05d}.pt` holds
what resuming also needs. Both contain plain values and tensors only, so `torch.load(..., weights_only=True)`
reads them, and parameter names carry no `module.` or `_orig_mod.` prefix.
"""

import errno
import math
import os
import platform
import re
import uuid
import zipfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils import __version__
from utils.command_line import UserError, shown
from utils.console import warn
from utils.files import destination, sync_folder, whole_file
from utils.runtime import check_torch_version
from utils.schema import is_int
from utils.suggestions import similar_file
from utils.text_files import quoted
from utils.weights.file_kinds import WHAT_TO_GIVE, is_zip, refuse
from utils.weights.foreign_checkpoints import conversion_command, convert, is_foreign
from utils.weights.schema import (
    FORMAT,
    MODEL_FILE,
    OPTIMIZERS,
    STATE_FILE,
    VERSION,
    check_moments,
    check_sizes,
    check_weights,
    checked,
)


class Checkpoint(NamedTuple):
    """The two files of a checkpoint."""

    path: Path  # of the model file
    model: dict[str, Any]  # its content, see `load_model_file`
    state: dict[str, Any]  # content of the optimizer file

    def without_tensors(self) -> "Checkpoint":
        """Path, configuration, tokenizer, settings and environment: what decides how a run is built."""
        model = {name: self.model[name] for name in ("config", "tokenizer")}
        state = {name: self.state[name] for name in ("train_args", "environment")}
        return Checkpoint(self.path, model, state)


def model_path(log_dir: Path, step: int) -> Path:
    """The model file of a checkpoint after `step` updates."""
    return log_dir / f"model_{step:05d}.pt"


def state_path(model_file: Path) -> Path:
    """The optimizer file that belongs to a model file."""
    return model_file.with_name(model_file.name.replace("model_", "optimizer_", 1))


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's file, or -1."""
    number = path.stem.partition("_")[2]
    return int(number) if number.isdecimal() else -1


def model_files(log_dir: Path) -> list[Path]:
    """The model files in a log directory, sorted by step."""
    return sorted((path for path in log_dir.glob("model_*.pt") if step_of(path) >= 0), key=step_of)


def best_path(log_dir: Path) -> Path:
    """The file with the weights of the lowest val loss of a run."""
    return log_dir / "model_best.pt"


def saved_step(path: Path) -> float:
    """The step in a model file of any name, without reading its tensors; infinite if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # damaged archives raise many types
        return math.inf


def newest_model_file(log_dir: Path) -> Path | None:
    """The model file of the latest step in a log directory, or None."""
    return next(reversed(model_files(log_dir)), None)


def pair_bytes(num_parameters: int, num_moments: int) -> tuple[int, int]:
    """Bytes of a model file and of its optimizer file: weights and moments, all in float32."""
    return 4 * num_parameters, 4 * num_moments


def checkpoints_to_keep(
    steps: Collection[int], keep_pairs: int, keep_every: int, final_step: int
) -> tuple[set[int], set[int]]:
    """The retention rule: (steps whose model file is kept, steps whose optimizer file is kept).

    Of `steps`, those of checkpoints with both files, the newest `keep_pairs` (at least 1) keep both. The
    final step and the multiples of `keep_every` (0: none) keep their models.
    """
    newest = set(sorted(steps)[-keep_pairs:])
    milestones = {step for step in steps if step == final_step or (keep_every and step % keep_every == 0)}
    return newest | milestones, newest


def prune(log_dir: Path, keep_pairs: int, keep_every: int, final_step: int, resumed: Path | None) -> None:
    """Deletes the checkpoints that `checkpoints_to_keep` does not list; call it after a new one is written.

    The checkpoint `resumed`, a model file in `log_dir`, is kept too, and so is every model file without
    an optimizer file. An optimizer file without a model file is deleted.
    """
    states = {step_of(path): path for path in log_dir.glob("optimizer_*.pt") if step_of(path) >= 0}
    pairs = [step for step in states if model_path(log_dir, step).exists()]
    models, optimizers = checkpoints_to_keep(pairs, keep_pairs, keep_every, final_step)
    protected = set() if resumed is None else {step_of(resumed)}
    for step in states.keys() - optimizers - protected:
        if step not in models:
            model_path(log_dir, step).unlink(missing_ok=True)
        states[step].unlink()


def versions() -> dict[str, str]:
    """Versions of the software that computes the weights."""
    libraries = {"torch": str(torch.__version__), "numpy": np.__version__}
    return {"mini-gpt": __version__, "python": platform.python_version(), **libraries}


def model_content(
    model: torch.nn.Module, config: dict, step: int, val_loss: float | None, tokenizer_state: dict
) -> dict[str, Any]:
    """The content of a model file, of the raw module, neither compiled nor wrapped.

    `config` holds the fields of its GPTConfig, `step` is the number of completed updates, `val_loss` the last
    one measured, in nats, and `tokenizer_state` what `tokenizer_from_state` reads.
    """
    config = {name: value for name, value in config.items() if value}  # dropout only where there is some
    content = dict(model=model.state_dict(), config=config, step=step, val_loss=val_loss)
    return dict(content, tokenizer=tokenizer_state, versions=versions())


def save_pair(log_dir: Path, step: int, model: dict[str, Any], state: dict[str, Any]) -> Path:
    """Writes both files of a checkpoint, marked with a common random id; returns the model file.

    The optimizer file appears first, so a model file that has one is complete and can be resumed from. Raises
    OSError or RuntimeError if the disk is full, for example; earlier files are then untouched.
    """
    head, path = _new_head(), model_path(log_dir, step)
    save_atomically({state_path(path): {**head, **state}, path: {**head, **model}})
    return path


def save_model(path: Path, model: dict[str, Any]) -> None:
    """Writes a model file alone, from which a run cannot be resumed. Raises as `save_pair` does."""
    save_atomically({path: {**_new_head(), **model}})


def _new_head() -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "save_id": uuid.uuid4().hex}


def save_atomically(contents: dict[Path, dict[str, Any]]) -> None:
    """Writes several files with torch.save; none appears before all are flushed and have been read back.

    They appear in the order of `contents`, each on disk before the next: only a kill between two renames can
    leave a new file beside an old one.
    """
    with ExitStack() as renames:  # last in, first out
        for path, content in reversed(contents.items()):
            target = destination(path)
            if target is None:
                raise OSError(f"{path} is not a regular file, so it could not be read back")
            renames.callback(sync_folder, target.parent)
            file = renames.enter_context(whole_file(path, "wb"))
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            with zipfile.ZipFile(file.name) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise OSError(f"{path} was not written correctly: checksum mismatch in {damaged}")


def newest_complete(log_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that can be resumed from, or None if there is no model file.

    Those without an optimizer file are skipped, damaged ones with a warning. Raises UserError if there are
    model files, but none can be resumed from.
    """
    paths = model_files(log_dir)
    for path in reversed(paths):
        if state_path(path).exists():
            try:
                return load_pair(path)
            except UserError as error:
                warn(f"{error}; trying the one before")
    if not paths:
        return None
    what = f"none of the {len(paths)} model files in {log_dir} can be resumed from"
    hint = "restore one together with its optimizer_*.pt, or start a new run without --resume"
    raise UserError(f"{what} (damaged, or without their optimizer_*.pt)", hint)


def load_pair(path: Path) -> Checkpoint:
    """Reads both files of a checkpoint. Raises UserError unless both are intact and were saved together."""
    model, twin = load_model_file(path), state_path(path)
    if twin == path:  # a file is never its own twin
        what = f"{path} is not named model_*.pt, so its optimizer file cannot be found"
        hint = "if it has one, name both model_STEP.pt and optimizer_STEP.pt, side by side"
        raise UserError(what, f"{hint}; else start a new run from the weights: --init-from {quoted(path)}")
    if not twin.exists():
        hint = "restore it beside the model file, or start a new run from the weights with --init-from"
        raise UserError(f"{path} has no optimizer file {twin.name} beside it to resume from", hint)
    content = load_checked(twin)
    if not _is_ours(content) or "save_id" not in model:
        what = f"{twin if 'save_id' in model else path} is not a checkpoint of this project"
        raise UserError(what, "resume from another one, or start from the weights with --init-from")
    state = checked(content, STATE_FILE, twin)
    for key in ("save_id", "step", "tokenizer"):
        if model[key] != state[key]:
            what = f"{path} and {twin.name} were not saved together: they differ in {key}"
            raise UserError(what, "resume from another checkpoint")
    return Checkpoint(path, model, state)


def check_fits(
    checkpoint: Checkpoint, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """Raises UserError unless all tensors have the shapes that a run's model and optimizers need."""
    state = checkpoint.state
    check_weights(checkpoint.path, checkpoint.model["model"], model.state_dict())
    # Until the first update that was not skipped, optimizers have no state.
    may_be_empty = state["spikes"]["num_skipped"] >= state["step"]
    for key, optimizer in optimizers.items():
        groups = optimizer.param_groups
        check_moments(state_path(checkpoint.path), key, state.get(key), groups, may_be_empty=may_be_empty)


def load_model_file(path: str | Path) -> dict[str, Any]:
    """The content of a model file of ours, or of nanoGPT, as `MODEL_FILE` describes it.

    Raises UserError if it is missing, damaged, or contradicts the schema or the memory of this machine.
    """
    path = Path(path)
    content = load_checked(path)
    if not _is_ours(content) and is_foreign(content):
        return convert(content, path)
    if not _is_ours(content):
        hint = "give a model_*.pt that train_gpt.py wrote"
        raise UserError(f"{path} is not a checkpoint of this project", hint)
    if not is_int(content.get("version"), VERSION, VERSION):
        what = f"{path} has format version {shown(content.get('version'))} (expected {VERSION})"
        raise UserError(what, "use the version of this project that wrote it")
    if "model" not in content and content.keys() & OPTIMIZERS.keys():
        raise optimizer_file(path)
    saved = checked(content, MODEL_FILE, path)
    check_sizes(saved["config"], path)
    return saved


def optimizer_file(path: Path) -> UserError:
    """The error for an optimizer file that is given as a model; the hint names the model file beside it."""
    model = path.with_name(path.name.replace("optimizer_", "model_", 1))
    is_there = model != path and model.exists()
    hint = f"give the model file beside it: {quoted(model)}" if is_there else "give a model_*.pt"
    return UserError(f"{path} is an optimizer file, not a checkpoint's model file", hint)


def missing_file(path: Path) -> UserError:
    """The error for a missing checkpoint; the hint names one of the same step or a similar name."""
    models = [model for model in model_files(path.parent) if model != path]  # a broken link is listed
    close = next((model for model in models if step_of(model) == step_of(path)), None)
    if close is None and step_of(path) < 0:  # another step is no typing error
        close = similar_model(path)
    hint = "python train_gpt.py writes log/model_*.pt"
    if close or models:
        hint = f"did you mean {quoted(close)}?" if close else f"the newest there is {quoted(models[-1])}"
    return UserError(f"no checkpoint at {path}", hint)


def similar_model(path: Path) -> Path | None:
    """A .pt file or a folder that is written like a path that does not exist, or None."""
    close = similar_file(path)
    return close if close and (close.suffix == ".pt" or close.is_dir()) else None


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_checked(path: Path) -> Any:
    """torch.load of plain values and tensors onto the CPU, after the archive's checksums were verified.

    Raises UserError if the file is missing, damaged, of another kind or holds code, or if PyTorch is too old
    to refuse code.
    """
    check_torch_version()
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint", WHAT_TO_GIVE)
    if not path.is_file():
        raise missing_file(path)
    _check_is_intact(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError for code, RuntimeError for other archives
        # Without torch's message, which suggests weights_only=False.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it contains code ({code[1]})" if code else "it is not an archive of plain values and tensors"
        hint = "use a checkpoint that train_gpt.py wrote"
        if code and code[1] == "__main__.GPTConfig":
            what = "its config is a pickled object (__main__.GPTConfig)"
            hint = f"if build-nanogpt wrote it, convert it: {conversion_command(path)}"
        raise UserError(f"refusing to load {path}: {what}", hint) from error


def _check_is_intact(path: Path) -> None:
    """Raises UserError unless it is a zip archive with the right checksums; torch.load verifies none."""
    try:
        if not is_zip(path) and not zipfile.is_zipfile(path):
            raise refuse(path)
        is_intact = _has_right_checksums(path)
    except OSError as error:
        what = f"cannot read checkpoint {path}: {error.strerror or error}"
        raise UserError(what, "check its permissions and the disk") from error
    if not is_intact:
        what = f"checkpoint {path} is damaged (truncated or not fully copied)"
        raise UserError(what, "copy it again or use an earlier one")


def _has_right_checksums(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            # No checksum covers the directory bit of an entry, whose data torch would not read.
            files = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
            return archive.testzip() is None and not any(entry.external_attr & 0x10 for entry in files)
    except Exception as error:  # damaged headers raise many types, EINVAL for a negative offset
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        return False
