"""HellaSwag: the fast form gives the numbers of the plain one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval_hellaswag import (
    evaluate_hellaswag,
    log_normalizers,
    most_likely_completion_index,
    plan_batches,
    render_multiple_choice_tensors,
    tree_mask,
)
from gpt_model import GPT, GPTConfig
from tests.benchmarks.hellaswag import choose_rows, score_padded_rows, score_trees
from tests.conftest import tiny_model
from utils.distributed import Distributed
from utils.hellaswag.dataset import harness_text, read_rows
from utils.hellaswag.examples import make_example
from utils.tokenizer import GPT2Tokenizer

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


class Folded:
    """GPT-2's ids folded into a small vocabulary: real lengths, small logits, and more shared beginnings."""

    num_words = 211

    def encode(self, text: str) -> np.ndarray:
        return GPT2Tokenizer().encode(text) % self.num_words


def silent(line: str) -> None:
    pass


def fixture_rows() -> list[dict]:
    return read_rows(FIXTURE, "val", silent)


def folded_model(block_size: int = 256, **changes) -> GPT:
    return tiny_model(block_size=block_size, vocab_size=Folded.num_words, **changes)


def make_examples(rows, model, tokenizer=None, style="completion"):
    tokenizer = tokenizer or Folded()
    return [make_example(row, i, tokenizer, model.config.block_size, style) for i, row in enumerate(rows)]


class Lover(torch.nn.Module):
    """A model with an opinion on each word, whatever came before: its logits are `opinions`, everywhere."""

    def __init__(self, opinions: dict[int, float]):
        super().__init__()
        self.config = GPTConfig(block_size=64)
        self.lm_head = torch.nn.Linear(1, 50257, bias=False)
        torch.nn.init.zeros_(self.lm_head.weight)
        with torch.no_grad():
            for word, logit in opinions.items():
                self.lm_head.weight[word] = logit

    def hidden_states(self, idx, positions=None, attention_mask=None):
        return torch.ones(*idx.shape, 1)


# ------------------------------------------------------------------------------------------------------------
# Tokens, masks and trees, by hand


def test_rendered_tokens_and_masks_are_those_counted_by_hand():
    """Context, then the ending with its space; zeros behind; the mask marks the ending alone."""
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


def test_the_likeliest_completion_has_the_lowest_mean_loss():
    """Not the lowest sum: the longer ending has twice the tokens, each a little likelier."""
    tokens = torch.tensor([[1, 2, 0], [1, 3, 3], [1, 2, 0], [1, 2, 0]])
    mask = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 0]])
    logits = torch.zeros(4, 3, 5)
    logits[..., 3] = 0.5
    assert most_likely_completion_index(tokens, mask, logits) == 1


def test_a_prefix_tree_holds_each_beginning_once():
    """Of the eight tokens of `HELLO`'s endings only three are read; who predicts whom is counted by hand."""
    example = make_example(HELLO, 5, GPT2Tokenizer(), 1024)
    assert example.tokens.tolist() == [*HELLO_CONTEXT, 257, 3303, 2746]
    assert example.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert example.owners.tolist() == [0b1111] * 5 + [0b1000, 0b0001, 0b0001]
    pairs = zip(example.endings, example.predictors[example.predicted_by], example.targets)
    assert [tuple(map(int, pair)) for pair in pairs] == [
        (0, 4, 3303), (0, 6, 2746), (0, 7, 11), (1, 4, 3303), (2, 4, 2746), (3, 4, 257), (3, 5, 3303),
    ]  # fmt: skip
    assert (example.index, example.label, example.num_shortened) == (5, 0, 0)
    assert example.divisors.tolist() == [3, 1, 1, 2]


