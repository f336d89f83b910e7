"""Several processes over gloo give the results of one, and all end within seconds when one of them dies."""

from __future__ import annotations

import json
import os
import re
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
from utils.command_line import UserError
from utils.distributed import Distributed, join_job

DRIVER = Path(__file__).with_name("ddp_driver.py")
MUON = ("--optimizer", "muon", "--schedule", "linear")
SETTINGS = (
    *(*TINY, "--micro-batch", "2", "--total-batch-tokens", "128", "--max-steps", "20", "--warmup-steps", "2"),
    *("--val-every", "5", "--sample-every", "0", "--checkpoint-every", "3"),
)


def torchrun(
    num_ranks: int,
    text_file: Path,
    log_dir: Path,
    *flags: str,
    agent: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen:
    """Starts ddp_driver.py under torchrun on this machine; `agent` are flags of torchrun."""
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


def own_lines(output: str, *starts: str) -> list[str]:
    """Lines of the ranks that begin so; those of torchrun's last block are indented."""
    return [line for line in output.splitlines() if line.startswith(starts)]


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Waits for a job and returns its output; a job that hangs is killed, and the test fails."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the job hung: " + process.communicate()[0][-3000:]) from None


def finished(num_ranks: int, text_file: Path, log_dir: Path, *flags: str, **environment: str) -> Path:
    """Runs a job that must succeed; returns its log directory."""
    process = torchrun(num_ranks, text_file, log_dir, *flags, **environment)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    return log_dir


def windows_of(log_dir: Path, num_ranks: int, windows_per_step: int = 8, steps: int = 20) -> list[list[int]]:
    """Windows of each step, in the order of micro-steps and ranks, without the last, prefetched batch."""
    ranks = [
        [json.loads(x) for x in (log_dir / f".windows_{r}.jsonl").read_text().splitlines()]
        for r in range(num_ranks)
    ]
    flat = [number for batches in zip(*ranks) for batch in batches for number in batch]
    return [flat[i * windows_per_step : (i + 1) * windows_per_step] for i in range(steps)]


class Jobs(dict[int, Path]):
    """Log directories of the same 20 steps on n processes, each run when it is first asked for."""

    def __init__(self, text_file: Path, folder: Path):
        super().__init__()
        self.text_file, self.folder = text_file, folder

    def __missing__(self, n: int) -> Path:
        self[n] = finished(n, self.text_file, self.folder / str(n))
        return self[n]


