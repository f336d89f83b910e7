"""A model is named by its size, its file or its folder; what is no model is named for what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import eval_hellaswag
import generate
import train_gpt
from gpt_model import GPT, PRETRAINED_CONFIGS
from tests.conftest import ROOT, tiny_model
from tests.small_runs import RESUMABLE
from utils.command_line import UserError
from utils.weights import export
from utils.weights.checkpoint import model_content, save_model, save_pair
from utils.weights.find_model import find_model, newest_run

CHARACTERS = {"name": "char", "characters": "\n abcdefghijklmnopqrstuvwxyz"}


def save(folder: Path, *steps: int, best: int | None = None) -> None:
    """Checkpoints of a run, and its model_best.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(vocab_size=len(CHARACTERS["characters"]))
    for step in steps:
        save_pair(folder, step, model_content(model, vars(model.config).copy(), step, 1.5, CHARACTERS), {})
    if best is not None:
        content = model_content(model, vars(model.config).copy(), best, 1.0, CHARACTERS)
        save_model(folder / "model_best.pt", content)


def refused(source: str | Path) -> UserError:
    """The error for a name."""
    with pytest.raises(UserError) as caught:
        find_model(source, PRETRAINED_CONFIGS)
    return caught.value


@pytest.mark.parametrize(
    ("steps", "best", "taken", "said"),
    [
        ((500, 1000), None, "model_01000.pt", ""),
        ((500, 1000), 1000, "model_01000.pt", ""),
        ((500, 1000), 750, "model_01000.pt", " (the lowest val loss was at step 750: {}/model_best.pt)"),
        ((99999, 100000), None, "model_100000.pt", ""),
        ((), 750, "model_best.pt", ""),
    ],
)
def test_a_folder_is_its_checkpoint_of_the_highest_step(steps, best, taken, said, tmp_path, capsys):
    """Which is named on stderr, with model_best.pt where that is of another step."""
    save(tmp_path, *steps, best=best)
    assert find_model(tmp_path, PRETRAINED_CONFIGS) == tmp_path / taken
    assert capsys.readouterr() == ("", f"model: {tmp_path / taken}{said.format(tmp_path)}\n")


def test_a_damaged_best_checkpoint_is_not_recommended(tmp_path, capsys):
    """Its step is unknown."""
    save(tmp_path, 500, best=250)
    (tmp_path / "model_best.pt").write_bytes((tmp_path / "model_best.pt").read_bytes()[:100])
    assert find_model(tmp_path, PRETRAINED_CONFIGS) == tmp_path / "model_00500.pt"
    assert capsys.readouterr().err == f"model: {tmp_path}/model_00500.pt\n"


def test_only_rank_0_names_the_checkpoint(tmp_path, monkeypatch, capsys):
    """The others take the same one."""
    save(tmp_path, 3)
    monkeypatch.setenv("RANK", "1")
    assert find_model(tmp_path, PRETRAINED_CONFIGS).name == "model_00003.pt"
    assert capsys.readouterr().err == ""


def test_sizes_files_and_folders_of_transformers_are_themselves(tmp_path, capsys):
    """Nothing is said about them; a folder with config.json is one of transformers."""
    assert find_model("gpt2-xl", PRETRAINED_CONFIGS) == "gpt2-xl"
    save(tmp_path, 3)
    for path in (tmp_path / "model_00003.pt", tmp_path):
        (tmp_path / "config.json").touch()
        assert find_model(str(path), PRETRAINED_CONFIGS) == path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpt2-larg", "gpt2-large"),
        ("GPT2xl", "gpt2-xl"),
        ("gpt2-small", "gpt2"),
        ("openai-community/gpt2", None),
    ],
)
def test_a_misspelled_size_is_answered_with_the_similar_one(name, meant):
    """Beside the list of all; a path is not taken for a size, but the hub's name for one is recognized."""
    error = refused(name)
    if meant:
        assert str(error).startswith(f"unknown model '{name}'; choose gpt2, gpt2-medium")
        assert error.hint.startswith(f"did you mean {meant}? ")
    else:
        assert str(error) == f"no checkpoint at {name}" and error.hint == "did you mean gpt2?"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model_1000.pt", "did you mean {}/model_01000.pt?"),
        ("model_1000", "did you mean {}/model_01000.pt?"),
        ("modle_01000.pt", "did you mean {}/model_01000.pt?"),
        ("model_bset.pt", "did you mean {}/model_best.pt?"),
        ("model_00999.pt", "the newest there is {}/model_01000.pt"),
        ("zzzz.pt", "the newest there is {}/model_01000.pt"),
    ],
)
def test_a_missing_checkpoint_is_answered_with_one_that_is_there(name, hint, tmp_path):
    """Of the same step, or of a similar name, else the newest; the file in the hint loads."""
    save(tmp_path, 500, 1000, best=750)
    error = refused(f"{tmp_path}/{name}")
    assert str(error) == f"no checkpoint at {tmp_path}/{name}" and error.hint == hint.format(tmp_path)
    assert GPT.load(error.hint.split()[-1].rstrip("?")).config.n_embd == 32


