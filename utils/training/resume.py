"""Saving a run and resuming it: what goes into a checkpoint, and what must not have changed since.

A resumed run is bitwise equal to an uninterrupted one on the same machine, PyTorch version, number of ranks
and of threads, in eager mode; on CUDA with --deterministic.
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.command_line import UserError, format_bytes
from utils.console import announced, say, warn
from utils.distributed import Distributed, restart_count
from utils.files import free_bytes, whole_file
from utils.runtime import device_name
from utils.text_files import quoted
from utils.tokenizer_json import MODELS
from utils.training.data_source import Data
from utils.training.flags import flag_of, settings_of
from utils.training.log_directory import archive_run, check_not_moved, cut_logs_back, log_sizes
from utils.training.optimizers import num_moments
from utils.training.run_log import RunLog
from utils.training.state import Progress, TrainState
from utils.weights.checkpoint import (
    Checkpoint,
    best_path,
    check_fits,
    load_pair,
    model_content,
    model_files,
    newest_complete,
    pair_bytes,
    prune,
    save_model,
    save_pair,
    saved_step,
    versions,
)

if TYPE_CHECKING:
    from gpt_model import GPT

# Resuming compares all settings. Changing one of these would repeat or skip windows, so it is refused.
# Moments of one optimizer mean nothing to another.
REFUSED = ("seq_len", "seed", "shuffle", "optimizer", "recipe")
# What a checkpoint was made with if it is older than the setting.
BEFORE = {"optimizer": "adamw", "recipe": "faithful"}
# Compared by their effect (weights, configuration, token ids, content of the data, device), not by the flag.
BY_CONTENT = ("preset", "data", "tokenizer", "init_from", "n_layer", "n_head", "n_embd", "device", "compile")
# These do not change what is trained: a change is not mentioned. Everything else warns.
HARMLESS = (
    *("log_dir", "hellaswag_dir", "resume", "eval_only", "dry_run", "cost_per_hour", "dist_timeout"),
    *("val_every", "hellaswag_every", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("patience", "max_hours", "log_every", "tensorboard", "wandb", "recompute"),
)


class Identity(NamedTuple):
    """What a checkpoint is compared with before a run continues from it."""

    config: dict[str, Any]  # the model's
    settings: dict[str, Any]  # all flags, as plain values
    tokenizer: dict[str, Any]  # its state
    data: list[dict[str, Any]]  # fingerprints of the train and val streams
    environment: dict[str, Any]  # what results depend on besides the settings


def identity_of(
    args: Namespace, model: "GPT", data: Data, dist: Distributed, dtype: torch.dtype, *, compiled: bool
) -> Identity:
    """The identity of this run; `dtype` and `compiled` are what is in use, because "auto" may change."""
    environment = dict(versions(), world_size=dist.world_size, threads=torch.get_num_threads())
    environment.update(device=device_name(dist.device), computes_in=str(dtype), compiled=compiled)
    fingerprints = [data.train.fingerprint(), data.val.fingerprint()]
    return Identity(
        vars(model.config).copy(), settings_of(args), data.tokenizer.state(), fingerprints, environment
    )


def save_checkpoint(
    state: TrainState, identity: Identity, args: Namespace, log: RunLog, dist: Distributed
) -> bool:
    """Writes a checkpoint of the completed updates; a full disk does not end the run. Returns success."""
    if state.saved == state.moment():
        return True
    log.sync()  # the sizes of the logs are part of the checkpoint
    rng = {"cpu": dist.gather(torch.get_rng_state())}  # nothing here draws from them, but a changed model may
    if dist.device.type == "cuda":
        rng["cuda"] = dist.gather(torch.cuda.get_rng_state(dist.device))
    if dist.is_master:
        content = state.state_dict()
        content.update(tokenizer=identity.tokenizer, data=identity.data, environment=identity.environment)
        content.update(train_args=identity.settings, rng=rng, log=log_sizes(args.log_dir))
        del content["model"]  # it has a file of its own, which is what one shares
        step, model = content["step"], model_of(state, identity)
        del content["val_loss"]  # in the model file
        with failure_warned(f"save step {step}", state, args, log), announced("saving a checkpoint"):
            restore_log_dir(args.log_dir, log)
            state.newest_checkpoint = save_pair(args.log_dir, step, model, content)
            state.saved = state.moment()
            log.say(f"checkpoint: {state.newest_checkpoint}", wrap=False)
            with failure_warned("remove old checkpoints", state, args, log):
                prune(
                    args.log_dir, args.keep_checkpoints, args.keep_every, args.max_steps, state.resumed_from
                )
    dist.barrier()
    state.saved = dist.broadcast(state.saved)
    return state.saved == state.moment()


def save_best(state: TrainState, identity: Identity, args: Namespace, log: RunLog, dist: Distributed) -> None:
    """Writes model_best.pt, the weights of the lowest val loss so far; a full disk does not end the run."""
    if dist.is_master and state.progress.step > 0:  # the initial weights are no result of the run
        with failure_warned("save model_best.pt", state, args, log), announced("saving model_best.pt"):
            restore_log_dir(args.log_dir, log)
            save_model(best_path(args.log_dir), model_of(state, identity))
    dist.barrier()


def why_it_ended(progress: Progress, args: Namespace) -> str:
    """What to say of a run that ended before its last update, because of `--patience`."""
    file = best_path(args.log_dir) if progress.best_step else "the weights that it started from"
    if progress.best_step and saved_step(best_path(args.log_dir)) != progress.best_step:
        file = f"not in {args.log_dir}"  # not saved, archived, or of a run in another log directory
    return (
        f"ended by --patience {args.patience} at step {progress.step} of {args.max_steps}; "
        f"best val loss {progress.best_loss:.4f} at step {progress.best_step}: {file}"
    )


def close_complete_run(state: TrainState, args: Namespace, dist: Distributed) -> None:
    """Says that nothing is left to train; draws and reports again what a kill after the last save lost."""
    if dist.is_master:
        step, model = state.progress.step, state.newest_checkpoint
        say(f"already complete: step {step} of {args.max_steps}, the model is {model}")
        if step < args.max_steps:
            say(why_it_ended(state.progress, args))
    if state.resumed_from is not None:
        with RunLog(args.log_dir, is_master=dist.is_master) as log:
            log.draw_curves()
            log.write_report()


def model_of(state: TrainState, identity: Identity) -> dict[str, Any]:
    """The content of a model file."""
    progress = state.progress
    return model_content(state.model, identity.config, progress.step, progress.val_loss, identity.tokenizer)


@contextmanager
def failure_warned(action: str, state: TrainState, args: Namespace, log: RunLog) -> Iterator[None]:
    """Turns an error of the block into a warning, which `action` names."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        if "unexpected pos" in reason:  # torch.save reports a full disk as a position in the stream
            reason = "the file could not be written completely"
        moments = num_moments(state.model, args.optimizer)
        need = format_bytes(sum(pair_bytes(state.model.num_parameters(), moments)))
        space = f"free {format_bytes(free_bytes(args.log_dir))}, need {need}"
        kept = state.newest_checkpoint or "nothing so far"
        log.warn(f"could not {action}: {reason} ({space}); keeping {kept}")


