"""Tokens per second of the shard builder beside the loop of the format's ancestor, on the same text.

The reference is one process for every two cores with `pool.imap(tokenize, documents, chunksize=16)`, where
`tokenize` makes a list of ids and an array of it; it reads the same parquet file and writes the same shards.
Both run in processes of their own, in turns; start-up is part of the time.
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
from pathlib import Path
from typing import Iterator

import numpy as np

from utils.command_line import positive_int
from utils.shards.format import find_shards, write_shard
from utils.tokenizer import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT_CHARACTERS = 4500  # on average, as in FineWeb-Edu


def add_arguments(parser) -> None:
    """The flags of `python -m tests.benchmarks shards`."""
    parser.add_argument("--megabytes", type=positive_int, default=100, help="English text to tokenize")
    parser.add_argument("--runs", type=positive_int, default=7, help="of each, in turns; the median counts")
    parser.add_argument("--shard-tokens", type=positive_int, default=10_000_000, help="tokens of a shard")
    parser.add_argument("--input", type=Path, help="a parquet file of your own, with a column `text`")


def run(args) -> dict:
    """Prints one line a run, then the medians. Returns the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = args.input or write_corpus(folder / "english.parquet", args.megabytes * 1_000_000)
        ours = [sys.executable, str(ROOT / "build_fineweb_edu_shards.py"), "--input", str(corpus)]
        ours += ["--shard-tokens", str(args.shard_tokens), "--output-dir"]
        reference = [sys.executable, "-m", "tests.benchmarks.shards", str(corpus), str(args.shard_tokens)]
        seconds: dict[str, list[float]] = {"reference": [], "builder": []}
        memory, agree = {"reference": 0, "builder": 0}, True
        for number in range(args.runs):
            found = {}
            for label, command in (("reference", reference), ("builder", ours)):
                output = folder / f"{label}{number}"
                elapsed, peak = _measure([*command, str(output)])
                tokens, found[label] = _digest(output)
                seconds[label].append(elapsed)
                memory[label] = max(memory[label], peak)
                print(
                    f"{label:9}  {tokens / elapsed:12,.0f} tokens/s  {elapsed:6.1f} s  {peak / 1e6:5.0f} MB",
                    flush=True,
                )
            agree = agree and found["reference"] == found["builder"]
        medians = {label: statistics.median(values) for label, values in seconds.items()}
        ratio = medians["reference"] / medians["builder"]
        print(
            f"median of {args.runs}: builder {tokens / medians['builder']:,.0f} tokens/s, "
            f"reference {tokens / medians['reference']:,.0f}, {ratio:.2f}x; "
            f"{'identical shards' if agree else 'the shards DIFFER'} ({tokens:,} tokens)"
        )
    return {
        "tokens": tokens,
        "tokens_per_second": {label: tokens / median for label, median in medians.items()},
        "ratio": ratio,
        "peak_memory_bytes": memory if all(memory.values()) else None,  # known on Linux only
        "agree": agree,
    }


def english_paragraphs() -> list[str]:
    """Paragraphs of English that are on any machine: Python's documentation and its library's docstrings.

    With input.txt and HellaSwag's validation file, where they are.
    """
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = [
            node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        ]
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
    """Documents of paragraphs in random order, as long as web pages are; the same each time."""
    draw = random.Random(1337)
    paragraphs = english_paragraphs()
    while num_bytes > 0:
        wanted, length, chosen = draw.expovariate(1 / DOCUMENT_CHARACTERS), 0, []
        while length < max(200, wanted):
            chosen.append(draw.choice(paragraphs))
            length += len(chosen[-1])
        document = "\n".join(chosen)
        num_bytes -= len(document.encode())
        yield document


def write_corpus(path: Path, num_bytes: int) -> Path:
    """A parquet file of that much text, in row groups of a thousand documents as on the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = list(english_documents(num_bytes))
    pq.write_table(pa.table({"text": documents}), path, row_group_size=1000)
    print(f"{num_bytes / 1e6:,.0f} MB of English text, {len(documents):,} documents")
    return path


def _measure(command: list[str]) -> tuple[float, int]:
    """Wall-clock seconds of a command, and the most bytes that it and its children held together."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peaks = [0]
    threading.Thread(target=_watch_memory, args=(process.pid, peaks), daemon=True).start()
    errors = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{command} failed: {errors}")
    return time.perf_counter() - start, max(peaks)


def _watch_memory(pid: int, peaks: list[int]) -> None:
    """Adds up the resident memory of a process and its children every 50 ms; Linux only."""
    page = resource.getpagesize()
    try:
        while True:
            pids = [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            peaks.append(
                sum(int(Path(f"/proc/{child}/statm").read_text().split()[1]) for child in pids) * page
            )
            time.sleep(0.05)
    except (OSError, IndexError):  # it has ended, or this is another system
        return


def _digest(folder: Path) -> tuple[int, str]:
    """Number of tokens in a folder of shards, and SHA-256 over all files."""
    digest, tokens = hashlib.sha256(), 0
    for path in find_shards(folder, "val") + find_shards(folder, "train"):
        data = path.read_bytes()
        digest.update(path.name.encode() + data)
        tokens += (len(data) - 128) // 2
    return tokens, digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# The reference


def tokenize(document: str) -> np.ndarray:
    """<|endoftext|> and the document's ids."""
    encoding = gpt2_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(document)], dtype=np.uint16)


def build_reference(corpus: Path, shard_tokens: int, folder: Path) -> None:
    """Shards of a parquet file by the ancestor's loop."""
    import pyarrow.parquet as pq

    folder.mkdir()
    documents = (
        text
        for batch in pq.ParquetFile(corpus).iter_batches(1000, columns=["text"])
        for text in batch["text"].to_pylist()
    )
    shard, count, number = np.empty(shard_tokens, dtype=np.uint16), 0, 0

    def flush() -> None:
        name = f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        write_shard(folder / name, [shard[:count]], count)

    with multiprocessing.Pool(max(1, multiprocessing.cpu_count() // 2)) as pool:
        for tokens in pool.imap(tokenize, documents, chunksize=16):
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
