"""Parquet files of a data set on the Hugging Face hub, one file at a time.

A data set is pinned to one revision when a build starts; names and sizes of its files go into the manifest,
so that continuing needs the network only for files that are not in the hub's cache yet. Short failures (429,
5xx, dropped connections) are waited out; `HF_ENDPOINT`, `HF_HOME` and the client's other variables count.
"""

from __future__ import annotations

import fnmatch
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable

from utils.errors import Unfinished, UserError

RETRY_SECONDS = (2, 8, 30, 60)  # waits between attempts, beyond those of the client itself
FIRST_CONTACT_SECONDS = 8  # longest wait between attempts while it is not known whether there is a network
OFFLINE_HINT = (
    "run once where there is a network, set HF_HOME to a filled cache, or give --input your own files"
)


class HubFiles:
    """The files of one subset at one revision.

    Args:
        description: as `resolve` made it and the manifest keeps it.
        read_ahead: fetch the next file while one is in use.
    """

    def __init__(self, description: dict[str, Any], read_ahead: bool = False):
        self.description, self.read_ahead = description, read_ahead
        self.names = [name for name, _ in description["files"]]
        self.kinds = ["parquet"] * len(self.names)
        self._coming: tuple[int, threading.Thread] | None = None

    @classmethod
    def resolve(cls, dataset: str, subset: str, revision: str | None, read_ahead: bool = False) -> HubFiles:
        """Asks the hub which files a subset has and which commit `revision` (default main) is now.

        Raises:
            UserError: no network, no such data set, revision or subset.
            Unfinished: the hub keeps failing.
        """
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint())
        info = _patiently(lambda: api.dataset_info(dataset, revision=revision), dataset, first_contact=True)
        names = _files_of_subset(dataset, subset, info)
        entries = _patiently(
            lambda: api.get_paths_info(dataset, names, repo_type="dataset", revision=info.sha), dataset
        )
        sizes = {entry.path: entry.size for entry in entries}
        files = [[name, sizes.get(name, 0)] for name in names]
        return cls(
            dict(kind="hub", dataset=dataset, subset=subset, revision=info.sha, files=files), read_ahead
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_bytes(self) -> int:
        """Of all files, compressed as they are."""
        return sum(size for _, size in self.description["files"])

    def describe(self) -> dict[str, Any]:
        return self.description

    def path(self, index: int) -> Path:
        """Where file number `index` is on this machine, fetched if it is not there yet.

        Raises:
            UserError: offline, or the file is gone.
            Unfinished: the hub keeps failing.
        """
        if self._coming and self._coming[0] == index:
            self._coming[1].join()  # if that failed, the call below says why
        path = self._fetch(index)
        if self.read_ahead and index + 1 < len(self) and (self._coming or (0,))[0] != index + 1:
            # A daemon: Ctrl-C need not wait for gigabytes; the client's cache goes on with half a file.
            thread = threading.Thread(target=self._fetch_quietly, args=(index + 1,), daemon=True)
            thread.start()
            self._coming = (index + 1, thread)
        return path

    def _fetch_quietly(self, index: int) -> None:
        try:
            self._fetch(index)
        except UserError:
            pass

    def _fetch(self, index: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the build has one line of its own
        source = self.description

        def fetch() -> str:
            return hf_hub_download(
                source["dataset"],
                self.names[index],
                repo_type="dataset",
                revision=source["revision"],
                endpoint=_endpoint(),
            )

        return Path(_patiently(fetch, f"{source['dataset']}/{self.names[index]}"))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _files_of_subset(dataset: str, subset: str, info: Any) -> list[str]:
    """The parquet files that the data set's card gives to a subset, or those in a folder of that name."""
    names = sorted(file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet"))
    card = info.card_data.to_dict() if info.card_data else {}
    patterns = {
        config["config_name"]: _patterns(config.get("data_files")) for config in card.get("configs") or []
    }
    wanted = patterns.get(subset, [f"{subset}/*"])
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if not found:
        raise UserError(
            f"data set {dataset} has no parquet files for subset {subset!r}",
            f"its subsets: {', '.join(patterns) or 'none named on its card'}",
        )
    return found


def _patterns(data_files: Any) -> list[str]:
    """`data_files` of a card: a pattern, a list of them, or a list of splits with theirs (train's count)."""
    if data_files is None or isinstance(data_files, str):
        return [data_files] if data_files else []
    patterns = []
    for entry in data_files:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.get("split", "train") == "train":
            patterns += _patterns(entry["path"])
    return [pattern[:-2] + "*" if pattern.endswith("**") else pattern for pattern in patterns]


def _patiently(call: Callable[[], Any], what: str, first_contact: bool = False) -> Any:
    """Makes a call to the hub, and again after a wait if what went wrong may pass.

    Args:
        first_contact: nothing has come from the hub yet, so that a dead connection means no network.

    Raises:
        UserError, Unfinished: see `HubFiles`.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return call()
        except Exception as error:  # the client raises its own, httpx's, requests' and the system's
            # Offline, the cache and other words of the client stand in front of the cause.
            causes = _causes(error)
            status = next((code for code in map(_status, causes) if code), None)
            if status in (401, 403, 404):
                raise UserError(
                    f"cannot get {what}: {_first_line(error)}", "check --dataset and --revision"
                ) from error
            offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes)
            dead = first_contact and status is None and (seconds or 99) > FIRST_CONTACT_SECONDS
            if offline or dead:
                raise UserError(
                    f"cannot download {what}: no network ({_first_line(error)})", OFFLINE_HINT
                ) from error
            if seconds is None:
                raise Unfinished(
                    f"the hub keeps failing on {what}: {_first_line(causes[-1])}",
                    "finished shards are kept; run the same command again to continue",
                ) from error
            print(f"the hub failed ({_first_line(causes[-1])}); next attempt in {seconds} s", flush=True)
            time.sleep(seconds)
    return None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    return chain


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
