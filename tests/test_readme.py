"""The README cannot lie: every command in it is run here, shortened, or in a list that says why not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, run
from train_gpt import read_arguments
from utils.training.flags import accumulation_steps

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.strip().splitlines()
]

# What cannot run on a CPU without a network, or is run elsewhere.
NOT_HERE = {
    "python -m venv": "the set-up itself: what runs the tests has done it",
    "python build_fineweb_edu_shards.py": "downloads 28 GB",
    "torchrun": "needs GPUs; test_distributed.py runs torchrun on CPUs, on one node and on two",
    "python generate.py -m gpt2-xl": "downloads OpenAI's weights",
    "python eval_hellaswag.py -m gpt2 -d cuda": "downloads OpenAI's weights",
    "python train_gpt.py --data book.txt --init-from gpt2": "downloads OpenAI's weights",
    "until python train_gpt.py": "a loop around commands that test_resume_signals.py runs",
}
SMALL = "--n-layer 1 --n-head 2 --n-embd 16 --max-steps 2 --sample-every 2 --hellaswag-every 0".split()
TINY = "--seq-len 16 --micro-batch 2 --total-batch-tokens 32".split()
SHORTER = {
    "train_gpt.py --preset char": [*SMALL, "--log-dir", "log"],
    "train_gpt.py --eval-only": [],
    "train_gpt.py": [*SMALL, *TINY, "--log-dir", "log"],
    "eval_hellaswag.py -m": ["--limit", "3", "--hellaswag-dir", str(ROOT / "tests" / "fixtures")],
    "generate.py": ["--max-new-tokens", "5"],
}


def is_run_here(command: str) -> bool:
    return not any(
        command == start if start == "python build_fineweb_edu_shards.py" else command.startswith(start)
        for start in NOT_HERE
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder as a user's might be: a text, a corpus, a finished run and another one."""
    folder = tmp_path_factory.mktemp("home")
    text = "The quick brown fox jumps over the lazy dog; the dog sleeps on.\n" * 400
    (folder / "book.txt").write_text(text)
    (folder / "notes.txt").write_text(text)
    (folder / "corpus").mkdir()
    rows = [json.dumps({"text": "A quick fox. " * 500})] * 40
    (folder / "corpus" / "a.jsonl").write_text("\n".join(rows) + "\n")
    flags = [*SMALL, *TINY, "--preset", "tiny", "--data", "book.txt"]
    for log_dir in ("log", "other_run/log"):
        process = run(ROOT / "train_gpt.py", *flags, "--log-dir", log_dir, cwd=folder)
        assert process.returncode == 0, process.stderr
    for name in ("a", "b"):
        shutil.copy(folder / "log" / "model_00002.pt", folder / f"{name}.pt")
        process = run(
            *(ROOT / "eval_hellaswag.py", "-m", f"{name}.pt", "--output", f"{name}.jsonl"),
            *("--hellaswag-dir", ROOT / "tests" / "fixtures", "--limit", "3"),
            cwd=folder,
        )
        assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if is_run_here(command)])
def test_a_command_of_the_readme_works(command, home):
    """It ends with exit code 0 in a folder that has what the README speaks of."""
    for part in command.split(" && "):
        words = shlex.split(part.replace("model_01000.pt", "model_00002.pt"))[1:]
        if words[0] != "-m":
            extra = next((flags for start, flags in SHORTER.items() if " ".join(words).startswith(start)), [])
            words = [str(ROOT / words[0]), *words[1:], *extra]
        process = run(*words, cwd=home, PYTHONPATH=str(ROOT))
        assert process.returncode == 0, f"{part}\n{process.stdout}\n{process.stderr}"
        if not (home / "log" / "model_00002.pt").exists():  # a fresh run has archived the one before
            shutil.copy(home / "a.pt", home / "log" / "model_00002.pt")


def test_every_exception_is_still_in_the_readme():
    """The list of what is not run has no entry that has nothing to say."""
    for start in NOT_HERE:
        assert any(command.startswith(start) for command in COMMANDS), start
    assert sum(is_run_here(command) for command in COMMANDS) >= 9


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("torchrun")])
def test_the_batch_can_be_split_over_the_gpus(command):
    """Each torchrun line gives every GPU a whole number of micro-batches of the faithful run."""
    launcher, flags = command.split(" train_gpt.py")
    nodes, gpus = (
        int(found[1]) if (found := re.search(rf"--{name}=(\d+)", launcher)) else 1
        for name in ("nnodes", "nproc_per_node")
    )
    args, _ = read_arguments(["--preset", "gpt2", *flags.split()])
    assert accumulation_steps(args.total_batch_tokens, args.micro_batch, args.seq_len, nodes * gpus) >= 1


def test_every_room_is_on_the_map():
    """Each script, each package of utils and the tests have a line in the README's table of files."""
    rooms = [path.name for path in ROOT.glob("*.py")]
    rooms += [f"utils/{path.parent.name}/" for path in (ROOT / "utils").glob("*/__init__.py")]
    assert len(rooms) >= 9
    for room in [*rooms, "utils/*.py", "tests/"]:
        assert f"\n| `{room}`" in README, room


def test_every_file_of_the_map_exists():
    """File names in code marks are files of the project, unless a run makes them."""
    for name in re.findall(r"`(?:utils/)?[a-z_]+\.py`", README):
        path = ROOT / name.strip("`")
        is_theirs = name in ("`train_gpt2.py`", "`fineweb.py`", "`hellaswag.py`", "`sample.py`")
        assert is_theirs or path.exists() or (ROOT / "utils" / path.name).exists(), name
