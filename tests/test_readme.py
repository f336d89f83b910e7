"""The README cannot lie: its commands run here in their order, shortened, but for a list of exceptions."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from tests.conftest import OFFLINE, ROOT, run
from train_gpt import read_arguments
from utils import __version__
from utils.training.flags import accumulation_steps, fitting_micro_batch

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.strip().splitlines()
]

MOST_LINES = 180  # of the README

# Not run in its order, and why.
NOT_HERE = {
    "python -m venv": "the set-up: what runs the tests has done it; the training behind it is run",
    "source": "the interpreter of the tests is used instead",
    "python build_fineweb_edu_shards.py #": "downloads 28 GB",
    "torchrun": "needs GPUs; test_distributed.py runs torchrun on CPUs, on one node and on two",
}
# What needs a download or a GPU uses the first run's weights and the CPU.
HERE = {
    "-m gpt2-xl": "-m log -p To",
    "-m gpt2": "-m log",
    "--init-from gpt2": "--init-from log",
    "-d cuda": "-d cpu",
}
SHORTER = {
    "train_gpt.py": "--n-layer 1 --n-head 2 --n-embd 16 --seq-len 16 --micro-batch 2 --total-batch-tokens 32 "
    "--max-steps 4 --val-tokens 320 --sample-every 2 --hellaswag-every 0 --device cpu",
    "generate.py": "--max-new-tokens 5",
    "eval_hellaswag.py -m": f"--limit 3 --hellaswag-dir {shlex.quote(str(ROOT / 'tests' / 'fixtures'))}",
}


def as_run_here(command: str) -> str | None:
    """The command with small sizes; None if it is in the list of exceptions."""
    if command.endswith("&& .venv/bin/python train_gpt.py"):
        command = "python train_gpt.py"  # the set-up before it is not repeated
    if any(f"{command} #".startswith(start) for start in NOT_HERE):
        return None
    for there, here in HERE.items():
        command = re.sub(f"{re.escape(there)}(?= |$)", here, command)
    for start, flags in SHORTER.items():
        if "--eval-only" in command:
            flags = "--device cpu" if start == "train_gpt.py" else flags
        command = re.sub(f"(python {re.escape(start)}[^;]*)", rf"\1 {flags}", command)
    return command


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order_in_one_clone(tmp_path):
    """Each ends with exit code 0 and needs only what those before it have made, and a text, input.txt."""
    clone = tmp_path / "clone"
    ignored = ("log", "runs", "edu_fineweb10B", "input.txt*", ".git", ".venv", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*ignored))
    (clone / "input.txt").write_text("".join(topics.topics.values())[:300_000], encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **OFFLINE, "PATH": path}
    commands = [here for command in COMMANDS if (here := as_run_here(command))]
    assert len(commands) >= 15
    for command in commands:
        process = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True,
            timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    newest = sorted((clone / "log").glob("model_0*.pt"))[-1]
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1].replace("model_01000.pt", newest.name)
    process = run("-c", snippet, cwd=clone)
    assert process.stdout.startswith("To be, or not to be"), process.stderr


def test_every_exception_is_still_in_the_readme():
    """The lists of what is run otherwise have no entry that has nothing to say."""
    for start in NOT_HERE:
        assert any(f"{command} #".startswith(start) for command in COMMANDS), start
    for there in (*HERE, *SHORTER):
        assert any(re.search(rf"{re.escape(there)}(?= |$)", command) for command in COMMANDS), there


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("torchrun")])
def test_the_batch_can_be_split_over_the_gpus(command):
    """Each torchrun line gives every GPU a whole number of micro-batches of the faithful run."""
    launcher, flags = command.split(" train_gpt.py")
    nodes, gpus = (
        int(found[1]) if (found := re.search(rf"--{name}=(\d+)", launcher)) else 1
        for name in ("nnodes", "nproc_per_node")
    )
    args, _ = read_arguments(["--preset", "gpt2", *flags.split()])
    micro_batch = fitting_micro_batch(args, args.micro_batch, nodes * gpus)  # of none that is typed
    assert accumulation_steps(args.total_batch_tokens, micro_batch, args.seq_len, nodes * gpus) >= 1


def test_the_readme_stays_short():
    """What does not fit belongs in a help text, a docstring or another page."""
    assert len(README.splitlines()) <= MOST_LINES


def test_every_room_is_on_the_map():
    """Each script, each package of utils and the tests have a line in the README's table of files."""
    rooms = [path.name for path in ROOT.glob("*.py")]
    rooms += [f"utils/{path.parent.name}/" for path in (ROOT / "utils").glob("*/__init__.py")]
    assert len(rooms) >= 9
    for room in [*rooms, "utils/*.py", "tests/"]:
        assert f"\n| `{room}`" in README, room


def test_the_changelog_begins_with_this_version():
    """The version has one home, and its changes are written down."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall("^## (.+)$", changes, re.M)[0] == __version__


def test_every_file_of_the_map_exists():
    """File names in code marks are files of the project, unless a run makes them."""
    for name in re.findall(r"`(?:utils/)?[a-z_]+\.py`", README):
        path = ROOT / name.strip("`")
        is_theirs = name in ("`train_gpt2.py`", "`fineweb.py`", "`hellaswag.py`", "`sample.py`")
        assert is_theirs or path.exists() or (ROOT / "utils" / path.name).exists(), name
