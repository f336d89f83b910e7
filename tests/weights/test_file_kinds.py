"""Files of other kinds are named for what they are, and the commands in the hints work when pasted."""

from __future__ import annotations

import gzip
import lzma
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from generate import main as generate
from gpt_model import GPT
from tests.conftest import OFFLINE, ROOT, tiny_model
from utils.command_line import UserError
from utils.weights.checkpoint import load_pair, model_content, save_pair

CHARACTERS = {"name": "char", "characters": "abc"}
NASTY_NAMES = ["old.pt", 'it\'s $HOME `touch PWNED`; "x"!.pt', "caf\udce9 \\n.pt"]


def content() -> dict:
    """The content of a healthy model file."""
    model = tiny_model()
    return {
        **model_content(model, vars(model.config).copy(), 7, None, CHARACTERS),
        **dict(format="minigpt-ckpt", version=1, save_id="0"),
    }


def follow(hint: str, folder: Path) -> None:
    """Runs the command after the colon of a hint, as a user pastes it."""
    command = hint.partition(": ")[2]
    if command.startswith("python "):
        command = f"{shlex.quote(sys.executable)} {command.removeprefix('python ')}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=OFFLINE, cwd=folder)
    assert done.returncode == 0, done.stderr


FILES = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:248d\nsize 548105171\n",
    "an HTML page": b"\n <!DOCTYPE HTML>\n<html>",
    "a GGUF model": b"GGUF\x03\x00\x00\x00" + bytes(100),
    "a pickle": pickle.dumps({"a": [1, 2]}),
    "a text": "To be, or not to be: é".encode(),
    "a NumPy array": b"\x93NUMPY\x01\x00" + bytes(100),
    r"compressed \(gzip\)": gzip.compress(b"x" * 100),
    r"compressed \(xz\)": lzma.compress(b"x" * 100),
    "a safetensors file": (64).to_bytes(8, "little") + b"{" + b" " * 200,
    "of no known kind": bytes(range(128, 256)) * 20,
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["model_00001.pt", "weights"])
def test_a_file_of_another_kind_is_named(kind, name, tmp_path):
    """By -m, --init-from and --resume alike; it is not called damaged."""
    (tmp_path / name).write_bytes(FILES[kind])
    for load in (GPT.load, load_pair):
        with pytest.raises(UserError, match=f"{name} is {kind}") as caught:
            load(tmp_path / name)
        assert "is damaged (" not in str(caught.value) and caught.value.hint


