"""Taking a run up where it stopped: what is saved beside the weights, and what must not have changed since.

Bitwise on the same machine, PyTorch version, number of ranks and threads, in eager mode; on CUDA with
--deterministic.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.distributed import restart_count
from utils.errors import UserError
from utils.runtime import device_name
from utils.training.log_directory import archive_run, cut_logs_back, log_sizes
from utils.weights.checkpoint import (
    free_space,
    load_pair,
    model_content,
    model_files,
    newest_complete,
    newest_model_file,
    prune,
    save_pair,
    versions,
)

# A change of these would train on windows again or leave some out.
FIXED = ("seq_len", "seed", "shuffle")
# A change of these makes another run of it, which a user may want: it is listed and used.
NUMERICS = (
    *("total_batch_tokens", "micro_batch", "max_steps", "warmup_steps", "max_lr", "min_lr", "weight_decay"),
    *("grad_clip", "dtype", "compile", "deterministic", "skip_spikes", "val_tokens"),
)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: completed updates.
        windows: windows trained so far: the position in the data.
        val_loss: the last one measured, in nats.
        done: what this pass has already evaluated and logged.
        seconds: of updates so far.
        saved: (step, done) of the last checkpoint.
        resumed_from: the checkpoint this process started from.
    """

    step: int = 0
    windows: int = 0
    val_loss: float | None = None
    done: list[str] = field(default_factory=list)
    seconds: float = 0.0
    saved: tuple | None = None
    resumed_from: Path | None = None

    def is_due(self, what: str, every: int, last: bool) -> bool:
        """Whether something happens in this pass: every so many steps, and after the last; 0 is never."""
        return every > 0 and (self.step % every == 0 or last) and what not in self.done

    def is_complete(self, args: Namespace, with_hellaswag: bool) -> bool:
        """Whether the last update is done and everything that is due after it."""
        everies = {
            "val": args.val_every,
            "hella": args.hellaswag_every * with_hellaswag,
            "samples": args.sample_every,
        }
        due = any(self.is_due(what, every, last=True) for what, every in everies.items())
        return self.step > args.max_steps or (self.step == args.max_steps and not due)

    def updated(self, num_windows: int, seconds: float) -> None:
        """An update on `num_windows` windows, which took `seconds`, is complete: the next pass begins."""
        self.step += 1
        self.windows += num_windows
        self.seconds += seconds
        self.done = []


def resume_state(run, progress: Progress) -> dict[str, Any]:
    """What the optimizer file holds, as plain values and tensors."""
    rng = {"cpu": run.dist.gather(torch.get_rng_state())}
    if run.dist.device.type == "cuda":
        rng["cuda"] = run.dist.gather(torch.cuda.get_rng_state(run.dist.device))
    return {
        "optimizer": run.optimizer.state_dict(),
        "step": progress.step,
        "windows": progress.windows,
        "done": list(progress.done),
        "seconds": progress.seconds,
        "train_args": {name: getattr(run.args, name) for name in (*FIXED, *NUMERICS)},
        "tokenizer": run.tokenizer.state(),
        "data": [run.train_loader.stream.fingerprint(), run.val_loader.stream.fingerprint()],
        # Nothing draws from it while dropout is absent; saved for the day somebody adds some.
        "rng": rng,
        "scaler": run.scaler.state_dict(),
        "spikes": run.spikes.state_dict(),
        "log": log_sizes(run.args.log_dir),
        "environment": environment(run),
    }


