"""HellaSwag: the fast form gives the numbers of the plain one, and its data is whole or an error."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from eval_hellaswag import (
    evaluate_hellaswag,
    iter_examples,
    log_normalizers,
    most_likely_completion_index,
    plan_batches,
    render_multiple_choice_tensors,
    tree_mask,
)
from gpt_model import GPT, GPTConfig
from tests.conftest import ROOT, run, tiny_model
from utils import hellaswag_data
from utils.benchmark_hellaswag import choose_rows, score_padded_rows, score_trees
from utils.checkpoint import model_content, save_pair
from utils.distributed import Distributed
from utils.errors import UserError
from utils.hellaswag_data import PublishedFile, find_or_download, harness_text, read_rows
from utils.hellaswag_examples import choose_tokenizer, load_examples, make_example
from utils.hellaswag_results import compare, mcnemar_p_value, standard_error, write_results
from utils.tokenizer import GPT2Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = FIXTURES / "hellaswag_val.jsonl"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "hellaswag"
ALONE = Distributed(torch.device("cpu"))

# GPT-2's ids of this sentence are in every tutorial: Hello 15496 , 11 I 314 'm 1101 a 257 language 3303
# model 2746 , 11
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
    """Of the eight tokens of `HELLO`'s endings only three are read; what predicts what is as counted by
    hand.
    """
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
    """The mask against a walk through the four rows: position i sees j if j is before it on every way
    through i.
    """
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
    """Batches cover all, keep to the limit (a single long example may exceed it), and mix only similar
    lengths.
    """
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
    """Random weights; alone, a few and all in one batch; with GPT-2's own vocabulary, padded, in both
    styles.
    """
    model = tiny_model(block_size=256, vocab_size=50304)
    rows = fixture_rows()
    expected = score_padded_rows(model, rows, style=style)
    found = score_trees(model, make_examples(rows, model, GPT2Tokenizer(), style), batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("block_size", [2, 5, 12, 20, 40])
def test_rows_longer_than_the_block_are_scored_as_padded_rows_are(block_size):
    """Cropped contexts, cropped endings, and endings that fill the block: same losses, same means, same
    count.
    """
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
    """Two likely words against one a little less likely: the mean picks the long one, the sum the short
    one.
    """
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
    """Activity in front, second sentence capitalised and lowered, brackets gone, their spaces left as they
    fall.
    """
    rows = fixture_rows()
    context, endings = harness_text(rows[2])
    assert context == "Home and Garden: How to water a cactus. Wait until the soil is dry."
    assert endings[0] == "A cactus likes rain. Sing to it."
    assert endings[3] == " Water it every hour. Then water it again."
    assert harness_text(rows[0])[0] == "Baking bread: A woman stands in a kitchen. She"
    assert harness_text(rows[4])[0].endswith("sew They sew all day. the needle")


def test_lm_eval_divides_by_characters_and_completion_by_tokens():
    """The ending with the lowest loss per character may have a higher one per token; both are chosen
    correctly.
    """
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
    """The harness tokenizes both at once; with GPT-2's words, which begin with their space, that is the
    same.
    """
    tokenizer = GPT2Tokenizer()
    trailing_space = dict(
        HELLO, activity_label="Talk", ctx_a="Hi [title]", ctx_b=""
    )  # leaves a space at the context's end
    for row in [*fixture_rows(), trailing_space]:
        context, endings = harness_text(row)
        example = make_example(dict(row, label=0), 0, tokenizer, 1024, "lm-eval")
        for number, ending in enumerate(endings):
            whole = tokenizer.encode(f"{context} {ending}").tolist()
            read = example.tokens[example.owners >> number & 1 == 1].tolist()
            assert read == whole[:-1]
            scored = example.targets[example.endings == number].tolist()
            assert scored == whole[len(tokenizer.encode(context.rstrip())) :]


# ------------------------------------------------------------------------------------------------------------
# The data


MALFORMED = {
    "not JSON": "{broken",
    "a blank line": "",
    "not an object": "[1, 2]",
    "no label": json.dumps({key: value for key, value in HELLO.items() if key != "label"}),
    "no context": json.dumps({key: value for key, value in HELLO.items() if key != "ctx"}),
    "three endings": json.dumps(dict(HELLO, endings=["a", "b", "c"])),
    "five endings": json.dumps(dict(HELLO, endings=["a", "b", "c", "d", "e"])),
    "an empty ending": json.dumps(dict(HELLO, endings=["a", "", "c", "d"])),
    "a blank ending": json.dumps(dict(HELLO, endings=["a", "b", " \t", "d"])),
    "an ending that is no text": json.dumps(dict(HELLO, endings=["a", "b", 3, "d"])),
    "an empty context": json.dumps(dict(HELLO, ctx=" ")),
    "a label out of range": json.dumps(dict(HELLO, label=4)),
    "an empty label": json.dumps(dict(HELLO, label="")),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_line_is_named_with_its_file(fault, tmp_path):
    """Whatever is wrong with a row, the error names file and line; it is never skipped."""
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join([json.dumps(HELLO), MALFORMED[fault], json.dumps(HELLO)]), encoding="utf-8")
    with pytest.raises(UserError, match=r"hellaswag_val\.jsonl:2: "):
        read_rows(path, "val")


def test_bytes_that_are_no_text_and_an_empty_file_are_errors(tmp_path):
    """Neither ends in a traceback."""
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_bytes(json.dumps(HELLO).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=r":2: .*utf-8"):
        read_rows(path, "val")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_rows(path, "val")


def test_a_file_that_somebody_put_there_is_used_as_it_is(tmp_path, monkeypatch, capsys):
    """Seven rows instead of 10,042, and no network: used, with one line that tells rows and checksum."""
    monkeypatch.setenv("HELLASWAG_DIR", str(FIXTURES))
    rows = list(iter_examples("val"))
    assert [row["label"] for row in rows] == [2, 0, 1, 3, 0, 1, 2]  # one of them is "0" in the file
    output = capsys.readouterr().out
    digest = hashlib.sha256(FIXTURE.read_bytes()).hexdigest()
    assert output.count("\n") == 1 and "7 val examples" in output and digest in output
    assert "not the published file" in output
    model = folded_model()
    examples = load_examples(None, "val", 3, Folded(), model.config.block_size, say=silent)
    assert [example.index for example in examples] == [0, 1, 2]
    with pytest.raises(UserError):  # the flag is stronger than the environment
        load_examples(tmp_path, "val", None, Folded(), model.config.block_size, say=silent)


class Server:
    """An HTTP server on this machine; `answers` are sent one after the other: bytes, or a status."""

    def __init__(self, *answers):
        self.requests: list[str] = []
        remaining = list(answers)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                self.send_response(200 if isinstance(answer, bytes) else answer)
                self.end_headers()  # no Content-Length: a short body looks complete
                self.wfile.write(answer if isinstance(answer, bytes) else b"<html>sorry</html>")

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.urls = tuple(f"http://127.0.0.1:{self.http.server_port}/{name}/" for name in ("first", "second"))


@pytest.fixture
def serve(monkeypatch):
    """Makes the downloads go to a server with the given answers, and the fixture the published file."""
    servers = []

    def start(*answers) -> Server:
        servers.append(Server(*answers))
        data = FIXTURE.read_bytes()
        published = PublishedFile(len(data), hashlib.sha256(data).hexdigest())
        monkeypatch.setattr(hellaswag_data, "BASE_URLS", servers[-1].urls)
        monkeypatch.setitem(hellaswag_data.PUBLISHED, "val", published)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def test_the_file_is_downloaded_once(serve, tmp_path):
    """One request, the right bytes under the right name, no part left; the second call asks nobody."""
    server = serve(FIXTURE.read_bytes())
    for _ in range(2):
        path = find_or_download(tmp_path / "new" / "folder", "val")
        assert path.read_bytes() == FIXTURE.read_bytes()
    assert server.requests == ["/first/hellaswag_val.jsonl"]
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("bad", [404, 429, b"<html>200, but sorry</html>", "truncated", "one byte changed"])
def test_a_bad_download_is_tried_once_more(serve, tmp_path, bad):
    """Error pages, a body cut short without a word, a wrong byte: found by checksum, then the other
    address.
    """
    data = FIXTURE.read_bytes()
    bad = {"truncated": data[:-100], "one byte changed": data[:-9] + b"X" + data[-8:]}.get(bad, bad)
    server = serve(bad, data)
    assert find_or_download(tmp_path, "val").read_bytes() == data
    assert server.requests == ["/first/hellaswag_val.jsonl", "/second/hellaswag_val.jsonl"]


@pytest.mark.parametrize("bad", [404, b"half"])
def test_two_bad_downloads_are_an_error_that_says_where_to_put_the_file(serve, tmp_path, bad):
    """Exactly two tries, nothing that looks like data left behind, and the hint names folder, flag,
    variable.
    """
    server = serve(bad)
    with pytest.raises(UserError, match="cannot download hellaswag_val.jsonl") as caught:
        find_or_download(tmp_path, "val")
    assert len(server.requests) == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert all(word in caught.value.hint for word in (str(tmp_path), "--hellaswag-dir", "HELLASWAG_DIR"))


TWO_RANKS = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from tests.test_hellaswag import Folded, folded_model
from utils import distributed, hellaswag_data
from eval_hellaswag import evaluate_hellaswag
from utils.errors import UserError
from utils.hellaswag_examples import load_examples
hellaswag_data.BASE_URLS = {urls!r}
hellaswag_data.PUBLISHED["val"] = hellaswag_data.PublishedFile({size}, {digest!r})
with distributed.start(torch.device("cpu"), 60) as dist:
    model, polls = folded_model(), []
    examples = load_examples({folder!r}, "val", None, Folded(), 256, dist=dist, say=lambda line: None)
    poll = lambda: polls.append(dist.max_number(0))  # a collective: called unequally often it would hang
    result = evaluate_hellaswag(model, examples, dist, torch.float32, batch_tokens=1, poll=poll)
    try:
        split = "train" if dist.rank else "val"
        load_examples({folder!r}, split, None, Folded(), 256, dist=dist, say=lambda line: None)
        failed = False
    except UserError:
        failed = True
    Path({folder!r}, f"rank{{dist.rank}}").write_text(repr((tuple(result), len(polls), failed)))
"""


