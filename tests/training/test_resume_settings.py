"""Resuming compares all settings: refused, silent, or a warning and the new value."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from tests.small_runs import RESUMABLE, assert_same_losses, train
from utils.command_line import UserError, run_script
from utils.training.resume import BY_CONTENT, HARMLESS, REFUSED, Identity, check_same_run, how_to_continue
from utils.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")

SETTINGS: dict[str, Any] = vars(train_gpt.flag.parser.parse_args([]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-layer", "1", "--n-embd", "32"], "has n_layer=2, this run has n_layer=1; has n_embd=16"),
        (["--seq-len", "8"], "seq_len=16, this run has seq_len=8"),
        (["--seed", "1"], "seed=1337, this run has seed=1"),
        (["--shuffle", "off"], "shuffle=on, this run has shuffle=off"),
        (["--tokenizer", "gpt2", "--n-embd", "16"], "another tokenizer"),
        (["--seed", "1", "--shuffle", "off"], "seed=1; was made with shuffle=on"),
    ],
)
def test_another_model_order_or_tokenizer_is_refused(flags, message, stopped_run, short_text, capsys):
    """Exit code 2 with all differences in one message, and no file is touched."""
    before = {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")}
    code = run_script(lambda: train(short_text, stopped_run, "--resume", *flags))
    error = capsys.readouterr().err
    assert code == 2 and message in error and "for a new run, leave out --resume" in error
    assert {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")} == before


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (["--n-layer", "1", "--n-embd", "32"], "add --n-layer 2 --n-embd 16"),
        (["--seq-len", "8", "--seed", "1"], "add --seq-len 16 --seed 1337"),
        (["--tokenizer", "gpt2"], "add --tokenizer char"),
        (["--preset", "char", "--optimizer", "muon"], "add --optimizer adamw"),
        (["--data", "OTHER"], "add --data SHORT"),
    ],
)
def test_the_hint_continues_the_run_when_it_is_followed(flags, step, stopped_run, short_text, tmp_path):
    """With the flags that it names added to the command; nothing else is needed."""
    (tmp_path / "other.txt").write_text(short_text.read_text().upper())
    names = {"OTHER": str(tmp_path / "other.txt"), "SHORT": str(short_text)}
    flags = ["--resume", *(names.get(flag, flag) for flag in flags)]
    with pytest.raises(UserError) as caught:
        train(short_text, stopped_run, *flags)
    hint = caught.value.hint
    assert hint.startswith(f"to continue it, {step.replace('SHORT', names['SHORT'])}; for a new run, ")
    added = shlex.split(hint.split("to continue it, add ")[1].split(";")[0])
    assert train(short_text, stopped_run, *flags, *added) == 0
    assert (stopped_run / "model_00020.pt").exists()


def test_changed_data_of_the_same_name_must_be_restored():
    """No flag brings it back, and the hint says so; other data is named, or its flag left out."""
    text, data = "text.txt", [{"sha256": "1"}, {"sha256": "1"}]
    saved = Checkpoint(
        Path("model_00001.pt"),
        {"config": {"n_layer": 2}},
        {"train_args": {"data": text}, "tokenizer": {"name": "gpt2"}, "data": data, "environment": {}},
    )
    now = Identity({"n_layer": 2}, {"data": text}, {"name": "gpt2"}, [], {})
    assert how_to_continue(now, saved, {}) == ["restore its data and tokenizer as they were"]
    assert how_to_continue(now._replace(settings={"data": "x"}), saved, {}) == [f"add --data {text}"]
    saved.state["train_args"]["data"] = None
    assert how_to_continue(now, saved, {}) == ["leave out --data"]
    other = Identity({"n_layer": 2}, {"data": text}, {"name": "bpe"}, data, {})  # a changed tokenizer.json
    assert how_to_continue(other, saved, {}) == ["restore its data and tokenizer as they were"]


def test_the_hint_for_a_new_run_moves_the_old_one_when_it_is_followed(stopped_run, short_text):
    """The same command without --resume; the checkpoints are in the archive."""
    flags = ["--n-layer", "1", "--max-steps", "2", "--warmup-steps", "0"]
    with pytest.raises(UserError, match="has n_layer=2, this run has n_layer=1") as caught:
        train(short_text, stopped_run, "--resume", *flags)
    assert "leave out --resume, which moves its files to archive/" in caught.value.hint
    assert train(short_text, stopped_run, *flags) == 0
    assert len(list(stopped_run.glob("archive/*/model_00009.pt"))) == 1


def test_a_folder_is_resumed_from_its_newest_checkpoint(stopped_run, short_text, tmp_path, capsys):
    """The log directory itself as without a name; an empty folder is refused."""
    assert train(short_text, stopped_run, "--resume", str(stopped_run)) == 0
    assert f"resumed {stopped_run}/model_00009.pt at step 9" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no model_.* to resume from"):
        train(short_text, stopped_run, "--resume", str(tmp_path / "empty"))


def test_other_data_is_refused(stopped_run, short_text, tmp_path):
    """Even another text of the same length, because the content is compared."""
    other = tmp_path / "other.txt"
    other.write_text(short_text.read_text().replace("dog", "cow", 1).replace("cow", "god", 1))
    with pytest.raises(
        UserError, match=r"made on other data.*before: sha256 \w+.*; now: sha256 \w+"
    ) as error:
        train(other, stopped_run, "--resume")
    assert error.value.exit_code == 2


def test_changed_settings_are_listed_and_used(stopped_run, short_text, capsys):
    """The run continues with the new values, at the window after the last one trained."""
    flags = ("--max-lr", "5e-3", "--total-batch-tokens", "128", "--sample-prompt", "The fox")
    assert train(short_text, stopped_run, "--resume", *flags) == 0
    warnings = capsys.readouterr().err
    (line,) = [line for line in warnings.splitlines() if line.startswith("warning: settings have changed: ")]
    for change in ("total_batch_tokens 64 -> 128", "max_lr 0.01 -> 0.005", "language model, -> The fox"):
        assert change in line
    state = torch.load(stopped_run / "optimizer_00020.pt", weights_only=True)
    assert state["windows"] == 9 * 4 + 11 * 8
    assert state["optimizer"]["param_groups"][0]["lr"] <= 5e-3


def test_harmless_settings_change_silently(stopped_run, short_text, capsys):
    """Other intervals and another number of checkpoints are used without a warning."""
    flags = ("--val-every", "10", "--sample-every", "0", "--checkpoint-every", "0", "--keep-checkpoints", "9")
    assert train(short_text, stopped_run, "--resume", *flags) == 0
    assert "settings have changed" not in capsys.readouterr().err
    lines = [line.split()[:2] for line in (stopped_run / "log.txt").read_text().splitlines()]
    assert [int(step) for step, kind in lines if kind == "val"] == [0, 4, 8, 10, 20]


def test_another_micro_batch_changes_rounding_only(stopped_run, short_text, undisturbed, capsys):
    """The same windows in each step, so the losses agree to 1e-4."""
    assert train(short_text, stopped_run, "--resume", "--micro-batch", "4") == 0
    assert "warning: settings have changed: micro_batch 2 -> 4; " in capsys.readouterr().err
    assert_same_losses(stopped_run, undisturbed)


# ------------------------------------------------------------------------------------------------------------
# Every setting


def compared(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The warnings of a resumed run that differs from its checkpoint in nothing but these settings."""
    checkpoint = Checkpoint(
        Path("model_00001.pt"),
        {"config": {"n_layer": 2}},
        {"train_args": saved, "tokenizer": {"name": "gpt2"}, "data": [], "environment": {}},
    )
    return check_same_run(Identity({"n_layer": 2}, current, {"name": "gpt2"}, [], {}), checkpoint)


