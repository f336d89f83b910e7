"""Each part of the benchmark at a toy size: it runs as typed, and it notices results that differ."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_model import GPT
from tests.benchmarks import __main__ as benchmark
from tests.benchmarks import cuda as benchmark_cuda
from tests.benchmarks import decode as benchmark_decode
from tests.benchmarks import generate as benchmark_generate
from tests.benchmarks import hellaswag as benchmark_hellaswag
from tests.benchmarks import loader as benchmark_loader
from tests.benchmarks import loss as benchmark_loss
from tests.benchmarks import recipe as benchmark_recipe
from tests.benchmarks import recompute as benchmark_recompute
from tests.benchmarks import shards as benchmark_shards
from tests.benchmarks import step as benchmark_step
from tests.benchmarks.interleaved import BenchmarkProcess, compare_interleaved
from tests.benchmarks.plain_gpt2 import plain_greedy, plain_twin
from tests.benchmarks.step import Size, hugging_face_twin, prepare_ours, prepare_plain, random_batches
from tests.conftest import ROOT, run, tiny_model
from utils import fused_loss
from utils.command_line import Unfinished, UserError
from utils.cpu_matmul import FastLinear
from utils.decoding import StaticDecoder
from utils.runtime import Decision
from utils.tokenizer import END_OF_TEXT_ID
from utils.training.state import TrainState

TOY = ("--n-layer", 2, "--n-head", 2, "--n-embd", 32)
CPU = torch.device("cpu")
FIXTURES = ROOT / "tests" / "fixtures"


def measured(tmp_path: Path, *arguments: Any, **environment: str) -> tuple[dict[str, Any], str]:
    """Runs a part as a user would. Returns the figures of --json, and what it printed."""
    process = run("-m", "tests.benchmarks", *arguments, "--json", tmp_path / "figures.json", **environment)
    assert process.returncode == 0, process.stderr
    return json.loads((tmp_path / "figures.json").read_text()), process.stdout


@pytest.mark.slow
def test_steps_are_compared_at_equal_losses(tmp_path: Path):
    """Ours, plain PyTorch and Hugging Face have the same losses in every step of two micro-batches."""
    sizes = "--seq-len 16 --micro-batch 2 --micro-steps 2 --vocab-size 300 --rounds 2".split()
    figures, printed = measured(tmp_path, "step", *TOY, *sizes, "--device", "cpu", "--dtype", "float32")
    size = figures["sizes"]["custom"]
    assert figures["agree"] and size["losses_agree"] and size["losses_apart"] < 1e-4
    assert set(size["contenders"]) == {"ours", "plain eager", "Hugging Face"}
    for row in size["contenders"].values():
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"]) and row["mfu"] is None
        assert row["micro_batch"] == 2
    assert "losses agree" in printed and figures["date"] and figures["cpu"]


@pytest.mark.slow
def test_texts_are_compared_token_by_token(tmp_path: Path):
    """Ours, Hugging Face's generate and plain PyTorch without a cache produce the same text."""
    figures, printed = measured(tmp_path, "generate", *TOY, "--max-new-tokens", 24, "--rounds", 2)
    assert figures["agree"] and "all produced the same tokens" in printed
    ours, plain = figures["ours"]["tokens_per_second"], figures["no cache"]["tokens_per_second"]
    assert figures["no cache"]["time_ratio"] == pytest.approx(ours / plain)
    assert figures["ours"]["share_of_limit"] == pytest.approx(ours / figures["limit_tokens_per_second"])


@pytest.mark.slow
def test_shards_and_loader_are_measured(tmp_path: Path):
    """The builder writes the reference's bytes; the loader is compared with nothing."""
    figures, printed = measured(tmp_path, "shards", "--megabytes", 1, "--runs", 1, "--shard-tokens", 100_000)
    assert figures["agree"] and "identical shards" in printed and figures["tokens"] > 100_000
    sizes = ("--num-shards", 2, "--shard-tokens", 200_000, "--batches", 2, "--runs", 1)
    figures, printed = measured(tmp_path, "loader", *sizes)
    assert figures["tokens_per_second"] > 0 and "median" in printed


