"""generate.py as it is typed: where prompts come from, what is printed, what is refused."""

from __future__ import annotations

import inspect
import io
import sys

import numpy as np
import pytest
import torch

import generate
from tests.benchmarks.step import hugging_face_twin
from tests.conftest import tiny_model
from utils.command_line import UserError, run_script
from utils.cpu_matmul import FastLinear
from utils.runtime import Decision
from utils.tokenizer import tokenizer_from_state
from utils.tokenizer_json import JsonTokenizer, state_of
from utils.weights.checkpoint import model_content, save_pair

CHARACTERS = {"name": "char", "characters": "\n abcdefghijklmnopqrstuvwxyz"}
END_OF_TEXT = 50256


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a character model with a block of 16."""
    model = tiny_model(vocab_size=len(CHARACTERS["characters"]))
    return save_pair(tmp_path, 7, model_content(model, vars(model.config).copy(), 7, 1.5, CHARACTERS), {})


def printed(capsys, *arguments) -> str:
    """What the script prints on success."""
    assert generate.main(["-d", "cpu", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_prompt_is_read_from_flag_file_or_standard_input(checkpoint, tmp_path, monkeypatch, capsys):
    """The same text for a prompt on the command line, in a file, on standard input, with and without -p.

    A closed standard input is an empty one.
    """
    flags = ("-m", checkpoint, "--max-new-tokens", 9)
    expected = printed(capsys, *flags, "-p", "to be")
    assert expected.startswith("to be") and len(expected) == len("to be") + 9 + 1
    (tmp_path / "prompt.txt").write_text("to be")
    assert printed(capsys, *flags, "-p", f"FILE:{tmp_path / 'prompt.txt'}") == expected
    nothing = printed(capsys, *flags, "-p", "")
    for prompt in (["-p", "-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("to be"))
        assert printed(capsys, *flags, *prompt) == expected
        monkeypatch.setattr(sys, "stdin", None)  # closed
        assert printed(capsys, *flags, *prompt) == nothing


def test_odd_prompts_are_answered(checkpoint, tmp_path, monkeypatch, capsys):
    """Only line breaks, a NUL character, a byte order mark; FILE:~ is in the home folder."""
    flags = ("-m", checkpoint, "--max-new-tokens", 4)
    assert printed(capsys, *flags, "-p", "\n\n").startswith("\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("to\0be"))
    assert printed(capsys, *flags).startswith("to\0be")
    expected = printed(capsys, *flags, "-p", "to be")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffto be"))
    assert printed(capsys, *flags) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfto be")
    assert printed(capsys, *flags, "-p", "FILE:~/prompt.txt") == expected


def test_a_prompt_that_is_not_utf8_is_refused(checkpoint, tmp_path, monkeypatch):
    """As an argument, on standard input with both of Python's error handlers, and in a file."""
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 au lait")
    flags = ["-m", str(checkpoint), "-d", "cpu"]
    for prompt in (
        b"caf\xe9".decode("utf-8", "surrogateescape"),
        f"FILE:{tmp_path / 'prompt.txt'}",
        "FILE:a\0b",
    ):
        with pytest.raises(UserError, match="is not UTF-8|null byte"):
            generate.main([*flags, "-p", prompt])
    for errors in ("strict", "surrogateescape"):
        stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UserError, match="standard input: the prompt is not UTF-8"):
            generate.main([*flags, "-p", "-"])


@pytest.mark.parametrize("temperature", ["1e-320", "1e-45", "1e-38", "1e-20"])
@pytest.mark.parametrize("more", [(), ("--top-k", "27"), ("--top-p", "0.5")])
def test_a_temperature_near_zero_is_greedy(checkpoint, capsys, temperature, more):
    """Its limit, also where the number is zero in float32."""
    flags = ("-m", checkpoint, "-p", "to be", "--max-new-tokens", 9, *more)
    assert printed(capsys, *flags, "--temperature", temperature) == printed(
        capsys, *flags, "--temperature", 0
    )


def test_several_samples_are_numbered_and_seeded(checkpoint, capsys):
    """-n texts under headings; another seed gives other texts; greedy ones are identical."""
    flags = ("-m", checkpoint, "-p", "a", "-n", 3, "--max-new-tokens", 12)
    first = printed(capsys, *flags, "--seed", 1)
    assert [line for line in first.splitlines() if line.startswith("---")] == [
        f"--- sample {i} of 3" for i in (1, 2, 3)
    ]
    assert printed(capsys, *flags, "--seed", 1) == first != printed(capsys, *flags, "--seed", 2)
    greedy = printed(capsys, *flags, "--temperature", 0).split("--- sample ")[1:]
    assert len({text.split("\n", 1)[1] for text in greedy}) == 1


