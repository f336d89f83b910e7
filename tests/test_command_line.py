"""What all scripts share: errors in two lines, exit codes, flags, and numbers as text."""

from __future__ import annotations

import time

import pytest

from tests.conftest import ROOT, run
from utils.command_line import (
    ArgumentParser,
    Diverged,
    Unfinished,
    UserError,
    format_bytes,
    format_duration,
    perplexity,
    positive_int,
    run_script,
)


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (Diverged, 3), (Unfinished, 1)])
def test_an_error_is_two_lines_and_an_exit_code(kind, code, capsys):
    """On stderr, from local rank 0 alone, unless other ranks may not see the error."""

    def fail(one_rank_only: bool = False) -> None:
        raise kind("what is wrong", "what to do", one_rank_only=one_rank_only)

    for local_rank, one_rank_only, lines in ((0, False, 2), (1, False, 0), (1, True, 2)):
        assert run_script(lambda only=one_rank_only: fail(only), local_rank) == code
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
        assert caught.value.hint == "python x.py --help lists the flags and their defaults"


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (59.9, "59s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h")]
)
def test_durations_as_text(seconds, text):
    """The two largest units."""
    assert format_duration(seconds) == text


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


def test_weights_that_cannot_be_downloaded_are_a_user_error(tmp_path):
    """Exit code 2 with a hint within seconds, where there is neither a file nor a network."""
    started = time.monotonic()
    process = run(ROOT / "generate.py", "-m", "gpt2", "-p", "x", HF_HOME=str(tmp_path))
    assert process.returncode == 2, process.stderr
    assert "error: cannot download " in process.stderr and "HF_HOME" in process.stderr
    assert "Traceback" not in process.stderr and time.monotonic() - started < 60
