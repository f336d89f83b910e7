"""What takes long says what it is: every part of every script that may, in this order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import build_fineweb_edu_shards
import eval_hellaswag
import generate
import train_gpt
from tests.conftest import ROOT
from tests.small_runs import small_args
from utils import tokenizer
from utils.distributed import Distributed
from utils.training import tokenizing
from utils.training.data_source import choose_source, open_data
from utils.weights import export

pytestmark = pytest.mark.usefixtures("no_pictures")

HELLASWAG = str(ROOT / "tests" / "fixtures")


class NoPatience(threading.Timer):
    """A timer that is over at once: all work takes too long for it."""

    def start(self) -> None:
        self.function()


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Announces everything."""
    monkeypatch.setattr(threading, "Timer", NoPatience)


def announcements(capsys) -> list[str]:
    """The announcements since the last call, each once, in the order in which they first appeared."""
    lines = capsys.readouterr().err.splitlines()
    return list(dict.fromkeys(line.removesuffix(" ...") for line in lines if line.endswith(" ...")))


def test_every_long_part_of_training_is_announced(impatient, text_file, tmp_path, capsys):
    """Of a fresh start with a BPE and HellaSwag, of a resumed one, of an evaluation and of a dry run."""
    flags = ("--tokenizer", "bpe:300", "--max-steps", "2", "--hellaswag-every", "2")
    args = small_args(text_file, tmp_path, *flags, "--hellaswag-dir", HELLASWAG)
    assert train_gpt.main(args) == 0
    setting_up = [f"reading {text_file}", "training a BPE of 300 tokens", "tokenizing"]
    setting_up += ["initialising the weights", "reading HellaSwag", "tokenizing HellaSwag"]
    setting_up += ["reading the evaluated tokens"]
    loop = ["evaluating", "HellaSwag", "saving model_best.pt", "sampling"]
    loop += ["saving a checkpoint", "drawing curves.png", "writing report.md"]
    found = announcements(capsys)
    assert [part for part in found if part in setting_up] == setting_up
    assert [part for part in found if part in loop] == loop
    assert train_gpt.main([*args, "--resume", "--max-steps", "3"]) == 0
    found = announcements(capsys)
    assert found[0] == "reading the checkpoint" and "sending the checkpoint to all processes" in found
    assert train_gpt.main([*args, "--dry-run"]) == 0
    assert announcements(capsys)[-1] == "timing micro-steps"
    model = str(tmp_path / "model_00002.pt")
    assert train_gpt.main(["--eval-only", "--init-from", model, "--data", str(text_file)]) == 0
    found = announcements(capsys)
    assert found[0] == f"loading {model}" and "evaluating" in found


def test_every_long_part_of_the_other_scripts_is_announced(
    impatient, undisturbed, text_file, tmp_path, capsys
):
    """Of sampling and of the export; of building shards with a BPE and verifying them."""
    pytest.importorskip("transformers")
    model = str(undisturbed / "model_00020.pt")
    assert generate.main(["-m", model, "-p", "The", "--max-new-tokens", "3"]) == 0
    assert announcements(capsys) == [f"loading {model}", "sampling"]
    assert export.main([model, str(tmp_path / "out")]) == 0
    parts = ["writing the weights", "comparing the logits with those of transformers"]
    assert announcements(capsys) == [f"loading {model}", *parts]
    documents = tmp_path / "documents.jsonl"
    rows = [json.dumps({"text": line}) for line in text_file.read_text().splitlines()]
    documents.write_text("\n".join(rows))
    shards = str(tmp_path / "shards")
    build = ["--input", str(documents), "--output-dir", shards, "--tokenizer", "bpe:300"]
    assert build_fineweb_edu_shards.main(build) == 0
    parts = ["looking for the input files", "estimating the size of the input", "looking at the input files"]
    parts += ["checksums of the input", "reading the first documents"]
    assert announcements(capsys) == parts
    assert build_fineweb_edu_shards.main(["--verify", "--inputs", "--output-dir", shards]) == 0
    names = [path.name for path in sorted(Path(shards).glob("*.npy"), key=lambda path: path.name[-10:])]
    assert announcements(capsys) == [*(f"reading {name}" for name in names), f"reading {documents}"]


def test_every_long_part_of_hellaswag_is_announced(impatient, tmp_path, capsys, text_file):
    """Before its first tenth, which is its first result."""
    flags = ("--tokenizer", "gpt2", "--max-steps", "1", "--val-every", "0", "--sample-every", "0")
    assert train_gpt.main(small_args(text_file, tmp_path, *flags)) == 0
    announcements(capsys)
    model = str(tmp_path / "model_00001.pt")
    assert eval_hellaswag.main(["-m", model, "--hellaswag-dir", HELLASWAG, "--limit", "4"]) == 0
    found = announcements(capsys)
    assert found[:3] == ["reading HellaSwag", f"loading {model}", "tokenizing HellaSwag"]
    assert found[3] == "scoring 4 examples"


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_a_text_is_tokenized_in_pieces_with_the_ids_of_the_whole(name, text_file, monkeypatch):
    """So that a bar can show how far it is."""
    source, counts = choose_source(str(text_file)), []

    @contextmanager
    def counted(activity: str, *_: Any, **options: Any) -> Iterator[Callable[[int], None]]:
        yield counts.append

    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizing, "announced", counted)
    data = open_data(source, {"name": name}, 4, Distributed(torch.device("cpu")))
    tokens = [*data.train.tokens, *data.val.tokens]
    monkeypatch.undo()
    text = text_file.read_text()
    assert tokens == data.tokenizer.encode(text).tolist()
    assert len(counts) > 10 and sum(counts) == len(text)