def restore_log_dir(log_dir: Path, log: RunLog) -> None:
    """Creates the log directory again if it is gone. Raises OSError if that is not possible."""
    if not log_dir.is_dir():
        log.warn(f"{log_dir} was removed or renamed during the run; creating it again")
        log_dir.mkdir(parents=True)


@announced("reading the checkpoint")
def read_checkpoint(name: str, log_dir: Path) -> Checkpoint | None:
    """What --resume names: a file, a folder, or "newest", which is None where the log directory is empty."""
    if name == "newest":
        return newest_complete(log_dir)
    path = Path(name)
    if path.is_dir():
        if checkpoint := newest_complete(path):
            return checkpoint
        path = best_path(path)
        if not path.exists():
            hint = "name the log directory of a run; --resume alone continues that in --log-dir"
            raise UserError(f"{name} has no model_*.pt to resume from", hint)
    if path.name == best_path(log_dir).name:
        hint = f"--resume alone continues from the newest checkpoint; --init-from {quoted(path)}"
        raise UserError(f"{path} holds weights only", f"{hint} starts a new run from these weights")
    return load_pair(path)


def find_checkpoint(args: Namespace, dist: Distributed, reasons: dict[str, str]) -> Checkpoint | None:
    """Reads the checkpoint that --resume asks for; None for a fresh start.

    Its tensors stay on rank 0: they are too large to be broadcast as objects. After a restart by torchrun,
    which repeats the original command, the newest checkpoint takes precedence. Where `--micro-batch` or
    `--compile` are automatic, what the resumed run used is used again. Raises UserError if the checkpoint is
    missing or damaged.
    """
    # A machine whose own workers did not fail has not counted the restart.
    if dist.max_number(restart_count()) and (args.resume is None or model_files(args.log_dir)):
        args.resume = "newest"
    found: list[Checkpoint | None] = [None]

    def read() -> Checkpoint | None:
        found[0] = None if args.resume is None else read_checkpoint(args.resume, args.log_dir)
        return found[0] and found[0].without_tensors()

    outline = dist.on_master(read)  # rank 0's: ranks that decided differently would wait for each other
    if outline is None:
        if args.init_from:
            dist.on_master(lambda: check_not_moved(args.log_dir, args.init_from))
        return None
    settings, used = outline.state["train_args"], outline.state["environment"]
    if args.micro_batch == "auto" and settings.get("micro_batch"):
        args.micro_batch, reasons["micro-batch"] = settings["micro_batch"], "that of the checkpoint"
    same_device = dist.max_number(used.get("device") != device_name(dist.device)) == 0
    if args.compile == "auto" and not args.deterministic and "compiled" in used and same_device:
        args.compile, reasons["compile"] = "on" if used["compiled"] else "off", "as in the resumed run"
    if args.init_from and args.init_from != settings.get("init_from") and dist.is_master:
        warn(f"--init-from {args.init_from} is not read: the weights are those of {outline.path}")
    return found[0] or outline


