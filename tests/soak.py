"""Interrupts training runs at random instants, and compares what they leave with an uninterrupted run.

    python -m tests.soak --minutes 10                  one process
    python -m tests.soak --minutes 10 --ranks 2        under torchrun: signals go to it or to one worker
    python -m tests.soak --jobs 30 --ranks 4           no signals: 30 jobs must end, with equal results

A run is started, ended by SIGKILL, SIGTERM, SIGHUP or SIGINT at an instant drawn from its whole duration
(imports, set-up, training, evaluation, saving, report), and continued by --resume, which is interrupted in
turn, until it exits with 0. Reads /proc, so it runs on Linux.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.conftest import OFFLINE, ROOT
from tests.small_runs import RESUMABLE, TEXT, differences
from utils.command_line import (
    ArgumentParser,
    Unfinished,
    format_count,
    format_duration,
    non_negative_int,
    positive_float,
    positive_int,
    run_script,
)

MAX_STEPS = 40
SETTINGS = (  # BPE tokens: with HellaSwag, and checkpoints that are large enough to be hit while written
    *(*RESUMABLE, "--tokenizer", "gpt2", "--total-batch-tokens", "128", "--max-steps", f"{MAX_STEPS}"),
    *("--val-every", "10", "--hellaswag-every", "7", "--hellaswag-dir", f"{ROOT / 'tests' / 'fixtures'}"),
)
# Exit codes while the script's handlers are installed.
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGINT: 130}
PHASES = ("before the log directory", "before the first update", "while training", "after the last update")
EARLIER_LOG = "0 val 4.0000\n"  # of a run without a checkpoint: the first start archives it
SECONDS_TO_END = 180  # for a complete job, and after a signal
# What a rank reports when another one, or the launcher with its store, has ended.
LOST_PEER = re.compile("onnection (closed|reset|refused)|Broken pipe|failed to recv|DistStoreError|TCPStore")


class Start:
    """One start of the script, alone or as a job of several ranks, with its output in files."""

    def __init__(self, folder: Path, ranks: int, *flags: str):
        self.log_dir, self.alone = folder / "log", ranks == 1
        self.outputs = folder / f"output_{len(list(folder.glob('output_*')))}"
        self.outputs.mkdir(parents=True)
        self.holder = self.log_dir / ".lock-holder"
        self.holder.unlink(missing_ok=True)  # then it tells whether this start has locked the log directory
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        agent += ["--redirects=3", f"--log-dir={self.outputs}"]  # a worker's output apart from torchrun's
        script = [ROOT / "train_gpt.py", *SETTINGS, "--data", folder.parent / "text.txt"]
        command = [sys.executable, *([] if self.alone else agent), *script, "--log-dir", self.log_dir, *flags]
        with open(self.outputs / ("std.log" if self.alone else "torchrun.txt"), "w") as file:
            self.process = subprocess.Popen(
                [*map(str, command)],
                env={**os.environ, **OFFLINE, "PYTHONFAULTHANDLER": "1"},
                **dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True),
            )

    def ends_within(self, seconds: float) -> bool:
        """Whether the process ends in that time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def workers(self) -> list[tuple[str, int]]:
        """Names and PIDs of the processes that torchrun has started, also of those that survive it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"\0{self.log_dir}\0".encode() in (folder / "cmdline").read_bytes():
                    if rank := re.search(rb"\0LOCAL_RANK=(\d+)", (folder / "environ").read_bytes()):
                        found.append((f"worker {rank[1].decode()}", int(folder.name)))
        return sorted(found)

    def interrupt(self, number: int, choice: float) -> str:
        """Sends a signal to the process; of a job to torchrun or a worker, as `choice` in [0, 1) tells."""
        workers, receiver = self.workers(), ("the process" if self.alone else "torchrun", self.process.pid)
        if workers and choice >= 0.5:
            receiver = workers[int((2 * choice - 1) * len(workers))]
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(receiver[1], number)
        return receiver[0]

    def problems(self, number: int | None = None) -> Iterator[str]:
        """Waits until all processes have ended, after the signal `number` if given; yields what is wrong."""
        end = time.monotonic() + SECONDS_TO_END
        while not self.ends_within(0.1) or self.workers():
            if time.monotonic() > end:
                yield f"has not ended after {SECONDS_TO_END} s"
                for _, pid in (*self.workers(), ("", self.process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGABRT)  # the outputs then tell where each thread was
                self.process.wait()
                break
            time.sleep(0.1)
        code, phase, output = self.process.returncode, self.phase(), self.output()
        starting = phase == PHASES[0] and ("train_gpt.py" not in output or "import begin_script" in output)
        allowed = {0} if number is None or phase == PHASES[3] else set()
        if number is not None:
            without_handler = starting if number == signal.SIGINT else phase == PHASES[0]
            allowed |= {EXIT_CODES[number], *([-number] if without_handler or phase == PHASES[3] else [])}
        if code not in allowed and (self.alone or number is None):  # torchrun has exit codes of its own
            yield f"exit code {code}"
        for error in re.findall(r"^Traceback.*\n(?:\s.*\n)*(.*)|^(error: .*)", output, re.MULTILINE):
            expected = number == signal.SIGINT and starting and error[0] == "KeyboardInterrupt"
            if not expected and (self.alone or not LOST_PEER.search("".join(error))):
                yield "".join(error)
        if self.holder.exists():
            own = re.findall(r'"pid": (\d+)', self.holder.read_text()) if number == signal.SIGKILL else []
            names = [path.name for path in self.log_dir.rglob(".*.tmp*")]
            yield from (f"{name} remains" for name in names if name.rpartition("-")[2] not in own)
        yield from (f"{path.name} exists" for path in self.log_dir.glob("*_00000.pt"))

    def output(self) -> str:
        """What the script printed, on all ranks; not what torchrun printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.outputs.rglob("*.log")))

    def phase(self) -> str:
        """How far the start came."""
        if not self.holder.exists():
            return PHASES[0]
        after = rf"^(already complete|resumed .* step {MAX_STEPS}$|step +{MAX_STEPS - 1} \| loss)"
        if re.search(after, self.output(), re.MULTILINE):
            return PHASES[3]
        return PHASES[2] if re.search(r"^step +\d+ \| loss", self.output(), re.MULTILINE) else PHASES[1]


