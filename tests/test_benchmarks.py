"""Each benchmark at a toy size: it runs as typed, and what it compares is equal."""

from __future__ import annotations

import json
import multiprocessing
from argparse import Namespace

import pytest
import torch

from gpt_model import GPT
from tests.benchmarks import __main__ as benchmark
from tests.benchmarks import generate as benchmark_generate
from tests.benchmarks import loader as benchmark_loader
from tests.benchmarks import step as benchmark_step
from tests.benchmarks.interleaved import in_pairs
from tests.benchmarks.plain_gpt2 import plain_greedy, plain_twin
from tests.benchmarks.step import Size, hugging_face_twin, prepare_ours, prepare_plain, random_batches
from tests.conftest import run, tiny_model
from utils.errors import Unfinished, UserError
from utils.runtime import OutOfMemory

TOY = ("--n-layer", 2, "--n-head", 2, "--n-embd", 32)


def measured(tmp_path, *arguments) -> tuple[dict, str]:
    """Runs a benchmark as a user would. Returns the figures of --json, and what it printed."""
    process = run("-m", "tests.benchmarks", *arguments, "--json", tmp_path / "figures.json")
    assert process.returncode == 0, process.stderr
    return json.loads((tmp_path / "figures.json").read_text()), process.stdout


def test_steps_are_compared_at_equal_losses(tmp_path):
    """Ours, plain PyTorch and Hugging Face make the same losses in every step of two micro-batches."""
    sizes = "--seq-len 16 --micro-batch 2 --micro-steps 2 --vocab-size 300 --rounds 2".split()
    figures, printed = measured(tmp_path, "step", *TOY, *sizes, "--device", "cpu")
    size = figures["sizes"]["custom"]
    assert figures["agree"] and size["losses_agree"] and size["losses_apart"] < 1e-4
    assert set(size["contenders"]) == {"ours", "plain eager", "Hugging Face"}
    for row in size["contenders"].values():
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"]) and row["mfu"] is None
    assert "losses agree" in printed and figures["date"] and figures["cpu"]


def test_texts_are_compared_token_by_token(tmp_path):
    """Ours, Hugging Face's generate and plain PyTorch without a cache write the same text."""
    figures, printed = measured(tmp_path, "generate", *TOY, "--max-new-tokens", 24, "--rounds", 2)
    assert figures["agree"] and "all wrote the same tokens" in printed
    ours, plain = figures["ours"]["tokens_per_second"], figures["no cache"]["tokens_per_second"]
    assert figures["no cache"]["time_ratio"] == pytest.approx(ours / plain)
    assert figures["ours"]["share_of_limit"] == pytest.approx(ours / figures["limit_tokens_per_second"])


def test_shards_and_loader_are_measured(tmp_path):
    """The builder writes the reference's bytes; the loader has nothing to be compared with."""
    figures, printed = measured(tmp_path, "shards", "--megabytes", 1, "--runs", 1, "--shard-tokens", 100_000)
    assert figures["agree"] and "identical shards" in printed and figures["tokens"] > 100_000
    sizes = ("--num-shards", 2, "--shard-tokens", 200_000, "--batches", 2, "--runs", 1)
    figures, printed = measured(tmp_path, "loader", *sizes)
    assert figures["tokens_per_second"] > 0 and "median" in printed


class Timed:
    """A contender whose turns take what a list says."""

    def __init__(self, *seconds):
        self.left, self.seconds = list(seconds), []

    def turn(self, counts=True):
        seconds = self.left.pop(0)
        if counts:
            self.seconds.append(seconds)


def test_each_is_compared_with_the_turn_before():
    """The median over the rounds that count, against ours just before: a slow minute cancels out."""
    ours = Timed(9, 9, 1, 2, 10, 20, 3, 1)
    others = [Timed(1, 2, 20, 9), Timed(1, 6, 60, 5)]
    assert in_pairs(ours, others, rounds=3, warm_up=1) == [2, 3]
    assert ours.seconds == [1, 2, 10, 20, 3, 1] and others[0].seconds == [2, 20, 9]


