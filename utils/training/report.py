"""log/report.md: a finished run on one page, from what it wrote down.

python -m utils.training.report log
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from utils.command_line import ArgumentParser
from utils.errors import UserError, run_script
from utils.files import whole_file
from utils.hellaswag.results import standard_error
from utils.training.plotting import HELLASWAG_REFERENCES, read_log, read_metrics
from utils.training.run_log import format_duration, perplexity

HELLASWAG_EXAMPLES = 10042  # of the validation split, where a record does not say how many it used


def write_report(log_dir: Path) -> Path:
    """Writes `report.md` from log.txt, metrics.jsonl and samples.txt.

    Returns:
        Its path.

    Raises:
        UserError: the directory holds no run, or only the start of one.
        OSError: it cannot be written.
    """
    records = read_metrics(log_dir / "metrics.jsonl")
    starts = [r for r in records if r["kind"] == "run"]
    curves = read_log(log_dir / "log.txt") if (log_dir / "log.txt").is_file() else {}
    if not starts or not curves:
        raise UserError(f"{log_dir} holds no run to report on", "give the log directory of train_gpt.py")
    updates = [r for r in records if r["kind"] == "train"]
    sections = [
        f"# Run of {starts[0]['settings'].get('preset', 'train_gpt.py')} in {log_dir.name}/",
        table("Result", results(starts[-1], updates, records, curves)),
        "![losses, learning rate, HellaSwag](curves.png)" if (log_dir / "curves.png").exists() else "",
        samples_section(log_dir / "samples.txt"),
        table("Environment", {**environment(starts), **starts[-1].get("reasons", {})}),
        table("Settings", starts[-1]["settings"]),
    ]
    path = log_dir / "report.md"
    with whole_file(path) as file:
        file.write("\n\n".join(filter(None, sections)) + "\n")
    return path


def table(title: str, rows: dict[str, Any]) -> str:
    """A section with a table of two columns; what would break its lines is escaped."""
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    for name, value in rows.items():
        text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines)


def results(start: dict, updates: list[dict], records: list[dict], curves: dict) -> dict[str, str]:
    """What the run reached, and what it took: rows of a table.

    Args:
        start: the last "run" record: settings and parameters.
        updates: the "train" records.
        records: all of them.
        curves: of log.txt.
    """
    settings = start["settings"]
    rows = {"parameters": f"{start['parameters']:,}"}
    steps = updates[-1]["step"] + 1 if updates else 0
    # Counted where the end was validated: the batch may have changed at a resume.
    counted = {r["step"]: r["tokens"] for r in records if r["kind"] == "val"}
    tokens = counted.get(steps, len(updates) * settings["total_batch_tokens"])
    done = "" if steps >= settings["max_steps"] else f" of {settings['max_steps']:,}: the run is not complete"
    rows["steps"] = f"{steps:,}{done}"
    rows["training tokens"] = f"{tokens:,}"
    if updates:
        rows.update(speed(updates, settings["total_batch_tokens"]))
    if "val" in curves:
        step, loss = curves["val"][0][-1], curves["val"][1][-1]
        rows["val loss"] = f"{loss:.4f} nats per token after step {step:,}"
        rows["val perplexity"] = perplexity(loss)
    if "hella" in curves:
        rows["HellaSwag"] = hellaswag_words(curves, records, settings)
    return rows


def speed(updates: list[dict], tokens_per_step: int) -> dict[str, str]:
    """Time, speed and memory of the updates; evaluations are not in them."""
    seconds = sorted(r["seconds"] for r in updates)
    total, median = sum(seconds), seconds[len(seconds) // 2]
    rows = {
        "time of updates": format_duration(total),
        "speed": f"{tokens_per_step / median:,.0f} tokens/s, {1000 * median:,.0f} ms a step (median)",
    }
    mfu = [r["mfu"] for r in updates if r.get("mfu") is not None]
    if mfu:
        rows["MFU"] = f"{100 * sum(mfu) / len(mfu):.1f} %"
    memory = max((r.get("memory") or 0 for r in updates), default=0)
    if memory:
        rows["peak memory"] = f"{memory / 1e9:.2f} GB"
    return rows


def hellaswag_words(curves: dict, records: list[dict], settings: dict) -> str:
    """The last accuracy with its standard error, beside the published ones."""
    step, accuracy = curves["hella"][0][-1], curves["hella"][1][-1]
    last = next((r for r in reversed(records) if r["kind"] == "hella"), {})
    count = last.get("examples") or settings.get("hellaswag_examples")
    count = count if isinstance(count, int) and count > 0 else HELLASWAG_EXAMPLES
    published = ", ".join(f"{name} {value:.4f}" for name, value in HELLASWAG_REFERENCES.items())
    return (
        f"{accuracy:.4f} ± {standard_error(accuracy, count):.4f} on {count:,} examples after step {step:,} "
        f"(published: {published})"
    )


def environment(starts: list[dict]) -> dict[str, Any]:
    """Versions and devices; more than one row of a kind if a resumed run changed them."""
    rows: dict[str, Any] = {}
    for start in starts:
        for name, value in start.get("environment", {}).items():
            seen = rows.setdefault(name, [])
            if str(value) not in seen:
                seen.append(str(value))
    words = {name: ", then ".join(values) for name, values in rows.items()}
    if len(starts) > 1:
        words["starts"] = ", ".join(f"step {start.get('step', 0)}" for start in starts)
    return words


def samples_section(path: Path) -> str:
    """The samples of the last time, in a block whose fence no sample can close; empty if there are none."""
    if not path.is_file():
        return ""
    parts = path.read_text(encoding="utf-8").split("\n--- step ")
    parts[0] = parts[0][len("--- step ") :] if parts[0].startswith("--- step ") else ""
    parts = [part for part in parts if part]
    if not parts:
        return ""
    step = parts[-1].split(",")[0]
    last = "\n".join(f"--- step {part}".rstrip("\n") for part in parts if part.split(",")[0] == step)
    fence = "```"
    while fence in last:
        fence += "`"
    return f"## Samples after step {step}\n\n{fence}text\n{last}\n{fence}"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="-m utils.training.report", description="Write report.md for a finished run."
    )
    parser.add_argument("log_dir", type=Path, help="log directory of train_gpt.py")
    print(write_report(parser.parse_args(argv).log_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
