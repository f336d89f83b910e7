"""Checkpoints of nanoGPT and build-nanogpt load wherever ours do; what is not safe is refused in words."""

from __future__ import annotations

import dataclasses
import pickle
import shlex
import subprocess
import sys

import pytest
import torch

from generate import main as generate
from gpt_model import GPT, GPTConfig
from tests.conftest import OFFLINE, tiny_model
from utils.errors import UserError
from utils.weights.checkpoint import load_model_file, load_pair

IDX = torch.tensor([[1, 2, 3, 4, 5]])


def nanogpt_content(model: GPT, prefix: str = "_orig_mod.", **model_args) -> dict:
    """What nanoGPT's train.py saves, for our weights under its names."""
    sizes = dataclasses.asdict(model.config)
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**sizes, "bias": True, "dropout": 0.0, **model_args},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3},
    }


def save_build_nanogpt(model: GPT, path) -> None:
    """What build-nanogpt saves: the config is an object of a class of its script."""
    config_class = type("GPTConfig", (), {"__module__": "__main__"})
    config = config_class()
    config.__dict__.update(dataclasses.asdict(model.config))
    sys.modules["__main__"].GPTConfig = config_class
    try:
        content = {"model": model.state_dict(), "config": config, "step": 19072, "val_loss": 3.05}
        torch.save(content, path)
    finally:
        del sys.modules["__main__"].GPTConfig


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_nanogpt_checkpoint_computes_what_it_computed(tmp_path, prefix, capsys):
    """Compiled or not, weights arrive under plain names; step, loss and tokenizer come along."""
    model = tiny_model(vocab_size=50304)
    content = nanogpt_content(model, prefix)
    content["model"][prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # an old version's mask
    torch.save(content, tmp_path / "ckpt.pt")
    again = GPT.load(tmp_path / "ckpt.pt").eval()
    assert torch.equal(again(IDX)[0], model(IDX)[0])
    assert again.config == model.config and again.tokenizer_state == {"name": "gpt2"}
    loaded = load_model_file(tmp_path / "ckpt.pt")
    assert loaded["step"] == 250 and loaded["val_loss"] == pytest.approx(1.4697)
    assert "compute GELU exactly" in capsys.readouterr().out


def test_nanogpt_without_biases_gets_zeros(tmp_path):
    """bias=False leaves all biases out of the file; the model computes as if they were zero."""
    model = tiny_model(vocab_size=50257)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    content = nanogpt_content(model, bias=False)
    content["model"] = {name: t for name, t in content["model"].items() if not name.endswith(".bias")}
    torch.save(content, tmp_path / "ckpt.pt")
    again = GPT.from_checkpoint(tmp_path / "ckpt.pt").eval()
    assert torch.equal(again(IDX)[0], model(IDX)[0])


def test_nanogpts_characters_come_from_its_meta_file(tmp_path, capsys):
    """A vocabulary that is not GPT-2's is explained by meta.pkl beside it: text can be sampled."""
    characters = "\n abcdefg"
    torch.save(nanogpt_content(tiny_model(vocab_size=len(characters))), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="has 9 words, which is not GPT-2's") as caught:
        GPT.from_checkpoint(tmp_path / "ckpt.pt")
    assert "meta.pkl" in caught.value.hint
    for damaged in (b"no pickle", pickle.dumps({"itos": ["a"]}), pickle.dumps(7)):
        (tmp_path / "meta.pkl").write_bytes(damaged)
        with pytest.raises(UserError, match="does not name them"):
            GPT.from_checkpoint(tmp_path / "ckpt.pt")
    meta = {
        "vocab_size": 9,
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert generate(["-m", str(tmp_path / "ckpt.pt"), "-p", "abc", "--max-new-tokens", "5", "-d", "cpu"]) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    assert set(text) <= set(characters)


def test_code_in_a_meta_file_is_refused(tmp_path):
    """The vocabulary's file is read as plain values: a command in it does not run."""

    class Evil:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "PWNED")],)

    torch.save(nanogpt_content(tiny_model(vocab_size=9)), tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    with pytest.raises(UserError, match="UnpicklingError"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "PWNED").exists()


def test_build_nanogpt_is_refused_and_the_hint_converts_it(tmp_path):
    """Its pickled config is named, and the hint's command, run as it stands, makes a file that loads."""
    model, path = tiny_model(vocab_size=50304), tmp_path / "model_19072.pt"
    save_build_nanogpt(model, path)
    with pytest.raises(UserError, match="refusing to load .*__main__.GPTConfig") as caught:
        GPT.load(path)
    assert caught.value.exit_code == 2 and "weights_only=False" not in caught.value.hint
    command = shlex.split(caught.value.hint.partition(": ")[2])
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    plain = tmp_path / "model_19072_plain.pt"
    assert torch.equal(GPT.load(plain).eval()(IDX)[0], model(IDX)[0])
    assert load_model_file(plain)["step"] == 19072 and load_model_file(plain)["val_loss"] == 3.05


def test_a_foreign_checkpoint_cannot_be_resumed_from(tmp_path):
    """It has no optimizer of ours: --resume says so instead of starting from nothing."""
    torch.save(nanogpt_content(tiny_model(vocab_size=50257)), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_pair(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("broken", [{"n_head": None}, {"n_layer": "2"}])
def test_incomplete_sizes_are_no_checkpoint(tmp_path, broken):
    """A file without the five numbers is called what it is."""
    torch.save(nanogpt_content(tiny_model(vocab_size=50257), **broken), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    """One layer fewer than its sizes say: two lines that name what is missing."""
    content = nanogpt_content(tiny_model(vocab_size=50257))
    content["model"] = {name: tensor for name, tensor in content["model"].items() if ".h.1." not in name}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"weights of its config: Missing key.*transformer.h.1"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")


def test_our_own_checkpoints_are_no_foreign_ones(tmp_path):
    """They come back untouched, also with a vocabulary of characters."""
    from utils.weights.checkpoint import model_content, save_pair

    model = tiny_model()
    content = model_content(
        model, dataclasses.asdict(model.config), 7, None, {"name": "char", "characters": "ab"}
    )
    path = save_pair(tmp_path, 7, content, {})
    assert load_model_file(path)["tokenizer"] == {"name": "char", "characters": "ab"}
    assert load_model_file(path)["config"] == dataclasses.asdict(GPTConfig(**content["config"]))