def test_a_position_sees_itself_its_ancestors_and_nothing_else():
    """The mask against a walk through the four rows: i sees j if j is before it on every way through i."""
    for row in fixture_rows():
        example = make_example(row, 0, GPT2Tokenizer(), 40)
        mask = tree_mask(torch.from_numpy(example.owners)[None])[0, 0]
        paths = [[i for i, owner in enumerate(example.owners) if owner >> e & 1] for e in range(4)]
        for i in range(len(example.tokens)):
            before = [set(path[: path.index(i) + 1]) for path in paths if i in path]
            assert all(ancestors == before[0] for ancestors in before)
            assert set(mask[i].nonzero().flatten().tolist()) == before[0]
            assert example.positions[i] == len(before[0]) - 1


def test_every_example_is_in_exactly_one_batch_and_little_is_padding():
    """Batches cover all, keep to the limit (but for a single long example), and mix only similar lengths."""
    examples = make_examples(fixture_rows() * 5, folded_model())
    for limit in (1, 100, 300, 10**6):
        batches = plan_batches(examples, limit)
        assert sorted(i for batch in batches for i in batch) == list(range(35))
        for batch in batches:
            lengths = [len(examples[i].tokens) for i in batch]
            assert len(batch) == 1 or len(batch) * max(lengths) <= limit
            assert min(lengths) >= 0.9 * max(lengths)


# ------------------------------------------------------------------------------------------------------------
# The same numbers as four padded rows


