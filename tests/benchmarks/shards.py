"""Tokens per second of the shard builder and of build-nanogpt's loop, on the same text.

The reference uses one process for every two cores, `pool.imap(tokenize_document, documents, chunksize=16)`,
and for each document a list of ids and an array of it. It reads the same parquet file and must write the same
shards. Both run alternately, as commands of their own; the time includes their start.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.command_line import ArgumentParser, UserError, positive_int
from utils.shards.format import find_all_shards, read_header, shard_name, write_shard
from utils.tokenizer import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT_CHARACTERS = 4500  # on average, as in FineWeb-Edu
MIN_DOCUMENT_CHARACTERS = 200


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `python -m tests.benchmarks shards`."""
    add = parser.add_argument
    add("--megabytes", type=positive_int, default=100, help="megabytes of English text to tokenize")
    add("--runs", type=positive_int, default=7, help="number of interleaved runs; the median is reported")
    add("--shard-tokens", type=positive_int, default=10_000_000, help="number of tokens per shard")
    add("--input", type=Path, help="your own parquet file with a column `text`; default: a generated one")


def measure(args: Namespace) -> dict[str, Any]:
    """Prints one line per run, then the medians and whether the shards are identical. Returns the figures."""
    seconds: dict[str, list[float]] = {"reference": [], "builder": []}
    memory, agree = {"reference": 0, "builder": 0}, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = args.input or write_corpus(folder / "english.parquet", args.megabytes * 1_000_000)
        builder = [sys.executable, str(ROOT / "build_fineweb_edu_shards.py"), "--input", str(corpus)]
        builder += ["--shard-tokens", str(args.shard_tokens), "--output-dir"]
        reference = [sys.executable, "-m", "tests.benchmarks.shards", str(corpus), str(args.shard_tokens)]
        for number in range(args.runs):
            digests = {}
            for label, command in (("reference", reference), ("builder", builder)):
                output = folder / f"{label}{number}"
                elapsed, peak = time_command([*command, str(output)])
                num_tokens, digests[label] = digest_of(output)
                seconds[label].append(elapsed)
                memory[label] = max(memory[label], peak)
                speed = num_tokens / elapsed
                print(
                    f"{label:9}  {speed:12,.0f} tokens/s  {elapsed:6.1f} s  {peak / 1e6:5.0f} MB", flush=True
                )
            if num_tokens < 2 * args.shard_tokens:  # the builder would give val a part of the only shard
                what = f"{num_tokens:,} tokens do not fill two shards of {args.shard_tokens:,}"
                raise UserError(what, "use more --megabytes or fewer --shard-tokens")
            agree = agree and digests["reference"] == digests["builder"]
    speeds = {label: num_tokens / statistics.median(values) for label, values in seconds.items()}
    ratio = speeds["builder"] / speeds["reference"]
    print(
        f"median of {args.runs}: builder {speeds['builder']:,.0f} tokens/s, reference "
        f"{speeds['reference']:,.0f}, {ratio:.2f}x; "
        f"{'identical shards' if agree else 'the shards DIFFER'} ({num_tokens:,} tokens)"
    )
    return {
        "tokens": num_tokens,
        "tokens_per_second": speeds,
        "ratio": ratio,
        "peak_memory_bytes": memory if all(memory.values()) else None,  # known on Linux only
        "agree": agree,
    }


# ------------------------------------------------------------------------------------------------------------
# The text


def english_paragraphs() -> list[str]:
    """Paragraphs of English that every machine has: Python's documentation and its library's docstrings.

    Also those of input.txt and of HellaSwag's validation file, if these exist.
    """
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        texts += [text for text in map(ast.get_docstring, nodes) if text]
    if (ROOT / "input.txt").exists():
        texts.append((ROOT / "input.txt").read_text(encoding="utf-8"))
    if (ROOT / "hellaswag" / "hellaswag_val.jsonl").exists():
        rows = (ROOT / "hellaswag" / "hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [json.loads(row) for row in rows]
        texts += [f"{row['ctx']} {ending}" for row in examples for ending in row["endings"]]
    paragraphs = [paragraph.strip() for text in texts for paragraph in text.split("\n\n")]
    return [paragraph for paragraph in paragraphs if paragraph]


def english_documents(num_bytes: int) -> Iterator[str]:
    """Documents of random paragraphs, with the lengths of web pages; the same on every call."""
    draw = random.Random(1337)
    paragraphs = english_paragraphs()
    while num_bytes > 0:
        wanted, length, chosen = draw.expovariate(1 / DOCUMENT_CHARACTERS), 0, []
        while length < max(MIN_DOCUMENT_CHARACTERS, wanted):
            chosen.append(draw.choice(paragraphs))
            length += len(chosen[-1])
        document = "\n".join(chosen)
        num_bytes -= len(document.encode())
        yield document


def write_corpus(path: Path, num_bytes: int) -> Path:
    """Writes a parquet file with this much text, in row groups of a thousand documents as on the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = list(english_documents(num_bytes))
    pq.write_table(pa.table({"text": documents}), path, row_group_size=1000)
    print(f"{num_bytes / 1e6:,.0f} MB of English text, {len(documents):,} documents")
    return path


# ------------------------------------------------------------------------------------------------------------
# The measurement


def time_command(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the peak memory of it and its children together, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    samples = [0]
    threading.Thread(target=_sample_memory, args=(process.pid, samples), daemon=True).start()
    errors = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{command} failed: {errors}")
    return time.perf_counter() - start, max(samples)


def _sample_memory(pid: int, samples: list[int]) -> None:
    """Appends the resident memory of a process and its children every 50 ms; on Linux only."""
    page = resource.getpagesize()
    try:
        while True:
            pids = [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            pages = [int(Path(f"/proc/{child}/statm").read_text().split()[1]) for child in pids]
            samples.append(sum(pages) * page)
            time.sleep(0.05)
    except (OSError, IndexError):  # the process has ended, or this is another system
        return


def digest_of(folder: Path) -> tuple[int, str]:
    """Number of tokens in a folder of shards, and the SHA-256 of all names and files."""
    digest, num_tokens = hashlib.sha256(), 0
    for path in find_all_shards(folder):
        digest.update(path.name.encode() + path.read_bytes())
        num_tokens += read_header(path).num_tokens
    return num_tokens, digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# The reference


def tokenize_document(document: str) -> np.ndarray:
    """<|endoftext|> and the ids of the document, 1-D uint16."""
    encoding = gpt2_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(document)], dtype=np.uint16)


def build_reference(corpus: Path, shard_tokens: int, folder: Path) -> None:
    """Writes the shards of a parquet file as build-nanogpt's fineweb.py does."""
    import pyarrow.parquet as pq

    folder.mkdir()
    documents = (
        text
        for batch in pq.ParquetFile(corpus).iter_batches(1000, columns=["text"])
        for text in batch["text"].to_pylist()
    )
    shard, count, number = np.empty(shard_tokens, dtype=np.uint16), 0, 0

    def flush() -> None:
        write_shard(folder / shard_name("train" if number else "val", number), [shard[:count]], count)

    with multiprocessing.Pool(max(1, multiprocessing.cpu_count() // 2)) as pool:
        for tokens in pool.imap(tokenize_document, documents, chunksize=16):
            while len(tokens):
                room = min(shard_tokens - count, len(tokens))
                shard[count : count + room] = tokens[:room]
                count, tokens = count + room, tokens[room:]
                if count == shard_tokens:
                    flush()
                    number, count = number + 1, 0
    if count:
        flush()


if __name__ == "__main__":
    build_reference(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