def test_two_ranks_count_what_one_rank_counts(serve, tmp_path):
    """Seven examples, four on one rank and three on the other: the same counts on both, as many polls, one
    download; and where one rank cannot read, both are told."""
    data = FIXTURE.read_bytes()
    server = serve(data)
    script, folder = tmp_path / "driver.py", tmp_path / "data"
    script.write_text(
        TWO_RANKS.format(
            root=str(ROOT), urls=server.urls, size=len(data), folder=str(folder),
            digest=hashlib.sha256(data).hexdigest(),
        )
    )  # fmt: skip
    process = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, HF_HUB_OFFLINE="0"
    )
    assert process.returncode == 0, process.stderr
    model = folded_model()
    alone = evaluate_hellaswag(model, make_examples(fixture_rows(), model), ALONE, torch.float32)
    assert alone.num_total == 7
    for rank in (0, 1):
        assert (folder / f"rank{rank}").read_text() == repr((tuple(alone), 4, True))
    assert server.requests.count("/first/hellaswag_val.jsonl") == 1


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    return save_checkpoint(folder, tiny_model(block_size=48, vocab_size=50304), {"name": "gpt2"})


def save_checkpoint(folder: Path, model: GPT, tokenizer_state: dict) -> Path:
    save_pair(
        folder, 1, model_content(model, vars(model.config).copy(), 1, None, tokenizer_state), {"step": 1}
    )
    return folder / "model_00001.pt"


