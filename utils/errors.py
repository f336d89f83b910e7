"""What a user sees when something is wrong: one `error:` line, one `hint:` line, an exit code.

Exit codes of every script: 0 the work is complete; 1 unexpected exception (a traceback); 2 the user must
change something (flag, file, device, missing resource); 3 the run diverged; 130 / 143 stopped by SIGINT /
SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Callable


class UserError(ValueError):
    """Something that only the user can put right.

    Args:
        what: the `error:` line: what is wrong, the value, what was expected and what was found.
        hint: the `hint:` line: what to run or to change.
        one_rank_only: other ranks may not meet it, so this rank must report it itself.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str, one_rank_only: bool = False):
        super().__init__(what)
        self.hint = hint
        self.one_rank_only = one_rank_only


class Diverged(UserError):
    """The loss or the gradient norm is no longer a finite number."""

    exit_code = 3


class Unfinished(UserError):
    """The work is not complete, through no fault of the user's; the same command may finish it."""

    exit_code = 1


def run_script(main: Callable[[], int | None], local_rank: int = 0) -> int:
    """Runs a script's `main` and turns its errors into two lines on stderr. Returns the exit code.

    An error that all ranks meet alike is printed once a machine.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that has no such letter ends no run
    try:
        return main() or 0
    except UserError as error:
        if local_rank == 0 or error.one_rank_only:
            sys.stdout.flush()
            print(f"error: {error}\nhint: {error.hint}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    except Exception:
        if not _is_in_a_job():
            raise
        traceback.print_exc()
        code = 1
    if _is_in_a_job():
        # Others may be waiting in a collective, and NCCL would wait for them before it lets this process go.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_in_a_job() -> bool:
    torch = sys.modules.get("torch")  # where it is not imported, there is no job
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