@pytest.mark.parametrize("name", [*SETTINGS, "a_new_hyperparameter"])
def test_every_setting_is_refused_harmless_compared_by_content_or_warns(name):
    """No setting is overlooked: one that is in no list, also a new one, is reported as old -> new."""
    settings = {**SETTINGS, "a_new_hyperparameter": 0.5}
    changed = {**settings, name: "other"}
    assert compared(settings, settings) == []
    if name in REFUSED:
        message = f"was made with {name}={settings[name]}, this run has {name}=other"
        with pytest.raises(UserError, match=message):
            compared(settings, changed)
    elif name in HARMLESS or name in BY_CONTENT:
        assert compared(settings, changed) == []
    else:
        (line,) = compared(settings, changed)
        assert f"settings have changed: {name} {settings[name]} -> other; " in line


def test_the_lists_name_flags_once():
    """No typing error, no removed flag, and no setting in two lists."""
    names = (*REFUSED, *BY_CONTENT, *HARMLESS)
    assert set(names) <= SETTINGS.keys() and len(set(names)) == len(names)


def test_what_changes_the_course_of_training_is_never_silent():
    """The recipe, the numerics and the amount of validation data warn; the order of the data is refused."""
    assert set(REFUSED) == {"seq_len", "seed", "shuffle", "optimizer", "recipe"}
    recipe = ("max_steps", "warmup_steps", "max_lr", "min_lr", "muon_lr", "schedule", "decay_fraction")
    others = (
        "weight_decay",
        "grad_clip",
        "skip_spikes",
        "micro_batch",
        "total_batch_tokens",
        "dtype",
        "deterministic",
        "val_tokens",
    )
    assert not {*recipe, *others} & {*REFUSED, *BY_CONTENT, *HARMLESS}
    assert {*recipe, *others} <= SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_an_old_checkpoint_lacks_is_silent(name):
    """A checkpoint of a version without this setting resumes without a warning about it."""
    saved = {key: value for key, value in SETTINGS.items() if key != name}
    assert compared(saved, SETTINGS) == []