@pytest.fixture(scope="module")
def jobs(short_text, tmp_path_factory) -> Jobs:
    """The same 20 steps on 1 process x accumulation 4, 2 x 2 and 4 x 1."""
    return Jobs(short_text, tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_gradients_of_one_process(num_ranks, jobs):
    """In the first step, per tensor and on every rank, the relative norm of the difference is below 1e-5."""
    expected = torch.load(jobs[1] / ".gradients_0.pt", weights_only=True)
    for rank in range(num_ranks):
        ours = torch.load(jobs[num_ranks] / f".gradients_{rank}.pt", weights_only=True)
        for mine, theirs in zip(ours, expected):
            assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_losses_of_one_process(num_ranks, jobs):
    """Twenty steps and five validations: the same lines, with values equal to 1e-4."""
    assert_same_losses(jobs[num_ranks], jobs[1])


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_on_the_windows_of_one_process(num_ranks, jobs):
    """Every step has the same windows in the same order, also across the end of an epoch."""
    assert windows_of(jobs[num_ranks], num_ranks) == windows_of(jobs[1], 1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_train_as_one(short_text, jobs, tmp_path):
    """Two torchrun agents without a shared folder: the losses of one process, and only rank 0 writes."""
    agent = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=gpt")
    nodes = [torchrun(1, short_text, tmp_path / str(i), agent=agent) for i in range(2)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    written = [folder for folder in (tmp_path / "0", tmp_path / "1") if (folder / "log.txt").exists()]
    assert len(written) == 1
    assert_same_losses(written[0], jobs[1])


@pytest.mark.parametrize("fault", ["raise", "kill", pytest.param("exit", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(fault, short_text, tmp_path):
    """At once and not with 0: the cause is printed, earlier checkpoints and no partial file remain."""
    process = torchrun(2, short_text, tmp_path, "--dist-timeout", "6000", FAULT=f"{fault}@7:1")
    output = finish(process)  # whose limit is far below that of the ranks
    assert process.returncode != 0
    if fault == "raise":
        assert "injected fault" in output and "rank 1 failed at step 7:" in output
    assert sorted(path.name for path in tmp_path.glob("model_0*")) == ["model_00003.pt", "model_00006.pt"]
    assert tensors_of(tmp_path / "model_00006.pt")
    assert not list(tmp_path.glob(".*.tmp-*"))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout(short_text, tmp_path):
    """After --dist-timeout seconds the other ranks end the job."""
    process = torchrun(2, short_text, tmp_path, "--dist-timeout", "6", FAULT="hang@4:1")
    output = finish(process)
    assert process.returncode != 0 and "imed out" in output


@pytest.mark.slow
def test_a_non_finite_loss_on_one_rank_stops_all_ranks(short_text, tmp_path):
    """One message names rank, micro-step, position and text; no checkpoint is written after it."""
    output = finish(torchrun(2, short_text, tmp_path, FAULT="nan@7:1"))
    (error,) = own_lines(output, "error: ")
    assert error.startswith("error: non-finite loss at step 7 (rank 1, micro-step 0, ")
    assert "text.txt position " in output
    assert "Traceback (most recent call last):\n  File" not in output.split("error: ")[0]
    assert sorted(path.name for path in tmp_path.glob("model_0*")) == ["model_00003.pt", "model_00006.pt"]


@pytest.mark.slow
def test_a_save_may_take_longer_than_the_timeout(short_text, tmp_path):
    """--dist-timeout does not apply while the other ranks wait for rank 0 to save."""
    flags = ("--max-steps", "3", "--dist-timeout", "10")  # it also limits how far apart the ranks may start
    finished(2, short_text, tmp_path, *flags, SLOW_SAVE="15")
    assert (tmp_path / "model_00003.pt").exists()


def test_a_port_in_use_is_an_error_with_its_address(tmp_path):
    """Exit code 1 with the address and a hint, without a traceback."""
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


@pytest.mark.parametrize("target", ["launcher", "one worker"])
@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_ranks_after_saving(target, short_text, tmp_path, jobs):
    """SIGTERM to torchrun or to one worker; the resumed job writes the log of an uninterrupted one."""
    if target == "launcher":
        process = torchrun(2, short_text, tmp_path, FAULT="wait@7:0")
        for line in process.stdout:
            if "step     6 |" in line:
                break
        process.send_signal(signal.SIGTERM)
    else:
        process = torchrun(2, short_text, tmp_path, FAULT="sigterm@6:1")
    output = finish(process)
    assert "received SIGTERM: saved" in output, output
    finished(2, short_text, tmp_path, "--resume")
    assert (tmp_path / "log.txt").read_bytes() == (jobs[2] / "log.txt").read_bytes()


@pytest.mark.parametrize(
    ("num_ranks", "recipe"),
    [
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(1, MUON, marks=pytest.mark.slow),
        pytest.param(2, MUON, marks=pytest.mark.slow),
    ],
)
def test_a_killed_job_is_resumed_bitwise(num_ranks, recipe, short_text, tmp_path):
    """Log, weights and moments; with 3 ranks DDP's rebuilt buckets would change the order of the sums."""
    flags = ("--total-batch-tokens", "96", "--micro-batch", "1", "--max-steps", "10", *recipe)
    whole = finished(num_ranks, short_text, tmp_path / "whole", *flags)
    process = torchrun(num_ranks, short_text, tmp_path / "killed", *flags, FAULT="kill@5:0")
    finish(process)
    finished(num_ranks, short_text, tmp_path / "killed", *flags, "--resume")
    assert (tmp_path / "killed" / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in ("model_00010.pt", "optimizer_00010.pt"):
        ours, theirs = tensors_of(tmp_path / "killed" / name), tensors_of(whole / name)
        assert all(torch.equal(ours[place], theirs[place]) for place in theirs)
        assert any(".muon." in place for place in theirs) is (recipe == MUON and name.startswith("optimizer"))


@pytest.mark.slow
def test_ranks_with_muon_give_the_losses_of_one_process(short_text, tmp_path):
    """Each rank orthogonalises the same summed gradients: 20 steps of 1 and 2 ranks agree to 1e-4."""
    one, two = (finished(n, short_text, tmp_path / str(n), *MUON) for n in (1, 2))
    assert_same_losses(two, one)


@pytest.mark.slow
def test_a_run_can_be_resumed_with_another_number_of_ranks(short_text, tmp_path, jobs):
    """Two ranks, then one, then two: a warning, and losses equal to 1e-4."""
    finish(torchrun(2, short_text, tmp_path, FAULT="kill@5:0"))
    output = finish(torchrun(1, short_text, tmp_path, "--resume", FAULT="kill@11:0"))
    assert "world size 2 -> 1: continuing, results equal to rounding only" in output
    finished(2, short_text, tmp_path, "--resume")
    assert_same_losses(tmp_path, jobs[1])


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(short_text, tmp_path, jobs):
    """With --max-restarts a killed worker resumes without --resume, and the log is that of one run."""
    agent = ("--standalone", "--max-restarts=2")
    variables = dict(FAULT="kill@7:1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    process = torchrun(2, short_text, tmp_path, agent=agent, **variables)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert "model_00006.pt at step 6" in output
    assert (tmp_path / "log.txt").read_bytes() == (jobs[2] / "log.txt").read_bytes()


@pytest.mark.slow
def test_workers_stop_when_their_launcher_is_killed(short_text, tmp_path):
    """After SIGKILL of torchrun they save and exit within seconds."""
    process = torchrun(2, short_text, tmp_path, "--max-steps", "100000", "--log-every", "1")
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
        raise AssertionError("a worker is still running")
    saved = max(int(path.stem[6:]) for path in tmp_path.glob("model_0*.pt"))
    assert (tmp_path / f"optimizer_{saved:05d}.pt").exists()


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(short_text, tmp_path):
    """One error line and one hint per machine; torchrun's own last block repeats it as the cause."""
    for flags, message in (
        (
            ("--total-batch-tokens", "100"),
            "error: --total-batch-tokens 100 is not a multiple of --micro-batch * --seq-len * ranks = 2*16*2",
        ),
        (("--resume", str(tmp_path / "none.pt")), "error: no checkpoint at"),
    ):
        output = finish(torchrun(2, short_text, tmp_path, *flags))
        assert own_lines(output, "error: ")[0].startswith(message), output
        assert len(own_lines(output, "error: ", "hint: ")) == 2, output
        assert f"traceback : {message}" in output.split("Root Cause (first observed failure):")[1]
        assert 'Traceback (most recent call last):\n  File "' + str(DRIVER) not in output


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        pytest.param(
            *(("--warmup-steps", "3"), "--warmup-steps is 2 on rank 0, 3 on rank 1"), marks=pytest.mark.slow
        ),
        pytest.param(
            *(("--total-batch-tokens", "64"), "--total-batch-tokens is 128 on rank 0, 64 on rank 1"),
            marks=pytest.mark.slow,
        ),
        (("--val-every", "7", "--skip-spikes", "4"), "--skip-spikes is 0.0 on rank 0, 4.0 on rank 1; --val-"),
    ],
)
def test_ranks_with_different_settings_are_refused(flags, difference, short_text, tmp_path):
    """Before the first step, on every rank, with flag, ranks and values: silently they would train another
    run, or wait for each other."""
    processes = []
    port = str(free_port())
    for rank in (0, 1):
        job = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        own = [*SETTINGS, "--data", short_text, "--log-dir", tmp_path, *(flags if rank else ())]
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, [ROOT / "train_gpt.py", *own])],
                env={**os.environ, **OFFLINE, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert f"error: the ranks differ: {difference}" in outputs[0] and outputs[0].count("hint: ") == 1
    assert not list(tmp_path.glob("*.pt"))


def test_alone_every_collective_is_the_identity():
    """One process needs no process group: every value is returned unchanged."""
    alone = Distributed(torch.device("cpu"))
    assert torch.equal(alone.mean(torch.tensor([2.0])), torch.tensor([2.0]))
    assert alone.sum_numbers(1, 2.5) == [1, 2.5] and alone.max_number(3) == 3
    assert alone.gather("x") == ["x"] and alone.broadcast("y") == "y" and alone.on_master(lambda: 7) == 7
    alone.barrier()


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}],
)
def test_incomplete_torchrun_variables_are_an_error(variables, monkeypatch):
    """The missing ones are named, instead of waiting for ranks that never join."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT not set") as caught:
        with join_job(torch.device("cpu")):
            pass
    assert caught.value.one_rank_only  # other ranks may have all of them


JOB = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1234")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("RANK", "abc"), ("RANK", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-2")),
        *(("LOCAL_RANK", "99999999999999999999"), ("LOCAL_RANK", "1.5")),
        *(("MASTER_PORT", "99999"), ("MASTER_PORT", "abc"), ("MASTER_PORT", "0"), ("MASTER_PORT", "")),
        ("TORCHELASTIC_RESTART_COUNT", "x"),
    ],
)
def test_a_variable_of_torchrun_that_is_no_number_is_named(name, text, monkeypatch):
    """Before the job is joined, which would wait, fail in torch, or end in a traceback."""
    for variable, value in {**JOB, name: text}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"environment variable {name}='{text}'"):
        with join_job(torch.device("cpu")):
            pass


def test_an_empty_address_is_a_missing_one(monkeypatch):
    """torch would look up the empty name."""
    for variable, value in {**JOB, "MASTER_ADDR": ""}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match="MASTER_ADDR not set"), join_job(torch.device("cpu")):
        pass


@pytest.mark.parametrize("script", ["train_gpt.py", "generate.py", "eval_hellaswag.py"])
@pytest.mark.slow
def test_a_wrong_rank_ends_every_script_in_two_lines(script, tmp_path):
    """Although it is read before anything else."""
    process = run(ROOT / script, "--help", LOCAL_RANK="abc")
    assert process.returncode == 2, process.stderr
    assert re.fullmatch("error: environment variable LOCAL_RANK='abc' .+\nhint: .+\n", process.stderr)
