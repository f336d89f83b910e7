"""Logs of runs that never took place, for the tests of reports and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SAMPLES = """--- step 20, sample 0
an older text
--- step 40, sample 0
Hello, I'm
--- no heading
--- step 40, sample 1
Hello ``` there
"""


def fake_run(log_dir: Path, *, hellaswag: bool = True, slower: float = 1.0, **settings: Any) -> Path:
    """Writes the files of a run of 40 steps of 1000 tokens, validated every ten; returns its directory."""
    log_dir.mkdir(parents=True)
    usual = {"preset": "tiny", "max_steps": 40, "total_batch_tokens": 1000, "sample_prompt": "a|b\nc"}
    settings = {**usual, **settings}
    head = dict(
        environment={"torch": "2.0.1", "device": "CPU"}, reasons={"data": "input.txt"}, parameters=12345
    )
    records, lines = [dict(kind="run", step=0, settings=settings, **head)], []
    for step in range(41):
        loss = 3 + 8 * 0.9**step
        if step % 10 == 0:
            lines.append(f"{step} val {loss:.4f}")
            seconds = 0.5 * slower * step
            records.append(
                dict(
                    kind="val",
                    step=step,
                    loss=loss,
                    tokens=1000 * step,
                    seconds=seconds,
                    bits_per_byte=loss / 3,
                )
            )
            if hellaswag:
                accuracy = 0.25 + 0.001 * step
                lines.append(f"{step} hella {accuracy:.4f}")
                records.append(dict(kind="hella", step=step, accuracy=accuracy, examples=10042))
        if step < 40:
            lines.append(f"{step} train {loss:.6f}")
            took = dict(seconds=0.5 * slower, mfu=None, memory=2_000_000_000 + step)
            records.append(dict(kind="train", step=step, loss=loss, lr=1e-3, norm=1.0, **took))
    (log_dir / "log.txt").write_text("\n".join(lines) + "\n")
    (log_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (log_dir / "samples.txt").write_text(SAMPLES)
    return log_dir


def labels_of(figure: Figure) -> list[str]:
    """The entries of the legend."""
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]
