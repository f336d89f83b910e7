"""The files of a corpus on this machine: each below an input folder is read, or the plan says why not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from build_fineweb_edu_shards import main
from tests.shards.test_build import build, expected_tokens, tokens_of
from utils.command_line import UserError
from utils.shards.local_files import LocalFiles, describe_left_out, find_files
from utils.shards.manifest import Manifest


def names(*arguments: object) -> list[str]:
    """The names of the files that these arguments of --input stand for."""
    return [path.name for path in find_files([str(argument) for argument in arguments])[0]]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with every kind of entry; all texts differ."""
    folder = tmp_path / "data [v2]"
    for name in ("a.txt", "B.TXT", "sub/c.JsonL", ".hidden.txt", ".cache/d.txt", "x.docx", "y.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": f"text of {name}"}))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("linked")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "f.txt").symlink_to(tmp_path / "elsewhere" / "e.txt")
    (folder / "broken.txt").symlink_to("nothing")
    os.mkfifo(folder / "pipe.txt")
    return folder


def test_a_folder_is_read_completely_or_the_plan_says_what_is_left_out(corpus, tmp_path, capsys):
    """Suffixes in any case, linked files and folders, each file once; the rest is named before the build."""
    assert build(tmp_path / "out", corpus) == 0
    recorded = [entry[0] for entry in Manifest.load(tmp_path / "out").settings["source"]["files"]]
    assert recorded == ["B.TXT", "a.txt", "f.txt", "c.JsonL"]
    line = capsys.readouterr().out.splitlines()[0]
    for part in (
        *("2 hidden (.cache, .hidden.txt)", "2 broken links or special files (broken.txt, pipe.txt)"),
        *("2 of other kinds (x.docx, y.json)", "1 named twice (e.txt)"),
    ):
        assert part in line
    assert names(corpus / ".hidden.txt", corpus / "y.json") == [".hidden.txt", "y.json"]  # where it is named


@pytest.mark.parametrize("target", [".", "..", "loop"])
def test_links_that_form_a_cycle_end(corpus, target):
    """To the folder itself, to one above it, to the link itself."""
    (corpus / "sub" / "loop").symlink_to(target)
    files, left_out = find_files([str(corpus)])
    assert [path.name for path in files] == ["B.TXT", "a.txt", "f.txt", "c.JsonL"]
    assert [path.name for path in left_out["named twice"]] == ["e.txt"]  # none is visited a second time


def test_a_pattern_may_follow_a_folder_with_brackets(corpus):
    """Its existing part is taken as it is; later brackets are a pattern, a matched folder is read."""
    assert names(corpus / "*.txt") == ["a.txt", "f.txt"]
    assert names(corpus / "[aB].*") == ["B.TXT", "a.txt"]
    assert names(corpus / "s*") == names(f"{corpus}/**/*.JsonL") == ["c.JsonL"]
    with pytest.raises(UserError, match="no such file") as caught:
        find_files([str(corpus / "brok*")])
    assert "1 broken links or special files (broken.txt)" in caught.value.hint


def test_what_exists_without_a_corpus_file_is_named_for_what_it_is(tmp_path):
    """A folder, and what is no regular file, are not said to be missing."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.docx").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("in", "a folder without corpus files"), ("pipe", "not a regular file")):
        with pytest.raises(UserError) as caught:
            find_files([str(tmp_path / name)])
        assert str(caught.value) == f"--input {tmp_path / name}: {problem}"
        assert caught.value.hint.startswith("give files, globs or folders: .parquet, ")


def test_a_pattern_is_relative_to_the_working_directory(corpus, monkeypatch):
    """With and without a folder before the first wildcard."""
    monkeypatch.chdir(corpus.parent)
    assert names("*[[]v2]/a.t*") == names("data [v2]/a.*") == ["a.txt"]
    monkeypatch.chdir(corpus)
    assert names("a.*") == ["a.txt"]


def test_a_name_that_is_not_utf8_is_read_and_recorded(tmp_path, capsys):
    """As an archive from Windows may hold: in the manifest, and found again by --verify --inputs."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))
    path.write_text("some words")
    for given in (folder, path, folder / "*.txt"):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert build(out, given) == 0
        assert np.array_equal(tokens_of(out), expected_tokens(["some words"]))
        assert Manifest.load(out).inputs[0]["path"] == str(path)


def test_a_tilde_after_an_equals_sign_is_the_home_folder(tmp_path, monkeypatch):
    """The shell leaves it there; for paths of both types."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some words")
    assert main(["--input=~/a.txt", "--output-dir=~/out", "--num-workers=1"]) == 0
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_that_cannot_be_read_is_an_error(corpus, monkeypatch):
    """Its texts would be missing in silence. Root may read all, so the failure is made."""
    real = Path.iterdir

    def iterdir(path: Path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match="cannot read folder .*sub: Permission denied"):
        find_files([str(corpus)])


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.md", b"text", r"a.md is not a corpus file \(expected .parquet", "rename it"),
        (
            "a.md.gz",
            b"\x1f\x8b\x08",
            r"a.md.gz is gzip \(expected .parquet",
            "gunzip -c < .*a.md.gz > .*a.md;",
        ),
        ("data", b"PAR1", r"data is parquet \(expected", "mv .*data .*data.parquet"),
    ],
)
def test_a_foreign_name_is_an_error_by_what_the_file_is(tmp_path, name, content, message, hint):
    """A text under another name, a compressed one, a parquet file without its suffix."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        LocalFiles([tmp_path / name])
    assert re.search(hint, caught.value.hint)


def test_many_left_out_files_are_abbreviated():
    """Three names of each reason, and the number."""
    left_out = {"hidden": [Path(f"f/.{i}") for i in range(5)], "of other kinds": [Path("x.docx")]}
    assert describe_left_out(left_out) == "5 hidden (.0, .1, .2, ...), 1 of other kinds (x.docx)"