@pytest.mark.slow
def test_recomputation_is_compared_in_memory_and_time(tmp_path: Path):
    """The same losses in every update, and less memory, although a toy has few activations to recompute."""
    sizes = "--n-layer 12 --n-head 2 --n-embd 64 --seq-len 256 --micro-batch 8 --rounds 1".split()
    figures, printed = measured(tmp_path, "recompute", *sizes, "--device", "cpu")
    assert figures["agree"] and figures["losses_apart"] == 0 and "losses agree" in printed
    assert figures["recompute"]["activation_bytes"] > 0 and figures["memory_ratio"] > 1.2
    assert figures["parameters"] == 649_088 and figures["plain"]["seconds"] > 0


def test_other_losses_of_recomputation_are_noticed(capsys: pytest.CaptureFixture):
    """In any update: on a CPU a difference in the last bit, elsewhere one beyond rounding, and NaN."""

    def agree(loss: float, *, exact: bool) -> bool:
        forms = [Namespace(results=[(2.0, 0), (other, 0)]) for other in (2.0, loss)]
        return benchmark_recompute.compare_losses(*forms, exact=exact)["agree"]

    assert agree(2.0, exact=True) and agree(2.0 + 1e-6, exact=False)
    assert not agree(2.0 + 1e-15, exact=True) and not agree(2.1, exact=False)
    assert not agree(math.nan, exact=False)
    assert capsys.readouterr().out.count("DISAGREE") == 3


@pytest.mark.slow
def test_forms_of_the_loss_are_compared(tmp_path: Path):
    """Ours, with its kernel where Triton is installed, is exact; a form that is not installed is named."""
    toy = ("--rows", 48, "--channels", 32, "--vocab-size", 1000, "--rounds", 1, "--device", "cpu")
    figures, printed = measured(tmp_path, "loss", *toy, TRITON_INTERPRET="1")
    forms = figures["forms"]
    assert figures["agree"] and "ours is exact" in printed
    assert forms["full logits, eager"]["loss_error"] == forms["full logits, compiled"]["loss_error"] == 0
    assert forms["ours, PyTorch's operations"]["rows"] == 48
    assert ("rows" in forms["ours, kernel"]) == (find_spec("triton") is not None)
    if find_spec("liger_kernel") is None:
        assert forms["liger-kernel"] == {"missing": "not installed (pip install liger-kernel)"}


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (12, 8), weight (30, 8) and targets (12,)."""
    torch.manual_seed(0)
    return torch.randn(12, 8), torch.randn(30, 8).requires_grad_(), torch.randint(30, (12,))


def test_a_form_uses_the_largest_number_of_rows_that_fits():
    """Halved as often as memory runs out; another failure is a row of the table, and makes ours inexact."""

    def hungry(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(hidden) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return benchmark_loss.full_logits(hidden, *rest)

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        return 1.001 * benchmark_loss.full_logits(*inputs)

    assert benchmark_loss.measure_speed(hungry, loss_inputs(), rounds=2)["rows"] == 3
    failed = benchmark_loss.measure_form(broken, loss_inputs(), rounds=1)
    assert failed == {"failed": "RuntimeError: no kernel image"} and not benchmark_loss.is_exact(failed)
    assert "FAILED RuntimeError: no kernel image" in benchmark_loss.described(failed)
    exact, inexact = (
        benchmark_loss.measure_form(form, loss_inputs(), rounds=1)
        for form in (benchmark_loss.without_kernel, wrong)
    )
    assert benchmark_loss.is_exact(exact) and not benchmark_loss.is_exact(inexact)


def test_a_kernel_that_training_does_not_use_has_failed(monkeypatch: pytest.MonkeyPatch):
    """Where Triton is missing, so is the kernel; where training avoids it for its results, it has failed."""
    assert "missing" in benchmark_loss.measure_form(benchmark_loss.with_kernel, loss_inputs(), rounds=1)
    monkeypatch.setattr(benchmark_loss, "choose_kernel", lambda device: Decision(True, "CUDA with Triton"))
    monkeypatch.setattr(fused_loss, "loss_backend", lambda device: Decision(False, "results differ"))
    failed = benchmark_loss.measure_form(benchmark_loss.with_kernel, loss_inputs(), rounds=1)
    assert failed == {"failed": "RuntimeError: results differ"}


@pytest.mark.parametrize("wrong", [False, True])
def test_static_and_eager_sampling_are_compared_with_one_pass(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Each of float32's tokens is the likeliest; a cache that forgets the first position is noticed."""
    append = StaticDecoder.append

    def forgetful(decoder: StaticDecoder, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple:
        keys, values = append(decoder, layer, k, v)
        return keys, values.index_fill(2, torch.tensor(0), 0.0) if decoder.position > 0 else values

    if wrong:
        monkeypatch.setattr(StaticDecoder, "append", forgetful)
    monkeypatch.setattr(benchmark_decode, "read_bandwidth", lambda device: 1e9)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, max_new_tokens=24, texts=3, rounds=1)
    figures = benchmark_decode.measure(Namespace(**sizes, device="cpu"))
    assert figures["agree"] is not wrong and ("ARE NOT" in capsys.readouterr().out) is wrong
    rows = [(row["form"], row["dtype"], row["texts"]) for row in figures["rows"]]
    assert rows == [
        (form, dtype, texts)
        for dtype, others in (("float32", ()), ("bfloat16", ("Hugging Face",)))
        for texts in (1, 3)
        for form in ("ours, graphs", "ours, eager", *others)
    ]


