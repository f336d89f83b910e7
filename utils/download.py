"""Downloads that are checked before they count: to a temporary name, compared by SHA-256, then renamed."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path

from utils.files import CHUNK_BYTES, sha256_of


def download(
    url: str, path: Path, sha256: str, num_bytes: int | None = None, timeout_seconds: float = 10
) -> None:
    """Fetches `url` to `path`, which appears only when it is complete and its checksum is right.

    Proxies are those of the environment. An existing `path` is replaced at the end, never before.

    Args:
        sha256, num_bytes: what the file must be.
        timeout_seconds: longest wait for the connection and for each piece of data.

    Raises:
        OSError: no network, an HTTP error, or a file that is not the expected one; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        opener = urllib.request.build_opener()  # urlopen would keep the proxies of its first call
        with opener.open(url, timeout=timeout_seconds) as response, open(part, "wb") as file:
            for chunk in iter(lambda: response.read(CHUNK_BYTES), b""):
                file.write(chunk)
        found_bytes, found_sha256 = part.stat().st_size, sha256_of(part)
        if found_sha256 != sha256 or num_bytes not in (None, found_bytes):
            raise OSError(
                f"{url} is not the expected file: {found_bytes:,} bytes, SHA-256 {found_sha256} "
                f"(expected {sha256})"
            )
        os.replace(part, path)
    except http.client.HTTPException as error:  # no OSError, as all other failures of the network are
        raise OSError(f"{url}: no proper answer ({error!r})") from error
    finally:
        part.unlink(missing_ok=True)
