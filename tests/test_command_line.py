"""What all scripts share: errors in two lines, exit codes, flags, and numbers as text."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

import build_fineweb_edu_shards
import eval_hellaswag
import generate
import train_gpt
from tests.conftest import ROOT, run
from utils.command_line import (
    ArgumentParser,
    Diverged,
    Unfinished,
    UserError,
    command_name,
    environment_int,
    format_bytes,
    format_count,
    format_duration,
    non_negative_float,
    non_negative_int,
    path_text,
    perplexity,
    positive_float,
    positive_int,
    run_script,
)


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (Diverged, 3), (Unfinished, 1)])
def test_an_error_is_two_lines_and_an_exit_code(kind, code, capsys):
    """On stderr, from local rank 0 alone, unless other ranks may not see the error."""

    def fail(one_rank_only: bool = False) -> None:
        raise kind("what is wrong", "what to do", one_rank_only=one_rank_only)

    for local_rank, one_rank_only, lines in ((0, False, 2), (1, False, 0), (1, True, 2)):
        assert run_script(lambda only=one_rank_only: fail(only), lambda rank=local_rank: rank) == code
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == lines
        assert error in ("", "error: what is wrong\nhint: what to do\n")


def test_other_exceptions_keep_their_traceback_and_success_is_zero():
    """None and 0 of `main` are success; Ctrl-C is 130."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_script(lambda: None) == run_script(lambda: 0) == 0 and run_script(lambda: 7) == 7
    assert run_script(interrupted) == 130
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            positive_int,
            "9" * 400,
            r"9{40}... \(400 characters\) is not a whole number \(expected at most 1,000",
        ),
        (positive_int, "9" * 5000, r"\(5,000 characters\) is not a whole number"),  # Python converts no more
        (non_negative_int, "1" + "0" * 19, "is not a whole number"),
        (non_negative_int, "1.5", "1.5 is not a whole number"),
        (positive_int, "", " is not a whole number"),
        (positive_float, "1e308", r"1e308 is not a finite number \(expected at most 1e\+30\)"),
        (positive_float, "1e-320", r"1e-320 is too close to zero \(expected at least 1e-30\)"),
        (non_negative_float, "inf", "inf is not a finite number"),
        (non_negative_float, "1e5000", "1e5000 is not a finite number"),
        (positive_float, "-0.0", "-0.0 is not above zero"),
    ],
)
def test_a_number_out_of_all_proportion_is_refused(kind, text, message):
    """It would overflow somewhere below; the message has the number, shortened, and the largest one."""
    parser = ArgumentParser(prog="x.py")
    parser.add_argument("--n", type=kind)
    with pytest.raises(UserError, match=message) as caught:
        parser.parse_args([f"--n={text}"])
    assert len(str(caught.value)) < 200
    is_int = kind in (positive_int, non_negative_int)
    for fits in ("1_000", "1000000000000000") if is_int else ("1e-30", "1e30"):
        assert parser.parse_args([f"--n={fits}"]).n == kind(fits) > 0


@pytest.mark.parametrize(
    "text", ["abc", "", " ", "-1", "1.0", "1_0", "+1", "99999999999999999999", "9" * 5000, "²"]
)
def test_an_environment_variable_that_is_no_number_is_named(text, monkeypatch):
    """With its value and the range; the error is of this process, so this process prints it."""
    monkeypatch.setenv("RANK", text)
    message = r"environment variable RANK=.* \(expected a whole number from 0 to"
    with pytest.raises(UserError, match=message) as caught:
        environment_int("RANK", 0)
    assert caught.value.one_rank_only and caught.value.hint == "correct it, or remove it: unset RANK"
    monkeypatch.setenv("RANK", "07")
    assert environment_int("RANK", 0) == 7
    monkeypatch.delenv("RANK")
    assert environment_int("RANK", 3) == 3