def save(run, log, progress: Progress) -> bool:
    """Writes a checkpoint of the completed updates, on rank 0.

    Returns whether there is one; a full disk ends no run.
    """
    args, moment = run.args, (progress.step, list(progress.done))
    if progress.saved == moment:
        return True
    log.sync()  # the sizes of the logs are part of the state
    state = resume_state(run, progress)
    if run.dist.is_master:
        config = vars(run.model.config).copy()
        model = model_content(run.model, config, progress.step, progress.val_loss, run.tokenizer.state())
        try:
            path = save_pair(args.log_dir, progress.step, model, state)
            progress.saved = moment
            log.say(f"checkpoint: {path}")
            prune(args.log_dir, args.keep_checkpoints, args.keep_every, args.max_steps, progress.resumed_from)
        except (OSError, RuntimeError) as error:
            space = free_space(args.log_dir, run.model)
            what = "remove old checkpoints" if progress.saved == moment else f"save step {progress.step}"
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            if "unexpected pos" in reason:  # torch.save's words for a full disk, about positions in a stream
                reason = "the file was not written whole"
            kept = newest_model_file(args.log_dir) or "nothing so far"
            log.say(f"warning: could not {what}: {reason} ({space}); keeping {kept}")
    run.dist.barrier()
    progress.saved = run.dist.broadcast(progress.saved)
    return progress.saved == moment


def environment(run) -> dict[str, Any]:
    """What results depend on besides the settings."""
    return dict(
        versions(),
        world_size=run.dist.world_size,
        threads=torch.get_num_threads(),
        device=device_name(run.dist.device),
        computes_in=str(run.dtype),  # "auto" may mean another dtype on another device
    )


def find(requested: str, log_dir: Path) -> tuple[Path, dict, dict] | None:
    """The checkpoint to resume from, or None for a fresh start.

    Args:
        requested: "newest", or the path of a model file.
        log_dir: where the newest is looked for.

    Returns:
        (path of the model file, its content, content of its twin).

    Raises:
        UserError: a checkpoint that was asked for by name is missing or damaged.
    """
    if requested == "newest":
        return newest_complete(log_dir)
    return (Path(requested), *load_pair(Path(requested)))


def begin(run, progress: Progress) -> list[str]:
    """Makes the log directory ready and takes up the checkpoint that --resume asks for, if there is one.

    Rank 0 decides and reads; what it finds of another run is moved to the archive.

    Returns:
        Lines to say.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another run.
    """
    args, dist = run.args, run.dist
    requested = args.resume
    # A machine whose own workers were well has not counted the restart that another one asked for.
    if dist.max_number(restart_count()) and (requested is None or model_files(args.log_dir)):
        requested = "newest"  # torchrun restarts the same command: what it has done since counts
    found: list[dict] = []  # contents of both files, on rank 0

    def decide() -> list[str]:
        checkpoint = find(requested, args.log_dir) if requested else None
        if checkpoint is None:
            archive_run(args.log_dir)
            return ["nothing to resume in the log directory: a fresh start"] if requested else []
        path, *contents = checkpoint
        lines = check_same_run(run, path, *contents)
        if path.resolve().parent == args.log_dir.resolve():
            archive_run(args.log_dir, checkpoints_after=contents[0]["step"])
            cut_logs_back(args.log_dir, contents[1]["log"])
            progress.resumed_from = path
        else:
            archive_run(args.log_dir)
        found.extend(contents)
        return [*lines, f"resumed {path} at step {contents[0]['step']}"]

    lines = dist.on_master(decide)
    if dist.broadcast(bool(found)):
        restore(run, progress, *(found or (None, None)))
    return lines


