"""A corpus as a row of tokens from any position on, tokenized by several processes.

The parent process hands out parts of files, a few at a time; workers read and tokenize them and give back
arrays; the parent takes the arrays in the order of the corpus. Workers are spawned, which works alike on
every system, and end with their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Iterator, NamedTuple

import numpy as np

from utils.errors import Unfinished, UserError
from utils.shards.documents import Part, Position, parts_from, read_documents
from utils.shards.encoder import END_OF_TEXT_ID, PLAIN_TIKTOKEN, BatchEncoder, ways_here

AHEAD_PER_WORKER = 3  # parts under way or waiting: no worker idles, and memory stays bounded


class Block(NamedTuple):
    """The tokens of one part: uint16, from position `start` of file number `file` up to `stop`."""

    file: int
    start: int
    stop: int
    tokens: np.ndarray


class Failure(NamedTuple):
    """A UserError on its way from a worker; an exception with two arguments does not survive pickling."""

    what: str
    hint: str


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tokenize_part(encoder: BatchEncoder, part: Part, text_field: str) -> np.ndarray:
    """Tokens of a part, uint16. Raises UserError for documents that cannot be read."""
    documents = read_documents(part, text_field)
    tokens = encoder.encode(documents.texts)
    return tokens[1:] if documents.continues else tokens  # only a document's start has an <|endoftext|>


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    BatchEncoder(ways_here()[0]).encode([""])  # loads what every part needs


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone: a killed one cannot tell it, and it would wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(part: Part, text_field: str, way: str) -> np.ndarray | Failure:
    try:
        return tokenize_part(BatchEncoder(way), part, text_field)
    except UserError as error:
        return Failure(str(error), error.hint)


def blocks_from(
    source,
    text_field: str,
    position: Position,
    num_workers: int,
    choose_way: Callable[[], str] = lambda: PLAIN_TIKTOKEN,
) -> Iterator[Block]:
    """Tokens of the corpus in order, from the part at `position` on (the caller leaves out `position.skip`).

    Args:
        source: LocalFiles or HubFiles.
        num_workers: processes; with 1 this process does the work itself.
        choose_way: how to encode, see BatchEncoder; called once, while the workers start.

    Raises:
        UserError: input that cannot be read.
        Unfinished: a worker died.
    """
    parts = parts_from(source, text_field, position)
    if num_workers == 1:
        encoder = BatchEncoder(choose_way())
        for part in parts:
            yield Block(part.file, part.start, part.stop, tokenize_part(encoder, part, text_field))
        return
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[Part, Future]] = deque()
    try:
        for _ in range(num_workers):
            pool.submit(num_cores)  # any call: a worker starts when there is work for it
        way = choose_way()
        while True:
            while len(waiting) < AHEAD_PER_WORKER * num_workers:
                part = next(parts, None)
                if part is None:
                    break
                waiting.append((part._replace(data=None), pool.submit(_work, part, text_field, way)))
            if not waiting:
                return
            part, future = waiting.popleft()
            result = future.result()
            if isinstance(result, Failure):
                raise UserError(result.what, result.hint)
            yield Block(part.file, part.start, part.stop, result)
    except BrokenProcessPool as error:
        raise Unfinished(
            "a tokenizing process died (killed, or out of memory?)",
            "run the same command again to continue, perhaps with a smaller --num-workers",
        ) from error
    finally:
        for _, future in waiting:
            future.cancel()
        pool.shutdown()


class TokenQueue:
    """Tokens of a corpus, taken in any amounts, with the position of the next one.

    Args:
        blocks: from `position`'s part on.
        position: of the first token.
        documents: begun before it.
        on_tokens: called with the number of tokens that arrived.
    """

    def __init__(
        self,
        blocks: Iterator[Block],
        position: Position,
        documents: int = 0,
        on_tokens: Callable[[int], object] = lambda count: None,
    ):
        self.position, self.documents = position, documents
        self.num_tokens = 0  # in the queue
        self._source, self._on_tokens = blocks, on_tokens
        self._to_skip = position.skip
        self._blocks: deque[Block] = deque()
        self._used = position.skip  # tokens of the first block that are no longer in the queue

    def fill(self, count: int) -> int:
        """Waits until `count` tokens are in the queue or the corpus ends; returns how many there are."""
        while self.num_tokens < count:
            block = next(self._source, None)
            if block is None:
                break
            self._blocks.append(block)
            skipped = min(self._to_skip, len(block.tokens))
            self._to_skip -= skipped
            self.num_tokens += len(block.tokens) - skipped
            if self._to_skip:  # parts may be smaller than those of the run that counted
                self._used -= len(self._blocks.popleft().tokens)
            self._on_tokens(len(block.tokens) - skipped)
        return self.num_tokens

    def document_starts(self, limit: int) -> np.ndarray:
        """Places in the queue, below `limit`, where a document starts."""
        starts, place = [], -self._used
        for block in self._blocks:
            if place >= limit:
                break
            starts.append(place + np.flatnonzero(block.tokens == END_OF_TEXT_ID))
            place += len(block.tokens)
        found = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        return found[(found >= 0) & (found < limit)]

    def take(self, count: int) -> list[np.ndarray]:
        """The next `count` tokens, which must be in the queue, as arrays in order."""
        assert count <= self.num_tokens
        self.num_tokens -= count
        pieces = []
        while count > 0:
            block = self._blocks[0]
            piece = block.tokens[self._used : self._used + count]
            self._used += len(piece)
            self.position = Position(block.file, block.start, self._used)
            if self._used == len(block.tokens):
                self._blocks.popleft()
                self._used = 0
                self.position = Position(block.file, block.stop)
            self.documents += int(np.count_nonzero(piece == END_OF_TEXT_ID))
            pieces.append(piece)
            count -= len(piece)
        return pieces