@pytest.mark.usefixtures("no_pictures")
def test_recipes_are_compared_by_the_tokens_to_a_loss(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Runs of train_gpt.py: equal data and seed, each with its own schedule, the curves in one picture."""
    import train_gpt

    commands: list[list[str]] = []

    def execute(command: list[str]) -> None:
        commands.append(command)
        assert command[0] == "train_gpt.py" and train_gpt.main(command[1:]) == 0

    monkeypatch.setattr(benchmark_recipe, "execute", execute)
    files = [
        "--data",
        str(text_file),
        "--picture",
        str(tmp_path / "a.png"),
        "--json",
        str(tmp_path / "a.json"),
    ]
    flags = ["--part", "char", "--toy", "--device", "cpu", "--seeds", "7", "--fast-steps", "8", "2"]
    assert benchmark.main(["recipe", *flags, *files]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    row = figures["seeds"]["7"]
    assert [run["steps"] for run in (row["faithful"], *row["fast"])] == [8, 2, 8]
    assert row["fast"][0]["tokens"] == 64 and row["fast"][0]["curve"][-1] == [64, row["fast"][0]["val_loss"]]
    share = 0.25 if row["fast"][0]["val_loss"] <= row["faithful"]["val_loss"] else 1.0
    assert figures["share_of_tokens"] == {"median": share, "lowest": share, "highest": share}
    assert f"reached with {share:.0%} of the tokens, " in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    recipes = [command[command.index("--recipe") + 1] for command in commands]
    assert recipes == ["faithful", "fast", "fast"] and all("7" in command for command in commands)
    milliseconds = figures["optimizer_milliseconds"]
    assert milliseconds.keys() == {"faithful", "fast"} and min(milliseconds.values()) > 0


def test_the_faithful_recipe_has_its_best_rate_and_the_fast_one_its_shortest_sufficient_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The rate is chosen on the first seed; a seed that no run serves leaves the spread open."""
    losses = {"0.0006": 3.5, "0.001": 3.4, "0.002": 3.6}

    runs: list[tuple[str, int, int]] = []

    def run(flags: list[str], steps: int, seed: int, folder: Path) -> dict[str, Any]:
        runs.append((flags[-1], steps, seed))
        loss = 3.5 - steps / 1000 - 0.05 * seed if "fast" in flags else losses[flags[-1]]
        return {"steps": steps, "tokens": 10 * steps, "val_loss": loss, "seconds": 1.0, "curve": []}

    monkeypatch.setattr(benchmark_recipe, "run", run)
    monkeypatch.setattr(benchmark_recipe, "prepare_data", lambda part, data, folder: "text.txt")
    monkeypatch.setattr(benchmark_recipe, "optimizer_milliseconds", lambda flags, device: 1.0)
    args = Namespace(part="larger", seeds=[1, 2], fast_steps=None, data=None, device="cpu", picture=None)
    args.toy = False
    figures = benchmark_recipe.measure(args)
    assert figures["flags"]["faithful"].endswith("--recipe faithful --max-lr 0.001")
    assert runs.count(("0.001", 400, 1)) == 1  # a trial of the first seed is not repeated
    assert figures["seeds"]["1"]["share_of_tokens"] == 120 / 400  # 3.33 after 120 steps
    assert figures["share_of_tokens"]["highest"] == 0.3
    args.seeds = [0, -1]
    assert benchmark_recipe.measure(args)["seeds"]["0"]["share_of_tokens"] == 120 / 400
    args.seeds = [1, -9]
    figures = benchmark_recipe.measure(args)
    assert figures["share_of_tokens"] is None and figures["seeds"]["-9"]["share_of_tokens"] is None
    assert "seed -9: no fast run reaches 3.4000" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_run_that_fails_ends_the_comparison():
    """With its command and its message."""
    with pytest.raises(Unfinished, match="train_gpt.py --max-steps 0 ended with exit code 2") as caught:
        benchmark_recipe.execute(["train_gpt.py", "--max-steps", "0"])
    assert "0 is not above zero" in caught.value.hint


def test_a_corpus_below_two_shards_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The builder then gives val a small part, unlike the reference: the shards cannot be compared."""
    monkeypatch.setattr(benchmark_shards, "write_corpus", lambda path, num_bytes: path)
    monkeypatch.setattr(benchmark_shards, "time_command", lambda command: (1.0, 1))
    monkeypatch.setattr(benchmark_shards, "digest_of", lambda folder: (199, ""))
    with pytest.raises(UserError, match="199 tokens do not fill two shards of 100"):
        benchmark.main(["shards", "--shard-tokens", "100"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hellaswag_is_measured_in_every_dtype(dtype: str, tmp_path: Path):
    """Also where the logits are bf16, which numpy does not have; the losses of both forms agree."""
    toy = ["--examples", "3", "--rounds", "2", *map(str, TOY), "--block-size", "256", "--device", "cpu"]
    files = ["--hellaswag-dir", str(FIXTURES), "--json", str(tmp_path / "figures.json")]
    assert benchmark.main(["hellaswag", *toy, "--dtype", dtype, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agree"] and figures["dtype"] == dtype and figures["examples"] == 3


def test_other_hellaswag_losses_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A loss per token that is off by 1 in one ending of one example fails the benchmark."""
    score_trees = benchmark_hellaswag.score_trees

    def wrong(model: GPT, examples: list, *arguments: Any) -> np.ndarray:
        losses = score_trees(model, examples, *arguments)
        losses[1, 2] += examples[1].divisors[2]
        return losses

    monkeypatch.setattr(benchmark_hellaswag, "score_trees", wrong)
    toy = ["--examples", "3", "--rounds", "1", *map(str, TOY), "--block-size", "256", "--device", "cpu"]
    with pytest.raises(Unfinished, match="different results"):
        benchmark.main(["hellaswag", *toy, "--dtype", "float32", "--hellaswag-dir", str(FIXTURES)])


def test_all_of_hellaswag_with_few_padded_rows(tmp_path: Path):
    """Every row of the file, once; the padded form gets a part of them, whose losses are compared."""
    toy = ["--examples", "99", "--padded-examples", "3", "--rounds", "1", "--block-size", "256"]
    files = ["--hellaswag-dir", str(FIXTURES), "--json", str(tmp_path / "figures.json")]
    assert benchmark.main(["hellaswag", *toy, *map(str, TOY), "--device", "cpu", *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agree"] and (figures["examples"], figures["padded_examples"]) == (7, 3)


class Timed:
    """A stand-in for a BenchmarkProcess whose executions take the given times."""

    def __init__(self, *seconds: float):
        self.left, self.seconds = list(seconds), []

    def execute(self, timed: bool = True) -> None:
        seconds = self.left.pop(0)
        if timed:
            self.seconds.append(seconds)


def test_ratios_are_taken_to_the_execution_just_before():
    """The median over the timed rounds, each to ours just before: a slow minute cancels out."""
    ours = Timed(9, 9, 1, 2, 10, 20, 3, 1)
    others = [Timed(1, 2, 20, 9), Timed(1, 6, 60, 5)]
    assert compare_interleaved(ours, others, rounds=3, warm_up=1) == [2, 3]
    assert ours.seconds == [1, 2, 10, 20, 3, 1] and others[0].seconds == [2, 20, 9]


def test_different_results_fail_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where the results differ, the figures are written, and the command ends with an error."""
    monkeypatch.setattr(benchmark_loader, "measure", lambda args: {"agree": False})
    with pytest.raises(Unfinished, match="different results"):
        benchmark.main(["loader", "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["agree"] is False


def prepare_memory_hungry(
    size: Size, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, Callable[[], float]]:
    """The plain implementation on a device that has no memory for more than one row."""
    device, step = prepare_plain(size, vocab_size, device, dtype)

    def hungry_step() -> float:
        if size.micro_batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step()

    return device, hungry_step


@pytest.mark.slow
def test_each_uses_the_largest_micro_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One that runs out of memory makes the same update of fewer rows at a time; the table says so."""
    monkeypatch.setattr(benchmark_step, "prepare_plain", prepare_memory_hungry)
    monkeypatch.setattr(benchmark_step, "prepare_hugging_face", prepare_ours)  # no long import
    monkeypatch.setattr(benchmark_step, "matmul_flops_per_second", lambda device, dtype: 1e9)
    found = benchmark_step.measure_size("toy", Size(1, 1, 8, 8, 2, 3), 50, CPU, torch.float32, 1)
    rows = {name: row["micro_batch"] for name, row in found["contenders"].items()}
    assert rows == {"ours": 2, "plain eager": 1, "Hugging Face": 2}
    assert found["losses_agree"] and (found["micro_batch"], found["micro_steps"]) == (2, 3)
    printed = capsys.readouterr().out
    assert "plain eager: CUDA out of memory; retrying with B1 x 6" in printed
    assert re.search(r"^plain eager +1 ", printed, re.MULTILINE)
    assert not multiprocessing.active_children()  # that of the first try has ended, too


def test_no_micro_batch_fits(monkeypatch: pytest.MonkeyPatch):
    """The rows are halved until their number is odd; then all processes end, and the user must act."""
    tried, killed = [], []

    class Full:
        """A process whose every step runs out of memory."""

        def __init__(self, name: str, prepare: Callable, *arguments: Any):
            self.name = name
            self.start(*arguments)

        def start(self, size: Size, *rest: Any) -> None:
            tried.append((size.micro_batch, size.micro_steps))

        def wait_until_ready(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def kill(self) -> None:
            killed.append(self.name)

    monkeypatch.setattr(benchmark_step, "BenchmarkProcess", Full)
    with pytest.raises(UserError, match="ours: out of memory with a micro-batch of 3"):
        benchmark_step.measure_size("toy", Size(1, 1, 8, 8, 12), 50, CPU, torch.float32, 1)
    assert tried == [(12, 1), (12, 1), (12, 1), (6, 2), (3, 4)]
    assert killed[-3:] == ["ours", "plain eager", "Hugging Face"]


def test_an_update_has_the_same_tokens_for_every_micro_batch():
    """So that losses of implementations with different micro-batches can be compared."""
    whole, halves = (random_batches(Size(1, 1, 8, 5, *rows), 50, CPU) for rows in ((4, 2), (2, 4)))
    assert [idx.shape for idx, _ in halves] == 4 * [(2, 5)]
    for i in range(2):
        assert torch.equal(
            torch.cat([batch[i] for batch in whole]), torch.cat([batch[i] for batch in halves])
        )


def prepare_failing() -> tuple[torch.device, Callable[[], None]]:
    """An implementation whose process ends without an answer."""
    raise SystemExit(7)


@pytest.mark.slow
def test_a_process_that_ends_is_named():
    """The error names the implementation and the exit code, and nothing waits for ever."""
    process = BenchmarkProcess("mine", prepare_failing)
    with pytest.raises(Unfinished, match="mine: its process ended with exit code 7"):
        process.wait_until_ready()


@pytest.mark.parametrize("wrong", [1e-4, math.nan])
def test_other_losses_are_noticed(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A first loss of one implementation that is off by more than rounding, or NaN."""

    class Fake(Timed):
        def __init__(self, name: str, prepare: Callable, *arguments: Any):
            super().__init__(*[1.0] * 9)
            self.name, self.peak_memory_bytes, self.median_seconds = name, 1, 1.0
            self.wait_until_ready = self.close = lambda: None
            self.results = [10.8 + wrong if name == "Hugging Face" else 10.8] * 4

    monkeypatch.setattr(benchmark_step, "BenchmarkProcess", Fake)
    monkeypatch.setattr(benchmark_step, "matmul_flops_per_second", lambda device, dtype: 1e9)
    found = benchmark_step.measure_size("toy", Size(1, 1, 8, 8, 1), 50, CPU, torch.float32, rounds=1)
    assert not found["losses_agree"] and "DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["", "ours", "Hugging Face", "no cache"])
def test_other_texts_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """One token that differs in the last round of one implementation."""
    text = [END_OF_TEXT_ID, 5, 6, 7, 8]

    class Fake(Timed):
        def __init__(self, name: str, prepare: Callable, *arguments: Any):
            super().__init__(*[1.0] * 9)
            self.name, self.peak_memory_bytes, self.median_seconds = name, 1, 1.0
            self.wait_until_ready = self.close = lambda: None
            self.results = []

        def execute(self, ids: list[int] | None = None, count: int = 0, timed: bool = True) -> list[int]:
            super().execute(timed)
            found = list(text if ids is None else text[: len(ids) + count])
            if self.name == wrong and len(self.seconds) == 2:
                found[-1] += 1
            self.results.append(found)
            return found

    monkeypatch.setattr(benchmark_generate, "BenchmarkProcess", Fake)
    monkeypatch.setattr(benchmark_generate, "read_bandwidth", lambda device: 1e9)
    args = Namespace(n_layer=1, n_head=1, n_embd=8, max_new_tokens=4, rounds=2, device="cpu")
    assert benchmark_generate.measure(args)["agree"] is (wrong == "")
    assert ("DISAGREE" in capsys.readouterr().out) is (wrong != "")


def test_the_references_are_gpt2():
    """The plain model and the twin have our logits; greedy text is the same without a cache."""
    model = tiny_model()
    plain = plain_twin(model).eval()
    idx = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
    logits, _ = model(idx)
    assert (plain(idx) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (hugging_face_twin(model).eval()(idx).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    assert torch.equal(plain_greedy(plain, idx, 7), model.generate(idx, 7, temperature=0))


def test_the_measured_update_is_that_of_the_training_script(monkeypatch: pytest.MonkeyPatch):
    """`ours` calls train_gpt.update on a TrainState, with the linear layers that the script would use.

    The losses of 20 steps fall, and equal those of the plain step, with the chunked loss and without.
    """
    import train_gpt

    calls, update = [], train_gpt.update
    monkeypatch.setattr(train_gpt, "update", lambda *a: calls.append(a) or update(*a))
    arguments = (Size(1, 2, 16, 8, 2), 60, CPU, torch.float32)
    ours, full = prepare_ours(*arguments), prepare_ours(*arguments, full_logits=True)
    plain = prepare_plain(*arguments)
    losses = [(ours[1](), full[1](), plain[1]()) for _ in range(20)]
    assert len(calls) == 40 and losses[-1][0] < losses[0][0]
    assert all(abs(a - c) < 1e-5 and abs(b - c) < 1e-5 for a, b, c in losses)
    assert len(random_batches(arguments[0]._replace(micro_steps=3), 60, CPU)) == 3
    state = calls[0][0]
    assert isinstance(state, TrainState) and isinstance(state.model, GPT)
    assert isinstance(state.model.lm_head, FastLinear)


def test_evaluated_models_have_the_linear_layers_of_the_scripts(monkeypatch: pytest.MonkeyPatch):
    """Sampling and HellaSwag are measured with the GEMM backend that the scripts choose on a CPU."""
    models = []

    def generate(model: GPT, *arguments: Any, **sampling: Any) -> torch.Tensor:
        models.append(model)
        return torch.zeros(1, 1)

    def score_interleaved(model: GPT, *arguments: Any) -> dict[str, Any]:
        models.append(model)
        raise Unfinished("enough", "")

    monkeypatch.setattr(GPT, "generate", generate)
    args = Namespace(n_layer=1, n_head=1, n_embd=8, max_new_tokens=4)
    benchmark_generate.prepare_ours(args, CPU)[1]()
    monkeypatch.setattr(benchmark_hellaswag, "score_interleaved", score_interleaved)
    with pytest.raises(Unfinished, match="enough"):
        benchmark.main(["hellaswag", *map(str, TOY), "--device", "cpu", "--hellaswag-dir", str(FIXTURES)])
    assert len(models) == 2 and all(isinstance(model.lm_head, FastLinear) for model in models)


# ------------------------------------------------------------------------------------------------------------
# The benchmarks on a GPU


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_at_toy_size(tmp_path: Path):
    """Every part, in its order, with its bars, met or not as the figures say; a CPU skips the tests."""
    flags = ("--toy", "--hellaswag-dir", FIXTURES, "--commit", "abc")
    figures, printed = measured(tmp_path, "cuda", *flags, TRITON_INTERPRET="1")
    parts = figures["parts"]
    assert figures["agree"] and figures["toy"] and figures["commit"] == "abc" and figures["versions"]["torch"]
    assert list(parts) == ["tests", "loss", "step", "generate", "hellaswag"]
    for name, part in parts.items():
        assert part["status"].startswith("done after ") and part["right"], name
        assert f"== {name}, at most " in printed and f"{name}: done after " in printed
        assert len(part["bars"]) == len(benchmark_cuda.PARTS[name].bars)
    assert re.search(r"^\d+ skipped\b", parts["tests"]["output"][-1])
    bars = {bar["name"]: bar for part in parts.values() for bar in part["bars"]}
    speed = bars["tokens/s of 8 texts, bf16"]
    assert speed["value"] > 0 and speed["met"] is (speed["value"] >= 8000)
    assert bars["seconds for all examples"]["met"] and bars["peak memory at B64 in GB"]["value"] is None


@pytest.mark.slow
def test_the_recipes_on_a_gpu_run_at_toy_size(tmp_path: Path):
    """On shards that it builds; this part runs only when asked for, and then alone."""
    figures, printed = measured(tmp_path, "cuda", "--toy", "--recipe", "--commit", "abc")
    assert list(figures["parts"]) == ["recipe"] and "recipe" not in benchmark_cuda.DEFAULT_PARTS
    part = figures["parts"]["recipe"]
    assert part["status"].startswith("done after ") and part["figures"]["name"] == "124M"
    (bar,) = part["bars"]
    assert bar["value"] == (part["figures"]["share_of_tokens"] or {}).get("highest")


@pytest.mark.slow
def test_a_command_is_ended_at_its_limit_with_all_it_has_started(tmp_path: Path):
    """A part that hangs disturbs no later one, and its output is kept; one that ends has its exit code."""
    grandchild = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {grandchild!r}]); "
        "print(child.pid); child.wait()"
    )
    log = tmp_path / "log.txt"
    assert benchmark_cuda.run_limited([sys.executable, "-c", code], 1.5, log) is None
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until its new parent has waited for it
            os.kill(int(log.read_text()), 0)
            time.sleep(0.1)
    code = "import os, sys; print(os.environ['A']); sys.exit(7)"
    assert benchmark_cuda.run_limited([sys.executable, "-c", code], 60, log, A="b") == 7
    assert log.read_text() == "b\n"


@pytest.fixture
def cuda_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the command with parts whose processes are given, as (exit code, figures); returns its file."""

    def command(**results: tuple[int | None, dict[str, Any]]) -> dict[str, Any]:
        file, left = tmp_path / "cuda.json", list(results)

        def run_limited(command: list[str], limit: float, log_path: Path, **environment: str) -> int | None:
            name = left.pop(0)
            assert len(json.loads(file.read_text())["parts"]) == len(results) - len(left) - 1
            log_path.write_text(f"output of {name}\n")
            code, figures = results[name]
            if "--json" in command and figures:
                Path(command[command.index("--json") + 1]).write_text(json.dumps(figures))
            return code

        monkeypatch.setattr(benchmark_cuda, "run_limited", run_limited)
        benchmark.main(["cuda", "--toy", "--json", str(file), "--parts", *results])
        return json.loads(file.read_text())

    return command


def test_the_other_parts_run_after_one_that_fails(cuda_command, capsys: pytest.CaptureFixture):
    """The file is written after each; a part that only measures may fail without failing the command."""
    found = cuda_command(tests=(0, {}), step=(None, {}), generate=(0, {"agree": True, "rows": []}))["parts"]
    assert found["tests"]["status"] == "done after 0 s: output of tests"
    assert found["step"]["status"] == "TIMED OUT after 0 s: output of step" and found["step"]["right"]
    assert [bar["value"] for bar in found["step"]["bars"]] == [None, None]
    assert found["generate"]["figures"] == {"agree": True, "rows": []}
    assert "step: TIMED OUT after 0 s: output of step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("results", "wrong"),
    [
        (dict(tests=(1, {}), loss=(0, {})), "tests"),
        (dict(tests=(None, {}), loss=(1, {"agree": False}), step=(0, {})), "tests, loss"),
        (dict(loss=(-9, {}), step=(1, {"agree": False}), generate=(0, {})), "loss, step"),
    ],
)
def test_results_that_are_not_proven_right_fail_the_command(
    results: dict, wrong: str, cuda_command, tmp_path
):
    """A proof that fails or does not end, or a part that only measures but found different results."""
    with pytest.raises(Unfinished, match=f"not proven right: {wrong}$"):
        cuda_command(**results)
    figures = json.loads((tmp_path / "cuda.json").read_text())
    assert figures["parts"].keys() == results.keys() and figures["agree"] is False


def test_parts_for_which_no_time_is_left_are_not_run(cuda_command, monkeypatch: pytest.MonkeyPatch, tmp_path):
    """They are named; where one would have proven results, the command has not proven them."""
    monkeypatch.setattr(benchmark_cuda, "TIME_LIMIT", 0)
    parts = cuda_command(step=(0, {}))["parts"]
    assert parts["step"]["status"] == "not run: no time left"
    with pytest.raises(Unfinished, match="not proven right: loss$"):
        cuda_command(loss=(0, {}))


def test_hellaswag_is_skipped_without_its_file(cuda_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The status names the folder; nothing is downloaded, and the command succeeds."""
    monkeypatch.setenv("HELLASWAG_DIR", str(tmp_path))
    [part] = cuda_command(hellaswag=(1, {}))["parts"].values()
    assert part["status"] == f"skipped: no hellaswag_val.jsonl in {tmp_path}"


def test_the_bars_are_taken_from_the_figures():
    """At least 1,500 and at most 27.4; memory counts for a micro-batch of 64 only."""
    row = {"form": "ours, graphs", "dtype": "bfloat16"}
    speeds = [{**row, "texts": 1, "tokens_per_second": 1400.0}, {**row, "texts": 8, "tokens_per_second": 9e3}]
    ours = {"micro_batch": 64, "peak_memory_bytes": 27e9}
    step = {"sizes": {"124M": {"contenders": {"ours": ours, "ours, full logits": {"time_ratio": 1.05}}}}}

    def outcome(name: str, figures: dict[str, Any]) -> list[tuple[float | None, bool]]:
        bars = [benchmark_cuda.compare(bar, figures) for bar in benchmark_cuda.PARTS[name].bars]
        return [(bar["value"], bar["met"]) for bar in bars]

    assert outcome("generate", {"rows": speeds}) == [(1400, False), (9000, True)]
    assert outcome("step", step) == [(1.05, True), (27, True)]
    ours["micro_batch"] = 32
    assert outcome("step", step)[1] == (None, False)
    assert outcome("recipe", {"share_of_tokens": {"median": 0.4, "highest": 0.45}}) == [(0.45, True)]
    assert outcome("recipe", {"share_of_tokens": None}) == [(None, False)]
    assert outcome("hellaswag", {"examples": 10_000, "examples_per_second": 2500}) == [(4, True)]
    forms = {
        "ours, kernel": {"loss_error": 2e-6, "gradient_error": 0.02, "milliseconds": 24, "rows": 65536},
        "full logits, compiled": {"milliseconds": 15, "rows": 32768},
    }
    assert outcome("loss", {"forms": forms}) == [(2e-6, True), (0.02, False), (0.8, True)]
    forms["ours, kernel"] = {"failed": "RuntimeError"}
    assert outcome("loss", {"forms": forms}) == 3 * [(None, False)]


def test_the_command_needs_a_gpu():
    """Without one it measures nothing; the hint says how to try it."""
    with pytest.raises(UserError, match="no CUDA device found") as caught:
        benchmark.main(["cuda"])
    assert "--toy" in caught.value.hint
