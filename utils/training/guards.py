"""Stop on a non-finite loss; optionally skip gradient-norm spikes."""

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.command_line import Diverged
from utils.distributed import Distributed

WINDOW = 128  # accepted norms with which a new one is compared
MAX_SKIPS, SKIP_WINDOW = 10, 100  # more skips than this among so many updates are no isolated spikes


class SpikeFilter:
    """Skips updates whose gradient norm is far above those of earlier updates (an idea of llm.c).

    `threshold`: standard deviations above the mean of the last 128 accepted norms; 0 accepts everything.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.accepted: deque[float] = deque(maxlen=WINDOW)
        self.skips: deque[int] = deque(maxlen=SKIP_WINDOW)  # 1 for a skipped update, else 0
        self.num_skipped = 0

    def accepts(self, norm: float) -> bool:
        """Whether to apply the update with this gradient norm; the same answer on every rank.

        A non-finite norm (fp16) is skipped and counted, but is no spike: the scaler will lower its scale.
        Raises Diverged if more than 10 of the last 100 updates would have been skipped.
        """
        if not math.isfinite(norm):
            self.num_skipped += 1
            return False
        if not self.threshold:
            return True
        spike = len(self.accepted) == WINDOW and self._z_score(norm) > self.threshold
        self.skips.append(int(spike))
        if not spike:
            self.accepted.append(norm)  # outliers stay out: they would widen the distribution
            return True
        self.num_skipped += 1
        if sum(self.skips) > MAX_SKIPS:
            what = f"{sum(self.skips)} of the last {len(self.skips)} updates had a gradient norm more than "
            what += f"{self.threshold:g} standard deviations above the mean (allowed: {MAX_SKIPS})"
            raise Diverged(what, "resume from an earlier checkpoint with a lower --max-lr")
        return False

    def _z_score(self, norm: float) -> float:
        mean = sum(self.accepted) / WINDOW
        std = math.sqrt(sum((value - mean) ** 2 for value in self.accepted) / WINDOW)
        return (norm - mean) / max(std, 1e-12)

    def state_dict(self) -> dict[str, Any]:
        return {"accepted": list(self.accepted), "skips": list(self.skips), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted.extend(state["accepted"])
        self.skips.extend(state["skips"])
        self.num_skipped = state["num_skipped"]


def stop_on_non_finite_val_loss(val_loss: float, step: int, last_good: Path | None) -> None:
    """Raises Diverged before a non-finite val loss is logged or its weights are saved."""
    if not math.isfinite(val_loss):
        hint = f"lower --max-lr, then --resume; last good checkpoint: {last_good or 'none yet'}"
        if step == 0:
            hint = "use --dtype float32, or give --init-from other weights"
        raise Diverged(f"non-finite val loss at step {step}", hint)


def stop_on_divergence(
    step: int, loss: float, norm: float, losses: list[Tensor], scaler: torch.amp.GradScaler,
    dist: Distributed, describe_batch: Callable[[int], str], last_good: Path | None,
) -> None:  # fmt: skip
    """Stops all ranks before an update with a non-finite loss or gradient norm.

    `loss`, the mean over all ranks, and `norm` are equal on every rank; `losses` are of this rank's
    micro-steps, and `describe_batch` says what micro-step i trained on; `last_good` is the newest checkpoint.
    Raises Diverged, which names rank, micro-step and text of the non-finite loss.
    """
    # In fp16 an infinite norm is normal: the gradient scaler skips the update and lowers the scale.
    scale_is_usable = scaler.is_enabled() and scaler.get_scale() >= 1
    if math.isfinite(loss) and (math.isfinite(norm) or scale_is_usable):
        return
    hint = "lower --max-lr or use --dtype float32, then --resume; "
    hint += f"last good checkpoint: {last_good or 'none yet'}"
    if math.isfinite(loss):
        raise Diverged(f"non-finite gradient norm at step {step} (loss {loss:.4f}, norm {norm})", hint)
    bad = [i for i, value in enumerate(losses) if not math.isfinite(value.item())]
    mine = f"rank {dist.rank}, micro-step {bad[0]}, {describe_batch(bad[0])}" if bad else None
    raise Diverged(f"non-finite loss at step {step} ({'; '.join(filter(None, dist.gather(mine)))})", hint)
