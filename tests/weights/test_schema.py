"""The schema of checkpoints: every wrong key, type, shape and size is an error in two lines."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from gpt_model import GPT, GPTConfig
from tests.conftest import ROOT
from tests.small_runs import RESUMABLE
from utils.command_line import UserError
from utils.tokenizer_json import train_bpe
from utils.weights import schema
from utils.weights.checkpoint import load_pair

FIXTURE = ROOT / "tests" / "fixtures" / "checkpoint_v1"
MODEL, STATE = "model_00009.pt", "optimizer_00009.pt"
CONTENTS = {name: torch.load(FIXTURE / name, weights_only=True) for name in (MODEL, STATE)}
DELETED = object()
# What a later version, or a person, may change without harm: these may be accepted, but never crash.
HARMLESS = ("versions.", "train_args.", "environment.", "param_groups.", "val_loss", "done", "data", "log.")
PARAMETERS = ("0", "27")  # the optimizer's state of these is mutated, of all 28


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every value in nested dicts, and to the first entry of every list."""
    entries = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
    for key, inner in entries:
        if place[-1:] == ("state",) and str(key) not in PARAMETERS:
            continue
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*place, key))


def wrong_values(value: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, value) for a place that should hold `value`."""
    yield "deleted", DELETED
    for name, other in {"None": None, "text": "x", "list": [[1]], "dict": {"a": 1}, "huge": 10**5000}.items():
        if type(other) is not type(value) or name == "huge":
            yield name, other
    if isinstance(value, torch.Tensor):
        yield "shape", torch.ones(3, 3)
        yield "dtype", value.to(torch.float64 if value.dtype == torch.uint8 else torch.int32)
        yield "sparse", torch.ones(value.shape or (1,)).to_sparse()
        yield "meta", torch.empty(value.shape, device="meta")
        yield "complex", value.to(torch.complex64)
    if isinstance(value, int):
        yield "negative", -1
    if isinstance(value, (int, float)):
        yield "NaN", float("nan")


def changed(content: dict, place: tuple, value: Any) -> dict:
    """A copy of a file's content with one value exchanged or deleted."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def value_at(content: Any, place: tuple) -> Any:
    """The value to which these keys lead."""
    for key in place:
        content = content[key]
    return content


