"""Several processes on this machine, over gloo: equal to one process, and gone in seconds when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import OFFLINE, ROOT, run
from tests.small_runs import TINY, assert_same_losses, tensors_of

DRIVER = Path(__file__).with_name("ddp_driver.py")
SETTINGS = (
    *(*TINY, "--micro-batch", "2", "--total-batch-tokens", "128", "--max-steps", "20", "--warmup-steps", "2"),
    *("--val-every", "5", "--sample-every", "0", "--checkpoint-every", "3"),
)


def torchrun(
    num_ranks: int, text_file: Path, log_dir: Path, *flags: str, agent=(), **environment
) -> subprocess.Popen:
    """Starts the watched training script under torchrun on this machine."""
    agent = agent or ("--standalone",)
    command = [sys.executable, "-m", "torch.distributed.run", *agent, f"--nproc_per_node={num_ranks}", DRIVER]
    log_dir.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*map(str, command), *SETTINGS, "--data", str(text_file), "--log-dir", str(log_dir), *flags],
        env={**os.environ, **OFFLINE, "WATCH": str(log_dir), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 90) -> str:
    """Waits for a job and returns what it printed; a job that hangs is killed and fails the test."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the job hung: " + process.communicate()[0][-3000:]) from None


def finished(num_ranks: int, text_file: Path, log_dir: Path, *flags: str, **environment) -> Path:
    """A job that must succeed; its log directory."""
    process = torchrun(num_ranks, text_file, log_dir, *flags, **environment)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    return log_dir


def windows_of(log_dir: Path, num_ranks: int, windows_per_step: int = 8, steps: int = 20) -> list[list[int]]:
    """Windows of each step, in the order of micro-steps and ranks. The last, prefetched batch is left out."""
    ranks = [
        [json.loads(x) for x in (log_dir / f".windows_{r}.jsonl").read_text().splitlines()]
        for r in range(num_ranks)
    ]
    flat = [number for batches in zip(*ranks) for batch in batches for number in batch]
    return [flat[i * windows_per_step : (i + 1) * windows_per_step] for i in range(steps)]


