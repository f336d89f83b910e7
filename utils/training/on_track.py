"""Am I on track? The val loss of the faithful run beside that of runs which went well.

The bands belong to one recipe alone: GPT-2 124M on FineWeb-Edu sample-10BT with build-nanogpt's settings and
val shard. For any other run there is no band, and nothing is said.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

# step: lowest and highest val loss that count as healthy: what users of build-nanogpt published for 8 GPUs
# (6.16, 4.15, 3.95, and 3.03-3.05 at the end), a little wider on both sides.
BANDS = {250: (6.02, 6.31), 1000: (4.09, 4.22), 1250: (3.90, 4.00), 19073: (3.00, 3.08)}
MARGIN = 0.05  # on both sides, where the band lies between two published points

# What those runs had in common: facts about them, not settings of ours.
MODEL = dict(block_size=1024, n_layer=12, n_head=12, n_embd=768)
VOCABULARIES = (50257, 50304)  # padded or not, the loss is the same
RECIPE = dict(
    total_batch_tokens=524288,
    max_steps=19073,
    warmup_steps=715,
    max_lr=6e-4,
    min_lr=6e-5,
    weight_decay=0.1,
    grad_clip=1.0,
    seq_len=1024,
)
SHARD_PREFIX = "edufineweb_"
TRAIN_TOKENS = 9.854e9  # sample-10BT less its val shard of 100M
TOLERANCE = 0.01  # of the tokens: builders differ in the last documents


def is_faithful_recipe(args: Namespace, config: Any, train_fingerprint: dict) -> bool:
    """Whether a run is the one that the bands describe.

    Args:
        args: settings of train_gpt.py.
        config: the model's GPTConfig.
        train_fingerprint: `fingerprint()` of the train stream: {"shards": [[name, tokens], ...]}.
    """
    same_model = all(getattr(config, name) == value for name, value in MODEL.items())
    same_recipe = all(math.isclose(getattr(args, name), value) for name, value in RECIPE.items())
    shards = train_fingerprint.get("shards", [])
    tokens = sum(num_tokens for _, num_tokens in shards)
    same_data = all(name.startswith(SHARD_PREFIX) for name, _ in shards)
    same_data = same_data and abs(tokens / TRAIN_TOKENS - 1) < TOLERANCE
    fresh = args.init_from is None  # weights that were trained before are ahead of any band
    return same_model and config.vocab_size in VOCABULARIES and same_recipe and same_data and fresh


def band(step: int) -> tuple[float, float, bool] | None:
    """(lowest, highest, whether that is approximate) val loss of healthy runs; None where none is known.

    Between published points the band is a straight line in log(step), wider by MARGIN on each side.
    """
    if step in BANDS:
        return (*BANDS[step], False)
    before = max((known for known in BANDS if known < step), default=None)
    after = min((known for known in BANDS if known > step), default=None)
    if before is None or after is None:
        return None
    share = math.log(step / before) / math.log(after / before)
    low, high = (a + share * (b - a) for a, b in zip(BANDS[before], BANDS[after]))
    return low - MARGIN, high + MARGIN, True


def verdict(step: int, val_loss: float, is_faithful: bool) -> str | None:
    """What to add to a val line: the band and OK, LOW or HIGH; None where nothing is known."""
    known = band(step) if is_faithful else None
    if known is None:
        return None
    low, high, approximate = known
    # Compared as printed: a loss that reads 6.31 is inside a band that ends at 6.31.
    loss = round(val_loss, 2)
    word = "LOW" if loss < round(low, 2) else "OK" if loss <= round(high, 2) else "HIGH"
    kind = "approximate band" if approximate else "band"
    return f"{word} ({kind} of healthy runs {low:.2f}-{high:.2f})"
