"""Saving a run and resuming it: what goes into a checkpoint, and what must not have changed since.

A resumed run is bitwise equal to an uninterrupted one on the same machine, PyTorch version, number of ranks
and of threads, in eager mode; on CUDA with --deterministic.
"""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.command_line import UserError, format_bytes
from utils.distributed import Distributed, restart_count
from utils.runtime import device_name
from utils.training.data_source import Data
from utils.training.log_directory import archive_run, cut_logs_back, log_sizes
from utils.training.run_log import RunLog
from utils.training.state import TrainState
from utils.weights.checkpoint import (
    Checkpoint,
    load_pair,
    model_content,
    model_files,
    newest_complete,
    pair_bytes,
    prune,
    save_pair,
    versions,
)

if TYPE_CHECKING:
    from gpt_model import GPT

# Resuming compares all settings. Changing one of these would repeat or skip windows, so it is refused.
REFUSED = ("seq_len", "seed", "shuffle")
# Compared by their effect (weights, configuration, token ids, content of the data, device), not by the flag.
BY_CONTENT = ("preset", "data", "tokenizer", "init_from", "n_layer", "n_head", "n_embd", "device", "compile")
# These do not change what is trained: a change is not mentioned. Everything else warns.
HARMLESS = (
    *("log_dir", "hellaswag_dir", "resume", "eval_only", "dry_run", "cost_per_hour", "dist_timeout"),
    *("val_every", "hellaswag_every", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    *("tensorboard", "wandb", "recompute"),
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
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    fingerprints = [data.train.fingerprint(), data.val.fingerprint()]
    return Identity(vars(model.config).copy(), settings, data.tokenizer.state(), fingerprints, environment)


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
        step, val_loss = content["step"], content.pop("val_loss")
        model = model_content(state.model, identity.config, step, val_loss, identity.tokenizer)
        try:
            state.newest_checkpoint = save_pair(args.log_dir, step, model, content)
            state.saved = state.moment()
            log.say(f"checkpoint: {state.newest_checkpoint}")
            prune(args.log_dir, args.keep_checkpoints, args.keep_every, args.max_steps, state.resumed_from)
        except (OSError, RuntimeError) as error:
            failed = "remove old checkpoints" if state.saved == state.moment() else f"save step {step}"
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            if "unexpected pos" in reason:  # torch.save reports a full disk as a position in the stream
                reason = "the file could not be written completely"
            need = format_bytes(sum(pair_bytes(state.model.num_parameters())))
            space = f"free {format_bytes(shutil.disk_usage(args.log_dir).free)}, need {need}"
            kept = state.newest_checkpoint or "nothing so far"
            log.say(f"warning: could not {failed}: {reason} ({space}); keeping {kept}")
    dist.barrier()
    state.saved = dist.broadcast(state.saved)
    return state.saved == state.moment()


def find_checkpoint(args: Namespace, dist: Distributed, reasons: dict[str, str]) -> Checkpoint | None:
    """Reads the checkpoint that --resume asks for; None for a fresh start, and on ranks other than 0.

    After a restart by torchrun, which repeats the original command, the newest one takes precedence.
    Where `--micro-batch` or `--compile` are automatic, what the resumed run used is used again. Raises
    UserError if the checkpoint is missing or damaged.
    """
    # A machine whose own workers did not fail has not counted the restart.
    if dist.max_number(restart_count()) and (args.resume is None or model_files(args.log_dir)):
        args.resume = "newest"
    found: list[Checkpoint | None] = [None]  # stays on rank 0: too large to be broadcast as an object

    def read() -> None:
        if args.resume == "newest":
            found[0] = newest_complete(args.log_dir)
        elif args.resume is not None:
            found[0] = load_pair(Path(args.resume))

    dist.on_master(read)
    saved = found[0].state if found[0] else {"train_args": {}, "environment": {}}
    used = {**saved["environment"], "micro_batch": saved["train_args"].get("micro_batch")}
    used["same_device"] = used.get("device") == device_name(dist.device)
    used = dist.broadcast(used)  # rank 0's: ranks that decided differently would wait for each other
    if args.micro_batch == "auto" and used["micro_batch"]:
        args.micro_batch, reasons["micro-batch"] = used["micro_batch"], "that of the checkpoint"
    if args.compile == "auto" and not args.deterministic and "compiled" in used and used["same_device"]:
        args.compile, reasons["compile"] = "on" if used["compiled"] else "off", "as in the resumed run"
    return found[0]


def start_or_resume(
    state: TrainState, identity: Identity, checkpoint: Checkpoint | None, args: Namespace, dist: Distributed
) -> list[str]:
    """Archives what another run left in the log directory, and restores the checkpoint if there is one.

    Returns lines for the console. Raises UserError if the checkpoint is of another run.
    """

    def prepare() -> list[str]:
        if checkpoint is None:
            archive_run(args.log_dir)
            return ["nothing to resume in the log directory: a fresh start"] if args.resume else []
        path, step = checkpoint.path, checkpoint.state["step"]
        lines = check_same_run(identity, checkpoint)
        if path.resolve().parent == args.log_dir.resolve():
            archive_run(args.log_dir, checkpoints_after=step)
            cut_logs_back(args.log_dir, checkpoint.state["log"])
            state.resumed_from = path
        else:
            archive_run(args.log_dir)
        state.newest_checkpoint = path
        return [*lines, f"resumed {path} at step {step}"]

    lines = dist.on_master(prepare)
    # From rank 0 to every rank: nodes need no shared disk.
    saved = checkpoint and {**checkpoint.model, **checkpoint.state}
    if saved := dist.broadcast_state(saved):
        state.load_state_dict(saved)
        state.saved = state.moment()
        rng = saved["rng"]
        if len(rng["cpu"]) == dist.world_size:
            torch.set_rng_state(rng["cpu"][dist.rank].cpu())
            if dist.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"][dist.rank].cpu(), dist.device)
    return lines


def check_same_run(identity: Identity, checkpoint: Checkpoint) -> list[str]:
    """Warnings about changed settings. Raises UserError, with all reasons, if it is of another run."""
    saved, config, problems = checkpoint.state, checkpoint.model["config"], []
    for key, value in identity.config.items():
        if key != "dropout" and config.get(key) != value:  # that is compared as a setting, which may change
            problems.append(f"has {key}={config.get(key)}, this run has {key}={value}")
    changed = {
        key: (saved["train_args"][key], value)
        for key, value in identity.settings.items()
        if key not in (*BY_CONTENT, *HARMLESS) and saved["train_args"].get(key, value) != value
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
        raise UserError(what, "use the same settings, or start a new run in another --log-dir")
    warnings = []
    if changed:
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
        warnings.append(f"warning: settings have changed: {changes}; continuing with the new values")
    before, now = saved["environment"], identity.environment
    if other := [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]
    ]:
        changes = ", ".join(other).replace("_", " ")
        masks = " and dropout masks" if identity.settings.get("dropout") else ""
        warnings.append(f"warning: {changes}: continuing, results equal to rounding{masks} only")
    return warnings


def _data_changes(before: list[dict], now: list[dict]) -> str:
    """What differs between two lists of fingerprints: shards by name, or size and content."""
    old, new = (
        [tuple(entry) for stream in streams for entry in stream.get("shards", stream.items())]
        for streams in (before, now)
    )
    lost = ", ".join([f"{entry[0]} {entry[1]}" for entry in old if entry not in new][:3])
    added = ", ".join([f"{entry[0]} {entry[1]}" for entry in new if entry not in old][:3])
    return f"before: {lost or 'nothing else'}; now: {added or 'nothing else'}"