def interrupted_run(
    folder: Path, ranks: int, rng: random.Random, seconds: float, interruptions: Counter
) -> list[str]:  # fmt: skip
    """Continues a run that takes `seconds` until it is complete; returns what is wrong. Interruptions are
    counted by signal, phase and receiver."""
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "log.txt").write_text(EARLIER_LOG)
    problems, flags, done = [], [], False
    while not (done or problems):
        number, instant, choice = rng.choice(list(EXIT_CODES)), rng.uniform(0, seconds), rng.random()
        start, flags = Start(folder, ranks, *flags), ["--resume"]
        receiver = None if start.ends_within(instant) else start.interrupt(number, choice)
        problems = list(start.problems(number if receiver else None))
        where = f"{start.outputs}, {number.name} to {receiver} after {instant:.2f} s, {start.phase()}"
        problems = [f"{where}: {problem}" for problem in problems]
        if receiver:
            interruptions[number.name, start.phase(), receiver] += 1
        done = start.process.returncode == 0
    if not problems and EARLIER_LOG not in [p.read_text() for p in folder.glob("log/archive/*/log.txt")]:
        problems.append(f"{folder}: the earlier log.txt is lost")
    return problems


def differences_of(log_dir: Path, expected: Path) -> list[str]:
    """What differs between two complete runs."""
    found = differences(log_dir, expected, MAX_STEPS, with_rng=True)
    report = log_dir / "report.md"
    if not report.exists() or f"| steps | {MAX_STEPS} |" not in report.read_text():
        found.append("report.md")
    return [f"{log_dir} differs in {name}" for name in found]


def soak(folder: Path, args: Namespace) -> int:
    """All runs or jobs, with a line for each, and a summary; returns how many have problems."""
    began, rng, interruptions = time.monotonic(), random.Random(args.seed), Counter()
    (folder / "text.txt").write_text(16 * TEXT)
    whole = Start(folder / "whole", args.ranks)
    if problems := list(whole.problems()):
        raise Unfinished(f"the uninterrupted run failed: {problems}", f"see {whole.outputs}")
    seconds, number, num_bad = time.monotonic() - began, 0, 0
    print(f"uninterrupted: {seconds:.1f} s", flush=True)
    while number < args.jobs if args.jobs else not number or time.monotonic() - began < 60 * args.minutes:
        run_began, run, before = time.monotonic(), folder / f"run_{number:03d}", interruptions.total()
        if args.jobs:
            start = Start(run, args.ranks)
            problems = [f"{start.outputs}: {problem}" for problem in start.problems()]
        else:
            problems = interrupted_run(run, args.ranks, rng, seconds, interruptions)
        problems = problems or differences_of(run / "log", whole.log_dir)
        count, duration = interruptions.total() - before, time.monotonic() - run_began
        found = f"{format_count(count, 'interruption')}, {format_count(len(problems), 'problem')}"
        print(f"{run.name}: {found}, {duration:.1f} s")
        print("".join(f"    {problem}\n" for problem in problems), end="", flush=True)
        if not problems:
            shutil.rmtree(run)
        if not count:
            seconds = min(seconds, duration)  # the first one was slow, as on a busy machine
        number, num_bad = number + 1, num_bad + bool(problems)
    what = f"{number} runs, {num_bad} with problems, {interruptions.total()} interruptions"
    print(f"{what}, seed {args.seed}, {format_duration(time.monotonic() - began)}")
    for key, count in sorted(interruptions.items()):
        print(f"{count:5d} x {key[0]} to {key[2]}, {key[1]}")
    return num_bad


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="-m tests.soak", description="Interrupt training runs at random instants.")
    parser.add_argument("--minutes", type=positive_float, default=10, help="time for interrupted runs")
    parser.add_argument("--ranks", type=positive_int, default=1, help="processes of a run")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of all random choices")
    parser.add_argument("--jobs", type=positive_int, help="instead, this many jobs without interruptions")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    if num_bad := soak(folder, args):
        what = f"{format_count(num_bad, 'run')} with problems, see above"
        raise Unfinished(what, f"logs and outputs are in {folder}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