def test_an_archive_with_folders_is_not_called_damaged(tmp_path):
    """A healthy zip file of something else, which begins as a checkpoint does."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else archive.writestr("folder/", "")
        archive.writestr("folder/a.txt", "text")
    with pytest.raises(UserError, match="refusing to load .*: it is not an archive of plain values"):
        GPT.load(tmp_path / "x.pt")


def test_an_empty_file_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    """By --resume; a folder is a model where it holds a checkpoint."""
    (tmp_path / "empty.pt").touch()
    for name, message in {
        "empty.pt": "the file is empty",
        ".": "is a folder",
        "none.pt": "no checkpoint",
    }.items():
        with pytest.raises(UserError, match=message):
            load_pair(tmp_path / name)
    with pytest.raises(UserError, match="is a folder without config.json") as caught:
        GPT.load(tmp_path)
    assert "give a model_" in caught.value.hint
    save_pair(tmp_path, 7, content(), {})
    assert GPT.load(tmp_path).config.n_embd == 32


def test_a_printed_command_overwrites_no_checkpoint(tmp_path):
    """The name that it would write to is taken: the command writes to another one."""
    (tmp_path / "model.pt").write_bytes(b"precious")
    (tmp_path / "model.pt.gz").write_bytes(gzip.compress(b"x" * 100))
    torch.save(content(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old_zip.pt").write_bytes(b"precious")
    for name in ("model.pt.gz", "old.pt"):
        with pytest.raises(UserError) as caught:
            GPT.load(tmp_path / name)
        follow(caught.value.hint, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "old_zip.pt").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("name", NASTY_NAMES)
@pytest.mark.slow
def test_a_file_of_an_old_torch_is_converted_by_the_hint(name, tmp_path):
    """Before PyTorch 1.6 torch.save wrote no zip archive; the command reads plain values only."""
    path = tmp_path / name
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="is a file of torch.save before PyTorch 1.6") as caught:
        GPT.load(path)
    assert "weights_only=True" in caught.value.hint
    follow(caught.value.hint, tmp_path)
    assert (
        generate(["-m", str(path.with_name(f"{path.stem}_zip.pt")), "-p", "a", "--max-new-tokens", "2"]) == 0
    )
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["model_00007.pt.gz", "a b.pt", "packed"])
def test_a_compressed_checkpoint_is_unpacked_by_the_hint(name, tmp_path):
    """Into another file, which loads."""
    path = save_pair(tmp_path, 7, content(), {})
    data = path.read_bytes()
    path.unlink()
    (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="is compressed .gzip.") as caught:
        GPT.load(tmp_path / name)
    before = set(tmp_path.iterdir())
    follow(caught.value.hint, tmp_path)
    (unpacked,) = set(tmp_path.iterdir()) - before
    assert GPT.load(unpacked).config.n_embd == 32


def test_safetensors_load_as_the_hint_says(tmp_path):
    """The file with its config.json in a folder."""
    safetensors = pytest.importorskip("safetensors.torch")
    from utils.weights.export import hugging_face_config, hugging_face_weights, write_json

    model, folder = tiny_model(vocab_size=50257), tmp_path / "folder"
    safetensors.save_file(
        hugging_face_weights(model, 50257), tmp_path / "x.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="is a safetensors file") as caught:
        GPT.load(tmp_path / "x.safetensors")
    assert caught.value.hint.startswith("put it as model.safetensors with its config.json into a folder")
    folder.mkdir()
    (tmp_path / "x.safetensors").rename(folder / "model.safetensors")
    write_json(folder / "config.json", hugging_face_config(model, 50257, 50256))
    assert torch.equal(GPT.load(folder).lm_head.weight, model.lm_head.weight)


def test_resuming_names_what_a_file_is(tmp_path):
    """An optimizer file, a renamed model file, and one without its twin: a file is never its own twin."""
    fixture = ROOT / "tests" / "fixtures" / "checkpoint_v1"
    with pytest.raises(
        UserError, match="optimizer_00009.pt is an optimizer file, not a checkpoint"
    ) as caught:
        load_pair(fixture / "optimizer_00009.pt")
    assert caught.value.hint == f"give the model file beside it: {fixture / 'model_00009.pt'}"
    data = {name: (fixture / f"{name}_00009.pt").read_bytes() for name in ("model", "optimizer")}
    (tmp_path / "best.pt").write_bytes(data["model"])
    with pytest.raises(UserError, match="best.pt is not named model_"):
        load_pair(tmp_path / "best.pt")
    (tmp_path / "best.pt").write_bytes(data["optimizer"])
    with pytest.raises(UserError, match="best.pt is an optimizer file"):
        load_pair(tmp_path / "best.pt")
    (tmp_path / "model_9.pt").write_bytes(data["model"])
    with pytest.raises(UserError, match="has no optimizer file optimizer_9.pt beside it"):
        load_pair(tmp_path / "model_9.pt")
    (tmp_path / "optimizer_9.pt").write_bytes(data["model"])
    with pytest.raises(UserError, match="optimizer_9.pt: key windows is missing"):
        load_pair(tmp_path / "model_9.pt")
    (tmp_path / "optimizer_9.pt").write_bytes(data["optimizer"])
    assert load_pair(tmp_path / "model_9.pt").state["windows"] == 36