def test_an_error_in_the_rank_itself_is_two_lines(capsys):
    """`run_script` calls the function that reads it, where errors are caught; main is not called."""

    def rank() -> int:
        raise UserError("LOCAL_RANK=x", "unset it", one_rank_only=True)

    assert run_script(lambda: 1 / 0, rank) == 2
    assert capsys.readouterr().err == "error: LOCAL_RANK=x\nhint: unset it\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[x] DefaultCPUAllocator: can't allocate"),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000000, 2048]"),
    ],
)
def test_a_lack_of_memory_is_two_lines(error, capsys):
    """Of Python and of PyTorch: smaller numbers help, a traceback does not."""

    def fail() -> None:
        raise error

    assert run_script(fail) == 2
    assert re.fullmatch("error: out of memory: .+\nhint: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("what is wrong", "what to do"), "error: what is wrong\nhint: what to do"),
        (UserError("caf\udce9", "rename it"), "error: caf\\udce9\nhint: rename it"),
        (
            MemoryError("too much"),
            "error: out of memory: too much\nhint: use smaller numbers, or more memory",
        ),
        (ZeroDivisionError("by zero"), None),
    ],
)
def test_torchrun_finds_the_cause_of_an_error(error, shown, tmp_path, monkeypatch, capsys):
    """In the file that it names, in the form that its own error handling reads, also from silent ranks."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def fail() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if shown is None:
        with pytest.raises(ZeroDivisionError):
            run_script(fail, lambda: 1)
    else:
        assert run_script(fail, lambda: 1) == 2
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert abs(failure.timestamp - time.time()) < 60
    text = failure.message["extraInfo"]["py_callstack"]
    end = shown or "in fail\n    raise error\nZeroDivisionError: by zero\n"
    assert text.endswith(end) and text.startswith(shown or "Traceback")


def test_no_error_file_is_written_without_torchrun_or_an_error(tmp_path, monkeypatch, capsys):
    """Nor does a folder that is gone replace the error by another one."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_script(lambda: 0) == 0 and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))

    def fail() -> None:
        raise UserError("what is wrong", "what to do")

    assert run_script(fail) == 2 and "what is wrong" in capsys.readouterr().err