def mutations(name: str, quick: tuple[str, ...]) -> list[Any]:
    """Test cases (place, what is wrong) of a file of the fixture; those that are not `quick` are slow."""
    return [
        pytest.param(
            *(place, wrong),
            id=f"{'.'.join(map(str, place))}-{wrong}",
            marks=[] if wrong in quick else pytest.mark.slow,
        )
        for place in places(CONTENTS[name])
        for wrong, _ in wrong_values(value_at(CONTENTS[name], place))
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A copy of the fixture's log directory, whose files the tests overwrite."""
    folder = tmp_path_factory.mktemp("pair") / "log"
    shutil.copytree(FIXTURE, folder)
    return folder


def resume(folder: Path, text: Path) -> int:
    """`--resume FILE` of a run that is already complete: everything is read and restored; the exit code."""
    flags = ("--max-steps", "9", "--val-every", "0", "--sample-every", "0", "--log-dir", str(folder))
    return train_gpt.main([*RESUMABLE, *flags, "--data", str(text), "--resume", str(folder / MODEL)])


def assert_refused(pair: Path, name: str, content: dict, place: tuple, text: Path | None) -> None:
    """The entry points raise UserError that names the file; for harmless places they may succeed."""
    dotted = ".".join(map(str, place))
    shutil.copy(FIXTURE / MODEL, pair / MODEL)
    shutil.copy(FIXTURE / STATE, pair / STATE)
    torch.save(content, pair / name)
    try:
        GPT.load(pair / MODEL) if text is None else resume(pair, text)
    except UserError as error:
        assert pair.name in str(error) and error.hint and len(str(error)) < 600 and "\n" not in str(error)
    else:
        assert any(harmless in dotted for harmless in HARMLESS), f"{dotted} was accepted"


@pytest.mark.parametrize(
    ("place", "wrong"),
    mutations(MODEL, ("deleted", "None", "text", "list", "dict", "huge", "shape", "dtype")),
)
def test_every_wrong_value_in_a_model_file_is_refused(place, wrong, pair):
    """By GPT.load, as by generate.py -m and --init-from."""
    wrong_value = dict(wrong_values(value_at(CONTENTS[MODEL], place)))[wrong]
    content = changed(CONTENTS[MODEL], place, wrong_value)
    assert_refused(pair, MODEL, content, place, None)


@pytest.mark.parametrize(("place", "wrong"), mutations(STATE, ("deleted", "text", "shape")))
@pytest.mark.slow
def test_every_wrong_value_in_an_optimizer_file_is_refused(place, wrong, pair, short_text):
    """By --resume. A moment of another shape would be written beyond its end, which ends the process."""
    wrong_value = dict(wrong_values(value_at(CONTENTS[STATE], place)))[wrong]
    content = changed(CONTENTS[STATE], place, wrong_value)
    assert_refused(pair, STATE, content, place, short_text)


def test_the_undamaged_fixture_passes(pair, short_text, capsys):
    """The control: what the tests above change is what they are refused for."""
    for name in (MODEL, STATE):
        shutil.copy(FIXTURE / name, pair / name)
    assert resume(pair, short_text) == 0 and "already complete: step 9" in capsys.readouterr().out
    assert GPT.load(pair / MODEL).config.n_embd == 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda state: {**state, "json": state["json"][:-9]},
            "key tokenizer.json is .*the text of a",
        ),
        (lambda state: {**state, "json": "[" * 100_000}, "key tokenizer.json is .*100,000 characters"),
        (lambda state: {**state, "json": '{"model":' * 5000 + "1" + "}" * 5000}, "key tokenizer.json is "),
        (lambda state: {**state, "json": state["json"].replace('"e":', '"zz":')}, "key tokenizer.json is "),
        (lambda state: {**state, "json": {"model": 1}}, "key tokenizer.json is a dict of 1"),
        (lambda state: {"name": "bpe", "json": state["json"]}, "key tokenizer.end_of_text is missing"),
        (
            lambda state: {**state, "end_of_text": 0},
            "tokenizer.end_of_text is 0 .expected a text or None",
        ),
        (lambda state: {**state, "more": 0}, "key tokenizer has the unknown 'more'"),
        (lambda state: {**state, "name": "gpt2"}, "key tokenizer has the unknown 'json'"),
        (lambda state: {**state, "name": "best"}, "key tokenizer.name is 'best'"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(damage, message, tmp_path):
    """In a checkpoint: cut, nested beyond measure, without a token that its merges need, of another kind."""
    pytest.importorskip("tokenizers")
    state = train_bpe(["a tokenizer of one's own " * 9], 270)
    for tokenizer, fails in ((state, False), (damage(state), True)):
        torch.save({**CONTENTS[MODEL], "tokenizer": tokenizer}, tmp_path / MODEL)
        if not fails:
            assert GPT.load(tmp_path / MODEL).tokenizer_state == state
            continue
        with pytest.raises(UserError, match=f"{MODEL}: .*{message}") as caught:
            GPT.load(tmp_path / MODEL)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("config", "foo"), 1, "key config has the unknown 'foo'"),
        (
            ("config", "vocab_size"),
            10**12,
            "config.vocab_size is 1000000000000 .expected a whole number from 1 to",
        ),
        (("config", "n_layer"), 10**6, "config.n_layer is 1000000 .expected a whole number from 1 to 2,048"),
        (("config", "n_embd"), 2**18, r"n_layer=2.*|needs? .* GB, this machine has|weights need"),
        (
            ("config", "n_layer"),
            3,
            r"weights do not match the config: transformer.h.2.ln_1.weight is missing",
        ),
        (("config", "n_head"), 3, "n_embd=16 is not a multiple of n_head=3"),
        (("tokenizer", "characters"), "aa", "tokenizer.characters is 'aa' .expected a text of different"),
        (("tokenizer", "characters"), "", "tokenizer.characters is ''"),
        (
            ("tokenizer", "characters"),
            "".join(map(chr, range(100, 200))),
            "100 characters .expected at most .*31",
        ),
        (("tokenizer", "x"), torch.ones(2), "key tokenizer has the unknown 'x'"),
        (("model", 5), torch.ones(1), "key model is a dict of 30 .expected float tensors by name"),
        (("model", "extra.weight"), torch.ones(1), "'extra.weight' is not in the model"),
    ],
)
def test_the_message_has_the_key_and_the_numbers(place, value, message, tmp_path):
    """For sizes at once, before a tensor of that size is allocated."""
    torch.save(changed(CONTENTS[MODEL], place, value), tmp_path / MODEL)
    with pytest.raises(UserError, match=message):
        GPT.load(tmp_path / MODEL)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (
            torch.ones(2),
            r"exp_avg is a tensor \(2,\) of torch.float32 \(expected a float tensor \(31, 16\)\)",
        ),
        (torch.ones(1, 1).expand(31, 16), r"exp_avg is a tensor \(31, 16\)"),  # one number in memory
        (torch.ones(16, 31).t(), r"exp_avg is a tensor \(31, 16\)"),
    ],
)
def test_a_moment_must_have_the_shape_and_the_memory_of_its_parameter(moment, message, pair, short_text):
    """The fused update writes all its elements one after another."""
    place = ("optimizer", "state", 0, "exp_avg")
    shutil.copy(FIXTURE / MODEL, pair / MODEL)
    torch.save(changed(CONTENTS[STATE], place, moment), pair / STATE)
    with pytest.raises(UserError, match=rf"optimizer_00009.pt: key optimizer.state\[0\].{message}"):
        resume(pair, short_text)


