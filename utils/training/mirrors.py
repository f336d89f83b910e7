"""The metrics of a run, a second time, in TensorBoard or Weights & Biases.

log.txt and metrics.jsonl stay the record; a mirror only shows them elsewhere. Both packages are optional and
imported when they are asked for; a service that cannot be reached costs one warning and never a step.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable

from utils.errors import UserError

PROJECT = "mini-gpt"
WANDB_ID_FILE = "wandb_id.txt"  # in the log directory: a resumed run goes on in the same place


def check_installed(tensorboard: bool, wandb: bool) -> None:
    """Raises UserError if a mirror is asked for whose package is missing. Imports nothing."""
    for asked, name in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if asked and find_spec(name) is None:
            raise UserError(f"--{name} asked, but {name} is not installed", f"pip install {name}")


class TensorBoardMirror:
    """Event files in `log_dir/tensorboard/`; what an earlier start wrote from `start_step` on is hidden."""

    name = "TensorBoard"

    def __init__(self, log_dir: Path, settings: dict, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=start_step or None)
        self.writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self) -> None:
        self.writer.close()


class WandbMirror:
    """A run of the project mini-gpt. Whose it is, and whether it goes online, wandb's own settings say."""

    name = "wandb"

    def __init__(self, log_dir: Path, settings: dict, start_step: int):
        import wandb

        id_path = log_dir / WANDB_ID_FILE
        known = id_path.read_text(encoding="utf-8").strip() if start_step and id_path.is_file() else None
        self.run = wandb.init(project=PROJECT, dir=str(log_dir), config=settings, id=known, resume="allow")
        id_path.write_text(self.run.id, encoding="utf-8")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        # To wandb our step is a number like any other: its own may never go back, ours does on resuming.
        self.run.log({**numbers, "step": step})

    def close(self) -> None:
        self.run.finish()


class Mirrors:
    """All mirrors of a run; on ranks other than 0, and without flags, there are none.

    Args:
        tensorboard, wandb: which ones.
        log_dir: where they may keep files.
        settings: of the run, plain values.
        start_step: where this process starts.
        say: prints a line.
    """

    def __init__(
        self,
        tensorboard: bool,
        wandb: bool,
        log_dir: Path,
        settings: dict[str, Any],
        start_step: int = 0,
        say: Callable[[str], None] = print,
    ):
        self.say = say
        self.open: list[Any] = []
        for asked, kind in ((tensorboard, TensorBoardMirror), (wandb, WandbMirror)):
            if asked:
                self._try(kind.name, lambda kind=kind: self.open.append(kind(log_dir, settings, start_step)))

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Shows a record of metrics.jsonl: every number in it, as `kind/name`, at its step."""
        if not self.open or "step" not in values:
            return
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for mirror in list(self.open):
            if numbers and not self._try(mirror.name, lambda m=mirror: m.write(values["step"], numbers)):
                self.open.remove(mirror)  # said once; trying again at every step could cost a timeout each

    def close(self) -> None:
        """Ends all mirrors."""
        for mirror in self.open:
            self._try(mirror.name, mirror.close)
        self.open = []

    def _try(self, name: str, action: Callable[[], Any]) -> bool:
        # Whatever a service raises, its own errors included, is its trouble and not the run's.
        try:
            action()
            return True
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self.say(f"warning: {name} does not answer ({reason}); training goes on without it")
            return False