def start_or_resume(
    state: TrainState, identity: Identity, checkpoint: Checkpoint | None, args: Namespace, dist: Distributed
) -> list[str]:
    """Archives what another run left in the log directory, and restores the checkpoint if there is one.

    Returns lines for the console. Raises UserError if the checkpoint is of another run.
    """

    lines = dist.on_master(lambda: prepare_log_dir(state, identity, checkpoint, args))
    # From rank 0 to every rank: nodes need no shared disk.
    saved = checkpoint and {**checkpoint.model, **checkpoint.state}
    with announced("sending the checkpoint to all processes", shown=dist.is_master):
        saved = dist.broadcast_state(saved)
    if saved:
        state.load_state_dict(saved)
        state.saved = state.moment()
        if has_other_val_tokens(saved, args):
            state.progress.forget_best()
        rng = saved["rng"]
        if len(rng["cpu"]) == dist.world_size:
            torch.set_rng_state(rng["cpu"][dist.rank].cpu())
            if dist.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"][dist.rank].cpu(), dist.device)
    return lines


def prepare_log_dir(
    state: TrainState, identity: Identity, checkpoint: Checkpoint | None, args: Namespace
) -> list[str]:
    """Leaves in the log directory what this run continues, and archives the rest. Returns lines to print.

    Raises UserError if the checkpoint is of another run: nothing has been moved then.
    """
    if checkpoint is None:
        archive_run(args.log_dir)
        return ["nothing to resume in the log directory: a fresh start"] if args.resume else []
    path, step = checkpoint.path, checkpoint.state["step"]
    for warning in check_same_run(identity, checkpoint):
        warn(warning)
    check_fits(checkpoint, state.model, state.optimizers)
    if path.resolve().parent == args.log_dir.resolve():
        other_val = has_other_val_tokens(checkpoint.state, args)
        archive_run(args.log_dir, checkpoints_after=step, with_best=other_val)
        if other_val:
            warn("val losses are measured on other tokens: the best one so far does not compare")
        else:
            restore_best(args.log_dir, checkpoint)
        cut_logs_back(args.log_dir, checkpoint.state["log"])
        state.resumed_from = path
    else:
        archive_run(args.log_dir)
    state.newest_checkpoint = path
    return [f"resumed {path} at step {step}"]


def has_other_val_tokens(saved: dict[str, Any], args: Namespace) -> bool:
    """Whether a run goes on with val losses on another number of tokens than before its checkpoint."""
    other = saved["train_args"].get("val_tokens", args.val_tokens) != args.val_tokens
    return other and saved["step"] < args.max_steps