def test_long_and_empty_prompts(capsys):
    """Of a long one the last block is used, with a warning; an empty one is <|endoftext|>, or id 0."""
    tokenizer = tokenizer_from_state(CHARACTERS)
    idx = generate.encode_prompt("x" * 10 + "abc", tokenizer, 3)
    assert idx.tolist() == [tokenizer.encode("abc").tolist()]
    message = "warning: the prompt has 13 tokens: only the last 3, the block size, are used\n"
    assert capsys.readouterr() == ("", message)
    assert generate.encode_prompt("", tokenizer, 3).tolist() == [[0]]
    assert generate.encode_prompt("", tokenizer_from_state({"name": "gpt2"}), 3).tolist() == [[END_OF_TEXT]]


def test_a_cpu_samples_with_the_fast_linear_layers(checkpoint, monkeypatch):
    """The loaded model's layers are exchanged before the first token."""
    models = []
    monkeypatch.setattr(generate, "sample_texts", lambda model, *a, **k: models.append(model) or [])
    assert generate.main(["-m", str(checkpoint), "-p", "a", "-d", "cpu"]) == 0
    assert type(models[0].lm_head) is FastLinear


def test_the_weights_are_converted_to_the_requested_dtype(checkpoint, monkeypatch):
    """Once, after loading; the automatic choice is the runtime's."""
    models = []
    monkeypatch.setattr(generate, "sample_texts", lambda model, *a, **k: models.append(model) or [])
    flags = ["-m", str(checkpoint), "-p", "a", "-d", "cpu"]
    for dtype in ("bfloat16", "float32"):
        assert generate.main([*flags, "--dtype", dtype]) == 0
        assert {parameter.dtype for parameter in models[-1].parameters()} == {getattr(torch, dtype)}
        assert models[-1].lm_head.weight is models[-1].transformer.wte.weight
    monkeypatch.setattr(generate, "choose_dtype", lambda asked, device: Decision(torch.bfloat16, asked))
    assert generate.main(flags) == 0 and models[-1].lm_head.weight.dtype == torch.bfloat16


def test_bf16_prints_texts_and_nothing_else(checkpoint, capsys):
    """Standard output is for texts."""
    text = printed(capsys, "-m", checkpoint, "-p", "to be", "--max-new-tokens", 9, "--dtype", "bfloat16")
    assert text.startswith("to be") and len(text) == len("to be") + 9 + 1


def test_a_text_ends_before_the_end_of_text_token(monkeypatch):
    """The tokens after <|endoftext|> belong to another document; one in the prompt ends nothing."""
    tokenizer, model = tokenizer_from_state({"name": "gpt2"}), tiny_model(vocab_size=50304)
    new = torch.tensor([[64, 65, END_OF_TEXT, 66], [64, 65, 66, 67]])
    monkeypatch.setattr(model, "generate", lambda idx, *a, **k: torch.cat([idx, new], dim=1))
    texts = generate.sample_texts(model, tokenizer, "<|endoftext|>x", 2, 4, 42)
    assert texts == ["<|endoftext|>xab", "<|endoftext|>xabcd"]


def test_prompts_at_a_terminal_stream_their_continuations(checkpoint, monkeypatch):
    """Token by token, the same as for -p; an empty line quits."""
    model = generate.GPT.load(checkpoint)
    texts = generate.sample_texts(
        model, tokenizer_from_state(CHARACTERS), "to be", 1, 9, 42, temperature=0.8, top_k=50
    )
    prompts, pieces = iter(["to be", "ab", ""]), []
    monkeypatch.setattr("builtins.input", lambda text: next(prompts))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append(a[0] if a else "\n"))
    flags = ["-m", str(checkpoint), "--max-new-tokens", "9", "-d", "cpu", "--dtype", "float32"]
    assert generate.main(flags) == 0
    assert "".join(pieces[:9]) == texts[0][len("to be") :] and pieces[9] == ""
    assert len(pieces) == 2 * (9 + 1) and list(prompts) == []