def check_same_run(run, path: Path, model: dict, state: dict) -> list[str]:
    """Compares a checkpoint with what the flags ask for.

    Returns:
        Warnings: settings that differ and are used as they are now.

    Raises:
        UserError: another architecture, or anything that would change the order of the data; lists all of it.
    """
    ours, theirs = asdict(run.model.config), model["config"]
    problems = [
        f"has {key}={theirs.get(key)}, this run asks {key}={ours[key]}"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    args, saved = vars(run.args), state["train_args"]
    problems += [
        f"was made with {key}={saved[key]}, this run has {key}={args[key]}"
        for key in FIXED
        if saved[key] != args[key]
    ]
    if state["tokenizer"] != run.tokenizer.state():
        problems.append(f"was made with another tokenizer ({state['tokenizer']['name']})")
    data = [run.train_loader.stream.fingerprint(), run.val_loader.stream.fingerprint()]
    if state["data"] != data:
        name, changes = run.train_loader.stream.name, _changes(state["data"], data)
        problems.append(f"was made on other data than {name} holds now ({changes})")
    if problems:
        raise UserError(
            f"checkpoint {path} " + "; ".join(problems),
            "use the same settings, or start a new run in another --log-dir",
        )
    changed = [
        f"{key} {saved[key]} -> {args[key]}" for key in NUMERICS if key in saved and saved[key] != args[key]
    ]
    warnings = []
    if changed:
        warnings.append(f"warning: settings have changed: {', '.join(changed)}; going on with the new ones")
    before, now = state["environment"], environment(run)
    other = [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if other:
        warnings.append(
            f"warning: {', '.join(other).replace('_', ' ')}: continuing, results equal to rounding only"
        )
    return warnings


def _changes(before: list[dict], now: list[dict]) -> str:
    """What differs between the fingerprints of two pairs of streams: shards by name, or size and content."""
    old, new = (
        [tuple(entry) for stream in streams for entry in stream.get("shards", stream.items())]
        for streams in (before, now)
    )
    lost, added = (
        ", ".join(f"{name} {value}" for name, value in [entry for entry in a if entry not in b][:3])
        for a, b in ((old, new), (new, old))
    )
    return f"before: {lost or 'no more'}; now: {added or 'no more'}"


def restore(run, progress: Progress, model: dict | None, state: dict | None) -> None:
    """Puts rank 0's checkpoint into every rank's model, optimizer and progress: nodes need no shared disk.

    Args:
        model, state: the files' contents on rank 0, None on the others.
    """
    dist = run.dist
    if dist.is_master:
        run.model.load_state_dict(model["model"])
    dist.broadcast_tensors([parameter.data for parameter in run.model.parameters()])
    _restore_optimizer(run, state["optimizer"] if dist.is_master else None)
    small = None
    if dist.is_master:
        small = {key: state[key] for key in ("step", "windows", "done", "seconds", "scaler", "spikes", "rng")}
        small["val_loss"] = model["val_loss"]
    small = dist.broadcast(small)
    for name in ("step", "windows", "done", "seconds", "val_loss"):
        setattr(progress, name, small[name])
    progress.saved = (progress.step, list(progress.done))
    if small["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(small["scaler"])
    run.spikes.load_state_dict(small["spikes"])
    if len(small["rng"]["cpu"]) == dist.world_size:
        torch.set_rng_state(small["rng"]["cpu"][dist.rank])
        if dist.device.type == "cuda" and "cuda" in small["rng"]:
            torch.cuda.set_rng_state(small["rng"]["cuda"][dist.rank], dist.device)


def _restore_optimizer(run, saved: dict | None) -> None:
    """Loads the optimizer's moments; its settings stay those of this run, not the checkpoint's."""
    dist, optimizer = run.dist, run.optimizer
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]

    def shape_only(value):
        return ("tensor", tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value

    # Rank 0 sends the skeleton as Python values, then the tensors as tensors.
    skeleton = None
    if dist.is_master:
        skeleton = {
            i: {key: shape_only(v) for key, v in entry.items()} for i, entry in saved["state"].items()
        }
    if not dist.is_alone:
        skeleton = dist.broadcast(skeleton)
    if not dist.is_master:
        saved = {"state": {i: {k: _allocate(v) for k, v in entry.items()} for i, entry in skeleton.items()}}
    groups = [
        dict(group, params=saved_params) for group, saved_params in zip(settings, _group_indices(optimizer))
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    dist.broadcast_tensors(tensors)


def _allocate(value):
    is_tensor = isinstance(value, tuple) and value[0] == "tensor"
    return torch.zeros(value[1], dtype=value[2]) if is_tensor else value


def _group_indices(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [group["params"] for group in optimizer.state_dict()["param_groups"]]
