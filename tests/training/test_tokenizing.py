"""Training with a tokenizer of one's own: on the train part only, once, by rank 0; resumed, read, refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import build_fineweb_edu_shards
import eval_hellaswag
import generate
import train_gpt
from gpt_model import GPT
from tests.conftest import ROOT
from tests.small_runs import TINY, Killed, assert_same_losses, assert_same_run, kill_in_update, train
from tests.test_tokenizer_json import ARABIC, CHINESE, EMOJI, ENGLISH, word_tokenizer
from tests.training.test_distributed import finished
from utils.command_line import UserError, run_script
from utils.data_loader import TRAIN_SHARE
from utils.distributed import Distributed
from utils.tokenizer import tokenizer_from_state
from utils.tokenizer_json import JsonTokenizer, read_tokenizer, train_bpe
from utils.training import tokenizing
from utils.training.data_source import Data, choose_source, open_data, part_of
from utils.training.tokenizing import train_share
from utils.weights.checkpoint import load_model_file

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_pictures")

ALONE = Distributed(torch.device("cpu"))
BPE = ("--tokenizer", "bpe:300")
BPE_300 = {"name": "bpe", "vocab_size": 300}
WORLD = (ENGLISH + CHINESE + ARABIC + EMOJI) * 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A text of four scripts."""
    path = tmp_path_factory.mktemp("world") / "world.txt"
    path.write_text(WORLD, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The log directory of an uninterrupted run with a BPE of 300 tokens."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    assert train(world, log_dir, *BPE) == 0
    return log_dir


def open_text(path: Path, state: dict, dist: Distributed = ALONE) -> Data:
    """The data of a text with a tokenizer."""
    return open_data(choose_source(str(path)), state, 4, dist)


def fail_to_train(texts: object, vocab_size: int) -> None:
    """In the place of `train_bpe`."""
    raise AssertionError("a tokenizer was trained again")


# ------------------------------------------------------------------------------------------------------------
# On the train part


def test_val_is_the_end_of_the_text_and_not_seen_by_the_tokenizer(world, tmp_path):
    """Another val part gives the same tokenizer and train tokens, another train part another tokenizer."""
    border = int(len(WORLD) * TRAIN_SHARE)
    data = open_text(world, BPE_300)
    assert data.tokenizer.state() == train_bpe([WORLD[:border]], 300)
    assert data.tokenizer.decode(data.train.read(0, data.train.num_tokens)) == WORLD[:border]
    assert data.tokenizer.decode(data.val.read(0, data.val.num_tokens)) == WORLD[border:]
    everything = part_of(data, "all")
    assert data.tokenizer.decode(everything.read(0, everything.num_tokens)) == WORLD

    path = tmp_path / "other.txt"
    path.write_text(WORLD[:border] + "zq" * ((len(WORLD) - border) // 2), encoding="utf-8")
    other = open_text(path, BPE_300)
    assert other.tokenizer.state() == data.tokenizer.state()
    assert other.train.read(0, 10**6).tolist() == data.train.read(0, 10**6).tolist()
    path.write_text("zq" * (border // 2) + WORLD[border // 2 * 2 :], encoding="utf-8")
    assert open_text(path, BPE_300).tokenizer.state() != data.tokenizer.state()


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_documents_begin_with_the_end_of_text(kind, tmp_path):
    """Records, and a text with separators; the document at the border is cut, and begins once."""
    documents = [ENGLISH * 2, CHINESE, "<|endoftext|> is text\n", ARABIC * 3, EMOJI * 6] * 3
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        path.write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    data = open_text(path, BPE_300)
    end = data.tokenizer.end_of_text
    tokens = [*data.train.read(0, 10**6).tolist(), *data.val.read(0, 10**6).tolist()]
    assert tokens.count(end) == len(documents) and tokens[0] == end
    assert data.tokenizer.decode(tokens) == "".join("<|endoftext|>" + text for text in documents)
    assert f"{len(documents)} documents" in data.reason
    train_text = "".join(train_share(documents)[0])
    assert len(train_text) == int(len("".join(documents)) * TRAIN_SHARE)
    assert data.tokenizer.state() == train_bpe(train_share(documents)[0], 300)
    assert data.tokenizer.decode(data.train.read(0, 10**6)).replace("<|endoftext|>", "") == (
        train_text.replace("<|endoftext|>", "")
    )


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0123456789"], (["012345678"], ["9"])),
        (["01234", "56789"], (["01234", "5678"], ["9"])),
        (["012345678", "9", "", ""], (["012345678"], ["9", "", ""])),
        (["01", "2345678", "9"], (["01", "2345678"], ["9"])),
        (["0"], ([""], ["0"])),
        ([""], ([""], [""])),
    ],
)
def test_texts_are_divided_by_characters(texts, expected):
    """At nine tenths; a border between two texts leaves nothing of the first for val."""
    before, after = train_share(texts)
    assert (before, after) in (expected, (expected[0], ["", *expected[1]]), ([*expected[0], ""], expected[1]))
    assert "".join(before) + "".join(after) == "".join(texts)


def test_only_rank_0_trains_the_tokenizer(world, monkeypatch):
    """The others get it."""
    state = train_bpe([WORLD], 280)

    class OtherRank(Distributed):
        def on_master(self, function: object) -> dict:
            return state

        def broadcast(self, value: list) -> list:
            return value

    monkeypatch.setattr(tokenizing, "train_bpe", fail_to_train)
    other = OtherRank(torch.device("cpu"), rank=1, world_size=2)
    assert open_text(world, BPE_300, other).tokenizer.state() == state


@pytest.mark.slow
def test_two_ranks_give_the_losses_and_the_tokenizer_of_one(world, tmp_path):
    """Twenty steps and five validations to 1e-4; the tokenizer is equal byte for byte."""
    jobs = [finished(n, world, tmp_path / str(n), *BPE) for n in (1, 2)]
    assert_same_losses(jobs[1], jobs[0])
    states = [load_model_file(job / "model_00020.pt")["tokenizer"] for job in jobs]
    assert states[0] == states[1] == train_bpe([WORLD[: int(len(WORLD) * TRAIN_SHARE)]], 300)


# ------------------------------------------------------------------------------------------------------------
# Resumed and read back


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world, whole, tmp_path, monkeypatch, capsys):
    """With the tokenizer of its checkpoint, which is not trained again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_update(patch, 11)
        train(world, tmp_path, *BPE)
    monkeypatch.setattr(tokenizing, "train_bpe", fail_to_train)
    assert train(world, tmp_path, *BPE, "--resume") == 0
    assert "tokenizer bpe of 300 tokens" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)
    states = [load_model_file(log_dir / "model_00020.pt")["tokenizer"] for log_dir in (tmp_path, whole)]
    assert states[0] == states[1]


@pytest.mark.parametrize("name", ["bpe:301", "char", "gpt2", "file"])
def test_another_tokenizer_is_refused_when_resuming(name, world, whole, tmp_path):
    """By content: a file with the same tokenizer is the same one."""
    shutil.copytree(whole, tmp_path / "log")
    flags = ["--tokenizer", name, "--resume", "--max-steps", "21"]
    if name == "file":
        state = load_model_file(whole / "model_00020.pt")["tokenizer"]
        path = tmp_path / "tokenizer.json"
        path.write_text(state["json"], encoding="utf-8")
        flags[1] = str(path)
        assert train(world, tmp_path / "log", *flags) == 0
        path.write_text(train_bpe([ARABIC * 9], 300)["json"], encoding="utf-8")
        flags[-1] = "22"
    with pytest.raises(UserError, match="was made with another tokenizer"):
        train(world, tmp_path / "log", *flags)


def test_a_changed_text_is_refused_when_resuming(whole, tmp_path):
    """Although the tokenizer, that of the checkpoint, is the same."""
    shutil.copytree(whole, tmp_path / "log")
    path = tmp_path / "changed.txt"
    path.write_text(WORLD.replace("1948", "1949", 1), encoding="utf-8")
    with pytest.raises(UserError, match="was made on other data") as caught:
        train(path, tmp_path / "log", *BPE, "--resume", "--max-steps", "21")
    assert "another tokenizer" not in str(caught.value)


def test_a_resumed_run_does_not_need_its_tokenizer_json(world, tmp_path, monkeypatch):
    """The file may be gone: the checkpoint has the tokenizer. A run that starts needs it."""
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe([WORLD], 300)["json"], encoding="utf-8")
    flags = ("--tokenizer", str(path), "--max-steps", "8")
    assert train(world, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_update(patch, 7)
        train(world, tmp_path / "log", *flags)
    model, tuned = str(tmp_path / "whole" / "model_00008.pt"), ("--tokenizer", str(path), "--max-steps")
    assert train(world, tmp_path / "tuned", *tuned, "2", "--init-from", model) == 0
    path.unlink()
    assert train(world, tmp_path / "tuned", *tuned, "4", "--resume") == 0
    assert train(world, tmp_path / "log", *flags, "--resume") == 0
    assert_same_run(tmp_path / "log", tmp_path / "whole", step=8)
    with pytest.raises(UserError, match=f"cannot read {path}: No such file"):
        train(world, tmp_path / "new", *flags)
    (tmp_path / "tokeniser.json").touch()
    with pytest.raises(UserError, match=f"no file {path}") as caught:
        train(world, tmp_path / "new", *flags)
    assert caught.value.hint == f"did you mean --tokenizer {tmp_path}/tokeniser.json?"


def test_the_model_is_read_by_every_program(world, whole, tmp_path, capsys, monkeypatch):
    """Sampling, val loss with bits per byte, fine-tuning, HellaSwag: with the tokenizer in the checkpoint."""
    model = str(whole / "model_00020.pt")
    monkeypatch.setattr(tokenizing, "train_bpe", fail_to_train)
    assert (
        generate.main(["-m", model, "-p", "自由<|endoftext|>حر", "--max-new-tokens", "8", "-d", "cpu"]) == 0
    )
    assert capsys.readouterr().out.startswith("自由<|endoftext|>حر")
    flags = [
        "--data",
        str(world),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--log-dir",
        str(tmp_path / "none"),
    ]
    assert train_gpt.main([*flags, "--eval-only", "--init-from", model]) == 0
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "val"][-1]
    loss = re.search(r"val loss (\S+) \| .* bits per byte", printed)[1]
    assert float(loss) == pytest.approx(last["loss"], abs=5.1e-5)  # half of the last digit that is shown
    assert train(world, tmp_path / "tuned", *BPE, "--init-from", model, "--max-steps", "2") == 0
    with pytest.raises(UserError, match=r"contradicts --tokenizer bpe:301 \(found bpe:300\)"):
        train(world, tmp_path / "other", "--tokenizer", "bpe:301", "--init-from", model)
    monkeypatch.setenv("HELLASWAG_DIR", str(ROOT / "tests" / "fixtures"))
    assert eval_hellaswag.main(["-m", model, "-d", "cpu", "--limit", "3"]) == 0
    assert "acc_norm" in capsys.readouterr().out


def test_a_run_records_what_its_model_decides(world, whole, tmp_path, capsys):
    """Not the preset's sizes and tokenizer, which earlier versions did; it is resumed again and again."""
    flags = ["--preset", "char", "--device", "cpu", "--seq-len", "16", "--micro-batch", "2"]
    flags += ["--total-batch-tokens", "32", "--sample-every", "0", "--data", str(world)]
    flags += ["--log-dir", str(tmp_path), "--max-steps"]
    assert train_gpt.main([*flags, "2", "--init-from", str(whole)]) == 0
    expected = dict(tokenizer="bpe:300", n_layer=2, n_head=2, n_embd=16, init_from=str(whole))
    path = tmp_path / "optimizer_00002.pt"
    content = torch.load(path, weights_only=True)
    assert content["train_args"].items() >= expected.items()
    content["train_args"].update(tokenizer="char", n_head=5, n_embd=160)
    torch.save(content, path)
    for steps in (3, 4):
        capsys.readouterr()
        assert train_gpt.main([*flags, str(steps), "--resume"]) == 0
        assert f"settings have changed: max_steps {steps - 1} -> {steps}; " in capsys.readouterr().err
        saved = torch.load(tmp_path / f"optimizer_0000{steps}.pt", weights_only=True)
        assert saved["train_args"].items() >= expected.items()


def test_hellaswag_during_training_uses_the_own_tokenizer(world, tmp_path, monkeypatch, capsys):
    """It has all bytes: the evaluation runs, without a warning."""
    monkeypatch.setenv("HELLASWAG_DIR", str(ROOT / "tests" / "fixtures"))
    flags = ("--max-steps", "2", "--hellaswag-every", "2", "--hellaswag-examples", "2")
    assert train(world, tmp_path, *BPE, *flags) == 0
    assert "HellaSwag is off" not in capsys.readouterr().err
    assert " hella " in (tmp_path / "log.txt").read_text()


def test_a_tokenizer_without_bytes_trains_without_bits_per_byte(tmp_path, capsys):
    """Of a tokenizer of words nothing is known about bytes; documents are joined, as it has no separator."""
    content = word_tokenizer(30)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    lines = [json.dumps({"text": " ".join(f"w{i % 30}" for i in range(n, n + 40))}) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ("--tokenizer", str(tmp_path), "--max-steps", "2")
    assert train(tmp_path / "a.jsonl", tmp_path / "log", *flags) == 0
    printed = capsys.readouterr()
    assert "tokenizer wordlevel of 30 tokens" in printed.out and "bits per byte" not in printed.out
    assert "documents are joined by blank lines: the tokenizer has no <|endoftext|>" in printed.err


# ------------------------------------------------------------------------------------------------------------
# Shards


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory) -> Path:
    """WORLD as shards of a BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    flags = ["--tokenizer", "bpe:300", "--shard-tokens", "2000", "--num-workers", "1"]
    build_fineweb_edu_shards.main(["--input", str(world), "--output-dir", str(folder), *flags])
    return folder


def train_on_shards(folder: Path, log_dir: Path, *flags: str) -> int:
    """A run of two steps whose tokenizer is that of the shards, unless `flags` name one."""
    tokenizer = TINY.index("--tokenizer")
    settings = [*TINY[:tokenizer], *TINY[tokenizer + 2 :], "--micro-batch", "2", "--total-batch-tokens", "64"]
    settings += ["--max-steps", "2", "--val-every", "2", "--sample-every", "0", "--log-dir", str(log_dir)]
    return train_gpt.main([*settings, "--data", str(folder), *flags])


def test_training_on_shards_uses_their_tokenizer(shards, tmp_path, capsys):
    """Without a flag, and with one that names the same: its number of tokens, or its file."""
    for number, flags in enumerate([(), BPE, ("--tokenizer", str(shards))]):
        assert train_on_shards(shards, tmp_path / str(number), *flags) == 0
        assert "tokenizer bpe of 300 tokens" in capsys.readouterr().out
    model = GPT.load(tmp_path / "0" / "model_00002.pt")
    assert model.config.vocab_size == 384 and model.tokenizer_state == read_tokenizer(shards)
    record = json.loads((tmp_path / "0" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["settings"]["tokenizer"] == "bpe:300"
    assert train_on_shards(shards, tmp_path / "0", "--resume", "--max-steps", "3") == 0
    assert train_on_shards(shards, tmp_path / "3", "--init-from", str(tmp_path / "0" / "model_00003.pt")) == 0


@pytest.mark.parametrize("recorded", ["bpe:300", "bpe"])  # by this version, and by earlier ones
def test_the_hint_continues_a_run_on_shards_when_it_is_followed(recorded, shards, world, tmp_path):
    """After another --data; the name of a kind of tokenizer is no value of --tokenizer."""
    assert train_on_shards(shards, tmp_path) == 0
    path = tmp_path / "optimizer_00002.pt"
    content = torch.load(path, weights_only=True)
    content["train_args"]["tokenizer"] = recorded
    torch.save(content, path)
    flags = ["--resume", "--max-steps", "3"]
    with pytest.raises(UserError, match="made on other data") as caught:
        train_on_shards(shards, tmp_path, *flags, "--data", str(world))
    added = shlex.split(caught.value.hint.split("to continue it, add ")[1].split(";")[0])
    assert train_on_shards(shards, tmp_path, *flags, "--data", str(world), *added) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "not GPT-2 tokens"),
        ("char", "not characters"),
        ("bpe:301", "not tokens of a bpe tokenizer of 301 tokens"),
        ("file", "not tokens of a bpe tokenizer of 300 tokens"),
    ],
)
def test_another_tokenizer_than_that_of_the_shards_is_refused(name, message, shards, tmp_path):
    """Before a model is built; a file of the same size is another tokenizer, too."""
    if name == "file":
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text(train_bpe([ARABIC * 9], 300)["json"], encoding="utf-8")
    with pytest.raises(UserError, match="holds tokens of a bpe tokenizer of 300 tokens, " + message):
        train_on_shards(shards, tmp_path / "log", "--tokenizer", name)


def test_a_model_of_other_tokens_is_not_trained_on_shards(shards, tmp_path):
    """As many tokens that mean something else; and a model with a BPE of its own on shards of GPT-2's."""
    shutil.copytree(shards, tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (tmp_path / "gpt2" / name).unlink()
    for folder, found in ((shards, "a bpe tokenizer of 300 tokens"), (tmp_path / "gpt2", "GPT-2 tokens")):
        with pytest.raises(UserError, match=f"{found}, not tokens of a bpe tokenizer of 300 tokens"):
            open_data(choose_source(str(folder)), train_bpe([ARABIC * 9], 300), 4, ALONE)


def test_shards_without_their_tokenizer_json_are_refused(shards, tmp_path):
    """The manifest records that there was one: GPT-2's would read their tokens as nonsense."""
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot read .*tokenizer.json"):
        train_on_shards(tmp_path / "copy", tmp_path / "log")


# ------------------------------------------------------------------------------------------------------------
# The flag


@pytest.mark.parametrize("name", ["bpe:100", "bpe:abc", "missing.json", "damaged", "another kind"])
def test_a_bad_tokenizer_is_an_error_of_two_lines(name, world, tmp_path, capsys):
    """Exit code 2, before a log directory is used."""
    if name == "damaged":
        (tmp_path / "tokenizer.json").write_text(train_bpe([WORLD], 300)["json"][:-9])
    elif name == "another kind":
        (tmp_path / "tokenizer.json").write_bytes(b"PK\x03\x04")
    path = tmp_path if name in ("damaged", "another kind") else name
    assert run_script(lambda: train(world, tmp_path / "log", "--tokenizer", str(path))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]


def test_the_preset_is_that_of_a_text(world):
    """A BPE of one's own trains the model of GPT-2's tokens, not that of characters."""
    for name, preset in (("bpe:1024", "tiny"), ("char", "char"), (None, "tiny")):
        flags = ["--data", str(world), *(["--tokenizer", name] if name else [])]
        args, reason = train_gpt.read_arguments(flags)
        assert (args.preset, args.tokenizer) == (preset, name)


def test_the_vocabulary_of_the_model_is_padded(whole):
    """To a multiple of 128; ids beyond the tokenizer's are never sampled."""
    model = GPT.load(whole / "model_00020.pt")
    tokenizer = tokenizer_from_state(model.tokenizer_state)
    assert isinstance(tokenizer, JsonTokenizer)
    assert (tokenizer.vocab_size, model.config.vocab_size) == (300, 384)
