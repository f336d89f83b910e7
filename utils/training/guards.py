"""When a run leaves the road: a loss that is no number ends it, a spike of the gradient can be skipped."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

from torch import Tensor

from utils.errors import Diverged
from utils.weights.checkpoint import newest_model_file

WINDOW = 128  # accepted norms that a new one is compared with
SKIPS_ALLOWED, SKIPS_WATCHED = 10, 100  # more skips than this among so many updates are no single spikes
DECODED_TOKENS = 24  # of the text that a message quotes


class SpikeFilter:
    """Skips an update whose gradient norm is far above those of the updates before it.

    Args:
        threshold: standard deviations above the mean of the last 128 accepted norms; 0 accepts everything.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.accepted: deque = deque(maxlen=WINDOW)
        self.skips: deque = deque(maxlen=SKIPS_WATCHED)  # 1 for a skipped update, 0 for another
        self.num_skipped = 0

    def accepts(self, norm: float) -> bool:
        """Whether the update with this gradient norm may happen; the same answer on every rank.

        A norm that is not finite (fp16) is let through and counted: the scaler skips that update itself.

        Raises:
            Diverged: more than 10 of the last 100 updates would have been skipped.
        """
        if not math.isfinite(norm):
            self.num_skipped += 1
            return True
        if not self.threshold:
            return True
        spike = len(self.accepted) == WINDOW and self._z_score(norm) > self.threshold
        self.skips.append(int(spike))
        if not spike:
            self.accepted.append(norm)  # an outlier must not widen the distribution that judges the next one
            return True
        self.num_skipped += 1
        if sum(self.skips) > SKIPS_ALLOWED:
            raise Diverged(
                f"{sum(self.skips)} of the last {len(self.skips)} updates had a gradient norm more than "
                f"{self.threshold:g} standard deviations above the mean (allowed: {SKIPS_ALLOWED})",
                "resume from an earlier checkpoint with a lower --max-lr",
            )
        return False

    def _z_score(self, norm: float) -> float:
        mean = sum(self.accepted) / WINDOW
        std = math.sqrt(sum((value - mean) ** 2 for value in self.accepted) / WINDOW)
        return (norm - mean) / max(std, 1e-12)

    def state_dict(self) -> dict:
        return {"accepted": list(self.accepted), "skips": list(self.skips), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict) -> None:
        self.accepted.extend(state["accepted"])
        self.skips.extend(state["skips"])
        self.num_skipped = state["num_skipped"]


def stop_if_not_finite(val_loss: float, step: int, log_dir: Path) -> None:
    """Ends the run before it logs or saves weights whose val loss is no finite number. Raises Diverged."""
    if not math.isfinite(val_loss):
        good = newest_model_file(log_dir) or "none yet"
        hint = f"lower --max-lr, then --resume; last good checkpoint: {good}"
        if step == 0:
            hint = "use --dtype float32, or give --init-from other weights"
        raise Diverged(f"non-finite val loss at step {step}", hint)


def stop_if_diverged(
    run, step: int, first_window: int, loss: float, norm: float, losses: list[Tensor]
) -> None:
    """Ends the run, on all ranks alike, if the step's loss or gradient norm is no finite number.

    Args:
        run: the training script's Run.
        step, first_window: of the update, which has not happened yet.
        loss, norm: mean over all ranks, and norm of the exchanged gradient: the same on every rank.
        losses: of this rank's micro-steps.

    Raises:
        Diverged: with the rank, the micro-step and the text that caused it, where one loss did.
    """
    # In fp16 a norm that is not finite is GradScaler's daily business: it skips the update and lowers the
    # scale.
    scaling = run.scaler.is_enabled()
    if math.isfinite(loss) and (math.isfinite(norm) or (scaling and run.scaler.get_scale() >= 1)):
        return
    last_good = newest_model_file(run.args.log_dir) or "none yet"
    hint = f"lower --max-lr or use --dtype float32, then --resume; last good checkpoint: {last_good}"
    if math.isfinite(loss):
        raise Diverged(f"non-finite gradient norm at step {step} (loss {loss:.4f}, norm {norm})", hint)
    bad = [i for i, value in enumerate(losses) if not math.isfinite(value.item())]
    where = [
        f"rank {rank}, micro-step {i}, {text}"
        for rank, i, text in filter(None, run.dist.gather(_blame(run, first_window, bad)))
    ]
    raise Diverged(f"non-finite loss at step {step} ({'; '.join(where)})", hint)


def _blame(run, first_window: int, bad: list[int]) -> tuple[int, int, str] | None:
    """(rank, micro-step, place and text of its first window) of this rank's first bad loss, or None."""
    if not bad:
        return None
    loader = run.train_loader
    start = loader.window_at(loader.numbers_of_batch(first_window, bad[0])[0]) * loader.seq_len
    name, position = loader.stream.locate(start)
    text = run.tokenizer.decode(loader.stream.read(start, DECODED_TOKENS))
    return run.dist.rank, bad[0], f"{name} position {position}, text {text!r}"