def restore_best(log_dir: Path, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint with the lowest val loss to model_best.pt, if that does not hold it.

    A kill after the next best one leaves a file of a later step, which is archived, a full disk an older one.
    """
    path, step = best_path(log_dir), checkpoint.state["step"]
    if checkpoint.state.get("best_step") == step > 0 and saved_step(path) != step:
        try:
            with open(checkpoint.path, "rb") as source, whole_file(path, "wb") as copy:
                shutil.copyfileobj(source, copy)
        except OSError as error:
            warn(f"could not copy {checkpoint.path} to {path}: {error.strerror}")


def check_same_run(identity: Identity, checkpoint: Checkpoint) -> list[str]:
    """Warnings about changed settings. Raises UserError, with all reasons, if it is of another run."""
    saved, config, problems = checkpoint.state, checkpoint.model["config"], []
    settings = BEFORE | saved["train_args"]
    for key, value in identity.config.items():
        if key != "dropout" and config.get(key) != value:  # that is compared as a setting, which may change
            problems.append(f"has {key}={config.get(key)}, this run has {key}={value}")
    changed = {
        key: (settings[key], value)
        for key, value in identity.settings.items()
        if key not in (*BY_CONTENT, *HARMLESS) and settings.get(key, value) != value
    }
    for key in REFUSED:
        if key in changed:
            problems.append(f"was made with {key}={changed[key][0]}, this run has {key}={changed[key][1]}")
    if saved["tokenizer"] != identity.tokenizer:
        problems.append(f"was made with another tokenizer ({saved['tokenizer']['name']})")
    if saved["data"] != identity.data:
        problems.append(f"was made on other data ({_data_changes(saved['data'], identity.data)})")
    if problems:
        what = f"checkpoint {checkpoint.path} {'; '.join(problems)}"
        steps = "; ".join(how_to_continue(identity, checkpoint, changed))
        new = "leave out --resume, which moves its files to archive/, or give another --log-dir"
        raise UserError(what, f"to continue it, {steps}; for a new run, {new}")
    warnings = []
    if changed:
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
        warnings.append(f"settings have changed: {changes}; continuing with the new values")
    before, now = saved["environment"], identity.environment
    if other := [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]
    ]:
        changes = ", ".join(other).replace("_", " ")
        masks = " and dropout masks" if identity.settings.get("dropout") else ""
        warnings.append(f"{changes}: continuing, results equal to rounding{masks} only")
    return warnings


def how_to_continue(
    identity: Identity, checkpoint: Checkpoint, changed: dict[str, tuple[Any, Any]]
) -> list[str]:
    """What to change on the command line, so that this run is the one of a checkpoint."""
    saved, sizes = checkpoint.state, checkpoint.model["config"]
    settings = saved["train_args"]
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "seq_len"}
    needed = {
        flag: sizes.get(key) for key, flag in names.items() if sizes.get(key) != identity.config.get(key)
    }
    needed |= {key: changed[key][0] for key in REFUSED if key in changed}
    if saved["tokenizer"] != identity.tokenizer:
        # Shards have their own, and "bpe" alone, as earlier versions recorded it, names none.
        if "shards" not in saved["data"][0] and settings.get("tokenizer") not in MODELS:
            needed["tokenizer"] = settings.get("tokenizer")
    if other_data := saved["data"] != identity.data:
        needed["data"] = settings.get("data")
    differ = {key: value for key, value in needed.items() if value != identity.settings.get(key, value)}
    flags = [f"{flag_of(key)} {quoted(str(value))}" for key, value in differ.items() if value is not None]
    steps = [f"add {' '.join(flags)}"] if flags else []
    if differ.get("data", "") is None:
        steps.append("leave out --data")
    if not steps or (other_data and "data" not in differ):
        steps.append("restore its data and tokenizer as they were")
    return steps


def _data_changes(before: list[dict], now: list[dict]) -> str:
    """What differs between two lists of fingerprints: shards by name, or size and content."""
    old, new = (
        [tuple(entry) for stream in streams for entry in stream.get("shards", stream.items())]
        for streams in (before, now)
    )
    lost = ", ".join([" ".join(map(str, entry)) for entry in old if entry not in new][:3])
    added = ", ".join([" ".join(map(str, entry)) for entry in new if entry not in old][:3])
    return f"before: {lost or 'nothing else'}; now: {added or 'nothing else'}"