def test_given_flags_are_told_from_defaults():
    """Also where the given value equals the default: presets apply between the two."""
    parser = ArgumentParser(prog="x.py")
    parser.add_argument("--max-steps", type=positive_int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    assert parser.parse_defaults_and_given(["--max_steps=5"]) == (
        {"max_steps": 5, "seed": 1},
        {"max_steps": 5},
    )
    for arguments in (["--max-step", "3"], ["--max-steps", "0"], ["--max-steps", "1.5"]):
        with pytest.raises(UserError) as caught:
            parser.parse_args(arguments)
        assert caught.value.hint.endswith("python x.py --help lists the flags and their defaults")


def test_flags_that_do_nothing_in_a_mode_are_named(capsys):
    """Those on the command line only, also with their default as the value; the ones of the mode are used."""
    arguments = "--verify --input none.txt --tokenizer=gpt2 --output_dir x --num-workers 1".split()
    build_fineweb_edu_shards.parse_arguments(arguments)
    unused = "--input (with --verify), --num-workers (with --verify), --tokenizer (with --verify)"
    assert sorted(read_unused(capsys)) == unused.split(", ")
    build_fineweb_edu_shards.parse_arguments(["--verify", "--inputs", "--output-dir", "x"])
    assert read_unused(capsys) == []
    with pytest.raises(UserError, match="a.jsonl"):  # it is missing
        eval_hellaswag.main(["--compare", "a.jsonl", "b.jsonl", "--limit", "3", "-m", "nonsense"])
    assert sorted(read_unused(capsys)) == ["--limit (with --compare)", "--model-name (with --compare)"]


def read_unused(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The flags that a warning on stderr names."""
    lines = capsys.readouterr().err.splitlines()
    return [text for line in lines for text in line.removeprefix("warning: not used: ").split(", ")]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (59.9, "59s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h")]
)
def test_durations_as_text(seconds, text):
    """The two largest units."""
    assert format_duration(seconds) == text


def test_counts_as_text():
    """One of a thing, or several; digits in groups of three."""
    assert [format_count(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    assert format_count(1000, "micro-step") == "1,000 micro-steps"


def test_bytes_and_perplexities_as_text():
    """Decimal units; a perplexity too large for a float is shown as the largest one."""
    assert [format_bytes(n) for n in (0, 12_345_678, 1e8, 1.5e12)] == [
        "0.0 MB",
        "12.3 MB",
        "0.10 GB",
        "1,500.00 GB",
    ]
    assert (
        perplexity(0.0) == "1.00" and perplexity(10.8) == "49,020.80" and perplexity(1e6) == perplexity(700)
    )


@pytest.mark.parametrize("folder", [".", str(ROOT), "/tmp/none"])
def test_a_printed_command_is_true_in_any_folder(folder, monkeypatch):
    """For the script that was started by its path, and for those beside it; others keep their names."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{folder}/train_gpt.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", object())  # started by python -m
    assert command_name("generate.py") == "generate.py"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command_name("train_gpt.py") == f"{folder}/train_gpt.py"
    expected = Path(folder, "generate.py") if folder != "/tmp/none" else "generate.py"
    assert command_name("generate.py") == str(expected)
    monkeypatch.setattr(sys, "argv", [""])  # Python's prompt
    assert command_name("generate.py") == "generate.py"


@pytest.mark.slow
def test_generate_reports_user_errors(tmp_path):
    """A missing checkpoint or an invalid setting: exit code 2 and two lines."""
    for arguments, message in (
        (["-m", tmp_path / "none.pt", "-p", "x"], "no checkpoint at"),
        (["--temperature", "nan"], "not a finite number"),
        (["--temperature=-1"], "temperature=-1.0 is not a finite number of at least 0"),
        (["--top-p", "1.5"], "top_p=1.5 is not above 0 and at most 1"),
    ):
        process = run(ROOT / "generate.py", *arguments)
        assert process.returncode == 2 and message in process.stderr, process.stderr
        assert "hint: " in process.stderr and "Traceback" not in process.stderr


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_are_a_user_error(tmp_path):
    """Exit code 2 with a hint within seconds, where there is neither a file nor a network."""
    started = time.monotonic()
    process = run(ROOT / "generate.py", "-m", "gpt2", "-p", "x", HF_HOME=str(tmp_path))
    assert process.returncode == 2, process.stderr
    assert "error: cannot download " in process.stderr and "HF_HOME" in process.stderr
    assert "Traceback" not in process.stderr and time.monotonic() - started < 60


@pytest.mark.parametrize("type", [Path, path_text])
def test_a_path_may_begin_with_a_tilde_and_has_no_nul(type, monkeypatch, tmp_path):
    """The shell expands neither `--log-dir=~/x` nor a quoted one; a tilde inside a name is a tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = ArgumentParser(prog="x")
    parser.add_argument("--log-dir", type=type, nargs="+")
    for given, expected in (("~/a_b", f"{tmp_path}/a_b"), ("~", str(tmp_path)), ("a~b", "a~b")):
        assert parser.parse_args([f"--log_dir={given}"]).log_dir == [type(expected)]
    with pytest.raises(UserError, match=r"'a\\x00b' has a NUL character"):
        parser.parse_args(["--log-dir", "a\0b"])


@pytest.mark.parametrize("value", ["", " \n"])
@pytest.mark.parametrize(
    ("main", "flag"),
    [
        (train_gpt.main, "--init-from"),
        (train_gpt.main, "--data"),
        (train_gpt.main, "--log-dir"),
        (train_gpt.main, "--resume"),
        (generate.main, "--model-name"),
        (eval_hellaswag.main, "--output"),
        (build_fineweb_edu_shards.main, "--input"),
    ],
)
def test_the_value_of_a_variable_that_is_not_set_is_no_path(main, flag, value):
    """`--init-from "$CHECKPOINT"` would otherwise train from random weights, or read the current folder."""
    with pytest.raises(
        UserError, match=f"{flag}.* is not a path; is it a variable of the shell that is not set"
    ):
        main([flag, value])