def test_an_incomplete_character_is_held_back(monkeypatch):
    """A token that ends within a character prints nothing until the next one, or the end, completes it."""
    tokenizer, model = tokenizer_from_state({"name": "gpt2"}), tiny_model(vocab_size=50304)
    ids = tokenizer.encode("a\U0001f600b").tolist()
    assert len(ids) > 3
    continuations = iter([[*ids, END_OF_TEXT, 5], ids[:2]])
    monkeypatch.setattr(model, "stream", lambda *a, **k: (torch.tensor([[i]]) for i in next(continuations)))
    prompts, pieces = iter(["x", "y", ""]), []
    monkeypatch.setattr("builtins.input", lambda text: next(prompts))
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append(a[0]))
    generate.interact(model, tokenizer, max_new_tokens=9, seed=42)
    assert pieces == ["a", "\U0001f600", "b", "", "a", "\ufffd"]


@pytest.mark.parametrize(
    ("kind", "words", "prompt"),
    [
        ("Metaspace", ["\u2581What", "\u2581is", "\u2581ber", "lin"], "What is"),
        ("WordPiece", ["What", "is", "ber", "##lin"], "What is"),
        ("Metaspace", ["\u2581What", "\u2581is", "\u2581ber", "lin"], ""),
    ],
)
def test_the_space_after_the_prompt_is_kept(kind, words, prompt, monkeypatch):
    """Of decoders that omit the one before the first token of a text; streamed as in the whole text."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(4))), words[-1]))
    library.decoder = getattr(tokenizers.decoders, kind)()
    splitters = tokenizers.pre_tokenizers
    library.pre_tokenizer = splitters.Metaspace() if kind == "Metaspace" else splitters.Whitespace()
    tokenizer, model = JsonTokenizer(state_of(library.to_str(), None)), tiny_model()
    new = torch.tensor([[2, 3, 2]])
    monkeypatch.setattr(model, "generate", lambda idx, *a, **k: torch.cat([idx, new], dim=1))
    text = generate.sample_texts(model, tokenizer, prompt, 1, 3, 42)[0]
    assert text == f"{prompt} berlin ber".strip()
    monkeypatch.setattr(model, "stream", lambda *a, **k: iter(new[0]))
    prompts, pieces = iter([prompt, ""]), []
    monkeypatch.setattr("builtins.input", lambda question: next(prompts))
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append(a[0]))
    generate.interact(model, tokenizer, max_new_tokens=3, seed=42)
    assert "".join(pieces) == (text[len(prompt) :] if prompt else "")


# ------------------------------------------------------------------------------------------------------------
# From Python

FOUR_LINES = """
from generate import complete
from gpt_model import GPT
model = GPT.load("log/model_01000.pt")
print(complete(model, "to be", max_new_tokens=9, temperature=0.8))
"""


def test_four_lines_complete_a_prompt(checkpoint, capsys):
    """The prompt with its continuation as one text, which is that of the command line with its defaults."""
    exec(FOUR_LINES.replace("log/model_01000.pt", str(checkpoint)), {})
    text = capsys.readouterr().out
    assert text.startswith("to be") and len(text) == len("to be") + 9 + 1
    assert text == printed(
        capsys, "-m", checkpoint, "-p", "to be", "--max-new-tokens", 9, "--dtype", "float32"
    )


def test_the_arguments_of_complete_are_used(checkpoint):
    """Each changes the text, and the defaults are those of the command line."""
    model = generate.GPT.load(checkpoint)
    changes = dict(max_new_tokens=90, temperature=3.0, top_k=2, top_p=0.2, seed=1)
    texts = [generate.complete(model, "ab", **{name: value}) for name, value in changes.items()]
    default = generate.complete(model, "ab")
    assert len({default, *texts}) == 1 + len(changes) and len(default) == len("ab") + 100
    args = vars(generate.parse_arguments([]))
    parameters = inspect.signature(generate.complete).parameters
    for name in changes:
        assert parameters[name].default == args[name], name


def test_complete_needs_the_models_tokenizer():
    """A tokenizer with more ids than the model has is refused, as on the command line."""
    with pytest.raises(UserError, match="tokenizer has 50257 tokens, the model only 97"):
        generate.complete(tiny_model(), "a")


IMPOSSIBLE = [
    *(dict(max_new_tokens=value) for value in (0, -5, 2.5, 10**26)),
    *(dict(temperature=value) for value in (-0.1, float("nan"), float("inf"))),
    *(dict(top_k=value) for value in (0, -1)),
    *(dict(top_p=value) for value in (0.0, -0.5, 1.01, float("nan"))),
]


@pytest.mark.parametrize("arguments", IMPOSSIBLE, ids=str)
def test_impossible_arguments_of_sampling_are_refused(arguments):
    """Alike by everything that samples, with name and value, instead of an empty or a random text."""
    model, tokenizer = tiny_model(vocab_size=len(CHARACTERS["characters"])), tokenizer_from_state(CHARACTERS)
    model.tokenizer_state = CHARACTERS
    (name, value), given = *arguments.items(), dict(max_new_tokens=3) | arguments
    message = f"sampling: {name}={value} is not"
    for sample in (
        lambda: generate.complete(model, "a", **given),
        lambda: generate.sample_texts(model, tokenizer, "a", num_samples=1, seed=1, **given),
        lambda: model.generate(torch.zeros(1, 1, dtype=torch.long), **given),
        lambda: next(model.stream(torch.zeros(1, 1, dtype=torch.long), **given)),
        lambda: generate.parse_arguments([f"--{name.replace('_', '-')}={value}"]),
    ):
        with pytest.raises(UserError, match=message if value != 2.5 else "2.5"):  # argparse reads an int
            sample()


@pytest.mark.parametrize("count", [0, -2])
def test_an_impossible_number_of_samples_is_refused(count):
    """Together with everything else that is wrong, in one message."""
    tokenizer = tokenizer_from_state(CHARACTERS)
    with pytest.raises(UserError) as caught:
        generate.sample_texts(tiny_model(), tokenizer, "a", count, 5, 1, temperature=-1.0, top_k=0)
    for problem in (f"num_samples={count} is not", "temperature=-1.0 is not", "top_k=0 is not"):
        assert problem in str(caught.value)


def test_the_bounds_themselves_are_possible():
    """One token, greedy, of the likeliest one, with a total probability of 1; counts may be numpy's."""
    model = tiny_model()
    idx = torch.zeros(1, 1, dtype=torch.long)
    greedy = model.generate(idx, np.int64(1), temperature=0)
    assert torch.equal(model.generate(idx, 1, top_k=np.int64(1), top_p=1), greedy)


