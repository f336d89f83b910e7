"""Stop a run at any instant, run it again with --resume: the same log, the same weights.

The numbers in the docstrings count the faults a run must survive; those that need several processes are in
test_distributed.py, those of single files in test_files.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt
from tests.conftest import OFFLINE, ROOT, run
from utils import checkpoint, resume, run_dir, run_log
from utils.divergence import WINDOW, SpikeFilter
from utils.errors import Diverged, Unfinished, UserError
from utils.resume import Progress

# Two windows short of 15 steps an epoch, so that 20 steps cross its end in the middle of one.
SETTINGS = (
    *("--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--tokenizer", "char"),
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--seq-len", "16", "--micro-batch", "2"),
    *("--total-batch-tokens", "64", "--max-lr", "1e-2", "--max-steps", "20", "--warmup-steps", "2"),
    *("--val-every", "4", "--sample-every", "5", "--checkpoint-every", "3", "--keep-every", "6"),
)
TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps on.\n" * 16


class Killed(BaseException):
    """Ends a run in this process as abruptly as SIGKILL ends a process: nothing catches it."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the run, and test_files.py draws."""
    monkeypatch.setattr(run_log, "plot_run", lambda log_dir: None)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def train(text_file: Path, log_dir: Path, *flags: str) -> int:
    return train_gpt.main([*SETTINGS, "--data", str(text_file), "--log-dir", str(log_dir), *flags])


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory) -> Path:
    """The log directory of a run that nothing stopped."""
    log_dir = tmp_path_factory.mktemp("undisturbed") / "log"
    assert train(text_file, log_dir) == 0
    return log_dir


def home_of(name: str):
    """The module through which the loop calls a function."""
    return resume if name == "save" else train_gpt


def kill_in(monkeypatch, name: str, when) -> None:
    """Kills the run inside the function `name` of the training script, the first time `when(arguments)`
    holds.
    """
    module = home_of(name)
    real = getattr(module, name)

    def deadly(*args, **kwargs):
        if when(args):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, deadly)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint file, by its place."""

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, dict):
            for key in value:
                yield from walk(value[key], f"{place}.{key}")

    return dict(walk(torch.load(path, weights_only=True), path.name))


def assert_same_run(log_dir: Path, expected: Path, step: int = 20) -> None:
    """log.txt and samples.txt byte for byte; weights, moments and step counts bit for bit."""
    for name in ("log.txt", "samples.txt"):
        assert (log_dir / name).read_bytes() == (expected / name).read_bytes(), name
    for name in (f"model_{step:05d}.pt", f"optimizer_{step:05d}.pt"):
        ours, theirs = tensors_of(log_dir / name), tensors_of(expected / name)
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for place in theirs:
            if ".rng." not in place:
                assert torch.equal(ours[place], theirs[place]), place
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(step))


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 11, 15, 19])
def test_killed_in_an_update_and_resumed_it_is_the_same_run(
    step, text_file, undisturbed, tmp_path, monkeypatch
):
    """Bitwise resume, 24: before the first checkpoint, just after one, at an evaluation, across an epoch's
    end.
    """
    with monkeypatch.context() as patch:
        kill_in(patch, "update", lambda args: args[2].step == step)
        with pytest.raises(Killed):
            train(text_file, tmp_path)
    assert train(text_file, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["evaluate", "write_samples", "save"])
def test_killed_in_an_evaluation_a_sample_or_a_save(name, text_file, undisturbed, tmp_path, monkeypatch):
    """24: no line is lost and none is there twice, wherever in a pass the run ended."""
    calls = []
    with monkeypatch.context() as patch:
        kill_in(patch, name, lambda args: calls.append(1) or len(calls) == 3)
        with pytest.raises(Killed):
            train(text_file, tmp_path)
    assert train(text_file, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def test_resumed_twice(text_file, undisturbed, tmp_path, monkeypatch):
    """A resumed run saves as good a state as a fresh one."""
    for step in (5, 13):
        with monkeypatch.context() as patch:
            kill_in(patch, "update", lambda args, step=step: args[2].step == step)
            with pytest.raises(Killed):
                train(text_file, tmp_path, "--resume")
    assert train(text_file, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)
    assert (tmp_path / "log.txt.stale").exists()


def test_a_complete_run_resumed_changes_nothing(text_file, undisturbed, capsys):
    """Resume at MAX_STEPS: it says so, exit 0, every file as it was."""
    before = {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()}
    assert train(text_file, undisturbed, "--resume") == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in undisturbed.glob("[!.]*.*") if path.is_file()} == before


def test_resume_without_a_checkpoint_is_a_fresh_start(text_file, undisturbed, tmp_path):
    """So that one command, in a loop, starts a run and continues it."""
    assert train(text_file, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def stop_by_signal_in(monkeypatch, name: str, number: int, at_call: int) -> None:
    """Sends this process a signal at the start of a function of the training script."""
    module = home_of(name)
    real, calls = getattr(module, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, signalled)


@pytest.mark.parametrize(
    ("name", "number", "at_call", "code"),
    [
        ("update", signal.SIGTERM, 6, 143),
        ("update", signal.SIGINT, 9, 130),
        ("update", signal.SIGUSR1, 17, 143),
        ("evaluate", signal.SIGTERM, 3, 143),
        ("evaluate", signal.SIGTERM, 6, 143),  # after the last update: what is left is the last evaluation
        ("write_samples", signal.SIGTERM, 2, 143),
        ("save", signal.SIGTERM, 2, 143),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    name, number, at_call, code, text_file, undisturbed, tmp_path, monkeypatch, capsys
):
    """3, 4, 7: in an update, an evaluation, a sample, a save; the last completed step is saved, nothing half
    is logged.
    """
    with monkeypatch.context() as patch:
        stop_by_signal_in(patch, name, number, at_call)
        assert train(text_file, tmp_path) == code
    assert "run it again with --resume to continue" in capsys.readouterr().out
    assert train(text_file, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, undisturbed)


def start(text_file: Path, log_dir: Path, *flags: str) -> subprocess.Popen:
    """Starts the script as a process of its own, in a session of its own; its output is a pipe."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train_gpt.py", *SETTINGS, "--data", text_file, "--log-dir", log_dir, *flags],
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Reads the process's output up to a line with these words."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came: {process.stderr.read()}")


