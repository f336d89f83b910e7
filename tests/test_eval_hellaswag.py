"""HellaSwag: prefix trees give the losses of padded rows; counts, ranks and the script's output."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_hellaswag
from eval_hellaswag import (
    evaluate_hellaswag,
    examples_for_training,
    log_normalizers,
    make_example,
    most_likely_completion_index,
    plan_batches,
    render_multiple_choice_tensors,
    tree_mask,
)
from gpt_model import GPT, GPTConfig
from tests.benchmarks.hellaswag import choose_rows, score_padded_rows, score_trees
from tests.conftest import ROOT, run, tiny_model
from utils.command_line import UserError
from utils.cpu_matmul import FastLinear
from utils.distributed import Distributed
from utils.hellaswag.dataset import read_rows
from utils.hellaswag.results import standard_error
from utils.tokenizer import GPT2_VOCAB_SIZE, PADDED_GPT2_VOCAB, CharTokenizer, GPT2Tokenizer
from utils.weights.checkpoint import model_content, save_pair

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = FIXTURES / "hellaswag_val.jsonl"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "hellaswag"
ALONE = Distributed(torch.device("cpu"))

# GPT-2's ids of this sentence are in every tutorial:
# Hello 15496 , 11 I 314 'm 1101 a 257 language 3303 model 2746 , 11
HELLO = {
    "ctx": "Hello, I'm a",
    "endings": ["language model,", "language", "model", "a language"],
    "label": 0,
}
HELLO_CONTEXT = [15496, 11, 314, 1101, 257]


class FoldedTokenizer:
    """GPT-2's ids folded into a small vocabulary: real lengths, small logits, and more shared beginnings."""

    name, vocab_size = "gpt2", 211

    def encode(self, text: str) -> np.ndarray:
        return GPT2Tokenizer().encode(text) % self.vocab_size


def fixture_rows() -> list[dict]:
    return read_rows(FIXTURE, "val")


def folded_model(block_size: int = 256, **changes) -> GPT:
    return tiny_model(block_size=block_size, vocab_size=FoldedTokenizer.vocab_size, **changes)


def make_examples(rows, model, tokenizer=None, style="completion"):
    tokenizer = tokenizer or FoldedTokenizer()
    return [make_example(row, i, tokenizer, model.config.block_size, style) for i, row in enumerate(rows)]


class FixedLogits(torch.nn.Module):
    """A model with the same logits at every position: those given for some tokens, 0 for the others."""

    def __init__(self, logits: dict[int, float]):
        super().__init__()
        self.config = GPTConfig(block_size=64)
        self.lm_head = torch.nn.Linear(1, GPT2_VOCAB_SIZE, bias=False)
        torch.nn.init.zeros_(self.lm_head.weight)
        with torch.no_grad():
            for token, logit in logits.items():
                self.lm_head.weight[token] = logit

    def hidden_states(self, idx, positions=None, attention_mask=None):
        return torch.ones(*idx.shape, 1)


# ------------------------------------------------------------------------------------------------------------
# Tokens, masks and trees, by hand


def test_rendered_tokens_and_masks_are_those_counted_by_hand():
    """Context, then the ending with its space, then zeros; the mask marks the ending alone."""
    data, tokens, mask, label = render_multiple_choice_tensors(HELLO)
    assert tokens.tolist() == [
        [*HELLO_CONTEXT, 3303, 2746, 11],
        [*HELLO_CONTEXT, 3303, 0, 0],
        [*HELLO_CONTEXT, 2746, 0, 0],
        [*HELLO_CONTEXT, 257, 3303, 0],
    ]
    none = [0] * 5
    assert mask.tolist() == [[*none, 1, 1, 1], [*none, 1, 0, 0], [*none, 1, 0, 0], [*none, 1, 1, 0]]
    assert tokens.dtype == mask.dtype == torch.int64
    assert label == 0 and data["ctx_tokens"] == HELLO_CONTEXT
    assert data["ending_tokens"] == [[3303, 2746, 11], [3303], [2746], [257, 3303]]