@pytest.fixture(scope="module")
def jobs(short_text, tmp_path_factory) -> dict[int, Path]:
    """The same 20 steps as 1 process x accumulation 4, 2 x 2 and 4 x 1."""
    folder = tmp_path_factory.mktemp("jobs")
    return {n: finished(n, short_text, folder / str(n)) for n in (1, 2, 4)}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_gradients_of_one_process(num_ranks, jobs):
    """First step, per tensor: the norm of the difference over the norm is below 1e-5, on every rank."""
    expected = torch.load(jobs[1] / ".gradients_0.pt", weights_only=True)
    for rank in range(num_ranks):
        ours = torch.load(jobs[num_ranks] / f".gradients_{rank}.pt", weights_only=True)
        for mine, theirs in zip(ours, expected):
            assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_losses_of_one_process(num_ranks, jobs):
    """Twenty steps and five validations: the same lines, the values to 1e-4."""
    assert_same_losses(jobs[num_ranks], jobs[1])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_train_on_the_windows_of_one_process(num_ranks, jobs):
    """Every step has the same windows in the same order, across the end of an epoch."""
    assert windows_of(jobs[num_ranks], num_ranks) == windows_of(jobs[1], 1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_nodes_train_as_one(short_text, jobs, tmp_path):
    """Two torchrun agents on loopback, no shared folder: the losses of one process; only rank 0 writes."""
    agent = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=gpt")
    nodes = [torchrun(1, short_text, tmp_path / str(i), agent=agent) for i in range(2)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    written = [folder for folder in (tmp_path / "0", tmp_path / "1") if (folder / "log.txt").exists()]
    assert len(written) == 1
    assert_same_losses(written[0], jobs[1])


@pytest.mark.parametrize("fault", ["raise", "kill", pytest.param("exit", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_job(fault, short_text, tmp_path):
    """In seconds, no success, the root cause in the output, earlier checkpoints whole, no half file."""
    started = time.monotonic()
    process = torchrun(2, short_text, tmp_path, FAULT=f"{fault}@7:1")
    output = finish(process, timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - started < 45
    if fault == "raise":
        assert "planted fault" in output and "rank 1 failed at step 7:" in output
    assert sorted(path.name for path in tmp_path.glob("model_*")) == ["model_00003.pt", "model_00006.pt"]
    assert tensors_of(tmp_path / "model_00006.pt")
    assert not list(tmp_path.glob(".*.tmp-*"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(short_text, tmp_path):
    """After --dist-timeout seconds the others end the job."""
    process = torchrun(2, short_text, tmp_path, "--dist-timeout", "6", FAULT="hang@4:1")
    output = finish(process, timeout=60)
    assert process.returncode != 0 and "imed out" in output


def test_a_loss_that_is_no_number_on_one_rank_stops_all(short_text, tmp_path):
    """The message names rank, place in the data and text, once; the broken step leaves no checkpoint."""
    output = finish(torchrun(2, short_text, tmp_path, FAULT="nan@7:1"))
    assert output.count("error: non-finite loss at step 7 (rank 1, micro-step 0, ") == 1, output
    assert "text.txt position " in output
    assert "Traceback (most recent call last):\n  File" not in output.split("error: ")[0]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == ["model_00003.pt", "model_00006.pt"]


@pytest.mark.slow
def test_a_save_may_take_longer_than_the_timeout(short_text, tmp_path):
    """The other ranks wait for rank 0's save with more patience than for each other."""
    flags = ("--max-steps", "3", "--dist-timeout", "4")
    finished(2, short_text, tmp_path, *flags, SLOW_SAVE="4")
    assert (tmp_path / "model_00003.pt").exists()


def test_a_port_that_is_taken_is_one_error(tmp_path):
    """Exit 1 with the address and a hint, not a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = dict(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        process = run(ROOT / "train_gpt.py", "--device", "cpu", "--log-dir", tmp_path, **variables)
    assert process.returncode == 1
    assert f"error: rank 0 cannot join the job at 127.0.0.1:{port}" in process.stderr
    assert "--master_port" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("target", ["launcher", pytest.param("one worker", marks=pytest.mark.slow)])
def test_a_signal_stops_all_ranks_together(target, short_text, tmp_path, jobs):
    """SIGTERM to torchrun or to one worker: all agree, rank 0 saves, and resumed it is the same run."""
    if target == "launcher":
        process = torchrun(2, short_text, tmp_path)
        for line in process.stdout:
            if "step     6 |" in line:
                break
        process.send_signal(signal.SIGTERM)
    else:
        process = torchrun(2, short_text, tmp_path, FAULT="sigterm@6:1")
    output = finish(process, timeout=60)
    assert "received SIGTERM: saved" in output, output
    finished(2, short_text, tmp_path, "--resume")
    assert (tmp_path / "log.txt").read_bytes() == (jobs[2] / "log.txt").read_bytes()


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_killed_and_resumed_ranks_are_the_same_run(num_ranks, short_text, tmp_path):
    """Bitwise with 2 and with 3 ranks, where DDP's rebuilt buckets would show: log, weights and moments."""
    flags = ("--total-batch-tokens", "96", "--micro-batch", "1", "--max-steps", "10")
    whole = finished(num_ranks, short_text, tmp_path / "whole", *flags)
    process = torchrun(num_ranks, short_text, tmp_path / "killed", *flags, FAULT="kill@5:0")
    finish(process)
    finished(num_ranks, short_text, tmp_path / "killed", *flags, "--resume")
    assert (tmp_path / "killed" / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in ("model_00010.pt", "optimizer_00010.pt"):
        ours, theirs = tensors_of(tmp_path / "killed" / name), tensors_of(whole / name)
        assert all(torch.equal(ours[place], theirs[place]) for place in theirs)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(short_text, tmp_path, jobs):
    """Two ranks, then one, then two: the same windows, the losses to 1e-4, and a line that says so."""
    finish(torchrun(2, short_text, tmp_path, FAULT="kill@5:0"))
    output = finish(torchrun(1, short_text, tmp_path, "--resume", FAULT="kill@11:0"))
    assert "world size 2 -> 1: continuing, results equal to rounding only" in output
    finished(2, short_text, tmp_path, "--resume")
    assert_same_losses(tmp_path, jobs[1])


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(short_text, tmp_path, jobs):
    """--max-restarts: a killed worker comes back and resumes without being told; the log is the same."""
    agent = ("--standalone", "--max-restarts=2")
    variables = dict(FAULT="kill@7:1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    process = torchrun(2, short_text, tmp_path, agent=agent, **variables)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert "model_00006.pt at step 6" in output
    assert (tmp_path / "log.txt").read_bytes() == (jobs[2] / "log.txt").read_bytes()


def test_workers_stop_when_their_launcher_is_killed(short_text, tmp_path):
    """SIGKILL of torchrun: the orphans save, leave within seconds and give up the log directory."""
    process = torchrun(2, short_text, tmp_path, "--max-steps", "100000", "--warmup-steps", "2")
    for line in process.stdout:
        if "step     3 |" in line:
            break
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    holder = json.loads((tmp_path / ".lock-holder").read_text())["pid"]
    while time.monotonic() < end:
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("an orphan went on")
    saved = max(int(path.stem[6:]) for path in tmp_path.glob("model_*.pt"))
    assert (tmp_path / f"optimizer_{saved:05d}.pt").exists()


def test_an_error_that_all_ranks_meet_is_said_once(short_text, tmp_path):
    """One error line and one hint a machine, for a setting and for a missing checkpoint."""
    for flags, message in (
        (
            ("--total-batch-tokens", "100"),
            "error: TOTAL_BATCH_TOKENS=100 is not a multiple of B*T*world_size = 2*16*2",
        ),
        (("--resume", str(tmp_path / "none.pt")), "error: no checkpoint at"),
    ):
        output = finish(torchrun(2, short_text, tmp_path, *flags))
        assert output.count(message) == output.count("hint: ") == 1, output
        assert 'Traceback (most recent call last):\n  File "' + str(DRIVER) not in output


def test_a_rank_whose_data_differs_is_named(short_text, tmp_path):
    """Every machine must hold the same files: the fingerprints are compared before the first step."""
    from utils.distributed import Distributed
    from utils.errors import UserError
    from utils.training.data_source import _check_ranks_agree

    class Stream:
        name = "shards"

        def __init__(self, value):
            self.value = value

        def fingerprint(self):
            return {"sha256": self.value}

    class OtherRank(Distributed):
        def broadcast(self, value):
            return [{"sha256": "theirs"}, {"sha256": "theirs"}]

    with pytest.raises(UserError, match="rank 1 sees other data"):
        _check_ranks_agree(
            Stream("mine"), Stream("mine"), OtherRank(torch.device("cpu"), rank=1, world_size=2)
        )


def test_alone_every_collective_is_the_identity():
    """One process needs no group: values come back as they were."""
    from utils.distributed import Distributed

    alone = Distributed(torch.device("cpu"))
    assert torch.equal(alone.mean(torch.tensor([2.0])), torch.tensor([2.0]))
    assert alone.sum_numbers(1, 2.5) == [1, 2.5] and alone.max_number(3) == 3
    assert alone.gather("x") == ["x"] and alone.broadcast("y") == "y" and alone.on_master(lambda: 7) == 7
    alone.barrier()


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}],
)
def test_half_an_environment_is_an_error(variables, monkeypatch):
    """torchrun's variables, set in part, name what is missing instead of waiting for ever."""
    from utils.distributed import start
    from utils.errors import UserError

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT not set") as caught:
        with start(torch.device("cpu")):
            pass
    assert caught.value.one_rank_only  # the others may have them all
