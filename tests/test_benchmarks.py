"""Each part of the benchmark at a toy size: it runs as typed, and it notices results that differ."""

from __future__ import annotations

import json
import math
import multiprocessing
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_model import GPT
from tests.benchmarks import __main__ as benchmark
from tests.benchmarks import generate as benchmark_generate
from tests.benchmarks import hellaswag as benchmark_hellaswag
from tests.benchmarks import loader as benchmark_loader
from tests.benchmarks import shards as benchmark_shards
from tests.benchmarks import step as benchmark_step
from tests.benchmarks.interleaved import BenchmarkProcess, compare_interleaved
from tests.benchmarks.plain_gpt2 import plain_greedy, plain_twin
from tests.benchmarks.step import Size, hugging_face_twin, prepare_ours, prepare_plain, random_batches
from tests.conftest import ROOT, run, tiny_model
from utils.command_line import Unfinished, UserError
from utils.cpu_matmul import FastLinear
from utils.tokenizer import END_OF_TEXT_ID
from utils.training.state import TrainState

TOY = ("--n-layer", 2, "--n-head", 2, "--n-embd", 32)
CPU = torch.device("cpu")
FIXTURES = ROOT / "tests" / "fixtures"


def measured(tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], str]:
    """Runs a part as a user would. Returns the figures of --json, and what it printed."""
    process = run("-m", "tests.benchmarks", *arguments, "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stderr
    return json.loads((tmp_path / "figures.json").read_text()), process.stdout


def test_steps_are_compared_at_equal_losses(tmp_path: Path):
    """Ours, plain PyTorch and Hugging Face have the same losses in every step of two micro-batches."""
    sizes = "--seq-len 16 --micro-batch 2 --micro-steps 2 --vocab-size 300 --rounds 2".split()
    figures, printed = measured(tmp_path, "step", *TOY, *sizes, "--device", "cpu")
    size = figures["sizes"]["custom"]
    assert figures["agree"] and size["losses_agree"] and size["losses_apart"] < 1e-4
    assert set(size["contenders"]) == {"ours", "plain eager", "Hugging Face"}
    for row in size["contenders"].values():
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"]) and row["mfu"] is None
    assert "losses agree" in printed and figures["date"] and figures["cpu"]


def test_texts_are_compared_token_by_token(tmp_path: Path):
    """Ours, Hugging Face's generate and plain PyTorch without a cache produce the same text."""
    figures, printed = measured(tmp_path, "generate", *TOY, "--max-new-tokens", 24, "--rounds", 2)
    assert figures["agree"] and "all produced the same tokens" in printed
    ours, plain = figures["ours"]["tokens_per_second"], figures["no cache"]["tokens_per_second"]
    assert figures["no cache"]["time_ratio"] == pytest.approx(ours / plain)
    assert figures["ours"]["share_of_limit"] == pytest.approx(ours / figures["limit_tokens_per_second"])


def test_shards_and_loader_are_measured(tmp_path: Path):
    """The builder writes the reference's bytes; the loader is compared with nothing."""
    figures, printed = measured(tmp_path, "shards", "--megabytes", 1, "--runs", 1, "--shard-tokens", 100_000)
    assert figures["agree"] and "identical shards" in printed and figures["tokens"] > 100_000
    sizes = ("--num-shards", 2, "--shard-tokens", 200_000, "--batches", 2, "--runs", 1)
    figures, printed = measured(tmp_path, "loader", *sizes)
    assert figures["tokens_per_second"] > 0 and "median" in printed


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


def test_all_use_the_largest_micro_batch_that_fits_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Where one implementation runs out of memory, all start again with half the rows and the same update."""
    monkeypatch.setattr(benchmark_step, "prepare_plain", prepare_memory_hungry)
    monkeypatch.setattr(benchmark_step, "prepare_hugging_face", prepare_ours)  # no long import
    monkeypatch.setattr(benchmark_step, "matmul_flops_per_second", lambda device, dtype: 1e9)
    found = benchmark_step.measure_largest_that_fits("toy", Size(1, 1, 8, 8, 2, 3), 50, CPU, torch.float32, 1)
    assert (found["micro_batch"], found["micro_steps"]) == (1, 6) and found["losses_agree"]
    assert "toy: plain eager: CUDA out of memory; retrying with B1 x 6" in capsys.readouterr().out
    assert not multiprocessing.active_children()  # those of the first try have ended, too


def test_no_micro_batch_fits(monkeypatch: pytest.MonkeyPatch):
    """The rows are halved until their number is odd; then the user must change something."""
    tried = []

    def measure_size(name: str, size: Size) -> None:
        tried.append((size.micro_batch, size.micro_steps))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark_step, "measure_size", measure_size)
    with pytest.raises(UserError, match="toy: out of memory with a micro-batch of 3"):
        benchmark_step.measure_largest_that_fits("toy", Size(1, 1, 8, 8, 12))
    assert tried == [(12, 1), (6, 2), (3, 4)]


def prepare_failing() -> tuple[torch.device, Callable[[], None]]:
    """An implementation whose process ends without an answer."""
    raise SystemExit(7)


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
