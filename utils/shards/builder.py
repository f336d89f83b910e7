"""From a row of tokens to shards: how many go into which, and what is kept when something goes wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Callable

from utils.errors import Unfinished, UserError
from utils.shards.documents import Position, parts_from, read_documents
from utils.shards.encoder import agrees_with_reference, ways_here
from utils.shards.format import write_shard
from utils.shards.manifest import FILE_NAME, Manifest
from utils.shards.workers import TokenQueue

SMALL_VAL_PART = 0.01  # of a corpus that does not fill two shards
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 100, 100_000  # compared with tiktoken's own ids before each build


def choose_way(source, text_field: str, position: Position) -> str:
    """The fastest way to encode that gives tiktoken's own ids for the first documents; says so.

    Args:
        source: LocalFiles or HubFiles.
        position: where the build starts.
    """
    from tqdm import tqdm

    part = next(parts_from(source, text_field, position), None)
    texts = read_documents(part, text_field).texts[:SAMPLE_DOCUMENTS] if part else []
    texts = [text[:SAMPLE_CHARACTERS] for text in texts]
    for way in ways_here():
        if agrees_with_reference(texts, way):
            tqdm.write(f"encoder: {way}, compared with tiktoken on the first {len(texts)} documents")
            return way
        tqdm.write(f"warning: {way} and tiktoken differ here; going on without it", file=sys.stderr)
    raise AssertionError("tiktoken differs from itself")


def val_length(queue: TokenQueue, total: int | None, shard_tokens: int, val_tokens: int | None) -> int:
    """Tokens of the val shard.

    Args:
        queue: holds the corpus, or its first two shards.
        total: tokens of the corpus if it does not fill two shards, else None.
        val_tokens: `--val-tokens`.

    Returns:
        A whole shard; or, where val_tokens is given or the corpus is small, the length of the first documents
        up to the limit, of one at least. A first document that is all there is, or does not fit a shard, is
        cut at the limit.
    """
    if val_tokens is None and total is None:
        return shard_tokens
    limit = max(1, int(total * SMALL_VAL_PART)) if val_tokens is None else val_tokens
    ends = queue.document_starts(queue.num_tokens)[1:]  # but for the last, a document ends where one starts
    fitting = ends[ends <= limit]
    if len(fitting):
        return int(fitting[-1])
    if len(ends) and ends[0] <= shard_tokens:
        return int(ends[0])
    return min(limit, max(1, queue.num_tokens - 1))


def write_next(manifest: Manifest, queue: TokenQueue, num_tokens: int) -> None:
    """Moves tokens from the queue into the next shard. Raises Unfinished if the disk does not take them."""
    path = manifest.folder / manifest.next_name()
    try:
        sha256 = write_shard(path, queue.take(num_tokens), num_tokens)
        manifest.add(sha256, num_tokens, queue.documents, queue.position)
    except OSError as error:
        raise cannot_write(path, 2 * num_tokens, error) from error


def cannot_write(path: Path, need: int, error: OSError) -> Unfinished:
    """What a full disk, or the like, looks like to the user."""
    free = shutil.disk_usage(path.parent).free
    return Unfinished(
        f"cannot write {path}: {error.strerror or error} "
        f"(free {free / 1e6:,.0f} MB, need {need / 1e6:,.0f} MB)",
        "finished shards are kept; make room and run the same command again to continue",
    )


def rebuild(manifest: Manifest, index: int, queue: TokenQueue) -> None:
    """Builds a recorded shard that is missing once more. Raises UserError if other bytes come out."""
    record = manifest.shards[index]
    path = manifest.folder / record["name"]
    print(f"{record['name']} is missing or damaged: building it again")
    count = min(record["tokens"], queue.fill(record["tokens"]))
    try:
        sha256 = write_shard(path, queue.take(count), count)
    except OSError as error:
        raise cannot_write(path, 2 * count, error) from error
    if sha256 != record["sha256"]:
        path.unlink()
        raise UserError(
            f"{path.name} came out different from the first time (SHA-256 {sha256}, "
            f"{FILE_NAME} says {record['sha256']})",
            "the input has changed: build into another --output-dir",
        )


def pack(
    manifest: Manifest,
    queue: TokenQueue,
    max_shards: int | None,
    on_shard: Callable[[int], object] = lambda number: None,
) -> None:
    """Writes shard after shard until the corpus ends or `max_shards` are there.

    Args:
        manifest: of the folder; each shard is recorded in it.
        queue: from the end of the last finished shard on.
        on_shard: called with the number of each shard that is begun.

    Raises:
        UserError: bad input, or none.
        Unfinished: the disk is full, a worker died.
    """
    size, val_tokens = manifest.settings["shard_tokens"], manifest.settings["val_tokens"]
    if not manifest.shards:
        on_shard(0)
        available = queue.fill(2 * size)  # only then is it known how large val must be
        if available == 0:
            raise UserError("the input has no documents", "give --input text")
        total = available if available < 2 * size else None
        write_next(manifest, queue, val_length(queue, total, size, val_tokens))
    while len(manifest.shards) < (max_shards or sys.maxsize):
        on_shard(len(manifest.shards))
        available = queue.fill(size)
        if available == 0:
            manifest.complete = True
            manifest.save()
            return
        write_next(manifest, queue, min(size, available))
