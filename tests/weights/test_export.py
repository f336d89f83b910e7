"""Exported models compute the same logits in transformers, and load again bit for bit."""

from __future__ import annotations

import json
import os

import pytest
import torch

from gpt_model import GPT
from tests.conftest import run, tiny_model
from utils.command_line import Unfinished, UserError, run_script
from utils.tokenizer import GPT2Tokenizer, tokenizer_from_state
from utils.tokenizer_json import train_bpe
from utils.weights import export
from utils.weights.checkpoint import model_content, save_pair
from utils.weights.pretrained import tokenizer_state_of

IDX = torch.tensor([[50256, 1, 2, 3, 50000, 5, 6, 7]])


@pytest.fixture(scope="module", autouse=True)
def offline():
    """transformers must not use the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model with a padded vocabulary, folder to which the command exported its checkpoint, its output)."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny_model(vocab_size=50304)
    content = model_content(model, vars(model.config).copy(), 7, 1.5, {"name": "gpt2"})
    path = save_pair(folder, 7, content, {"step": 7})
    process = run("-m", "utils.weights.export", path, folder / "out")
    assert process.returncode == 0, process.stderr
    return model, folder / "out", process.stdout


def test_transformers_computes_our_logits(exported):
    """AutoModelForCausalLM loads a GPT-2 of 50257 tokens whose logits are ours to 1e-5."""
    from transformers import AutoModelForCausalLM

    model, folder, _ = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = theirs(IDX).logits
    assert type(theirs).__name__ == "GPT2LMHeadModel" and logits.shape == (1, 8, 50257)
    assert (logits - model(IDX)[0][..., :50257]).abs().max() < 1e-5


def test_a_round_trip_preserves_every_bit(exported):
    """GPT.from_pretrained on the folder returns our weights, without the padding of the vocabulary."""
    model, folder, _ = exported
    again = GPT.load(folder)
    assert again.config.vocab_size == 50257 and again.config.block_size == model.config.block_size
    state = again.state_dict()
    assert all(
        torch.equal(state[name], tensor[: len(state[name])]) for name, tensor in model.state_dict().items()
    )
    assert again.transformer.wte.weight is again.lm_head.weight


def test_autotokenizer_encodes_as_ours_does(exported):
    """The same ids for many scripts, white space and the special token; decoding returns the text."""
    from transformers import AutoTokenizer

    _, folder, _ = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello,  world!\n\n  It's 1234 o'clock; na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u00a0 x\t\r\n "
    text += open(export.__file__, encoding="utf-8").read()
    ids = GPT2Tokenizer().encode(text).tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 50257


@pytest.mark.parametrize(("token", "name"), [("[PAD]", "gpt2"), ("[header]", "bpe")])
def test_an_added_token_matters_if_hellaswag_contains_it(token, name, exported, tmp_path):
    """A padding token leaves the tokenizer GPT-2's; one that occurs in WikiHow's texts changes their ids."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(tmp_path)
    state = tokenizer_state_of(tmp_path)
    assert state["name"] == name
    ids = tokenizer_from_state(state).encode(f"it ends. {token} Then").tolist()
    assert (ids == tokenizer.encode(f"it ends. {token} Then")) is (name == "bpe")


@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", "Ġthe"])
def test_a_tokenizer_of_ones_own_is_exported_and_read_back(end_of_text, tmp_path, capsys):
    """AutoTokenizer encodes the same ids, in any language; the folder gives back the tokenizer's state."""
    from transformers import AutoTokenizer

    text = "the first, the second:  \u7b2c\u4e00\u6761 \u0623\u062d\u0631\u0627\u0631 \U0001f600\n\n it's\t"
    model = tiny_model(vocab_size=384)
    model.tokenizer_state = {**train_bpe([text * 9], 300), "end_of_text": end_of_text}
    ours = tokenizer_from_state(model.tokenizer_state)
    assert export.export(model, tmp_path / "out") < 1e-9
    assert "tokenizer.json: the model's own tokenizer" in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == ours.encode(text).tolist() and len(theirs) == ours.vocab_size
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs("<|endoftext|>")["input_ids"] == ours.encode("<|endoftext|>", allow_special=True).tolist()
    again = GPT.load(tmp_path / "out")
    assert again.tokenizer_state == model.tokenizer_state and again.config.vocab_size == ours.vocab_size


def test_the_command_reports_what_it_wrote_and_verified(exported):
    """Files, removed padding and the measured difference; nothing but the folder is left behind."""
    _, folder, output = exported
    assert "47 padding rows of the vocabulary removed" in output
    assert "largest difference to the logits of transformers: " in output
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert {path.suffix for path in folder.parent.iterdir()} == {".pt", ""}
    assert not list(folder.parent.glob(".*"))


def test_a_character_model_is_exported_with_its_vocabulary(tmp_path, capsys):
    """characters.json maps each character to its id, a line reports it, and loading the folder reads it."""
    model = tiny_model(vocab_size=4)
    model.tokenizer_state = {"name": "char", "characters": "\nab\u00e9"}
    assert export.export(model, tmp_path / "out") < 1e-9
    characters = json.loads((tmp_path / "out" / "characters.json").read_text(encoding="utf-8"))
    assert characters == {"\n": 0, "a": 1, "b": 2, "\u00e9": 3}
    assert "characters.json: ids of a character model" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] is None and config["vocab_size"] == 4
    again = GPT.load(tmp_path / "out")
    assert again.config.vocab_size == 4 and again.tokenizer_state == model.tokenizer_state
    for damaged in ("[1]", '{"a": 1}', "{"):
        (tmp_path / "out" / "characters.json").write_text(damaged)
        with pytest.raises(
            UserError, match="characters.json (holds no characters|cannot be read as an object)"
        ):
            GPT.load(tmp_path / "out")


def test_different_logits_fail_the_export(tmp_path, monkeypatch):
    """If transformers computes something else, the command fails and leaves no folder."""
    model, correct = tiny_model(vocab_size=50257), export.hugging_face_weights

    def swapped(model, vocab_size):
        weights = correct(model, vocab_size)
        first, second = (f"transformer.h.{layer}.ln_1.bias" for layer in (0, 1))
        return {**weights, first: weights[second], second: weights[first]}

    monkeypatch.setattr(export, "hugging_face_weights", swapped)
    with pytest.raises(Unfinished, match="logits differ by"):
        export.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    """A folder that is not empty, and a file, are refused before anything is written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for taken in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export.export(tiny_model(), taken)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """A limit on file sizes stands for it; safetensors raises a type of its own."""
    import resource

    model = tiny_model(vocab_size=4)
    model.tokenizer_state = {"name": "char", "characters": "abcd"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*out: .*File too large"):
            export.export(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    """The error names it before anything is written."""
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=f"{package} is not installed"):
        export.export(tiny_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_an_error_of_two_lines(tmp_path, capsys):
    """Exit code 2, with a hint."""
    assert run_script(lambda: export.main([str(tmp_path / "none.pt"), str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("error: no checkpoint at") and error[1].startswith("hint: ")
