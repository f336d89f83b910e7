"""Checkpoint files: written atomically, and damaged, foreign or malicious ones are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gpt_model import GPT
from tests.conftest import tiny_model
from utils.command_line import UserError
from utils.weights.checkpoint import (
    load_model_file,
    model_content,
    newest_model_file,
    save_atomically,
    save_pair,
)


@pytest.fixture
def model() -> GPT:
    """The model whose weights are in `path`."""
    return tiny_model()


@pytest.fixture
def path(model, tmp_path) -> Path:
    """The model file of a checkpoint after 7 steps."""
    content = model_content(model, vars(model.config).copy(), 7, 1.5, {"name": "char", "characters": "abc"})
    return save_pair(tmp_path, 7, content, {"step": 7})


def test_a_saved_model_is_loaded_as_it_was(path, model):
    """Weights bit for bit, sizes and tokenizer, in plain values that the safe loader reads; still tied."""
    loaded = GPT.from_checkpoint(path)
    assert all(torch.equal(loaded.state_dict()[name], p) for name, p in model.state_dict().items())
    assert loaded.config == model.config
    assert loaded.tokenizer_state == {"name": "char", "characters": "abc"}
    assert loaded.transformer.wte.weight is loaded.lm_head.weight
    content = torch.load(path, weights_only=True)
    assert (content["step"], content["val_loss"]) == (7, 1.5)
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in content["model"])
    assert path.stat().st_size < 1.2 * 4 * model.num_parameters() + 20_000  # the tied tensor is stored once


def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch):
    """After an error while writing, the earlier file is unchanged and no temporary file remains."""
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_atomically({path: {"a": 1}})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_00007.pt", "optimizer_00007.pt"]


def test_a_file_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    """fsync(file), rename, fsync(folder): a power cut at any moment leaves the old file or the new one."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    save_atomically({tmp_path / "x.pt": {"a": 1}})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_file_that_was_written_incorrectly_is_not_renamed(path, monkeypatch):
    """What was written is read back; a wrong checksum is an error and leaves the earlier file."""
    before, real = path.read_bytes(), torch.save

    def save(content, file):
        real(content, file)
        file.flush()
        middle = file.tell() // 2
        with open(file.name, "r+b") as written:
            written.seek(middle)
            flipped = bytes([written.read(1)[0] ^ 1])
            written.seek(middle)
            written.write(flipped)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="not written correctly: checksum mismatch"):
        save_atomically({path: {"a": torch.zeros(10_000)}})
    assert path.read_bytes() == before


def test_a_checkpoint_is_written_through_a_link_and_to_no_device(path, tmp_path):
    """A link stays, its target is replaced; a FIFO or device, which could not be read back, is an error."""
    (tmp_path / "disk").mkdir()
    path.rename(tmp_path / "disk" / "weights")
    path.symlink_to("disk/weights")
    save_atomically({path: {"a": 1}})
    assert path.is_symlink() and torch.load(tmp_path / "disk" / "weights", weights_only=True) == {"a": 1}
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "null.pt").symlink_to(os.devnull)
    for name in ("fifo.pt", "null.pt"):
        with pytest.raises(OSError, match=f"{name} is not a regular file"):
            save_atomically({tmp_path / name: {"a": 1}})
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        save_atomically({tmp_path / "folder.pt": {"a": 1}})
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_called_damaged(path, share):
    """Whatever error torch.load would raise for it."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


def test_a_flipped_bit_is_detected(path):
    """By the archive's checksum: torch.load alone would return wrong weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


@pytest.mark.parametrize(("offset", "mask"), [(46, 0x80), (8, 0x01), (38, 0x10)])
def test_a_flipped_bit_in_a_header_is_detected(path, offset, mask):
    """In the name, the encryption flag, and the directory flag, which no checksum covers."""
    whole = path.read_bytes()
    entry = whole.find(b"PK\x01\x02")
    while entry >= 0:
        data = bytearray(whole)
        data[entry + offset] ^= mask
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            load_model_file(path)
        entry = whole.find(b"PK\x01\x02", entry + 1)


def test_a_damaged_end_of_the_archive_is_detected(path):
    """An offset before the beginning of the file is reported as damage, not as an error of the disk."""
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x06\x06") + 48] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_model_file(path)


def test_an_unreadable_checkpoint_is_not_called_damaged(path, monkeypatch):
    """The system's reason is given, for example missing permissions."""

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", refused)
    with pytest.raises(UserError, match="cannot read checkpoint .*model_00007.pt: Permission denied"):
        load_model_file(path)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    """A pickle that would run a command does not; the message names it and suggests no workaround."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'PWNED'}",)

    torch.save({"format": "minigpt-ckpt", "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refusing to load") as caught:
        load_model_file(tmp_path / "evil.pt")
    assert "system" in str(caught.value) and "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"format": "other"}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    """Although it is a valid archive that torch.load reads."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model_file(tmp_path / "x.pt")


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path):
    """The meaning of a later format is not guessed."""
    torch.save({"format": "minigpt-ckpt", "version": 2, "config": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"format version 2 \(expected 1\)"):
        load_model_file(tmp_path / "x.pt")


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path):
    """By number, not by name: 100000 comes after 99999."""
    for name in ("model_00010.pt", "model_99999.pt", "model_100000.pt", "model_old.pt"):
        (tmp_path / name).touch()
    assert newest_model_file(tmp_path).name == "model_100000.pt"
    assert newest_model_file(tmp_path / "nowhere") is None
