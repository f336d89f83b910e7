"""The training script: its functions, and whole runs as a user starts them."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from gpt_model import GPT
from tests.conftest import ROOT, run, tiny_model
from tests.small_runs import TEXT, assert_same_losses, small_args
from utils import __version__
from utils.command_line import UserError
from utils.data_loader import TextStream, WindowLoader
from utils.distributed import Distributed
from utils.tokenizer import gpt2_encoding, tokenizer_from_state
from utils.training.log_reader import read_metrics


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path, Path]:
    """A run of 30 steps in a process: (process, log directory, text file)."""
    folder = tmp_path_factory.mktemp("run")
    text_file = folder / "text.txt"
    text_file.write_text(TEXT * 300, encoding="utf-8")
    process = run(
        ROOT / "train_gpt.py", *small_args(text_file, folder / "log", "--max-steps", "30"), cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return process, folder / "log", text_file


def test_a_run_writes_its_log_line_by_line(finished_run):
    """log.txt: train losses with six decimals, and val losses with four when due and after the last step."""
    _, log_dir, _ = finished_run
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    assert [int(step) for step, kind, _ in lines if kind == "train"] == list(range(30))
    assert [int(step) for step, kind, _ in lines if kind == "val"] == [0, 10, 20, 30]
    assert {kind for _, kind, _ in lines} == {"train", "val"}
    assert all(len(value.split(".")[1]) == (6 if kind == "train" else 4) for _, kind, value in lines)


def test_a_run_learns(finished_run):
    """The first loss is that of a uniform guess, and the last one is more than 1 nat lower."""
    _, log_dir, text_file = finished_run
    losses = [
        float(line.split()[2]) for line in (log_dir / "log.txt").read_text().splitlines() if "train" in line
    ]
    assert abs(losses[0] - math.log(len(set(text_file.read_text())))) < 0.3
    assert losses[-1] < losses[0] - 1


def test_a_run_records_its_environment_first_and_then_its_steps(finished_run):
    """metrics.jsonl has settings and versions, then one record per update and one per validation."""
    _, log_dir, _ = finished_run
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["kind"] == "run"
    assert records[0]["settings"]["max_steps"] == 30
    assert records[0]["environment"]["torch"] == torch.__version__
    assert records[0]["environment"]["mini-gpt"] == __version__
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(30))
    assert all(r["seconds"] > 0 and r["norm"] > 0 and r["memory"] > 0 and r["mfu"] is None for r in steps)
    vals = [r for r in records if r["kind"] == "val"]
    assert [r["tokens"] for r in vals] == [0, 1280, 2560, 3840]


def test_a_run_writes_plot_samples_and_checkpoints(finished_run):
    """And its last line is the command that samples from the model."""
    process, log_dir, _ = finished_run
    assert (log_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (log_dir / "samples.txt").read_text().count("--- step 15, sample") == train_gpt.NUM_SAMPLES
    names = sorted(p.name for p in log_dir.glob("*_0*.pt"))
    assert (log_dir / "model_best.pt").exists()
    assert names == ["model_00020.pt", "model_00030.pt", "optimizer_00020.pt", "optimizer_00030.pt"]
    last = process.stdout.strip().splitlines()[-1]
    script = shlex.quote(str(ROOT / "generate.py"))
    assert last.startswith(f"sample from it: python {script} -m ") and "model_00030.pt" in last
    assert "step    12 | loss " in process.stdout and " tok/s | eta " in process.stdout


@pytest.mark.slow
def test_generate_samples_from_a_checkpoint(finished_run):
    """With the checkpoint's tokenizer, and with the same text for the same seed."""
    _, log_dir, _ = finished_run
    flags = ("-m", log_dir / "model_00030.pt", "-p", "The quick", "--max-new-tokens", "20", "--seed", "1")
    first, second = run(ROOT / "generate.py", *flags), run(ROOT / "generate.py", *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The quick") and len(first.stdout) == len("The quick") + 20 + 1
    assert first.stdout == second.stdout


def test_eval_only_gives_the_val_loss_of_the_log(finished_run, capsys):
    """The final checkpoint alone gives the last val loss, also with another micro-batch."""
    _, log_dir, text_file = finished_run
    logged = [record["loss"] for record in read_metrics(log_dir / "metrics.jsonl") if record["kind"] == "val"]
    flags = ("--eval-only", "--init-from", str(log_dir / "model_00030.pt"), "--micro-batch", "7")
    assert train_gpt.main(small_args(text_file, log_dir, *flags)) == 0
    out = capsys.readouterr().out
    loss, perplexity, bits = re.search(r"val loss (\S+) \| perplexity (\S+) \| (\S+) bits", out).groups()
    assert float(loss) == pytest.approx(logged[-1], abs=5.1e-5)  # half of the last digit that is shown
    assert float(bits) == pytest.approx(logged[-1] / math.log(2), abs=1e-4)  # one byte a character
    assert float(perplexity) == pytest.approx(math.exp(logged[-1]), rel=1e-3)


def test_a_second_run_archives_the_files_of_the_first(finished_run, tmp_path):
    """They are moved unchanged; files that no run writes stay where they are."""
    _, log_dir, text_file = finished_run
    copy = tmp_path / "log"
    shutil.copytree(log_dir, copy)
    foreign = ("README.md", "thesis.tex", "train_gpt.py", "other_run/log.txt")
    (copy / "other_run").mkdir()
    for name in foreign:
        (copy / name).write_text("stays")
    assert train_gpt.main(small_args(text_file, copy, "--max-steps", "1", "--val-every", "0")) == 0
    (archive,) = (copy / "archive").iterdir()
    for path in log_dir.glob("[!.]*"):
        assert (archive / path.name).read_bytes() == path.read_bytes()
    assert (copy / "log.txt").read_text().count("\n") == 1
    assert {(copy / name).read_text() for name in foreign} == {"stays"}


def test_two_equal_runs_have_equal_logs(finished_run, tmp_path):
    """On one machine: log.txt byte for byte, weights bit for bit."""
    _, log_dir, text_file = finished_run
    process = run(ROOT / "train_gpt.py", *small_args(text_file, tmp_path, "--max-steps", "30"))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "log.txt").read_bytes() == (log_dir / "log.txt").read_bytes()
    ours, theirs = (GPT.from_checkpoint(d / "model_00030.pt").state_dict() for d in (tmp_path, log_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_accumulation_changes_rounding_only(text_file, tmp_path):
    """A batch of one or of eight micro-batches gives the same losses to 1e-4."""
    for micro_batch in ("8", "1"):
        flags = ("--max-steps", "8", "--micro-batch", micro_batch, "--sample-every", "0")
        assert train_gpt.main(small_args(text_file, tmp_path / micro_batch, *flags)) == 0
    assert_same_losses(tmp_path / "1", tmp_path / "8")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_bits_per_byte_divide_the_loss_by_the_bytes_of_the_text(tokenizer, tmp_path):
    """All tokens' bytes, of characters as UTF-8, of BPE tokens also where a token is part of a character."""
    text = tmp_path / "text.txt"
    text.write_text("Größe, café, 日本の猫 🐈‍⬛!\n" * 90, encoding="utf-8")
    flags = ("--tokenizer", tokenizer, "--max-steps", "1", "--sample-every", "0")
    assert train_gpt.main(small_args(text, tmp_path / "log", *flags)) == 0
    records = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    record = next(record for record in records if record["kind"] == "val")
    state = GPT.load(tmp_path / "log" / "model_00001.pt").tokenizer_state
    ids = tokenizer_from_state(state).encode(text.read_text("utf-8"))
    val = ids[int(0.9 * len(ids)) :]
    targets = val[1 : (len(val) - 1) // 16 * 16 + 1].tolist()  # of whole windows
    if tokenizer == "char":
        num_bytes = len("".join(state["characters"][i] for i in targets).encode("utf-8"))
    else:
        num_bytes = len(gpt2_encoding().decode_bytes(targets))
    assert record["bits_per_byte"] == pytest.approx(
        record["loss"] * len(targets) / math.log(2) / num_bytes, rel=1e-9
    )


def test_fine_tuning_starts_from_the_checkpoint(finished_run, tmp_path):
    """--init-from loads sizes, weights and vocabulary: the first val loss is the last one of the file."""
    _, log_dir, text_file = finished_run
    flags = ("--init-from", str(log_dir / "model_00030.pt"), "--max-steps", "1")
    assert train_gpt.main(small_args(text_file, tmp_path, *flags)) == 0
    last = (log_dir / "log.txt").read_text().splitlines()[-1].split()[2]
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == f"0 val {last}"
    assert GPT.from_checkpoint(tmp_path / "model_00001.pt").config.n_layer == 2


def hellaswag_folder(folder: Path) -> Path:
    """Writes a file of four examples in the published format; returns the folder."""
    folder.mkdir()
    endings = ["sleeps on.", "jumps over the fox.", "is quick and brown.", "flies away."]
    shared = dict(activity_label="Dog", ctx_a="A dog", ctx_b="it", endings=endings)
    rows = [
        dict(shared, ind=i, label=i, ctx=f"A {word} dog. It")
        for i, word in enumerate(("lazy", "quick", "brown", "gone"))
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_hellaswag_in_training(text_file, tmp_path, capsys):
    """A line in the log every N steps and after the last; the number of examples is printed."""
    flags = ("--tokenizer", "gpt2", "--max-steps", "2", "--hellaswag-every", "1", "--sample-every", "0")
    folder = hellaswag_folder(tmp_path / "data")
    flags += ("--hellaswag-dir", str(folder), "--hellaswag-examples", "3")
    assert train_gpt.main(small_args(text_file, tmp_path / "log", *flags)) == 0
    lines = [line.split() for line in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    values = [(int(step), float(value)) for step, kind, value in lines if kind == "hella"]
    assert [step for step, _ in values] == [0, 1, 2]
    assert all(round(3 * value, 2) in (0.0, 1.0, 2.0, 3.0) for _, value in values)
    assert "of 3 examples" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_without_hellaswag_training_continues(tokenizer, text_file, tmp_path, capsys, monkeypatch):
    """If its file cannot be downloaded, or with characters: one warning, no line in the log, exit code 0."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    flags = ("--tokenizer", tokenizer, "--max-steps", "1", "--hellaswag-every", "1", "--sample-every", "0")
    flags += ("--hellaswag-dir", str(tmp_path / "none"))
    log_dir = tmp_path / "log"
    assert train_gpt.main(small_args(text_file, log_dir, *flags)) == 0
    assert capsys.readouterr().err.count("warning: HellaSwag is off") == 1
    assert "hella" not in (log_dir / "log.txt").read_text()


def test_evaluation_is_exact_for_any_micro_batch():
    """The mean over all windows does not depend on the batches, whose last one may be smaller."""
    stream = TextStream("t", np.random.RandomState(0).randint(0, 97, 400).astype(np.uint16), 0, {})
    model, alone = tiny_model(), Distributed(torch.device("cpu"))
    losses = [
        train_gpt.evaluate(
            model, WindowLoader(stream, 16, micro_batch).val_batches(10**6), alone, torch.float32
        )
        for micro_batch in (1, 7, 100)
    ]
    rows = torch.from_numpy(stream.tokens[:385].astype(np.int64))
    logits, truth = model(rows[:384].view(24, 16), rows[1:].view(24, 16))
    assert max(losses) - min(losses) < 1e-6
    assert abs(losses[0] - truth.item()) < 1e-5


@pytest.mark.parametrize(("num_tokens", "stride"), [(100, 16), (100, 5), (97, 1), (17, 4), (9, 16), (2, 3)])
def test_every_token_but_the_first_is_scored_once_with_its_context(num_tokens, stride):
    """The mean of the losses that the model gives one by one, each after the context of its window."""
    T, model, alone = 16, tiny_model(), Distributed(torch.device("cpu"))
    tokens = np.random.RandomState(0).randint(0, 97, num_tokens).astype(np.uint16)
    loader = WindowLoader(TextStream("t", tokens, 0, {}), T, 3)
    loss = train_gpt.evaluate(model, loader.sliding_batches(stride), alone, torch.float32)
    ids, expected, start = torch.from_numpy(tokens.astype(np.int64)), [], 0
    for target in range(1, num_tokens):
        while target > start + T:  # the window slides
            start += stride
        logits = model(ids[None, start:target])[0][0, -1]
        expected.append(torch.nn.functional.cross_entropy(logits, ids[target]).item())
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    parts = [list(WindowLoader(loader.stream, T, 3, rank, 3).sliding_batches(stride)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1  # for collectives
    scored = [batch[1][batch[1] >= 0] for part in parts for batch in part if batch is not None]
    assert torch.equal(torch.cat(scored).sort().values, ids[1:].sort().values)


def test_a_part_of_a_text_is_evaluated_whole(finished_run, tmp_path, capsys):
    """All of a text shorter than the block, and the train part with overlapping windows."""
    _, log_dir, text_file = finished_run
    short = tmp_path / "short.txt"
    short.write_text("the dog")
    flags = ("--eval-only", "--init-from", str(log_dir / "model_00030.pt"), "--device", "cpu", "--eval-part")
    assert train_gpt.main([*flags, "all", "--data", str(short)]) == 0
    assert re.search(r": all loss \d.* \| 6 tokens of .*short.txt\n$", capsys.readouterr().out)
    assert train_gpt.main([*flags, "train", "--data", str(text_file), "--stride", "4"]) == 0
    assert f"| {int(0.9 * len(TEXT) * 300) - 1:,} tokens of " in capsys.readouterr().out
    with pytest.raises(UserError, match="--stride 17 is more than the 16 tokens of a window"):
        train_gpt.main([*flags, "val", "--data", str(text_file), "--stride", "17"])


def test_a_text_to_train_on_is_never_shorter_than_a_window(tmp_path):
    """Also with --eval-part, which means nothing without --eval-only."""
    short = tmp_path / "short.txt"
    short.write_text("the dog")
    for flags in ((), ("--eval-part", "val")):
        with pytest.raises(UserError, match="short.txt has 7 tokens, need at least T.1 = 17"):
            train_gpt.main(small_args(short, tmp_path / "log", *flags))


@pytest.mark.slow
def test_deterministic_runs_are_equal(text_file, tmp_path):
    """--deterministic selects deterministic algorithms, and two runs have the same log."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train_gpt; train_gpt.main(); assert torch.are_deterministic_algorithms_enabled()"
    )
    for name in ("a", "b"):
        flags = small_args(text_file, tmp_path / name, "--max-steps", "5", "--deterministic")
        process = run("-c", code, *flags)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "a" / "log.txt").read_bytes() == (tmp_path / "b" / "log.txt").read_bytes()


def test_a_finished_run_has_a_report(finished_run):
    """report.md has the final val loss of the log and shows curves.png."""
    _, log_dir, _ = finished_run
    last_val = (log_dir / "log.txt").read_text().splitlines()[-1].split()[2]
    report = (log_dir / "report.md").read_text()
    assert last_val in report and "curves.png" in report
