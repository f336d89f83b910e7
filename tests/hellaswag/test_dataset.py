"""HellaSwag's files, scripts and ranks: whole or an error, and the same for everybody."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import re
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval_hellaswag import evaluate_hellaswag, iter_examples
from gpt_model import GPT
from tests.benchmarks.hellaswag import score_padded_rows
from tests.conftest import ROOT, run, tiny_model
from tests.test_eval_hellaswag import (
    ALONE,
    FIXTURE,
    FIXTURES,
    HELLO,
    Folded,
    fixture_rows,
    folded_model,
    make_examples,
    silent,
)
from utils.errors import UserError
from utils.hellaswag import dataset as hellaswag_data
from utils.hellaswag.dataset import PublishedFile, find_or_download, read_rows
from utils.hellaswag.examples import choose_tokenizer, examples_for_training, load_examples
from utils.hellaswag.results import compare, mcnemar_p_value, standard_error, write_results
from utils.tokenizer import GPT2Tokenizer, tokenizer_from_state
from utils.weights.checkpoint import model_content, save_pair
from utils.weights.pretrained import tokenizer_state_of

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
    (tmp_path / "new" / "folder").mkdir(parents=True)
    (tmp_path / "new" / "folder" / "hellaswag_val.jsonl.123.part").write_bytes(b"of a killed process")
    for _ in range(2):
        path = find_or_download(tmp_path / "new" / "folder", "val")
        assert path.read_bytes() == FIXTURE.read_bytes()
    assert server.requests == ["/first/hellaswag_val.jsonl"]
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("bad", [404, 429, b"<html>200, but sorry</html>", "truncated", "one byte changed"])
def test_a_bad_download_is_tried_once_more(serve, tmp_path, bad):
    """Error pages, a body cut short without a word, a wrong byte: the checksum finds it; then the mirror."""
    data = FIXTURE.read_bytes()
    bad = {"truncated": data[:-100], "one byte changed": data[:-9] + b"X" + data[-8:]}.get(bad, bad)
    server = serve(bad, data)
    assert find_or_download(tmp_path, "val").read_bytes() == data
    assert server.requests == ["/first/hellaswag_val.jsonl", "/second/hellaswag_val.jsonl"]


@pytest.mark.parametrize("bad", [404, b"half"])
def test_two_bad_downloads_are_an_error_that_says_where_to_put_the_file(serve, tmp_path, bad):
    """Exactly two tries, nothing left that looks like data; the hint names folder, flag and variable."""
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
from tests.test_eval_hellaswag import Folded, folded_model
from utils import distributed
from utils.hellaswag import dataset as hellaswag_data
from eval_hellaswag import evaluate_hellaswag
from utils.errors import UserError
from utils.hellaswag.examples import load_examples
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
    """Seven examples, four here and three there: equal counts, as many polls, one download, shared errors."""
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


def test_each_machine_says_why_hellaswag_is_off(monkeypatch, capsys):
    """Only the machine whose file is damaged knows the reason; its first process prints it, no other does."""

    def damaged(*arguments, **options):
        raise UserError("hellaswag_val.jsonl:10: not JSON", "fetch it again")

    monkeypatch.setattr("utils.hellaswag.examples.load_examples", damaged)
    args = Namespace(hellaswag_every=1, hellaswag_examples=None, hellaswag_dir=None)
    tokenizer = GPT2Tokenizer()
    for local_rank, expected in (
        (0, "warning: HellaSwag is off: hellaswag_val.jsonl:10: not JSON\n"),
        (1, ""),
    ):
        dist = SimpleNamespace(is_master=False, local_rank=local_rank)
        assert examples_for_training(args, tokenizer, 64, dist) == []
        assert capsys.readouterr().out == expected


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
    """Both styles in one run: a line an example, in file order, and the accuracies that follow from them.

    The losses are those of the plain form; accuracies are fractions of four decimals with standard errors.
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
    """No data and no network, a character model, a malformed line, no place for --output, broken weights."""
    folder = tmp_path / "chars"
    folder.mkdir()
    characters = save_checkpoint(folder, tiny_model(), {"name": "char", "characters": "abc"})
    nan = tiny_model(block_size=48, vocab_size=50304)
    nan.transformer.ln_f.weight.data[0] = math.nan
    (tmp_path / "nan").mkdir()
    broken_weights = save_checkpoint(tmp_path / "nan", nan, {"name": "gpt2"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "hellaswag_val.jsonl").write_text(json.dumps(HELLO) + "\n{}\n")
    for words, flags in {
        "cannot download hellaswag_val.jsonl: no network": ["-m", checkpoint, "--hellaswag-dir", tmp_path],
        "reads characters": ["-m", characters, "--hellaswag-dir", FIXTURES],
        "hellaswag_val.jsonl:2: missing key 'ctx'": ["-m", checkpoint, "--hellaswag-dir", broken],
        "cannot write": ["-m", checkpoint, "--hellaswag-dir", FIXTURES, "--output", tmp_path / "no" / "x"],
        "not a plain file": ["-m", checkpoint, "--hellaswag-dir", FIXTURES, "--output", folder],
        "losses are not finite": ["-m", broken_weights, "--hellaswag-dir", FIXTURES],
    }.items():
        started = time.perf_counter()
        process = run("eval_hellaswag.py", *flags)
        assert process.returncode == 2, process.stderr
        assert re.fullmatch(r"error: .*\nhint: .*\n", process.stderr) and words in process.stderr
        assert time.perf_counter() - started < 30


def test_a_folder_of_transformers_is_read_with_its_own_tokenizer(tmp_path, monkeypatch):
    """Files of another tokenizer beside the weights are used; without any, or with GPT-2's: GPT-2's BPE."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(block_size=256, vocab_size=50257)
    for source in ("gpt2", tmp_path):
        model.tokenizer_state = tokenizer_state_of(source)
        assert isinstance(choose_tokenizer(model, source), GPT2Tokenizer)
    words = sorted(
        {word for row in fixture_rows() for word in re.findall(r"\w+|\S", " ".join(row["endings"]))}
    )
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(tmp_path)
    model.tokenizer_state = tokenizer_state_of(tmp_path)
    found = choose_tokenizer(model, tmp_path)
    assert found.num_words == len(vocabulary)
    assert found.encode("puts the oven").tolist() == [vocabulary[word] for word in ("puts", "the", "oven")]
    small = tiny_model(vocab_size=50)
    small.tokenizer_state = model.tokenizer_state
    with pytest.raises(UserError, match="words"):
        choose_tokenizer(small, tmp_path)
    with pytest.raises(UserError, match="a tokenizer of its own"):  # generate.py and train_gpt.py
        tokenizer_from_state(model.tokenizer_state)


def test_a_block_of_one_token_is_refused():
    """No ending would be scored, and the first one win everywhere."""
    with pytest.raises(UserError, match="a block of 2 tokens"):
        load_examples(None, "val", 3, None, block_size=1)


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
        "-m", "tests.benchmarks", "hellaswag", "--examples", 3, "--rounds", 2, "--n-layer", 1, "--n-head", 2,
        "--n-embd", 16, "--device", "cpu", "--hellaswag-dir", FIXTURES, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agree"] and figures["examples"] == figures["same_predictions"] == 3
    assert figures["ratio"] > 0 and figures["peak_memory_bytes"] > 0 and figures["examples_per_second"] > 0
    assert "mean losses agree" in process.stdout and "ratio" in process.stdout
