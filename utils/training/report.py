"""The report about a finished run, log/report.md: `python -m utils.training.report log` writes it again."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where utils is, also if started by its path
    from utils.start import begin_script

    begin_script()

import re
from argparse import Namespace
from typing import Any

from utils.command_line import ArgumentParser, UserError, format_duration, perplexity, run_script
from utils.files import whole_file
from utils.hellaswag.results import standard_error
from utils.schema import Optional, count, find_problem, is_number, positive
from utils.training.log_reader import (
    BEST,
    HELLASWAG_REFERENCES,
    published_val_losses,
    read_log,
    read_metrics,
    tokens_trained,
)
from utils.training.state import Progress


def write_report(log_dir: Path) -> Path:
    """Writes `report.md` from the logs, and returns its path. Raises UserError if they hold no run."""
    records = read_metrics(log_dir / "metrics.jsonl")
    counts = {"max_steps": positive, "total_batch_tokens": positive, "patience": Optional(count)}
    starts = [r for r in records if r["kind"] == "run" and find_problem(r, {"settings": counts}) is None]
    curves = read_log(log_dir / "log.txt")
    if not starts or not curves:
        raise UserError(f"{log_dir} holds no run to report on", "give the log directory of train_gpt.py")
    sections = [
        f"# Run of {starts[0]['settings'].get('preset', 'train_gpt.py')} in {log_dir.name}/",
        table("Result", results(starts[-1], records, curves)),
        "![losses, learning rate, HellaSwag](curves.png)" if (log_dir / "curves.png").exists() else "",
        samples_section(log_dir / "samples.txt"),
        table("Environment", {**environment(starts), **starts[-1].get("reasons", {})}),
        table("Settings", starts[-1]["settings"]),
    ]
    path = log_dir / "report.md"
    try:
        with whole_file(path) as file:
            file.write("\n\n".join(filter(None, sections)) + "\n")
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise UserError(
            what, "make room, or copy the log directory to a folder that you can write"
        ) from error
    return path


def table(title: str, rows: dict[str, Any]) -> str:
    """A section with a table of two columns; what would break its lines is escaped."""
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    for name, value in rows.items():
        text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines)


def results(start: dict[str, Any], records: list[dict[str, Any]], curves: dict[str, tuple]) -> dict[str, str]:
    """What the run reached and took, as rows of a table; `start` is the last "run" record of `records`."""
    settings, updates = start["settings"], [r for r in records if r["kind"] == "train"]
    rows = {"parameters": f"{start['parameters']:,}"}
    steps = updates[-1]["step"] + 1 if updates else 0
    progress, rest = progress_of(records, steps), ""
    if steps < settings["max_steps"]:
        is_over = progress.ends(Namespace(**{"patience": 0, **settings}))
        why = f"ended by --patience {settings['patience']}" if is_over else "the run is not complete"
        rest = f" of {settings['max_steps']:,}: {why}"
    rows["steps"] = f"{steps:,}{rest}"
    rows["training tokens"] = f"{tokens_trained(records, steps):,}"
    if any("seconds" in r for r in updates):
        rows.update(speed(updates, settings["total_batch_tokens"]))
    if "val" in curves:
        step, loss = curves["val"][0][-1], curves["val"][1][-1]
        rows["val loss"] = f"{loss:.4f} nats per token after step {step:,}"
        if published := published_val_losses(records).get(step):
            rows["val loss"] += f" (published for this recipe on FineWeb-Edu: {published})"
        rows["val perplexity"] = perplexity(loss)
        bits = {r["step"]: r.get("bits_per_byte") for r in records if r["kind"] == "val"}.get(step)
        if is_number(bits):
            rows["val bits per byte"] = f"{bits:.4f}"
    if progress.best_loss is not None:
        where = f"after step {progress.best_step:,}"
        rows["best val loss"] = f"{progress.best_loss:.4f} nats per token {where}"
    if hellaswag := [r for r in records if r["kind"] == "hella"]:
        rows["HellaSwag"] = hellaswag_result(**hellaswag[-1])
    return rows


def progress_of(records: list[dict[str, Any]], steps: int) -> Progress:
    """How far a run is after so many steps."""
    progress = Progress()
    for record in records:
        if record["kind"] == "run" and "best" in record:  # maybe with other val tokens, or a log of its own
            for name in BEST:
                setattr(progress, name, record["best"][name])
        if record["kind"] == "val":
            progress.step = record["step"]
            progress.note_val_loss(record["loss"])
    progress.step = steps
    return progress


def speed(updates: list[dict[str, Any]], tokens_per_step: int) -> dict[str, str]:
    """Time, speed and memory of the updates, without evaluations."""
    seconds = sorted(r["seconds"] for r in updates if "seconds" in r)
    total, median = sum(seconds), max(seconds[len(seconds) // 2], 1e-9)
    rows = {
        "time of updates": format_duration(total),
        "speed": f"{tokens_per_step / median:,.0f} tokens/s, {1000 * median:,.0f} ms a step (median)",
    }
    if mfu := [r["mfu"] for r in updates if r.get("mfu") is not None]:
        rows["MFU"] = f"{100 * sum(mfu) / len(mfu):.1f} %"
    if memory := max(r.get("memory") or 0 for r in updates):
        rows["peak memory"] = f"{memory / 1e9:.2f} GB"
    return rows


def hellaswag_result(step: int, accuracy: float, examples: int, **rest: Any) -> str:
    """The accuracy of a record with its standard error, beside the published ones."""
    published = ", ".join(f"{name} {value:.4f}" for name, value in HELLASWAG_REFERENCES.items())
    error = standard_error(accuracy, examples)
    where = f"on {examples:,} examples after step {step:,}"
    return f"{accuracy:.4f} ± {error:.4f} {where} (published: {published})"


def environment(starts: list[dict[str, Any]]) -> dict[str, str]:
    """Versions and devices; several values where a resumed run changed them."""
    rows: dict[str, list[str]] = {}
    for start in starts:
        for name, value in start.get("environment", {}).items():
            seen = rows.setdefault(name, [])
            if str(value) not in seen:
                seen.append(str(value))
    texts = {name: ", then ".join(values) for name, values in rows.items()}
    if len(starts) > 1:
        texts["starts"] = ", ".join(f"step {start.get('step', 0)}" for start in starts)
    return texts


def samples_section(path: Path) -> str:
    """The last samples, in a code block whose fence no sample can close; empty if there are none."""
    if not path.is_file():
        return ""
    parts = re.split("^--- step ", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)[1:]
    if not parts:
        return ""
    step = parts[-1].split(",")[0]
    last = "\n".join(f"--- step {part}".rstrip("\n") for part in parts if part.split(",")[0] == step)
    fence = "```"
    while fence in last:
        fence += "`"
    return f"## Samples after step {step}\n\n{fence}text\n{last}\n{fence}"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="-m utils.training.report", description="Write report.md about a run.")
    parser.add_argument("log_dir", type=Path, help="log directory of train_gpt.py")
    print(write_report(parser.parse_args(argv).log_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
