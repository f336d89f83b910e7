"""The state of a run: everything that training changes, and therefore everything that a checkpoint holds."""

from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.training.guards import SpikeFilter


def is_due(step: int, every: int, *, last: bool) -> bool:
    """Whether something happens before update `step`: every so many steps and after the last; 0 is never."""
    return every > 0 and (step % every == 0 or last)


def due_steps(every: int, max_steps: int) -> list[int]:
    """All steps of a run for which `is_due` holds."""
    return [*range(0, max_steps, every), max_steps] if every else []


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # completed updates
    windows: int = 0  # trained so far: the position in the data
    val_loss: float | None = None  # the last one measured, in nats
    best_loss: float | None = None  # the lowest one
    best_step: int = 0  # where it was measured
    since_best: int = 0  # validations since then
    done: list[str] = field(default_factory=list)  # evaluations of this pass that are already in the log
    seconds: float = 0.0  # of all updates so far

    def is_due(self, name: str, every: int, *, last: bool) -> bool:
        """Whether `name` happens in this pass and has not happened yet."""
        return is_due(self.step, every, last=last) and name not in self.done

    def note_val_loss(self, loss: float) -> bool:
        """Records a val loss; whether it is strictly the lowest so far."""
        self.val_loss = loss
        self.since_best += 1
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_loss, self.best_step, self.since_best = loss, self.step, 0
        return True

    def forget_best(self) -> None:
        """From here on val losses are measured on other tokens, so earlier ones do not compare."""
        self.best_loss, self.best_step, self.since_best = None, 0, 0

    def ends(self, args: Namespace) -> bool:
        """Whether there are no more updates: all are done, or `--patience` is exhausted."""
        return self.step >= args.max_steps or 0 < args.patience <= self.since_best

    def is_complete(self, args: Namespace, *, with_hellaswag: bool) -> bool:
        """Whether the last update and every evaluation after it are done."""
        hellaswag_every = args.hellaswag_every if with_hellaswag else 0
        after_last = {"val": args.val_every, "hella": hellaswag_every, "samples": args.sample_every}
        due = any(self.is_due(name, every, last=True) for name, every in after_last.items())
        return self.step > args.max_steps or (self.ends(args) and not due)

    def complete_update(self, num_windows: int, seconds: float) -> None:
        """Counts an update on `num_windows` windows, which took `seconds`; the next pass begins."""
        self.step += 1
        self.windows += num_windows
        self.seconds += seconds
        self.done = []


@dataclass
class TrainState:
    """Model, optimizers and progress of a run; the last three fields are not saved."""

    model: nn.Module  # the raw module: evaluated, sampled from, saved
    trained_model: nn.Module  # the same weights, compiled and wrapped where that applies: trained through
    optimizers: dict[str, torch.optim.Optimizer]  # by their key in a checkpoint
    scaler: torch.amp.GradScaler  # of the loss, for fp16
    spikes: SpikeFilter
    progress: Progress = field(default_factory=Progress)
    saved: tuple[int, list[str]] | None = None  # `moment()` of the last checkpoint
    newest_checkpoint: Path | None = None  # the last one that was written or resumed from
    resumed_from: Path | None = None  # in the log directory: never deleted

    def moment(self) -> tuple[int, list[str]]:
        """What tells two checkpoints of a run apart: the step, and which of its evaluations are done."""
        return self.progress.step, list(self.progress.done)

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last update: "lr" of AdamW and, where there is one, "muon_lr"."""
        return {
            "lr" if name == "optimizer" else f"{name}_lr": optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, without the random number generators, which belong to the process."""
        return {
            "model": self.model.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "spikes": self.spikes.state_dict(),
            **asdict(self.progress),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores a state; the optimizers' hyperparameters stay those of this run, not the saved ones."""
        self.model.load_state_dict(saved["model"])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved[name]["state"], "param_groups": groups})
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.spikes.load_state_dict(saved["spikes"])
        # Checkpoints of earlier versions do not have all of them.
        self.progress = Progress(**{name: saved[name] for name in asdict(Progress()) if name in saved})
