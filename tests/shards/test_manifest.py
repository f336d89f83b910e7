"""manifest.json: only what a build writes is accepted; it finds changed input again."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build_fineweb_edu_shards import main
from tests.shards.test_build import build, checksums, make_documents, write_jsonl
from utils.command_line import UserError
from utils.shards import verify
from utils.shards.hub import SAFE_NAME
from utils.shards.manifest import Manifest

FLAGS = {"shard-tokens": 2000}
HUB = {"kind": "hub", "dataset": "a/b", "subset": "c", "revision": "0" * 40, "files": [["c/000.parquet", 7]]}


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the manifest of a folder."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def built(tmp_path) -> Path:
    """A build of several shards, and a file outside of its folder."""
    build(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", make_documents(40)), **FLAGS)
    (tmp_path / "precious.txt").write_text("precious")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["../precious.txt", "/x.npy", "edufineweb_train_000003.npy", "", 7, None])
def test_a_name_that_leads_elsewhere_is_refused(built, name):
    """Out of the folder, to an absolute path, to another shard, to nothing: no file is written or read."""
    (built / "edufineweb_train_000001.npy").unlink()
    change(built, lambda content: content["shards"][1].update(name=name))
    before = checksums(built)
    for arguments in (["--input", str(built.parent / "a.jsonl"), "--shard-tokens", "2000"], ["--verify"]):
        with pytest.raises(UserError, match=r"key shards\[1\].name is .* \(expected '.*_000001.npy'\)"):
            main([*arguments, "--output-dir", str(built), "--num-workers", "1"])
    assert checksums(built) == before
    assert (built.parent / "precious.txt").read_text() == "precious"


EDITS = {
    "key tokens is ": lambda c: c.update(tokens=c["tokens"] + 1),
    "key complete is 'yes' (expected True or False)": lambda c: c.update(complete="yes"),
    "key shards is a dict of 0 (expected a list)": lambda c: c.update(shards={}),
    "key shards[0] is 'a' (expected a dict)": lambda c: c["shards"].insert(0, "a"),
    "key shards[1].documents is missing": lambda c: c["shards"][1].pop("documents"),
    "key shards[1].tokens is 2001 (expected": lambda c: c["shards"][1].update(tokens=2001),
    "key shards[0].tokens is True": lambda c: c["shards"][0].update(tokens=True),
    "key shards[1].sha256 is '../": lambda c: c["shards"][1].update(sha256="../" * 21 + "a"),
    "key shards[1].documents is 0": lambda c: c["shards"][1].update(documents=0),
    "key shards[1].skipped_rows is missing": lambda c: (
        c["shards"][0].update(skipped_rows=1) or c["shards"][1].pop("skipped_rows")
    ),
    "key shards[1].next[0] is 1": lambda c: c["shards"][1].update(next=[1, 0, 0]),
    "key shards[1].next[1] is -1": lambda c: c["shards"][1].update(next=[0, -1, 0]),
    "key shards[1].next[2] is 11805916": lambda c: c["shards"][1].update(next=[0, 0, 1 << 70]),
    "key shards[1].next is a list of 2": lambda c: c["shards"][1].update(next=[0, 0]),
    "key settings has the unknown 'more'": lambda c: c["settings"].update(more=1),
    "key settings has the unknown 'merges_sha256'": lambda c: c["settings"].update(tokenizer_sha256="0" * 64),
    "key settings.merges_sha256 is missing": lambda c: c["settings"].pop("merges_sha256"),
    "key settings.shard_tokens is 1.5": lambda c: c["settings"].update(shard_tokens=1.5),
    "key settings.val_tokens is '1' (expected": lambda c: c["settings"].update(val_tokens="1"),
    "key settings.source.files[0] is a list of": lambda c: c["settings"]["source"]["files"][0].pop(),
    "key settings.source.files[0][0] is '../../x.parquet' (expected": lambda c: c["settings"].update(
        source={**HUB, "files": [["../../x.parquet", 7]]}, text_field="text"
    ),
    "key inputs[0].bytes is None": lambda c: c["inputs"][0].update(bytes=None),
    "key version is 2 (expected 1)": lambda c: c.update(version=2),
    "the content has the unknown 'more'": lambda c: c.update(more=1),
}


@pytest.mark.parametrize("message", EDITS)
def test_what_no_build_writes_is_refused_with_its_place(built, message):
    """Missing and unknown keys, other types, numbers out of range, names on the hub that leave its folder."""
    change(built, EDITS[message])
    with pytest.raises(UserError) as caught:
        Manifest.load(built)
    assert f"manifest.json as minigpt-shards 1: {message}" in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 200_000, "{", "\xff", '{"format": 1e999}'])
def test_a_file_that_is_no_manifest_is_refused(built, text):
    """Empty, another JSON value, nested too deeply, not JSON, not UTF-8."""
    (built / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="cannot read .*manifest.json"):
        Manifest.load(built)


def test_valid_manifests_are_loaded(built):
    """That of the build, one of the hub, one of an earlier version, which recorded no inputs."""
    assert Manifest.load(built).complete
    change(built, lambda content: content["settings"].update(source=HUB))
    assert Manifest.load(built).settings["source"]["revision"] == "0" * 40
    change(built, lambda content: content.pop("inputs"))
    assert Manifest.load(built).inputs is None


def test_names_of_files_on_the_hub_stay_in_its_folder():
    """They are paths below it, with dots or without."""
    for name in ("a.parquet", "sample/10BT/000_00000.parquet", "a..b/c.parquet", ".a/b"):
        assert SAFE_NAME.fullmatch(name)
    for name in ("/a", "../a", "a/../../b", "a/..", "..", "a\\..\\b", "a\0", ""):
        assert not SAFE_NAME.fullmatch(name)


def unreadable(path: Path, *rest: object) -> str:
    """Reading a file without permission, which root has for every file."""
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_verify_finds_changed_and_missing_input(built, capsys, monkeypatch):
    """One byte in the middle, which the fingerprint of both ends does not see; unreadable; then missing."""
    source = built.parent / "a.jsonl"
    arguments = ["--verify", "--inputs", "--output-dir", str(built)]
    assert main(arguments) == 0
    assert f"{source}: ok" in capsys.readouterr().out
    data = source.read_bytes()
    source.write_bytes(data[:-1] + b" ")
    with pytest.raises(UserError, match=f"1 of 1 input files differ: {source}"):
        main(arguments)
    assert main([argument for argument in arguments if argument != "--inputs"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(verify, "sha256_of", unreadable)
        with pytest.raises(UserError, match=f"cannot read {source}: .*Permission denied"):
            main(arguments)
    source.unlink()
    with pytest.raises(UserError, match="1 of 1 input files differ"):
        main(arguments)
    assert f"{source}: missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="--inputs is part of --verify"):
        main(["--inputs", "--output-dir", str(built)])


def test_a_build_does_not_continue_with_changed_input(tmp_path, monkeypatch):
    """The middle of the file has changed: nothing is built. With the first content the build continues."""
    monkeypatch.setattr("utils.shards.local_files.PROBE_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out = tmp_path / "out"
    build(out, source, **FLAGS, **{"max-shards": 2})
    data, before = source.read_bytes(), checksums(out)
    middle = data.index(b"the", len(data) // 2)
    source.write_bytes(data[:middle] + b"The" + data[middle + 3 :])
    with pytest.raises(UserError, match="a.jsonl has changed since the build started"):
        build(out, source, **FLAGS)
    assert checksums(out) == before
    source.write_bytes(data)
    assert build(out, source, **FLAGS) == 0


def test_a_build_of_an_earlier_version_continues(tmp_path):
    """Without the checksums, which it never had; --verify --inputs says so."""
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(40))
    out = tmp_path / "out"
    build(out, source, **FLAGS, **{"max-shards": 2})
    change(out, lambda content: content.pop("inputs"))
    assert build(out, source, **FLAGS) == 0
    build(tmp_path / "whole", source, **FLAGS)
    shards = {name: digest for name, digest in checksums(out).items() if name.endswith(".npy")}
    assert shards.items() <= checksums(tmp_path / "whole").items()
    with pytest.raises(UserError, match="records no checksums"):
        main(["--verify", "--inputs", "--output-dir", str(out)])