def test_a_checkpoint_without_a_setting_resumes_silently(stopped_run, short_text, capsys):
    """The same in a whole run, with a setting that differs from its default."""
    path = stopped_run / "optimizer_00009.pt"
    content = torch.load(path, weights_only=True)
    del content["train_args"]["max_lr"]
    torch.save(content, path)
    assert "--max-lr" in RESUMABLE
    assert train(short_text, stopped_run, "--resume") == 0
    out, err = capsys.readouterr()
    assert "model_00009.pt at step 9" in out and "settings have changed" not in err


@pytest.mark.parametrize(("dropout", "what"), [(0.0, "rounding"), (0.1, "rounding and dropout masks")])
def test_dropout_masks_depend_on_the_environment_as_rounding_does(dropout, what):
    """Such as the number of ranks; the warning says which results will differ."""
    saved = {"train_args": {}, "tokenizer": {}, "data": [], "environment": {"world_size": 2}}
    checkpoint = Checkpoint(Path("model_00001.pt"), {"config": {}}, saved)
    (warning,) = check_same_run(Identity({}, {"dropout": dropout}, {}, [], {"world_size": 1}), checkpoint)
    assert warning == f"world size 2 -> 1: continuing, results equal to {what} only"


@pytest.mark.parametrize("before", [{"compiled": False, "threads": 2}, {"threads": 2}])
def test_compiling_a_run_that_was_not_is_reported_from_the_environment(before):
    """--compile is compared by what is in use; a checkpoint that does not say is silent about it."""
    saved = {"train_args": {}, "tokenizer": {"name": "gpt2"}, "data": [], "environment": before}
    checkpoint = Checkpoint(Path("model_00001.pt"), {"config": {}}, saved)
    identity = Identity({}, {}, {"name": "gpt2"}, [], {"compiled": True, "threads": 2})
    warnings = check_same_run(identity, checkpoint)
    assert warnings == (
        ["compiled False -> True: continuing, results equal to rounding only"] if "compiled" in before else []
    )
