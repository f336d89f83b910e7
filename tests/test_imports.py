"""Imports have no side effects, and the optional packages are optional."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import ROOT, run

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]
    if path.stem != "__init__"
)


def test_importing_every_module_leaves_an_empty_folder_empty(tmp_path):
    """From any working directory: no file, no output, no process group, and no slow library is imported."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import importlib\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "import torch.distributed as d\n"
        "assert not d.is_initialized()\n"
        "slow = {'transformers', 'datasets', 'matplotlib', 'tiktoken', 'pyarrow', 'torch._dynamo'}\n"
        "slow |= {'triton', 'huggingface_hub', 'wandb', 'tensorboard', 'tokenizers'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    status = dict(args=["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    before = subprocess.run(**status).stdout
    process = run("-c", code, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(**status).stdout == before


BLOCK_IMPORTS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Block())
import runpy
sys.argv = {argv!r}
sys.path.insert(0, {root!r})
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "gpt_model.py")
)
def test_help_needs_no_optional_package(script):
    """--help of every script works without the optional packages."""
    code = BLOCK_IMPORTS.format(
        blocked=(
            *("transformers", "datasets", "matplotlib", "tiktoken", "tqdm", "pyarrow"),
            *("huggingface_hub", "wandb"),
        ),
        argv=[script, "--help"],
        root=str(ROOT),
        script=str(ROOT / script),
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr
    assert "usage: " in process.stdout


@pytest.mark.slow
def test_training_without_tiktoken_and_matplotlib_uses_characters(text_file, tmp_path):
    """A warning each: characters instead of BPE tokens, and no curves.png."""
    flags = "--preset tiny --n-embd 16 --n-head 2 --n-layer 1 --max-steps 2 --seq-len 16".split()
    flags += "--micro-batch 2 --total-batch-tokens 32".split()
    flags += ["--data", str(text_file), "--log-dir", str(tmp_path / "log")]
    code = BLOCK_IMPORTS.format(
        blocked=("transformers", "datasets", "matplotlib", "tiktoken"),
        argv=["train_gpt.py", *flags],
        root=str(ROOT),
        script=str(ROOT / "train_gpt.py"),
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr
    assert "warning: tiktoken is not installed" in process.stderr
    assert "tokenizer char" in process.stdout
    assert "warning: no curves.png: matplotlib is not installed" in process.stderr
    (files,) = [line for line in process.stdout.splitlines() if line.startswith("in ")]
    assert "samples.txt, report.md" in files and "curves.png" not in files
    assert (tmp_path / "log" / "model_00002.pt").exists() and not (tmp_path / "log" / "curves.png").exists()


def test_shards_without_tiktoken_are_refused_at_once(text_file, tmp_path):
    """With two lines, before a folder is created."""
    code = BLOCK_IMPORTS.format(
        blocked=("tiktoken",),
        argv=["build.py", "--input", str(text_file), "--output-dir", str(tmp_path / "out")],
        root=str(ROOT),
        script=str(ROOT / "build_fineweb_edu_shards.py"),
    )
    process = run("-c", code)
    assert process.returncode == 2 and process.stderr.startswith("error: tiktoken is not installed\nhint: ")
    assert not (tmp_path / "out").exists()