def test_a_row_longer_than_the_block_keeps_its_end():
    """Each row is cropped on its own, so rows of one example begin at different places of the context."""
    _, tokens, mask, _ = render_multiple_choice_tensors(HELLO, block_size=6)
    assert tokens.tolist() == [
        [314, 1101, 257, 3303, 2746, 11],
        [*HELLO_CONTEXT, 3303],
        [*HELLO_CONTEXT, 2746],
        [11, 314, 1101, 257, 257, 3303],
    ]
    assert mask.sum(dim=1).tolist() == [3, 1, 1, 2]


def test_the_most_likely_completion_has_the_lowest_mean_loss():
    """Not the lowest sum: the longer ending has twice the tokens, each with a slightly lower loss."""
    tokens = torch.tensor([[1, 2, 0], [1, 3, 3], [1, 2, 0], [1, 2, 0]])
    mask = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 0]])
    logits = torch.zeros(4, 3, 5)
    logits[..., 3] = 0.5
    assert most_likely_completion_index(tokens, mask, logits) == 1


def test_a_prefix_tree_holds_each_prefix_once():
    """The example of `Example`'s docstring: nodes, depths, and which node predicts which token, by hand.

    Another order of the endings gives the same nodes.
    """
    example = make_example(HELLO, 5, GPT2Tokenizer(), 1024)
    assert example.tokens.tolist() == [*HELLO_CONTEXT, 257, 3303, 2746]
    assert example.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert example.row_sets.tolist() == [0b1111] * 5 + [0b1000, 0b0001, 0b0001]
    pairs = zip(example.endings, example.predicted_by, example.targets)
    assert [tuple(map(int, pair)) for pair in pairs] == [
        (0, 4, 3303), (0, 6, 2746), (0, 7, 11), (1, 4, 3303), (2, 4, 2746), (3, 4, 257), (3, 5, 3303),
    ]  # fmt: skip
    assert (example.index, example.label, example.num_shortened) == (5, 0, 0)
    assert example.divisors.tolist() == [3, 1, 1, 2]
    reordered = make_example(dict(HELLO, endings=HELLO["endings"][::-1]), 5, GPT2Tokenizer(), 1024)
    assert reordered.tokens.tolist() == example.tokens.tolist()
    assert reordered.divisors.tolist() == [2, 1, 1, 3]


def test_a_node_attends_to_itself_and_its_ancestors_only():
    """The mask against a walk along the four rows: i attends to j if j precedes it on the rows through i."""
    for row in fixture_rows():
        example = make_example(row, 0, GPT2Tokenizer(), 40)
        mask = tree_mask(torch.from_numpy(example.row_sets)[None])[0, 0]
        paths = [[i for i, rows in enumerate(example.row_sets) if rows >> e & 1] for e in range(4)]
        for i in range(len(example.tokens)):
            ancestors = [set(path[: path.index(i) + 1]) for path in paths if i in path]
            assert all(found == ancestors[0] for found in ancestors)
            assert set(mask[i].nonzero().flatten().tolist()) == ancestors[0]
            assert example.positions[i] == len(ancestors[0]) - 1


def test_a_block_of_one_token_is_refused():
    """No ending could be scored, and the first one would win everywhere."""
    with pytest.raises(UserError, match="a block size of at least 2"):
        make_example(HELLO, 0, GPT2Tokenizer(), block_size=1)


def test_every_example_is_in_exactly_one_batch_and_little_is_padding():
    """Batches keep to the limit (except for a single large example) and combine only similar sizes."""
    examples = make_examples(fixture_rows() * 5, folded_model())
    for limit in (1, 100, 300, 10**6):
        batches = plan_batches(examples, limit)
        assert sorted(example.index for batch in batches for example in batch) == list(range(35))
        for batch in batches:
            lengths = [len(example.tokens) for example in batch]
            assert len(batch) == 1 or len(batch) * max(lengths) <= limit
            assert min(lengths) >= 0.9 * max(lengths)


# ------------------------------------------------------------------------------------------------------------
# The losses of four padded rows