def test_a_process_killed_for_real(text_file, undisturbed, tmp_path):
    """1, 24: SIGKILL of the process at step 7, resumed by the same command."""
    process = start(text_file, tmp_path)
    wait_for(process, "step     7 |")
    process.kill()
    process.communicate()
    resumed = start(text_file, tmp_path, "--resume")
    out, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert "resumed" in out
    # One thread in the child, one here: the same bits.
    assert_same_run(tmp_path, undisturbed)


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(text_file, tmp_path):
    """7: the first ends with 130 after saving; the second, a second later, does not wait for anything."""
    process = start(text_file, tmp_path / "a", "--max-steps", "100000")
    wait_for(process, "step     5 |")
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "received SIGINT: saved" in out and "Traceback" not in error
    # A loop that never polls stands in for a long computation.
    code = (
        "import time, torch\n"
        "from utils.distributed import Distributed\n"
        "from utils.stopping import StopSignals\n"
        "with StopSignals(Distributed(torch.device('cpu'))):\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_second_run_in_the_same_folder_is_refused(text_file, tmp_path, capsys):
    """8, 23: the message names the holder; a killed holder holds nothing."""
    process = start(text_file, tmp_path, "--max-steps", "100000")
    wait_for(process, "step     1 |")
    with pytest.raises(UserError, match=f"is in use by pid {process.pid} on host .* since 20"):
        train(text_file, tmp_path)
    process.kill()
    process.communicate()
    assert train(text_file, tmp_path) == 0


def test_leftovers_of_a_torn_save_are_swept(text_file, tmp_path, capsys):
    """1: a temporary file of a killed save is removed with one line."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / ".model_00010.pt.tmp-123").write_bytes(b"half")
    assert train(text_file, tmp_path, "--max-steps", "2") == 0
    assert "removed .model_00010.pt.tmp-123" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.tmp-*"))


CHILD_SAVES = """
import sys, torch
from pathlib import Path
from utils.checkpoint import save_pair
step = 0
while True:
    save_pair(Path(sys.argv[1]), step, {"model": {"w": torch.full((300_000,), float(step))}}, {"step": step})
    print(step, flush=True)
    step = (step + 1) % 3
"""


def test_saving_a_step_again_keeps_the_pair_together(text_file, stopped_run, monkeypatch):
    """1, 20: when the second file cannot be written, neither is replaced, and the old pair still resumes."""
    real, calls = torch.save, []

    def second_fails(content, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", second_fails)
    model, state = checkpoint.load_pair(stopped_run / "model_00009.pt")
    with pytest.raises(OSError):
        checkpoint.save_pair(stopped_run, 9, model, state)
    path, again, _ = checkpoint.newest_complete(stopped_run)
    assert path.name == "model_00009.pt" and again["save_id"] == model["save_id"]
    assert not list(stopped_run.glob(".*.tmp-*"))


def test_the_twin_is_no_model(stopped_run, text_file):
    """An optimizer file given as a model is an error of the user's, for --resume as well."""
    for call in (
        lambda: checkpoint.load_model_file(stopped_run / "optimizer_00009.pt"),
        lambda: train(text_file, stopped_run, "--resume", str(stopped_run / "optimizer_00009.pt")),
    ):
        with pytest.raises(UserError, match="not a checkpoint"):
            call()


@pytest.mark.slow
def test_a_save_killed_at_any_moment_leaves_whole_files(tmp_path):
    """1: a process that saves over its own files, killed twelve times: every file is the old one or the new
    one.
    """
    for kill in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD_SAVES, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.02 + 0.015 * kill)
        process.kill()
        process.wait()
        for path in tmp_path.glob("*.pt"):
            assert isinstance(checkpoint.load_checked(path), dict)
    run_dir.sweep(tmp_path)
    assert all(path.suffix == ".pt" and not path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.fixture
def stopped_run(text_file, tmp_path, monkeypatch) -> Path:
    """A run killed in step 11, with checkpoints of steps 6 and 9 to resume from."""
    with monkeypatch.context() as patch:
        kill_in(patch, "update", lambda args: args[2].step == 11)
        with pytest.raises(Killed):
            train(text_file, tmp_path)
    return tmp_path


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "html":
        path.write_bytes(b"<html>not found</html>")
    elif how == "other pair":
        content = torch.load(path, weights_only=True)
        torch.save({**content, "save_id": "0"}, path)
    else:
        path.write_bytes(data[: int(len(data) * float(how))])


@pytest.mark.parametrize("how", ["0", "0.1", "0.5", "0.99", "flip", "html", "other pair"])
@pytest.mark.parametrize("name", ["model_00009.pt", "optimizer_00009.pt"])
def test_a_damaged_checkpoint_is_passed_over(name, how, stopped_run, text_file, undisturbed, capsys):
    """16, 17: --resume falls back to the one before, with a warning, and the run is the same; by name it is
    exit 2.
    """
    damage(stopped_run / name, how)
    with pytest.raises(UserError, match="damaged|saved together"):
        train(text_file, stopped_run, "--resume", str(stopped_run / "model_00009.pt"))
    assert train(text_file, stopped_run, "--resume") == 0
    out = capsys.readouterr().out
    assert "trying the one before" in out and "model_00006.pt at step 6" in out
    assert_same_run(stopped_run, undisturbed)


def test_an_older_checkpoint_sends_the_newer_ones_to_the_archive(stopped_run, text_file, undisturbed):
    """Resuming step 6 while step 9 exists: the dead branch cannot be taken up later."""
    assert (
        train(text_file, stopped_run, "--resume", str(stopped_run / "model_00006.pt"), "--max-steps", "20")
        == 0
    )
    (archive,) = (stopped_run / "archive").iterdir()
    assert sorted(path.name for path in archive.iterdir()) == ["model_00009.pt", "optimizer_00009.pt"]
    assert_same_run(stopped_run, undisturbed)


def test_a_checkpoint_from_another_folder_starts_a_new_log(
    stopped_run, text_file, undisturbed, tmp_path_factory
):
    """The old folder is left alone; the weights end up the same."""
    new = tmp_path_factory.mktemp("new")
    before = sorted(path.name for path in stopped_run.iterdir())
    assert train(text_file, new, "--resume", str(stopped_run / "model_00009.pt")) == 0
    assert sorted(path.name for path in stopped_run.iterdir()) == before
    assert (new / "log.txt").read_text() in (undisturbed / "log.txt").read_text()
    assert (new / "log.txt").read_text().startswith("9 train")
    ours, theirs = (tensors_of(folder / "model_00020.pt") for folder in (new, undisturbed))
    assert all(torch.equal(ours[place], theirs[place]) for place in theirs)


@pytest.mark.parametrize("key", ["optimizer", "step", "windows", "log", "val_loss", "done"])
def test_without_one_part_of_the_state_the_run_would_be_another(
    key, text_file, undisturbed, tmp_path, monkeypatch
):
    """Negative controls: the comparison above sees the loss of any part of the state."""
    with monkeypatch.context() as patch:  # stopped in step 12, whose validation is in the log already
        stop_by_signal_in(patch, "update", signal.SIGTERM, 13)
        assert train(text_file, tmp_path) == 143
    path = tmp_path / ("model_00012.pt" if key == "val_loss" else "optimizer_00012.pt")
    content = torch.load(path, weights_only=True)
    if key == "optimizer":
        for entry in content["optimizer"]["state"].values():
            entry["exp_avg"].zero_()
    else:
        content[key] = {"step": 11, "windows": 0, "log": {}, "val_loss": 0.0, "done": []}[key]
    torch.save(content, path)
    train(text_file, tmp_path, "--resume", "--val-every", "0" if key == "val_loss" else "4")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-layer", "1", "--n-embd", "32"], "has n_layer=2, this run asks n_layer=1; has n_embd=16"),
        (["--seq-len", "8"], "seq_len=16, this run has seq_len=8"),
        (["--seed", "1"], "seed=1337, this run has seed=1"),
        (["--shuffle", "off"], "shuffle=on, this run has shuffle=off"),
        (["--tokenizer", "gpt2", "--n-embd", "16"], "another tokenizer"),
    ],
)
def test_what_would_be_another_run_is_refused(flags, message, stopped_run, text_file):
    """14, 15: every differing key in one message, and nothing is touched."""
    before = {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")}
    with pytest.raises(UserError, match=message):
        train(text_file, stopped_run, "--resume", *flags)
    assert {path.name: path.stat().st_mtime_ns for path in stopped_run.glob("[!.]*.*")} == before


def test_other_data_is_refused(stopped_run, text_file, tmp_path):
    """47: another text of the same length."""
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().replace("dog", "cow", 1).replace("cow", "god", 1))
    with pytest.raises(UserError, match="made on other data"):
        train(other, stopped_run, "--resume")