@pytest.mark.parametrize("style", ["completion", "lm-eval"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_trees_give_the_losses_of_padded_rows(style, batch_tokens):
    """Random weights; alone, a few, all in one batch; with GPT-2's own vocabulary, padded; both styles."""
    model = tiny_model(block_size=256, vocab_size=50304)
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
    expected = score_padded_rows(model, rows, tokenizer=Folded())
    np.testing.assert_allclose(score_trees(model, examples), expected, rtol=1e-5)
    full = [render_multiple_choice_tensors(row) for row in rows]
    lengths = [len(data["ctx_tokens"]) + len(ids) for data, *_ in full for ids in data["ending_tokens"]]
    assert sum(e.num_shortened for e in examples) == sum(length > block_size for length in lengths) > 0
    for row, example in zip(rows, examples):
        mask = render_multiple_choice_tensors(row, block_size=block_size)[2]
        assert example.divisors.tolist() == mask[:, 1:].sum(dim=1).tolist()


def test_the_normalizer_is_logsumexp_in_any_blocks():
    """Also where the logits are large, and where the vocabulary is no multiple of the block."""
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
    rows = read_rows(REAL / "hellaswag_val.jsonl", "val", silent)[::33][:300]
    model = folded_model(block_size=192)
    examples = make_examples(rows, model)
    divisors = np.stack([example.divisors for example in examples])
    expected = score_padded_rows(model, rows, tokenizer=Folded()) / divisors
    found = score_trees(model, examples) / divisors
    assert len(rows) == 300 and np.abs(found - expected).max() < 1e-4
    assert (found.argmin(axis=1) == expected.argmin(axis=1)).all()


# ------------------------------------------------------------------------------------------------------------
# Accuracy


def test_a_model_that_loves_the_right_ending_scores_100_percent():
    """And one that loves a wrong one 0: loss, arg-min, label and count have no sign or index wrong."""
    row = dict(HELLO, endings=["cats", "dogs", "trees", "stones"])
    rows = [dict(row, label=label) for label in (0, 1, 2, 3)]
    for loved in range(4):
        model = Lover({int(GPT2Tokenizer().encode(" " + row["endings"][loved])[0]): 9.0})
        examples = make_examples(rows, model, GPT2Tokenizer())
        right = [example for example in examples if example.label == loved]
        assert evaluate_hellaswag(model, right, ALONE, torch.float32) == (1, 1, 1)
        assert evaluate_hellaswag(model, examples, ALONE, torch.float32) == (1, 1, 4)
        wrong = [example for example in examples if example.label != loved]
        result = evaluate_hellaswag(model, wrong, ALONE, torch.float32)
        assert (result.acc_norm, result.acc, result.num_total) == (0.0, 0.0, 3)


def test_acc_and_acc_norm_differ_where_the_right_ending_is_long():
    """Two likely words against one a little less likely: the mean picks the long one, the sum the short."""
    row = dict(HELLO, endings=["cats cats", "dogs", "trees trees", "stones stones"], label=0)
    cats, dogs = (int(GPT2Tokenizer().encode(word)[0]) for word in (" cats", " dogs"))
    model = Lover({cats: 9.0, dogs: 8.0})
    result = evaluate_hellaswag(model, make_examples([row], model, GPT2Tokenizer()), ALONE, torch.float32)
    assert (result.acc_norm, result.acc) == (1.0, 0.0)


def test_an_evaluation_leaves_the_model_as_it_was():
    """Training mode is restored, no gradient appears, and what `poll` raises ends it after one batch."""
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


# ------------------------------------------------------------------------------------------------------------
# The harness's wording


def test_the_harness_wording_is_that_of_its_source():
    """Activity in front, second sentence capitalised and lowered, brackets gone, their spaces left."""
    rows = fixture_rows()
    context, endings = harness_text(rows[2])
    assert context == "Home and Garden: How to water a cactus. Wait until the soil is dry."
    assert endings[0] == "A cactus likes rain. Sing to it."
    assert endings[3] == " Water it every hour. Then water it again."
    assert harness_text(rows[0])[0] == "Baking bread: A woman stands in a kitchen. She"
    assert harness_text(rows[4])[0].endswith("sew They sew all day. the needle")


def test_lm_eval_divides_by_characters_and_completion_by_tokens():
    """The lowest loss per character may be a higher one per token: each rule chooses its own ending."""
    row = dict(
        HELLO,
        ctx_a="Hello, I'm a",
        activity_label="Talk",
        endings=["cats", "extraordinarily", "dogs", "trees"],
    )
    tokens = GPT2Tokenizer().encode(" extraordinarily").tolist()
    cats = int(GPT2Tokenizer().encode(" cats")[0])
    model = Lover({**dict.fromkeys(tokens, 8.5), cats: 9.0})
    for style, expected in (("completion", 0), ("lm-eval", 1)):
        example = make_example(dict(row, label=expected), 0, GPT2Tokenizer(), 64, style)
        assert evaluate_hellaswag(model, [example], ALONE, torch.float32).num_correct_norm == 1
    assert example.divisors.tolist() == [4, 15, 4, 5]


def test_context_and_ending_apart_are_the_tokens_of_the_whole():
    """The harness tokenizes both at once; as GPT-2's words begin with their space, that is the same."""
    tokenizer = GPT2Tokenizer()
    # "[title]" at the end of the context leaves a space there.
    trailing_space = dict(HELLO, activity_label="Talk", ctx_a="Hi [title]", ctx_b="")
    for row in [*fixture_rows(), trailing_space]:
        context, endings = harness_text(row)
        example = make_example(dict(row, label=0), 0, tokenizer, 1024, "lm-eval")
        for number, ending in enumerate(endings):
            whole = tokenizer.encode(f"{context} {ending}").tolist()
            read = example.tokens[example.owners >> number & 1 == 1].tolist()
            assert read == whole[:-1]
            scored = example.targets[example.endings == number].tolist()
            assert scored == whole[len(tokenizer.encode(context.rstrip())) :]


def test_the_benchmark_chooses_rows_of_all_lengths():
    """As many as asked for, each once, and their mean length is near that of all."""
    rows = [dict(HELLO, ctx="x" * n) for n in range(1, 1001)]
    for count in (1, 3, 8, 20, 64, 1000):
        chosen = [len(row["ctx"]) for row in choose_rows(rows, count)]
        assert len(set(chosen)) == len(chosen) == count
        assert abs(sum(chosen) / count - 500) < 60