def test_a_missing_checkpoint_in_an_empty_folder_is_answered_with_the_command_that_writes_one(tmp_path):
    """A file of another kind is no suggestion; a folder with a similar name is one."""
    (tmp_path / "ckpt.py").touch()
    assert "train_gpt.py writes" in refused(tmp_path / "ckpt.pt").hint
    save(tmp_path / "runs" / "large", 3)
    assert refused(tmp_path / "runs" / "larg").hint == f"did you mean {tmp_path}/runs/large?"
    error = refused(tmp_path / "runs")
    assert "without config.json, so not a transformers folder, and without model_*.pt" in str(error)
    assert error.hint == f"it holds runs: give {tmp_path}/runs/large"


@pytest.mark.parametrize("has_model", [True, False])
def test_an_optimizer_file_is_named_with_the_model_beside_it(has_model, tmp_path):
    """By its name before it is read, and a renamed one by its content."""
    save(tmp_path, 7)
    if not has_model:
        (tmp_path / "model_00007.pt").unlink()
    expected = (
        f"give the model file beside it: {tmp_path}/model_00007.pt" if has_model else "give a model_*.pt"
    )
    error = refused(tmp_path / "optimizer_00007.pt")
    assert str(error).endswith("optimizer_00007.pt is an optimizer file, not a checkpoint's model file")
    assert error.hint == expected


def test_a_folder_is_a_model_for_every_script(tmp_path, short_text, capsys):
    """generate.py, eval_hellaswag.py, --init-from and the export, each saying which checkpoint."""
    log_dir, tiny = tmp_path / "a", ["--preset", "tiny", "--data", str(short_text)]
    assert train_gpt.main([*RESUMABLE, "--data", str(short_text), "--log-dir", str(log_dir)]) == 0
    flags = ["--eval-only", "--device", "cpu", "--init-from", str(log_dir)]
    calls = {
        "generate": lambda: generate.main(
            ["-m", str(log_dir), "-p", "a", "--max-new-tokens", "2", "-d", "cpu"]
        ),
        "train": lambda: train_gpt.main([*tiny, *flags]),
        "export": lambda: export.main([str(log_dir), str(tmp_path / "out")]),
        "hellaswag": lambda: eval_hellaswag.main(
            ["-m", str(log_dir), "-d", "cpu", "--hellaswag-dir", str(ROOT / "tests" / "fixtures")]
        ),
    }
    capsys.readouterr()
    for name, call in calls.items():
        try:
            assert call() == 0, name
        except UserError as error:  # characters are no GPT-2 tokens; transformers may be missing
            assert "character tokenizer" in str(error) or "not installed" in str(error), name
        error = capsys.readouterr().err
        assert f"model: {log_dir}/model_00020.pt" in error, name


def test_a_model_is_checked_before_data_is_looked_for(tmp_path):
    """By eval_hellaswag.py, whose data set is missing here."""
    for name, message in (("gpt2-larg", "unknown model"), (str(tmp_path / "none.pt"), "no checkpoint at")):
        with pytest.raises(UserError, match=message):
            eval_hellaswag.main(["-m", name, "--hellaswag-dir", str(tmp_path / "nowhere")])
    assert list(tmp_path.iterdir()) == []


def test_the_newest_run_is_that_of_the_newest_checkpoint(tmp_path):
    """In log/ and in runs/*/, by the time of the file of the highest step; other files count for nothing."""
    assert newest_run(tmp_path) is None
    for number, folder in enumerate(("runs/old", "log", "runs/new")):
        save(tmp_path / folder, 1, 2)
        os.utime(tmp_path / folder / "model_00002.pt", (1000 + number, 1000 + number))
    (tmp_path / "runs" / "a file").touch()
    assert newest_run(tmp_path) == tmp_path / "runs" / "new"
    os.utime(tmp_path / "log" / "model_00002.pt", (2000, 2000))
    assert newest_run(tmp_path) == tmp_path / "log"
    save(tmp_path / "runs" / "diverged", best=1)  # before its first checkpoint
    assert newest_run(tmp_path) == tmp_path / "runs" / "diverged"