@pytest.mark.parametrize("style", ["completion", "lm-eval"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_trees_give_the_losses_of_padded_rows(style, batch_tokens):
    """Random weights; alone, a few, all in one batch; with GPT-2's own vocabulary, padded; both styles."""
    model = tiny_model(block_size=256, vocab_size=PADDED_GPT2_VOCAB)
    rows = fixture_rows()
    expected = score_padded_rows(model, rows, style=style)
    found = score_trees(model, make_examples(rows, model, GPT2Tokenizer(), style), batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("block_size", [2, 5, 12, 20, 40])
def test_rows_longer_than_the_block_are_scored_as_padded_rows_are(block_size):
    """Cropped contexts, cropped endings, endings that fill the block: same losses, means and count."""
    model = folded_model(block_size)
    rows = fixture_rows()
    examples = make_examples(rows, model)
    expected = score_padded_rows(model, rows, tokenizer=FoldedTokenizer())
    np.testing.assert_allclose(score_trees(model, examples), expected, rtol=1e-5)
    full = [render_multiple_choice_tensors(row) for row in rows]
    lengths = [len(data["ctx_tokens"]) + len(ids) for data, *_ in full for ids in data["ending_tokens"]]
    assert sum(e.num_shortened for e in examples) == sum(length > block_size for length in lengths) > 0
    for row, example in zip(rows, examples):
        mask = render_multiple_choice_tensors(row, block_size=block_size)[2]
        assert example.divisors.tolist() == mask[:, 1:].sum(dim=1).tolist()


def test_the_normalizer_is_logsumexp_in_any_chunks():
    """Also for large logits, and for a vocabulary that is not a multiple of the chunk."""
    torch.manual_seed(0)
    hidden, weight = 30 * torch.randn(70_000, 4), torch.randn(301, 4)
    expected = (hidden.double() @ weight.double().t()).logsumexp(dim=1)
    torch.testing.assert_close(log_normalizers(hidden, weight).double(), expected, rtol=1e-6, atol=1e-5)
    low = log_normalizers(hidden[:50].bfloat16(), weight.bfloat16())
    torch.testing.assert_close(low.double(), expected[:50], rtol=2e-2, atol=0.5)


def test_half_precision_gives_nearly_the_same_losses():
    """Under bf16 autocast the trees' losses stay within a few per cent: the mask survives the cast."""
    model = folded_model()
    examples = make_examples(fixture_rows(), model)
    exact = score_trees(model, examples)
    np.testing.assert_allclose(score_trees(model, examples, torch.bfloat16), exact, rtol=0.05)


def test_real_examples_give_the_losses_of_padded_rows():
    """300 examples of the real validation set: losses to 1e-4, and the same predictions."""
    if not (REAL / "hellaswag_val.jsonl").exists():
        pytest.skip("the real data set is not here")
    rows = read_rows(REAL / "hellaswag_val.jsonl", "val")[::33][:300]
    model = folded_model(block_size=192)
    examples = make_examples(rows, model)
    divisors = np.stack([example.divisors for example in examples])
    expected = score_padded_rows(model, rows, tokenizer=FoldedTokenizer()) / divisors
    found = score_trees(model, examples) / divisors
    assert len(rows) == 300 and np.abs(found - expected).max() < 1e-4
    assert (found.argmin(axis=1) == expected.argmin(axis=1)).all()


# ------------------------------------------------------------------------------------------------------------
# Accuracy


def test_a_model_that_prefers_the_true_ending_has_accuracy_1():
    """And one that prefers a wrong one 0: no sign or index of loss, arg-min, label and count is wrong."""
    row = dict(HELLO, endings=["cats", "dogs", "trees", "stones"])
    rows = [dict(row, label=label) for label in (0, 1, 2, 3)]
    for preferred in range(4):
        model = FixedLogits({int(GPT2Tokenizer().encode(" " + row["endings"][preferred])[0]): 9.0})
        examples = make_examples(rows, model, GPT2Tokenizer())
        right = [example for example in examples if example.label == preferred]
        assert evaluate_hellaswag(model, right, ALONE, torch.float32) == (1, 1, 1)
        assert evaluate_hellaswag(model, examples, ALONE, torch.float32) == (1, 1, 4)
        wrong = [example for example in examples if example.label != preferred]
        result = evaluate_hellaswag(model, wrong, ALONE, torch.float32)
        assert result == (0, 0, 3)


def test_acc_and_acc_norm_differ_if_the_true_ending_is_long():
    """Two likely tokens against one slightly less likely: the mean picks the long one, the sum the short."""
    row = dict(HELLO, endings=["cats cats", "dogs", "trees trees", "stones stones"], label=0)
    cats, dogs = (int(GPT2Tokenizer().encode(word)[0]) for word in (" cats", " dogs"))
    model = FixedLogits({cats: 9.0, dogs: 8.0})
    result = evaluate_hellaswag(model, make_examples([row], model, GPT2Tokenizer()), ALONE, torch.float32)
    assert result == (1, 0, 1)


def test_an_evaluation_leaves_the_model_unchanged():
    """Training mode is restored, no gradient appears, and an exception of `poll` ends it after one batch."""
    model = folded_model().train()
    examples = make_examples(fixture_rows(), model)
    evaluate_hellaswag(model, examples, ALONE, torch.float32)
    assert model.training and all(p.grad is None for p in model.parameters())

    def stop() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        evaluate_hellaswag(model, examples, ALONE, torch.float32, batch_tokens=1, poll=stop)
    assert calls == [1] and model.training


def test_lm_eval_divides_by_characters_and_completion_by_tokens():
    """The ending with the lowest loss per character need not be that with the lowest per token."""
    row = dict(
        HELLO,
        ctx_a="Hello, I'm a",
        activity_label="Talk",
        endings=["cats", "extraordinarily", "dogs", "trees"],
    )
    tokens = GPT2Tokenizer().encode(" extraordinarily").tolist()
    cats = int(GPT2Tokenizer().encode(" cats")[0])
    model = FixedLogits({**dict.fromkeys(tokens, 8.5), cats: 9.0})
    for style, expected in (("completion", 0), ("lm-eval", 1)):
        example = make_example(dict(row, label=expected), 0, GPT2Tokenizer(), 64, style)
        assert evaluate_hellaswag(model, [example], ALONE, torch.float32).num_correct_norm == 1
    assert example.divisors.tolist() == [4, 15, 4, 5]


# ------------------------------------------------------------------------------------------------------------
# In training, on one rank or several


TWO_RANKS = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from eval_hellaswag import evaluate_hellaswag, examples_for_training
from tests.test_eval_hellaswag import FIXTURES, FoldedTokenizer, folded_model
from utils import distributed
with distributed.join_job(torch.device("cpu"), 60) as dist:
    folder = Path({folder!r})
    model, polls = folded_model(), []
    directory = folder / "missing" if dist.rank else FIXTURES
    examples = examples_for_training(directory, None, FoldedTokenizer(), 256, dist)
    poll = lambda: polls.append(dist.max_number(0))  # a collective: called unequally often it would hang
    result = evaluate_hellaswag(model, examples, dist, torch.float32, batch_tokens=1, poll=poll)
    directory = FIXTURES if dist.rank else folder / "missing"
    without = examples_for_training(directory, None, FoldedTokenizer(), 256, dist)
    (folder / f"rank{{dist.rank}}").write_text(repr((tuple(result), len(polls), without)))
"""


@pytest.mark.slow
def test_two_ranks_count_what_one_rank_counts(tmp_path):
    """Seven examples, four on one rank and three on the other: equal counts, and equally many polls.

    Only rank 0 looks for the file: what it finds is enough for both; without it HellaSwag is off on both,
    after one warning.
    """
    script = tmp_path / "driver.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), folder=str(tmp_path)))
    process = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script)
    assert process.returncode == 0, process.stderr
    model = folded_model()
    alone = evaluate_hellaswag(model, make_examples(fixture_rows(), model), ALONE, torch.float32)
    assert alone.num_total == 7
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == repr((tuple(alone), 4, []))
    assert process.stdout.count("7 val examples") == 1
    assert process.stderr.count("warning: HellaSwag is off: cannot download") == 1


def test_examples_for_training_are_the_first_of_the_file(monkeypatch):
    """`limit` of them, or all; the folder may come from HELLASWAG_DIR."""
    monkeypatch.setenv("HELLASWAG_DIR", str(FIXTURES))
    for limit, expected in ((3, [0, 1, 2]), (None, list(range(7)))):
        examples = examples_for_training(None, limit, FoldedTokenizer(), 256, ALONE)
        assert [example.index for example in examples] == expected


def test_training_continues_without_hellaswag_after_one_warning(tmp_path, monkeypatch, capsys):
    """A missing file without a network, a malformed one, a block of one token, a character tokenizer."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(HELLO) + "\n{}\n")
    for reason, directory, tokenizer, block_size in (
        ("cannot download hellaswag_val.jsonl", tmp_path / "none", FoldedTokenizer(), 64),
        ("hellaswag_val.jsonl:2: missing key", tmp_path, FoldedTokenizer(), 64),
        ("a block size of at least 2", FIXTURES, FoldedTokenizer(), 1),
        ("character tokenizer", FIXTURES, CharTokenizer("abc"), 64),
    ):
        assert examples_for_training(directory, None, tokenizer, block_size, ALONE) == []
        output = capsys.readouterr().err
        assert output.count("warning: HellaSwag is off: ") == 1 and reason in output


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    return save_checkpoint(folder, tiny_model(block_size=48, vocab_size=PADDED_GPT2_VOCAB), {"name": "gpt2"})


def save_checkpoint(folder: Path, model: GPT, tokenizer_state: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_pair(
        folder, 1, model_content(model, vars(model.config).copy(), 1, None, tokenizer_state), {"step": 1}
    )
    return folder / "model_00001.pt"


def test_the_script_prints_and_writes_the_losses_of_padded_rows(checkpoint, tmp_path):
    """Both styles in one run: one line per example, in file order, and the accuracies that follow from them.

    The losses are those of the plain form; accuracies have four decimals and standard errors.
    """
    output = tmp_path / "results.jsonl"
    process = run(
        "eval_hellaswag.py", "--model_name", checkpoint, "-d", "cpu", "--dtype", "float32", "--style", "both",
        "--hellaswag_dir", FIXTURES, "--output", output, "--batch_tokens", 300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    rows, model = fixture_rows(), GPT.from_checkpoint(checkpoint).eval()
    assert [record["index"] for record in records] == list(range(7))
    assert [record["label"] for record in records] == [row["label"] for row in rows]
    for style, found in (("completion", records), ("lm-eval", [record["lm-eval"] for record in records])):
        expected = score_padded_rows(model, rows, style=style)
        divisors = np.stack([e.divisors for e in make_examples(rows, model, GPT2Tokenizer(), style)])
        np.testing.assert_allclose([record["loss_sum"] for record in found], expected, rtol=1e-5)
        np.testing.assert_allclose([record["loss_mean"] for record in found], expected / divisors, rtol=1e-4)
        assert [record["prediction"] for record in found] == expected.argmin(axis=1).tolist()
        by_mean = (expected / divisors).argmin(axis=1).tolist()
        assert [record["prediction_norm"] for record in found] == by_mean
        accuracy = sum(a == row["label"] for a, row in zip(by_mean, rows)) / 7
        line = rf"{style} style .*\n +acc_norm {accuracy:.4f} \+- {standard_error(accuracy, 7):.4f}\n +acc "
        assert re.search(line, process.stdout), process.stdout
    assert "7/7 acc_norm" in process.stdout and "examples/s" in process.stdout
    assert "4 rows keep their last 48 tokens" in process.stdout


def test_the_file_is_found_and_read_once_and_the_model_gets_the_fast_matmuls(checkpoint, monkeypatch):
    """Also with both styles; on a CPU the linear layers are those of `choose_matmul` when scoring starts."""
    calls: list[str] = []

    def count(name: str) -> None:
        real = getattr(eval_hellaswag, name)

        def counted(*arguments, **options):
            calls.append(name)
            assert name != "score_style" or type(arguments[0].lm_head) is FastLinear
            return real(*arguments, **options)

        monkeypatch.setattr(eval_hellaswag, name, counted)

    for name in ("find_or_download", "read_rows", "score_style"):
        count(name)
    flags = ["-m", str(checkpoint), "-d", "cpu", "--hellaswag-dir", str(FIXTURES)]
    assert eval_hellaswag.main([*flags, "--style", "both", "--limit", "2"]) == 0
    assert calls == ["find_or_download", "read_rows", "score_style", "score_style"]


@pytest.mark.slow
def test_an_unlabelled_split_needs_a_file_for_its_predictions(checkpoint, tmp_path):
    """Without --output exit 2; with it, predictions and no accuracy."""
    unlabelled = [{key: row[key] for key in ("ctx", "endings")} for row in fixture_rows()]
    text = "".join(json.dumps(row) + "\n" for row in unlabelled)
    (tmp_path / "hellaswag_test.jsonl").write_text(text, encoding="utf-8")
    flags = ("eval_hellaswag.py", "-m", checkpoint, "--split", "test", "--hellaswag-dir", tmp_path)
    process = run(*flags)
    assert process.returncode == 2 and "error: test has no labels" in process.stderr
    process = run(*flags, "--output", tmp_path / "out.jsonl", "--limit", 4)
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 4 and all(record["label"] is None for record in records)
    assert "4/4\n" in process.stdout and "acc" not in process.stdout


@pytest.mark.slow
def test_errors_of_the_user_are_two_lines(checkpoint, tmp_path):
    """No data and no network, a character model, a malformed row, an unwritable --output, broken weights."""
    folder = tmp_path / "chars"
    characters = save_checkpoint(folder, tiny_model(), {"name": "char", "characters": "abc"})
    nan = tiny_model(block_size=48, vocab_size=PADDED_GPT2_VOCAB)
    nan.transformer.ln_f.weight.data[0] = math.nan
    broken_weights = save_checkpoint(tmp_path / "nan", nan, {"name": "gpt2"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "hellaswag_val.jsonl").write_text(json.dumps(HELLO) + "\n{}\n")
    for message, flags in {
        "cannot download hellaswag_val.jsonl: HF_HUB_OFFLINE": [
            "-m",
            checkpoint,
            "--hellaswag-dir",
            tmp_path,
        ],
        "has a character tokenizer": ["-m", characters, "--hellaswag-dir", FIXTURES],
        "hellaswag_val.jsonl:2: missing key 'ctx'": ["-m", checkpoint, "--hellaswag-dir", broken],
        "cannot write": ["-m", checkpoint, "--hellaswag-dir", FIXTURES, "--output", tmp_path / "no" / "x"],
        "Is a directory": ["-m", checkpoint, "--hellaswag-dir", FIXTURES, "--output", folder],
        "losses are not finite": ["-m", broken_weights, "--hellaswag-dir", FIXTURES],
    }.items():
        started = time.perf_counter()
        process = run("eval_hellaswag.py", *flags)
        assert process.returncode == 2, process.stderr
        assert re.fullmatch(r"error: .*\nhint: .*\n", process.stderr) and message in process.stderr
        assert time.perf_counter() - started < 30


# ------------------------------------------------------------------------------------------------------------
# The benchmark


def test_the_benchmark_measures_both_forms_and_checks_that_they_agree(tmp_path):
    """A toy size: figures on the console and in the file, and the losses agree."""
    process = run(
        "-m", "tests.benchmarks", "hellaswag", "--examples", 3, "--rounds", 2, "--n-layer", 1, "--n-head", 2,
        "--n-embd", 16, "--device", "cpu", "--dtype", "float32", "--hellaswag-dir", FIXTURES,
        "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agree"] and figures["examples"] == figures["same_predictions"] == 3
    assert figures["ratio"] > 0 and figures["peak_memory_bytes"] > 0 and figures["examples_per_second"] > 0
    assert "mean losses agree" in process.stdout and "ratio" in process.stdout


def test_the_benchmark_chooses_rows_of_all_lengths():
    """The requested number, each once, with a mean length near that of all rows."""
    rows = [dict(HELLO, ctx="x" * n) for n in range(1, 1001)]
    for count in (1, 3, 8, 20, 64, 1000):
        chosen = [len(row["ctx"]) for row in choose_rows(rows, count)]
        assert len(set(chosen)) == len(chosen) == count
        assert abs(sum(chosen) / count - 500) < 60