def test_the_script_prints_and_writes_what_padded_rows_give(checkpoint, tmp_path):
    """Both styles in one run: a line an example in file order with the losses of the plain form, and
    accuracies, fractions of four decimals with their standard errors, that follow from the lines."""
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
    assert "acc" not in process.stdout


def test_what_the_user_must_change_is_said_in_two_lines(checkpoint, tmp_path):
    """No data and no network, a model of characters, a malformed line, a folder for --output that is not
    there.
    """
    folder = tmp_path / "chars"
    folder.mkdir()
    characters = save_checkpoint(folder, tiny_model(), {"name": "char", "characters": "abc"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "hellaswag_val.jsonl").write_text(json.dumps(HELLO) + "\n{}\n")
    for words, flags in {
        "cannot download hellaswag_val.jsonl: no network": ["-m", checkpoint, "--hellaswag-dir", tmp_path],
        "reads characters": ["-m", characters, "--hellaswag-dir", FIXTURES],
        "hellaswag_val.jsonl:2: missing key 'ctx'": ["-m", checkpoint, "--hellaswag-dir", broken],
        "cannot write": ["-m", checkpoint, "--hellaswag-dir", FIXTURES, "--output", tmp_path / "no" / "x"],
    }.items():
        started = time.perf_counter()
        process = run("eval_hellaswag.py", *flags)
        assert process.returncode == 2, process.stderr
        assert re.fullmatch(r"error: .*\nhint: .*\n", process.stderr) and words in process.stderr
        assert time.perf_counter() - started < 30


def test_a_folder_of_transformers_is_read_with_its_own_tokenizer(tmp_path, monkeypatch):
    """Files of another tokenizer beside the weights are used; without any, and with GPT-2's own, it is
    GPT-2's BPE.
    """
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(block_size=256, vocab_size=50257)
    assert isinstance(choose_tokenizer(model, "gpt2"), GPT2Tokenizer)
    assert isinstance(choose_tokenizer(model, tmp_path), GPT2Tokenizer)
    words = sorted(
        {word for row in fixture_rows() for word in re.findall(r"\w+|\S", " ".join(row["endings"]))}
    )
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(tmp_path)
    found = choose_tokenizer(model, tmp_path)
    assert found.num_words == len(vocabulary)
    assert found.encode("puts the oven").tolist() == [vocabulary[word] for word in ("puts", "the", "oven")]
    with pytest.raises(UserError, match="words"):
        choose_tokenizer(tiny_model(vocab_size=50), tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Comparing two models, and the benchmark


def test_mcnemar_is_a_coin_toss():
    """Against sums done by hand, and it stays a number where 2 ** n is beyond a float."""
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(7, 7) == 1.0
    assert mcnemar_p_value(1, 9) == mcnemar_p_value(9, 1) == 2 * (1 + 10) / 1024
    assert mcnemar_p_value(0, 5) == 2 / 32
    assert mcnemar_p_value(2400, 2600) == pytest.approx(
        math.erfc(199 / math.sqrt(5000) / math.sqrt(2)), rel=1e-2
    )


def results_file(path: Path, right: list[bool], style: str = "completion") -> Path:
    records = [
        {"index": i, "label": 1, "style": style, "prediction": 1, "prediction_norm": 1 if is_right else 0}
        for i, is_right in enumerate(right)
    ]
    write_results(path, records)
    return path


def test_two_result_files_are_compared_example_by_example(tmp_path):
    """Accuracies, standard errors, the two counts that matter and the p-value; from the shell, too."""
    a = results_file(tmp_path / "a.jsonl", [True] * 10 + [False] * 10)
    b = results_file(tmp_path / "b.jsonl", [True] * 9 + [False] + [True] * 9 + [False])
    words = "A 0.5000 +- 0.1118   B 0.9000 +- 0.0671   B - A +0.4000   only A right 1, only B right 9"
    assert f"{words}   McNemar p = 0.02148" in compare(a, b)
    process = run("eval_hellaswag.py", "--compare", a, b)
    assert process.returncode == 0 and words in process.stdout
    for other, message in (
        (results_file(tmp_path / "c.jsonl", [True] * 19), "20 and 19 examples"),
        (results_file(tmp_path / "d.jsonl", [True] * 20, "lm-eval"), "column 'style' differs"),
        (tmp_path / "none.jsonl", "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            compare(a, other)
    a.write_text(a.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:21: not a scored example"):
        compare(a, b)


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """A failure while writing leaves the earlier file and nothing beside it."""
    path = results_file(tmp_path / "a.jsonl", [True])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, [{"index": 0}, {"index": 1, "label": object()}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_benchmark_measures_both_and_checks_that_they_agree(tmp_path):
    """A toy size: figures on the console and in the file, and the losses agree."""
    process = run(
        "-m", "utils.benchmark", "hellaswag", "--examples", 3, "--rounds", 2, "--n-layer", 1, "--n-head", 2,
        "--n-embd", 16, "--device", "cpu", "--hellaswag-dir", FIXTURES, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["losses_agree"] and figures["examples"] == figures["same_predictions"] == 3
    assert figures["ratio"] > 0 and figures["peak_memory_bytes"] > 0 and figures["examples_per_second"] > 0
    assert "mean losses agree" in process.stdout and "ratio" in process.stdout


def test_the_benchmark_chooses_rows_of_all_lengths():
    """As many as asked for, each once, and their mean length is near that of all."""
    rows = [dict(HELLO, ctx="x" * n) for n in range(1, 1001)]
    for count in (1, 3, 8, 20, 64, 1000):
        chosen = [len(row["ctx"]) for row in choose_rows(rows, count)]
        assert len(set(chosen)) == len(chosen) == count
        assert abs(sum(chosen) / count - 500) < 60
