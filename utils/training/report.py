"""The logs of a run read back: log/curves.png, and log/report.md about a finished run.

`python -m utils.training.report log` writes the report again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where utils is, also if started by its path
    from utils.console import begin_script

    begin_script()

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from utils.command_line import ArgumentParser, UserError, format_duration, perplexity, run_script
from utils.console import warn
from utils.files import whole_file
from utils.hellaswag.results import PUBLISHED_GPT2, standard_error
from utils.weights.schema import (
    Rule,
    Schema,
    count,
    duration,
    find_problem,
    is_int,
    is_number,
    number,
    number_or_none,
    optional,
    plain_dict,
    positive,
    text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

# acc_norm, completion style, of the models that a 124M run is compared with.
HELLASWAG_REFERENCES = {
    "GPT-2 124M": PUBLISHED_GPT2["completion"]["gpt2"].acc_norm,
    "GPT-3 124M": 0.337,  # Brown et al. 2020, table H.1
}
# Val losses that users of build-nanogpt published for its recipe, which is that of the preset gpt2.
PUBLISHED_VAL_LOSSES = {250: 6.163, 1000: 4.153, 1250: 3.952, 19073: 3.04}
PUBLISHED_RECIPE = dict(
    n_layer=12, n_head=12, n_embd=768, seq_len=1024, total_batch_tokens=524288, max_steps=19073,
    warmup_steps=715, max_lr=6e-4, min_lr=6e-5, weight_decay=0.1, grad_clip=1.0,
)  # fmt: skip
PUBLISHED_KINDS = dict(tokenizer="gpt2", init_from=None, optimizer="adamw", schedule="cosine", dropout=0.0)


share = Rule("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
# What the records of metrics.jsonl must hold to be used, by their kind.
RECORDS: dict[str, Schema] = {
    "run": {
        "settings": plain_dict,
        "parameters": count,
        "step": optional(count),
        "environment": optional(plain_dict),
        "reasons": optional(plain_dict),
    },
    "train": {
        "step": count,
        "lr": number,
        "muon_lr": optional(number),
        "seconds": optional(duration),
        "mfu": optional(number_or_none),
        "memory": optional(number_or_none),
    },
    "val": {"step": count, "loss": number, "tokens": optional(count), "seconds": optional(duration)},
    "hella": {"step": count, "accuracy": share, "examples": positive},
}
_warned: set[tuple[Path, int]] = set()  # (file, first line left out): a run reads its logs again and again


def read_log(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Reads log.txt as {kind: (steps, values)}, without an incomplete last line; see `_parsed_lines`."""

    def parse(line: str) -> tuple[int, str, float]:
        step, kind, value = line.split()
        parsed = int(step), kind, float(value)
        if not (is_int(parsed[0]) and is_number(parsed[2]) and (kind != "hella" or share.holds(parsed[2]))):
            raise ValueError("not a step and a finite number")
        return parsed

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, kind, value in _parsed_lines(path, parse):
        steps, values = curves.setdefault(kind, ([], []))
        steps.append(step)
        values.append(value)
    return curves


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the records of metrics.jsonl, without an incomplete last line; see `_parsed_lines`."""

    def parse(line: str) -> dict[str, Any]:
        record = json.loads(line)
        if problem := find_problem(record, {"kind": text}) or find_problem(
            record, RECORDS.get(record["kind"], {})
        ):
            raise ValueError(problem)
        return record

    return list(_parsed_lines(path, parse))


def _parsed_lines(path: Path, parse: Callable[[str], T]) -> Iterator[T]:
    """Parses the complete lines of a file, none if it is missing. Raises UserError if it cannot be read.

    What people or a full disk have damaged is left out, with one warning: a log is no reason to stop.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give the log directory of a run") from error
    bad: list[tuple[int, str]] = []
    for line_number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield parse(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, not such a record
            bad.append((line_number, str(error).split("\n")[0][:100]))
    if bad and (path, bad[0][0]) not in _warned:
        _warned.add((path, bad[0][0]))
        warn(f"{path}:{bad[0][0]}: {bad[0][1]}; {len(bad):,} of {len(lines):,} lines are left out")


def published_val_losses(records: list[dict[str, Any]]) -> dict[int, float]:
    """{step: val loss} that others published for the recipe of this run; empty for any other recipe.

    They belong to FineWeb-Edu: on other shards they are a reference, not an expectation.
    """
    settings = next((record["settings"] for record in records if record["kind"] == "run"), {})
    found = {name: settings.get(name) for name in PUBLISHED_RECIPE}
    # isclose: the default of min_lr is max_lr / 10, which is not 6e-5 to the last bit.
    same = all(is_number(found[name]) and math.isclose(found[name], PUBLISHED_RECIPE[name]) for name in found)
    same = same and all(settings.get(name) in (None, value) for name, value in PUBLISHED_KINDS.items())
    return PUBLISHED_VAL_LOSSES if same else {}


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average without the bias towards the start (Kingma & Ba 2015, section 3)."""
    average, result = 0.0, []
    for n, value in enumerate(values, 1):
        average = memory * average + (1 - memory) * value
        result.append(average / (1 - memory**n))
    return result


def plot_run(log_dir: Path) -> Path | None:
    """Draws `curves.png`, returns its path, None for an empty log. Raises UserError without matplotlib."""
    figure = new_figure()
    curves = read_log(log_dir / "log.txt")
    if not curves:
        return None
    records = read_metrics(log_dir / "metrics.jsonl")
    panels = 3 if "hella" in curves else 2
    figure.set_size_inches(10, 3.6 * 2 if panels == 3 else 5.6)
    axes = figure.subplots(panels, 1, sharex=True, height_ratios=[3, 1, 1.5][:panels])
    _draw_losses(axes[0], curves, published_val_losses(records))
    _draw_learning_rates(axes[1], [record for record in records if record["kind"] == "train"])
    if panels == 3:
        axes[2].plot(*curves["hella"], color="tab:red", marker="o", markersize=3)
        draw_hellaswag_references(axes[2])
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return save_picture(figure, log_dir / "curves.png")


def _draw_losses(axis: "Axes", curves: dict[str, tuple], published: dict[int, float]) -> None:
    if "train" in curves:
        steps, losses = curves["train"]
        axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train")
        axis.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="train, smoothed")
    if "val" in curves:
        steps, losses = curves["val"]
        style = dict(color="tab:orange", marker="o", markersize=4, linewidth=1.6)
        axis.plot(steps, losses, label=f"val (last {losses[-1]:.4f})", **style)
    reached = max((max(steps, default=0) for steps, _ in curves.values()), default=0)
    if points := [(step, loss) for step, loss in published.items() if step <= reached]:
        style = dict(color="gray", marker="x", linestyle="none", zorder=3)
        axis.plot(*zip(*points), label="val published for this recipe on FineWeb-Edu", **style)
    axis.set_ylabel("loss (nats per token)")
    axis.legend()


def _draw_learning_rates(axis: "Axes", updates: list[dict[str, Any]]) -> None:
    for name, label, color in (("lr", "AdamW", "tab:green"), ("muon_lr", "Muon", "tab:purple")):
        if points := [(record["step"], record[name]) for record in updates if name in record]:
            axis.plot(*zip(*points), color=color, label=label)
    if len(axis.lines) > 1:
        axis.legend()
    axis.set_ylabel("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def draw_hellaswag_references(axis: "Axes") -> None:
    """Draws dashed lines at the accuracies of GPT-2 and GPT-3."""
    for name, accuracy in HELLASWAG_REFERENCES.items():
        axis.axhline(accuracy, color="gray", linestyle="--", linewidth=1)
        place = dict(xycoords=("axes fraction", "data"), va="top", color="gray")
        axis.annotate(f"{name} {accuracy:.4f}", (0.005, accuracy), **place)
    axis.set_ylabel("HellaSwag accuracy")


def new_figure() -> "Figure":
    """An empty figure that needs no display. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed", "pip install matplotlib") from error
    return Figure(layout="constrained")


def save_picture(figure: "Figure", path: Path) -> Path:
    """Writes a PNG, which appears when it is complete, and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with whole_file(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return path


def write_report(log_dir: Path) -> Path:
    """Writes `report.md` from the logs, and returns its path. Raises UserError if they hold no run."""
    records = read_metrics(log_dir / "metrics.jsonl")
    needed = {"settings": {"max_steps": positive, "total_batch_tokens": positive}}
    starts = [r for r in records if r["kind"] == "run" and find_problem(r, needed) is None]
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
    # The last validation has counted the tokens: the batch may have changed at a resume.
    counted = {r["step"]: r["tokens"] for r in records if r["kind"] == "val" and "tokens" in r}
    tokens = counted.get(steps, len(updates) * settings["total_batch_tokens"])
    rest = "" if steps >= settings["max_steps"] else f" of {settings['max_steps']:,}: the run is not complete"
    rows["steps"] = f"{steps:,}{rest}"
    rows["training tokens"] = f"{tokens:,}"
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
    if hellaswag := [r for r in records if r["kind"] == "hella"]:
        rows["HellaSwag"] = hellaswag_result(**hellaswag[-1])
    return rows


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
