"""The first lines of every script: Ctrl-C ends it quietly while its slow imports run.

Imports only what Python itself has loaded when it starts, so that no interrupt arrives before the handler.
"""

import _signal  # the module signal imports enum and re
import os


def begin_script() -> None:
    """From here on, Ctrl-C ends with exit code 130 and no traceback; `prepare_console` does the rest.

    `run_script` replaces this by KeyboardInterrupt, which removes unfinished files, as long as `main` runs.
    """
    if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
        _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
    from utils.console import prepare_console

    prepare_console()