@pytest.mark.parametrize(
    "function",
    [generate.complete, generate.sample_texts, generate.interact, generate.GPT.generate, generate.GPT.stream],
)
def test_the_arguments_of_sampling_have_names(function):
    """So that an editor completes them, and a misspelled one is an error where it is given."""
    parameters = inspect.signature(function).parameters
    assert {"max_new_tokens", "temperature", "top_k", "top_p"} <= parameters.keys()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "flags",
    ["--temperature -1", f"--seed {2**64}", f"--seed -{2**63 + 1}", "--temperature nan", "--top-k 0",
     "--top-p 0", "--top-p 1.5", "--top-p inf", "-n 0", f"-n {10**26}", f"-n {10**15}",
     "--max-new-tokens -5", "-p FILE:none.txt", "-d cpu --dtype float16"],
)  # fmt: skip
def test_invalid_settings_are_refused(flags, checkpoint, capsys):
    """Exit code 2 and two lines; the hint names this script's flags."""
    assert run_script(lambda: generate.main(["-m", str(checkpoint), "-p", "a", *flags.split()])) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ") and "--data" not in hint


def test_the_default_model_is_the_newest_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    """The newest one in log/ or runs/*/, which is named on stderr, or an error that says how to get one."""
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    run = checkpoint.parent / "runs" / "a"
    run.mkdir()
    moved = checkpoint.rename(run / checkpoint.name)
    flags = ["-p", "ab", "--max-new-tokens", "4", "-d", "cpu"]
    assert generate.main(flags) == 0
    out, error = capsys.readouterr()
    assert error == f"model: {moved}\n" and out == printed(capsys, "-m", moved, *flags)
    monkeypatch.setattr(generate, "ROOT", tmp_path / "none")
    assert run_script(lambda: generate.main(["-p", "ab"])) == 2
    assert "hint: run train_gpt.py first" in capsys.readouterr().err


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    """A folder without tokenizer files is read with GPT-2's BPE, whose ids a small model cannot embed."""
    pytest.importorskip("transformers")
    hugging_face_twin(tiny_model(vocab_size=300)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer has 50257 tokens, the model only 300"):
        generate.main(["-m", str(tmp_path), "-p", "Hello", "-d", "cpu"])


def test_non_finite_logits_are_an_error_that_names_the_checkpoint(tmp_path, capsys):
    """Exit code 2, no traceback."""
    model = tiny_model(vocab_size=len(CHARACTERS["characters"]))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    content = model_content(model, vars(model.config).copy(), 7, 1.5, CHARACTERS)
    path = save_pair(tmp_path, 7, content, {})
    assert run_script(lambda: generate.main(["-m", str(path), "-p", "a", "-d", "cpu"])) == 2
    assert f"{path}: non-finite logits" in capsys.readouterr().err