def test_different_results_are_no_benchmark(monkeypatch, tmp_path):
    """Where the results differ, the figures are written, and the command ends with an error."""
    monkeypatch.setattr(benchmark_loader, "run", lambda args: {"agree": False})
    with pytest.raises(Unfinished, match="different results"):
        benchmark.main(["loader", "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["agree"] is False


def prepare_hungry(size, vocab_size, device, dtype):
    """A plain contender for which more than one row is too much."""
    device, step = prepare_plain(size, vocab_size, device, dtype)

    def hungry() -> float:
        if size.micro_batch > 1:
            raise OutOfMemory("CUDA out of memory")
        return step()

    return device, hungry


def test_all_take_the_largest_micro_batch_that_fits_each(monkeypatch, capsys):
    """Where one contender runs out of memory, all start again with half the rows, and the same update."""
    monkeypatch.setattr(benchmark_step, "prepare_plain", prepare_hungry)
    monkeypatch.setattr(benchmark_step, "prepare_hugging_face", prepare_ours)  # no long import
    monkeypatch.setattr(benchmark_step, "product_flops", lambda device, dtype: 1e9)
    arguments = (50, torch.device("cpu"), torch.float32, 1)
    found = benchmark_step.measure_what_fits("toy", Size(1, 1, 8, 8, 2, 3), *arguments)
    assert (found["micro_batch"], found["micro_steps"]) == (1, 6) and found["losses_agree"]
    assert "toy: plain eager: CUDA out of memory; all go on with B1 x 6" in capsys.readouterr().out
    assert not multiprocessing.active_children()  # those of the first try were ended, too


def test_no_micro_batch_fits(monkeypatch):
    """Half the rows again and again, until they can be halved no more."""
    tried = []

    def measure(name, size):
        tried.append((size.micro_batch, size.micro_steps))
        raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(benchmark_step, "measure", measure)
    with pytest.raises(UserError, match="toy: out of memory with a micro-batch of 3"):
        benchmark_step.measure_what_fits("toy", Size(1, 1, 8, 8, 12))
    assert tried == [(12, 1), (6, 2), (3, 4)]


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_other_losses_are_noticed(wrong, monkeypatch, capsys):
    """One loss that is off by more than rounding, or no number, in the first step of one contender."""

    class Fake(Timed):
        def __init__(self, name, prepare, *arguments):
            super().__init__(*[1.0] * 9)
            self.name, self.memory, self.median, self.finish = name, 1, 1.0, lambda: None
            self.ready = lambda: self
            self.results = [10.8 + wrong if name == "Hugging Face" else 10.8] * 4

    monkeypatch.setattr(benchmark_step, "Contender", Fake)
    monkeypatch.setattr(benchmark_step, "product_flops", lambda device, dtype: 1e9)
    found = benchmark_step.measure(
        "toy", Size(1, 1, 8, 8, 1), 50, torch.device("cpu"), torch.float32, rounds=1
    )
    assert not found["losses_agree"] and "DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["", "ours", "Hugging Face", "no cache"])
def test_other_texts_are_noticed(wrong, monkeypatch, capsys):
    """One token that differs in the last round of one contender."""
    text = [50256, 5, 6, 7, 8]

    class Fake(Timed):
        def __init__(self, name, prepare, *arguments):
            super().__init__(*[1.0] * 9)
            self.name, self.memory, self.median, self.finish = name, 1, 1.0, lambda: None
            self.ready, self.results = lambda: self, []

        def turn(self, ids=None, count=0, counts=True):
            super().turn(counts)
            found = list(text if ids is None else text[: len(ids) + count])
            if self.name == wrong and len(self.seconds) == 2:
                found[-1] += 1
            self.results.append(found)
            return found

    monkeypatch.setattr(benchmark_generate, "Contender", Fake)
    monkeypatch.setattr(benchmark_generate, "read_bandwidth", lambda device: 1e9)
    args = Namespace(n_layer=1, n_head=1, n_embd=8, max_new_tokens=4, rounds=2, device="cpu")
    assert benchmark_generate.run(args)["agree"] is (wrong == "")
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


def test_the_update_that_is_measured_is_the_training_scripts(monkeypatch):
    """`ours` goes through train_gpt.update, and trains as the plain step does: the losses fall alike."""
    import train_gpt

    calls, update = [], train_gpt.update
    monkeypatch.setattr(train_gpt, "update", lambda *a: calls.append(a) or update(*a))
    arguments = (Size(1, 2, 16, 8, 2), 60, torch.device("cpu"), torch.float32)
    ours, full, plain = prepare_ours(*arguments), prepare_ours(*arguments, True), prepare_plain(*arguments)
    losses = [(ours[1](), full[1](), plain[1]()) for _ in range(20)]
    assert len(calls) == 40 and losses[-1][0] < losses[0][0]
    assert all(abs(a - c) < 1e-5 and abs(b - c) < 1e-5 for a, b, c in losses)
    assert len(random_batches(arguments[0]._replace(micro_steps=3), 60, arguments[2])) == 3
    assert isinstance(calls[0][0].model, GPT)
