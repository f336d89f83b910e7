"""A corpus as a sequence of tokens from any position on, tokenized by several processes.

The parent process hands out parts of files, a few at a time; worker processes read and tokenize them and
return arrays; the parent collects the arrays in the order of the corpus. Workers are spawned, which behaves
alike on every system, and end with their parent.
"""

import copyreg
import multiprocessing
import os
import signal
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from utils.command_line import Unfinished, UserError
from utils.shards.documents import DocumentSource, Part, Position, parts_from, read_rows
from utils.shards.encoder import Backend, encode_in_batches
from utils.tokenizer import END_OF_TEXT_ID

PARTS_PER_WORKER = 3  # submitted or finished ahead: no worker is idle, and memory stays bounded

# Lets a UserError travel from a worker to the parent: by default, unpickling it fails for lack of the hint.
copyreg.pickle(UserError, lambda error: (UserError, (str(error), error.hint)))


class Block(NamedTuple):
    """The tokens of one part, 1-D: from position `start` of file number `file` up to `stop`.

    `bad_rows` says for each row without text how many of the tokens come before it.
    """

    file: int
    start: int
    stop: int
    tokens: np.ndarray
    bad_rows: tuple[int, ...] = ()


def num_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tokenize_part(part: Part, text_field: str, backend: Backend, bad_rows: str = "stop") -> Block:
    """Reads and tokenizes a part. Raises UserError for documents that cannot be read, see `read_rows`."""
    rows = read_rows(part, text_field, bad_rows=bad_rows)
    texts = [text for text in rows if text is not None]
    tokens = backend(texts)
    if part.continues_document:
        tokens = tokens[1:]  # <|endoftext|> stands only at the start of a document
    places: tuple[int, ...] = ()
    if len(texts) < len(rows):
        starts = [*np.flatnonzero(tokens == tokens[:1]).tolist(), len(tokens)]  # the first one is a start
        before = np.cumsum([text is not None for text in rows])  # texts up to each row
        places = tuple(starts[before[i]] for i, text in enumerate(rows) if text is None)
    return Block(part.file, part.start, part.stop, tokens, places)


def _start_worker(backend: Backend) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    backend([""])  # loads what every part needs


def _exit_with_parent() -> None:
    """Ends this worker when its parent is gone: a parent killed by SIGKILL cannot tell it to."""
    multiprocessing.parent_process().join()
    os._exit(1)


class TokenizerPool:
    """Worker processes; they start, in the background, when the `with` block begins.

    With `num_workers` 1 the calling process does the work itself. `backend` is called once in each process
    when it starts.
    """

    def __init__(self, num_workers: int, backend: Backend = encode_in_batches):
        self.num_workers, self._backend = num_workers, backend
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "TokenizerPool":
        if self.num_workers > 1:
            spawn = multiprocessing.get_context("spawn")
            start = partial(_start_worker, self._backend)
            self._executor = ProcessPoolExecutor(self.num_workers, spawn, initializer=start)
            for _ in range(self.num_workers):
                self._executor.submit(num_cores)  # any call: a process starts when there is work for it
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def blocks(
        self, source: DocumentSource, text_field: str, position: Position, backend: Backend,
        bad_rows: str = "stop",
    ) -> Iterator[Block]:  # fmt: skip
        """Tokens of the corpus in order, from the part at `position` on (the caller skips `position.skip`).

        Raises UserError for input that cannot be read, Unfinished if a worker died.
        """
        parts = parts_from(source, text_field, position)
        if self._executor is None:
            yield from (tokenize_part(part, text_field, backend, bad_rows) for part in parts)
            return
        waiting: deque[Future] = deque()
        try:
            while True:
                for part in islice(parts, PARTS_PER_WORKER * self.num_workers - len(waiting)):
                    work = (tokenize_part, part, text_field, backend, bad_rows)
                    waiting.append(self._executor.submit(*work))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            hint = "run the same command again to continue, perhaps with a smaller --num-workers"
            raise Unfinished("a tokenizing process died (killed, or out of memory?)", hint) from error
        finally:
            for future in waiting:
                future.cancel()


class TokenQueue:
    """Tokens of a corpus, taken in any amounts, with the position of the next one.

    `blocks` start with the part at `position`, that of the first token, before which `documents` documents
    start and `skipped_rows` bad rows are left out. `on_tokens` is called with their number whenever some
    arrive. `num_tokens` are in the queue. A document starts with the token `end_of_text`.
    """

    def __init__(
        self,
        blocks: Iterator[Block],
        position: Position,
        documents: int = 0,
        on_tokens: Callable[[int], object] = lambda count: None,
        end_of_text: int = END_OF_TEXT_ID,
        skipped_rows: int = 0,
    ):
        self.position, self.documents, self.skipped_rows = position, documents, skipped_rows
        self.num_tokens = 0
        self.trailing_rows = 0  # bad ones in the blocks without tokens after the last one with some
        self._source, self._on_tokens, self._end_of_text = blocks, on_tokens, end_of_text
        self._to_skip = position.skip
        self._blocks: deque[Block] = deque()
        self._used = 0  # tokens of the first block that are no longer in the queue

    def fill(self, count: int) -> int:
        """Waits until `count` tokens are in the queue or the corpus ends; returns how many there are."""
        while self.num_tokens < count and (block := next(self._source, None)):
            skipped = min(self._to_skip, len(block.tokens))
            self._to_skip -= skipped
            # Those before the skipped tokens were counted before `position` was recorded.
            bad_rows = block.bad_rows[bisect_left(block.bad_rows, skipped) :]
            if skipped == len(block.tokens):  # parts may be smaller than when the position was recorded
                self.trailing_rows += len(bad_rows)
                continue
            self._used += skipped  # of the first block: only before it can there be tokens to skip
            bad_rows = (skipped,) * self.trailing_rows + bad_rows
            self.trailing_rows = 0
            self._blocks.append(block._replace(bad_rows=bad_rows))
            self.num_tokens += len(block.tokens) - skipped
            self._on_tokens(len(block.tokens) - skipped)
        return self.num_tokens

    def document_starts(self) -> np.ndarray:
        """Indices in the queue at which documents start, 1-D integers."""
        starts, index = [np.zeros(0, dtype=np.int64)], -self._used
        for block in self._blocks:
            starts.append(index + np.flatnonzero(block.tokens == self._end_of_text))
            index += len(block.tokens)
        found = np.concatenate(starts)
        return found[found >= 0]

    def take(self, count: int) -> list[np.ndarray]:
        """Removes the next `count` tokens, which must be in the queue; returns them as arrays in order."""
        assert count <= self.num_tokens
        self.num_tokens -= count
        pieces = []
        while count > 0:
            block = self._blocks[0]
            pieces.append(block.tokens[self._used : self._used + count])
            count -= len(pieces[-1])
            self.documents += int(np.count_nonzero(pieces[-1] == self._end_of_text))
            self._used += len(pieces[-1])
            self.position = Position(block.file, block.start, self._used)
            passed = bisect_left(block.bad_rows, self._used)
            if self._used == len(block.tokens):
                passed = len(block.bad_rows)
                self._blocks.popleft()
                self._used = 0
                self.position = Position(block.file, block.stop)
            else:
                self._blocks[0] = block._replace(bad_rows=block.bad_rows[passed:])
            self.skipped_rows += passed
        return pieces
