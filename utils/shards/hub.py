"""Parquet files of a data set on the Hugging Face hub, one file at a time.

A data set is pinned to one revision when a build starts; names and sizes of its files go into the manifest,
so that a build needs the network to continue only for files that are not in the hub's cache yet. Short
failures (429, 5xx, dropped connections) are retried. `HF_ENDPOINT`, `HF_HOME` and the client's other
environment variables are respected.
"""

import fnmatch
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.command_line import Unfinished, UserError
from utils.console import announced, warn
from utils.shards.documents import TOKENS_PER_DOCUMENT, bytes_per_token

RETRY_SECONDS = (2, 8, 30, 60)  # waits between attempts, in addition to those of the client itself
FIRST_CONTACT_SECONDS = 8  # longest wait between attempts until the hub has answered once
# A name of a file that stays in the folder of its data set.
SAFE_NAME = re.compile(r"(?!/)(?!(.*/)?\.\.(/|$))[^\\\0]+")
OFFLINE_HINT = "run once with a network, set HF_HOME to a filled cache, or give --input your own files"


class HubFiles:
    """The files of one subset at one revision.

    Args:
        description: as `resolve` made it and the manifest stores it.
        read_ahead: download the next file while one is in use.
    """

    def __init__(self, description: dict[str, Any], *, read_ahead: bool = False):
        self.description, self.read_ahead = description, read_ahead
        self.names = [name for name, _ in description["files"]]
        self.kinds = ["parquet"] * len(self.names)
        self._downloads: dict[int, threading.Thread] = {}

    @classmethod
    def resolve(
        cls, dataset: str, subset: str, revision: str | None, *, read_ahead: bool = False
    ) -> "HubFiles":
        """Asks the hub for the files of a subset and the commit that `revision` (default main) is now.

        Raises UserError without a network, or such a data set, revision or subset; Unfinished as `path` does.
        """
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint())
        with announced(f"asking the hub for the files of {dataset}"):
            info = _retry(lambda: api.dataset_info(dataset, revision=revision), dataset, first_contact=True)
            names = _files_of_subset(dataset, subset, info)
            where = dict(repo_type="dataset", revision=info.sha)
            entries = _retry(lambda: api.get_paths_info(dataset, names, **where), dataset)
        sizes = {entry.path: entry.size for entry in entries}
        files = [[name, sizes.get(name, 0)] for name in names]
        description = dict(kind="hub", dataset=dataset, subset=subset, revision=info.sha, files=files)
        return cls(description, read_ahead=read_ahead)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_bytes(self) -> int:
        """Size of all files, compressed as they are."""
        return sum(size for _, size in self.description["files"])

    def describe(self) -> dict[str, Any]:
        return self.description

    def estimate(self, text_field: str) -> tuple[int, int]:
        num_tokens = int(self.num_bytes / bytes_per_token("parquet"))
        return num_tokens, num_tokens // TOKENS_PER_DOCUMENT

    def checksums(self) -> None:
        return None

    def path(self, index: int) -> Path:
        """File number `index` on this machine, downloaded if it is not in the hub's cache.

        Raises UserError if offline or if the file no longer exists, Unfinished if the hub keeps failing.
        """
        with announced(f"downloading {self.names[index]}"):
            if index in self._downloads:
                self._downloads[index].join()  # if it failed, the call below raises the reason
            path = self._download(index)
        following = index + 1
        if self.read_ahead and following < len(self) and following not in self._downloads:
            # A daemon, so that Ctrl-C need not wait for gigabytes; the client can resume half a file.
            thread = threading.Thread(target=self._try_download, args=(following,), daemon=True)
            self._downloads[following] = thread
            thread.start()
        return path

    def _try_download(self, index: int) -> None:
        with suppress(UserError):
            self._download(index)

    def _download(self, index: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the build has its own
        dataset, name = self.description["dataset"], self.names[index]
        where = dict(repo_type="dataset", revision=self.description["revision"], endpoint=_endpoint())
        return Path(_retry(lambda: hf_hub_download(dataset, name, **where), f"{dataset}/{name}"))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _files_of_subset(dataset: str, subset: str, info: Any) -> list[str]:
    """The parquet files that the data set's card assigns to a subset, or those in a folder of that name."""
    names = sorted(file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet"))
    if unsafe := [name for name in names if not SAFE_NAME.fullmatch(name)]:
        raise UserError(f"data set {dataset} has a file named {unsafe[0]!r}", "use another --dataset")
    card = info.card_data.to_dict() if info.card_data else {}
    configs = card.get("configs") or []
    patterns = {config["config_name"]: _patterns(config.get("data_files")) for config in configs}
    wanted = patterns.get(subset, [f"{subset}/*"])
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if not found:
        hint = f"its subsets: {', '.join(patterns) or 'none named on its card'}"
        raise UserError(f"data set {dataset} has no parquet files for subset {subset!r}", hint)
    return found


def _patterns(data_files: Any) -> list[str]:
    """`data_files` of a card: a pattern, a list of them, or a list of splits with theirs (only train's)."""
    patterns = []
    for entry in [data_files] if isinstance(data_files, str) else data_files or []:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.get("split", "train") == "train":
            patterns += _patterns(entry["path"])
    return patterns


def _retry(call: Callable[[], Any], what: str, *, first_contact: bool = False) -> Any:
    """Calls the hub, and again after a wait if the failure may be temporary.

    `what` names the data set or file in messages. `first_contact`: the hub has not answered yet, so that a
    dead connection means no network. Raises UserError or Unfinished, see `HubFiles`.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return call()
        except Exception as error:  # the client raises its own, httpx's, requests' and the system's
            # The cause may be hidden behind exceptions of the client's cache and offline mode.
            causes = [error]
            while cause := causes[-1].__cause__ or causes[-1].__context__:
                causes.append(cause)
            responses = [getattr(cause, "response", None) for cause in causes]
            status = next((r.status_code for r in responses if hasattr(r, "status_code")), None)
            if status in (401, 403, 404):
                hint = "check --dataset and --revision"
                raise UserError(f"cannot get {what}: {_first_line(error)}", hint) from error
            offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes)
            waited = seconds is None or seconds > FIRST_CONTACT_SECONDS
            if offline or (first_contact and status is None and waited):
                problem = f"cannot download {what}: no network ({_first_line(error)})"
                raise UserError(problem, OFFLINE_HINT) from error
            reason = _first_line(causes[-1])
            if seconds is None:
                hint = "finished shards are kept; run the same command again to continue"
                raise Unfinished(f"the hub keeps failing on {what}: {reason}", hint) from error
            warn(f"the hub failed ({reason}); next attempt in {seconds} s")
            time.sleep(seconds)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
