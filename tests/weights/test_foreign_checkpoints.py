"""Checkpoints of nanoGPT and build-nanogpt load wherever ours do; unsafe ones are refused with a reason."""

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
from utils.command_line import UserError
from utils.weights.checkpoint import load_model_file, load_pair, model_content, save_pair

IDX = torch.tensor([[1, 2, 3, 4, 5]])


def nanogpt_content(model: GPT, prefix: str = "_orig_mod.", **model_args) -> dict:
    """What nanoGPT's train.py saves, with our weights under its names."""
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
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, prefix, capsys):
    """Whatever wrapped the model, weights get their plain names; step, loss and tokenizer are read too."""
    model = tiny_model(vocab_size=50304)
    content = nanogpt_content(model, prefix)
    content["model"][prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # a stored causal mask
    torch.save(content, tmp_path / "ckpt.pt")
    again = GPT.load(tmp_path / "ckpt.pt").eval()
    assert torch.equal(again(IDX)[0], model(IDX)[0])
    assert again.config == model.config and again.tokenizer_state == {"name": "gpt2"}
    loaded = load_model_file(tmp_path / "ckpt.pt")
    assert loaded["step"] == 250 and loaded["val_loss"] == pytest.approx(1.4697)
    assert "compute GELU exactly" in capsys.readouterr().err


def test_missing_biases_of_nanogpt_become_zeros(tmp_path):
    """With bias=False the file has no biases; zeros give the same logits."""
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


def test_nanogpts_characters_are_read_from_its_meta_file(tmp_path, capsys):
    """A vocabulary that is not GPT-2's is read from meta.pkl beside the checkpoint: text can be sampled."""
    characters = "\n abcdefg"
    torch.save(nanogpt_content(tiny_model(vocab_size=len(characters))), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="has a vocabulary of 9 tokens, which is not GPT-2's") as caught:
        GPT.from_checkpoint(tmp_path / "ckpt.pt")
    assert "meta.pkl" in caught.value.hint
    for damaged in (b"no pickle", pickle.dumps({"itos": ["a"]}), pickle.dumps(7)):
        (tmp_path / "meta.pkl").write_bytes(damaged)
        with pytest.raises(UserError, match="does not list them"):
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
    """meta.pkl is read as plain values: a command in it does not run."""

    class Evil:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "PWNED")],)

    torch.save(nanogpt_content(tiny_model(vocab_size=9)), tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    with pytest.raises(UserError, match="UnpicklingError"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["model_19072.pt", "a `touch PWNED`.pt", "it's $HOME.pt"])
@pytest.mark.slow
def test_build_nanogpt_is_refused_and_the_hint_converts_it(name, tmp_path):
    """The error names its pickled config, and the hint's command, run unchanged, writes a file that loads.

    No character of the file's name has a meaning for the shell.
    """
    model, path = tiny_model(vocab_size=50304), tmp_path / name
    save_build_nanogpt(model, path)
    with pytest.raises(UserError, match="refusing to load .*__main__.GPTConfig") as caught:
        GPT.load(path)
    assert caught.value.exit_code == 2 and "weights_only=False" not in caught.value.hint
    command = caught.value.hint.partition("convert it: python ")[2]
    command = f"{shlex.quote(sys.executable)} {command}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=OFFLINE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain = path.with_name(f"{path.stem}_plain.pt")
    assert torch.equal(GPT.load(plain).eval()(IDX)[0], model(IDX)[0])
    assert load_model_file(plain)["step"] == 19072 and load_model_file(plain)["val_loss"] == 3.05
    assert sorted(tmp_path.iterdir()) == sorted([path, plain])


def test_a_foreign_checkpoint_cannot_be_resumed_from(tmp_path):
    """It has no optimizer file: --resume is an error, not a fresh start."""
    torch.save(nanogpt_content(tiny_model(vocab_size=50257)), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is not named model_") as caught:
        load_pair(tmp_path / "ckpt.pt")
    torch.save(nanogpt_content(tiny_model(vocab_size=50257)), tmp_path / "model_1.pt")
    with pytest.raises(UserError, match="has no optimizer file optimizer_1.pt beside it") as caught:
        load_pair(tmp_path / "model_1.pt")
    assert "--init-from" in caught.value.hint
    torch.save({"format": "minigpt-ckpt"}, tmp_path / "optimizer_1.pt")
    with pytest.raises(UserError, match="model_1.pt is not a checkpoint of this project"):
        load_pair(tmp_path / "model_1.pt")


@pytest.mark.parametrize("broken", [{"n_head": None}, {"n_layer": "2"}])
def test_a_file_with_incomplete_sizes_is_not_a_checkpoint(tmp_path, broken):
    """All five sizes must be whole numbers."""
    torch.save(nanogpt_content(tiny_model(vocab_size=50257), **broken), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    """A file with fewer layers than its config: the error names a missing weight."""
    content = nanogpt_content(tiny_model(vocab_size=50257))
    content["model"] = {name: tensor for name, tensor in content["model"].items() if ".h.1." not in name}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"weights do not match the config: transformer.h.1.*is missing"):
        GPT.from_checkpoint(tmp_path / "ckpt.pt")


WRONG = [
    None,
    "x",
    -1,
    True,
    10**12,
    10**5000,
    float("nan"),
    [1],
    {},
    torch.ones(2),
    torch.ones(3, 3).to_sparse(),
]


@pytest.mark.parametrize("key", ["model", "model_args", "iter_num", "best_val_loss", "config", "optimizer"])
def test_no_wrong_value_in_a_foreign_checkpoint_ends_in_a_traceback(key, tmp_path):
    """Values that matter are refused; of those that do not, wrong ones are ignored."""
    whole = nanogpt_content(tiny_model(vocab_size=50257, n_layer=1), prefix="")
    inner = [(), *((name,) for name in list(whole[key])[:6])] if key in ("model", "model_args") else [()]
    for place in inner:
        for value in WRONG:
            content = {**whole, key: {**whole[key], place[0]: value} if place else value}
            torch.save(content, tmp_path / "ckpt.pt")
            try:
                GPT.load(tmp_path / "ckpt.pt")
            except UserError as error:
                assert "ckpt.pt" in str(error) and "\n" not in str(error) and error.hint
            else:
                is_ignored = key in ("best_val_loss", "config", "optimizer") or place in (
                    ("bias",),
                    ("dropout",),
                )
                assert is_ignored or (key == "iter_num" and value is WRONG[4])  # a large number of steps


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_layer=10**6), "n_layer=1000000 is not a whole number from 1 to 2,048"),
        (dict(vocab_size=10**12), "vocab_size=1000000000000 is not a whole number from 1 to"),
        (dict(n_head=3), "n_embd=32 is not a multiple of n_head=3"),
    ],
)
def test_a_foreign_checkpoint_of_impossible_size_is_refused_at_once(sizes, message, tmp_path):
    """With the numbers, before meta.pkl is asked for a trillion characters."""
    torch.save(nanogpt_content(tiny_model(vocab_size=50257), **sizes), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message):
        GPT.load(tmp_path / "ckpt.pt")


def test_characters_that_are_not_single_are_refused(tmp_path):
    """A meta.pkl of another data set, whose tokens are words, or twice the same."""
    torch.save(nanogpt_content(tiny_model(vocab_size=3)), tmp_path / "ckpt.pt")
    for itos in (["ab", "c", "d"], ["a", "a", "b"]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(itos))}))
        with pytest.raises(UserError, match="key tokenizer"):
            GPT.load(tmp_path / "ckpt.pt")


def test_our_own_checkpoints_are_not_converted(tmp_path):
    """Their content is returned unchanged, also with a vocabulary of characters."""
    model = tiny_model()
    content = model_content(
        model, dataclasses.asdict(model.config), 7, None, {"name": "char", "characters": "ab"}
    )
    path = save_pair(tmp_path, 7, content, {})
    assert load_model_file(path)["tokenizer"] == {"name": "char", "characters": "ab"}
    assert GPTConfig(**load_model_file(path)["config"]) == GPTConfig(**content["config"])