def test_changed_settings_are_listed_and_used(stopped_run, text_file, capsys):
    """15: the run goes on with the new values from the windows already trained."""
    flags = ("--max-lr", "5e-3", "--total-batch-tokens", "128")
    assert train(text_file, stopped_run, "--resume", *flags) == 0
    out = capsys.readouterr().out
    assert "settings have changed: total_batch_tokens 64 -> 128, max_lr 0.01 -> 0.005" in out
    state = torch.load(stopped_run / "optimizer_00020.pt", weights_only=True)
    assert state["windows"] == 9 * 4 + 11 * 8
    assert state["optimizer"]["param_groups"][0]["lr"] <= 5e-3


def test_another_micro_batch_changes_rounding_only(stopped_run, text_file, undisturbed):
    """13: the same windows in each step, the losses to 1e-4."""
    assert train(text_file, stopped_run, "--resume", "--micro-batch", "4") == 0
    pairs = zip(*((folder / "log.txt").read_text().split("\n")[:-1] for folder in (stopped_run, undisturbed)))
    for ours, theirs in pairs:
        assert ours.split()[:2] == theirs.split()[:2]
        assert abs(float(ours.split()[2]) - float(theirs.split()[2])) <= 1e-4


def test_only_the_newest_checkpoints_and_milestones_stay(undisturbed):
    """25: two pairs to resume from, models at multiples of --keep-every, and the last one."""
    names = sorted(path.name for path in undisturbed.glob("*.pt"))
    assert names == [
        *("model_00006.pt", "model_00012.pt", "model_00018.pt", "model_00020.pt"),
        *("optimizer_00018.pt", "optimizer_00020.pt"),
    ]