@pytest.mark.parametrize("wrong", [1, True, torch.ones(2)], ids=["other", "True", "tensor"])
def test_an_optimizer_of_other_parameters_is_refused(wrong, pair, short_text):
    """Their numbers are in order; `True` and what cannot be compared are none."""
    shutil.copy(FIXTURE / MODEL, pair / MODEL)
    torch.save(changed(CONTENTS[STATE], ("optimizer", "param_groups", 0, "params", 0), wrong), pair / STATE)
    with pytest.raises(UserError, match=r"key optimizer.param_groups.* .expected (0 to 27|a whole number)"):
        resume(pair, short_text)


def test_an_optimizer_without_state_is_right_only_before_the_first_update(pair, short_text):
    """Where every update was skipped, as at the start in fp16, there is none; else the moments were lost."""
    empty = changed(CONTENTS[STATE], ("optimizer", "state"), {})
    shutil.copy(FIXTURE / MODEL, pair / MODEL)
    torch.save(empty, pair / STATE)
    with pytest.raises(UserError, match=r"key optimizer.state has 0 entries \(expected 28"):
        resume(pair, short_text)
    torch.save(changed(empty, ("spikes", "num_skipped"), 9), pair / STATE)
    assert resume(pair, short_text) == 0


@pytest.mark.parametrize(("key", "value"), [("step", 8), ("tokenizer", {"name": "gpt2"}), ("save_id", "0")])
def test_two_files_that_contradict_each_other_are_refused(key, value, pair):
    """In the step, the tokenizer, or the id that both got when they were saved."""
    shutil.copy(FIXTURE / MODEL, pair / MODEL)
    torch.save({**CONTENTS[STATE], key: value}, pair / STATE)
    with pytest.raises(UserError, match=f"were not saved together: they differ in {key}"):
        load_pair(pair / MODEL)


def test_keys_of_a_later_version_are_left_out(pair, short_text):
    """At the top level, so an older version can still read a file; they cannot replace what is checked."""
    for name, added in ((MODEL, {"extra": [1]}), (STATE, {"model": {}, "val_loss": "x", "config": None})):
        torch.save({**CONTENTS[name], **added}, pair / name)
    assert resume(pair, short_text) == 0
    loaded = load_pair(pair / MODEL)
    assert "extra" not in loaded.model and "config" not in loaded.state


def test_flipped_bytes_never_change_what_is_loaded(tmp_path):
    """300 files with up to three wrong bytes: an error, or the same weights, where a byte has no meaning."""
    data, draw, refused = (FIXTURE / MODEL).read_bytes(), random.Random(0), 0
    expected = CONTENTS[MODEL]["model"]
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(data))] ^= draw.randint(1, 255)
        (tmp_path / MODEL).write_bytes(damaged)
        try:
            loaded = GPT.load(tmp_path / MODEL).state_dict()
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert refused > 100


def test_the_fields_of_the_config_are_in_the_schema():
    """A field that is added to GPTConfig and not here could be saved, but not be loaded again."""
    assert [field.name for field in dataclasses.fields(GPTConfig)] == list(schema.CONFIG)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_layer=True), "n_layer=True is not a whole number from 1 to 2,048"),
        (dict(n_embd=10**7), "n_embd=10000000 is not a whole number from 1 to 262,144"),
        (dict(block_size=10**5000), "block_size=a whole number of 16610 bits is not"),
        (
            dict(n_layer=2048, n_embd=2**18, n_head=1),
            "about 1,.* parameters are more than 10,000,000,000,000",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_the_numbers(sizes, message):
    """By GPTConfig itself, before a layer exists."""
    with pytest.raises(UserError, match=message):
        GPTConfig(**sizes)