def test_a_full_disk_ends_no_run_but_a_failed_last_save_does(text_file, tmp_path, monkeypatch, capsys):
    """20: a warning with free and needed space, tried again at the next save; exit 1 only after the last."""
    real, calls = checkpoint.save_atomically, []

    def full(contents):
        calls.append(contents)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        real(contents)

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    assert train(text_file, tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert out.count("warning: could not save") == 2 and "No space left on device (free " in out
    monkeypatch.setattr(
        checkpoint, "save_atomically", lambda *args: full(None, tmp_path / "x") or calls.clear()
    )
    calls.clear()

    def always(contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_atomically", always)
    with pytest.raises(Unfinished, match="final checkpoint could not be saved") as caught:
        train(text_file, tmp_path / "b")
    assert caught.value.exit_code == 1
    assert (tmp_path / "b" / "log.txt").read_bytes() == (tmp_path / "a" / "log.txt").read_bytes()


def test_a_file_size_limit_is_a_full_disk(text_file, tmp_path):
    """20: what the system says when a file may not grow is an error of torch.save's own kind, and no
    traceback.
    """
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt; from utils.errors import run_script\n"
        "sys.exit(run_script(train_gpt.main))"
    )
    process = run(
        "-c",
        code,
        *SETTINGS,
        "--data",
        text_file,
        "--log-dir",
        tmp_path,
        "--max-steps",
        "4",
        "--val-every",
        "0",
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert "warning: could not save step 3" in process.stdout
    assert (
        process.stderr.startswith("error: the final checkpoint could not be saved")
        and "Traceback" not in process.stderr
    )
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.tmp-*"))


def test_a_spike_is_an_outlier_of_128_accepted_norms():
    """27: no decision before 128 norms, an outlier is skipped and does not judge the next one, the state
    comes back.
    """
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        assert spikes.accepts(1.0 + 0.1 * (i % 2) + (99.0 if i == 3 else 0.0))
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        assert spikes.accepts(1.0 + 0.1 * (i % 2))
    assert not spikes.accepts(10.0) and not spikes.accepts(10.0)
    assert spikes.accepts(1.2) and spikes.num_skipped == 2
    again = SpikeFilter(5.0)
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.state_dict() == spikes.state_dict() and not again.accepts(10.0)
    assert SpikeFilter(0.0).accepts(1e30)


def test_too_many_spikes_end_the_run():
    """27: more than ten of a hundred are no single spikes."""
    spikes = SpikeFilter(5.0)
    for i in range(WINDOW):
        spikes.accepts(1.0 + 0.1 * (i % 2))
    for _ in range(10):
        assert not spikes.accepts(10.0)
    with pytest.raises(Diverged, match="11 of the last"):
        spikes.accepts(10.0)


def test_a_skipped_spike_leaves_the_weights_alone(text_file, tmp_path, monkeypatch, capsys):
    """27: with --skip-spikes the update of an outlier does not happen, is counted, and the run resumes
    exactly.
    """
    monkeypatch.setattr("utils.divergence.WINDOW", 4)
    seen = []
    real = SpikeFilter.accepts
    monkeypatch.setattr(
        SpikeFilter, "accepts", lambda self, norm: seen.append(norm) or (len(seen) != 7 and real(self, norm))
    )
    states = []
    real_update = train_gpt.update

    def watched(run, batches, progress):
        before = run.model.lm_head.weight.detach().clone()
        result = real_update(run, batches, progress)
        states.append(torch.equal(before, run.model.lm_head.weight))
        return result

    monkeypatch.setattr(train_gpt, "update", watched)
    assert train(text_file, tmp_path, "--skip-spikes", "1000") == 0
    assert [i for i, unchanged in enumerate(states) if unchanged] == [6]


def test_what_is_due_is_due_once_a_pass():
    """Every N steps and after the last, 0 never, and not again once it is in the log."""
    progress = Progress(step=10)
    assert progress.is_due("val", 5, last=False) and progress.is_due("val", 7, last=True)
    assert not progress.is_due("val", 3, last=False) and not progress.is_due("val", 0, last=True)
    progress.done.append("val")
    assert not progress.is_due("val", 5, last=False)
    progress.updated(4, 0.5)
    assert (progress.step, progress.windows, progress.done) == (11, 4, [])


@pytest.mark.slow
def test_chaos(text_file, tmp_path):
    """A run killed at twenty random instants, in updates, saves, evaluations and samples, ends as if nothing
    had been.
    """
    import random

    flags = (
        "--max-steps",
        "600",
        "--checkpoint-every",
        "4",
        "--val-every",
        "7",
        "--sample-every",
        "9",
        "--seed",
        "5",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(text_file, whole, *flags)
    assert undisturbed.communicate(timeout=300) and undisturbed.returncode == 0
    rng = random.Random(0)
    for number in range(20):
        process = start(text_file, killed, *flags, "--resume")
        for _ in range(rng.randrange(1, 40)):  # at least one line, so that every kill is of a live run
            process.stdout.readline()
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, f"complete after {number} kills: the run is too short for this test"
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        process.communicate(timeout=60)
    last = start(text_file, killed, *flags, "--resume")
    assert last.communicate(timeout=300) and last.returncode == 0
    assert_same_run(killed, whole, step=600)
