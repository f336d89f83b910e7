"""Builds token shards from FineWeb-Edu on the Hugging Face hub, or from your own text.

    python build_fineweb_edu_shards.py                        FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python build_fineweb_edu_shards.py --max-shards 10        the first billion tokens
    python build_fineweb_edu_shards.py --input '*.jsonl' notes.txt --output-dir my_tokens    your own text
    python build_fineweb_edu_shards.py --tokenizer bpe:16384  with a BPE trained on the corpus
    python build_fineweb_edu_shards.py --verify               compare every shard with the manifest
    python build_fineweb_edu_shards.py --verify --inputs      compare the input files, too

Every document becomes <|endoftext|> followed by its tokens, as uint16, or as uint32 for a vocabulary above
65,536 tokens. The documents of a corpus, in order, are one sequence of tokens, which is cut into shards
without a gap; shard 0 is val. A build that stops for any reason continues when the same command is run again,
and produces the same bytes.
"""

from utils.start import begin_script

if __name__ == "__main__":
    begin_script()

import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.command_line import ArgumentParser, UserError, path_text, positive_int, run_script
from utils.console import announced, say, warn
from utils.files import check_writable, locked, remove_temporary_files
from utils.shards.documents import (
    TEXT_FIELD,
    DocumentSource,
    Position,
    is_text,
    parts_from,
    read_documents,
)
from utils.shards.encoder import backend_of, choose_method, encode_in_batches
from utils.shards.format import find_all_shards, write_shard
from utils.shards.hub import HubFiles
from utils.shards.local_files import LocalFiles, describe_left_out, find_files
from utils.shards.manifest import FILE_NAME, Manifest
from utils.shards.tokenizer import (
    choose_tokenizer,
    recorded_as,
    store_tokenizer,
    train_on_corpus,
)
from utils.shards.verify import check_inputs, verify
from utils.shards.workers import TokenizerPool, TokenQueue, num_cores
from utils.tokenizer import Tokenizer, has_tiktoken, token_dtype, tokenizer_from_state
from utils.tokenizer_json import tokenizer_name

ROOT = Path(__file__).resolve().parent

SHARD_TOKENS = 100_000_000  # 200 MB per shard
SMALL_CORPUS_VAL_FRACTION = 0.01  # val's share of a corpus that does not fill two shards
DATASET = "HuggingFaceFW/fineweb-edu"
SUBSET = "sample-10BT"

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 100, 100_000  # compared between the two backends before each build
TOKENS_PER_SECOND = 4_000_000  # of one process, for the estimate of the time
LIBRARY_TOKENS_PER_SECOND = 400_000  # the same for a tokenizer that only the tokenizers library can run
MOST_WORKERS_PER_CORE = 8  # more only cost memory
KEPT = "finished shards are kept; run the same command again to continue"


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """Parses the command line. Raises UserError for flags that contradict each other."""
    parser = ArgumentParser(prog="build_fineweb_edu_shards.py", doc=__doc__)
    add = parser.add_argument
    input_help = "files, globs or folders: .parquet .jsonl .json .txt; all but parquet also as .gz or .zst"
    add("--input", nargs="+", type=path_text, metavar="FILE", help=input_help)
    add("--text-field", default=TEXT_FIELD, help="parquet column or jsonl field that contains the text")
    bad_help = "rows without text, valid JSON or valid UTF-8: stop at the first, or skip and count them"
    add("--bad-rows", choices=("stop", "skip"), default="stop", help=bad_help)
    add("--output-dir", type=Path, default=ROOT / "edu_fineweb10B", help="folder for the shards")
    add("--shard-tokens", type=positive_int, default=SHARD_TOKENS, help="number of tokens per shard")
    add("--max-shards", type=positive_int, help="stop after this many shards, val included; default: all")
    add("--num-workers", type=positive_int, default=num_cores(), help="number of tokenizing processes")
    add("--dataset", default=DATASET, help="data set on the Hugging Face hub")
    add("--subset", default=SUBSET, help="subset of the data set")
    add("--revision", help="branch, tag or commit of the data set; default: main when the build starts")
    val_help = "val: the first documents up to this many tokens; default: a shard, or 1 %% of a small corpus"
    add("--val-tokens", type=positive_int, help=val_help)
    kinds, help = ("gpt2",), "gpt2, bpe:N (trained on the corpus, N tokens), or the path of a tokenizer.json"
    add("--tokenizer", type=partial(tokenizer_name, kinds=kinds, must_exist=True), default="gpt2", help=help)
    add("--verify", action="store_true", help="compare every shard with the manifest, and exit")
    add("--inputs", action="store_true", help="with --verify: compare the input files with it, too")
    args = parser.parse_args(arguments)
    if args.verify:
        parser.warn_of_others(arguments, {"verify", "inputs", "output_dir"}, "with --verify")
    if args.inputs and not args.verify:
        raise UserError("--inputs is part of --verify", "add --verify, or name files with --input")
    if args.num_workers > (most := MOST_WORKERS_PER_CORE * num_cores()):
        what = f"--num-workers {args.num_workers} is above {most}, {MOST_WORKERS_PER_CORE} for each core"
        raise UserError(what, f"the default is one for each core: {num_cores()}")
    if args.val_tokens and args.val_tokens > args.shard_tokens:
        what = f"--val-tokens {args.val_tokens} is more than a shard (--shard-tokens {args.shard_tokens})"
        raise UserError(what, "val is one shard: lower --val-tokens or raise --shard-tokens")
    if args.input and (args.revision, args.dataset, args.subset) != (None, DATASET, SUBSET):
        raise UserError("--dataset, --subset and --revision contradict --input", "omit one or the other")
    return args


# ------------------------------------------------------------------------------------------------------------
# Tokens to shards


def pack(
    manifest: Manifest, queue: TokenQueue, max_shards: int | None, on_shard: Callable[[int], object]
) -> None:
    """Writes shard after shard until the corpus ends or there are `max_shards`.

    `queue` holds the tokens from the end of the last finished shard on. `on_shard` is called with the number
    of each shard before it is built; the manifest records it as soon as it is written. Raises UserError for
    input that cannot be read or has no document, Unfinished if the disk is full or a worker died.
    """
    shard_tokens, val_tokens = manifest.settings["shard_tokens"], manifest.settings["val_tokens"]
    while not is_done(manifest, max_shards):
        number = len(manifest.shards)
        on_shard(number)
        # The length of val depends on whether the corpus fills two shards.
        available = queue.fill(2 * shard_tokens if number == 0 else shard_tokens)
        if available == 0:
            if number == 0:
                found = f" ({queue.trailing_rows:,} rows without text)" if queue.trailing_rows else ""
                raise UserError(f"the input contains no documents{found}", "check --input and --text-field")
            manifest.complete = True
            manifest.skipped_rows = queue.skipped_rows + queue.trailing_rows
            manifest.save()
            break
        count = val_length(queue, shard_tokens, val_tokens) if number == 0 else min(shard_tokens, available)
        sha256 = write_shard(manifest.folder / manifest.next_name(), queue.take(count), count)
        manifest.add(sha256, count, queue.documents, queue.position, queue.skipped_rows)


def val_length(queue: TokenQueue, shard_tokens: int, val_tokens: int | None) -> int:
    """Number of tokens in the val shard; `queue` holds the whole corpus, or at least its first two shards.

    A whole shard; or, where `val_tokens` is given or the corpus is small, the length of the first documents
    up to that limit, at least one. A first document that is the whole corpus, or longer than a shard, is cut
    at the limit.
    """
    limit = val_tokens
    if limit is None:
        if queue.num_tokens >= 2 * shard_tokens:
            return shard_tokens
        limit = max(1, int(queue.num_tokens * SMALL_CORPUS_VAL_FRACTION))
    ends = queue.document_starts()[1:]  # a document ends where the next one starts
    fitting = ends[ends <= limit]
    if len(fitting):
        return int(fitting[-1])
    if len(ends) and ends[0] <= shard_tokens:
        return int(ends[0])
    return min(limit, max(1, queue.num_tokens - 1))


def rebuild(manifest: Manifest, index: int, queue: TokenQueue) -> None:
    """Builds a recorded shard again that is missing or damaged. Raises UserError if its bytes differ."""
    record = manifest.shards[index]
    path = manifest.folder / record["name"]
    say(f"{path.name} is missing or damaged: building it again")
    count = min(record["tokens"], queue.fill(record["tokens"]))
    sha256 = write_shard(path, queue.take(count), count)
    if sha256 != record["sha256"]:
        path.unlink()
        what = f"{path.name} differs from the first time: SHA-256 {sha256}, in {FILE_NAME} {record['sha256']}"
        raise UserError(what, "the input has changed: build into another --output-dir")


# ------------------------------------------------------------------------------------------------------------
# The build


def build(args: Namespace, source: DocumentSource, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Rebuilds missing shards and adds the ones that `args` request."""
    from tqdm import tqdm

    missing = manifest.missing()
    expected_tokens = print_plan(args, source, manifest, tokenizer)
    with TokenizerPool(args.num_workers, backend_of(encode_in_batches, tokenizer, args.output_dir)) as pool:
        # While the processes start: the fast backend must produce tiktoken's own tokens for this input.
        first = min([*missing, len(manifest.shards)])
        with announced("reading the first documents"):
            sample = read_sample(source, args.text_field, args.bad_rows, manifest.start_of(first)[0])
            method, how = choose_method(sample, tokenizer)
        backend = backend_of(method, tokenizer, args.output_dir)
        say(f"encoding {how}")

        def queue_from(index: int, on_tokens: Callable[[int], object] = lambda count: None) -> TokenQueue:
            position, documents, skipped_rows = manifest.start_of(index)
            blocks = pool.blocks(source, args.text_field, position, backend, args.bad_rows)
            end_of_text = tokenizer.end_of_text
            return TokenQueue(blocks, position, documents, on_tokens, end_of_text, skipped_rows)

        for index in missing:
            rebuild(manifest, index, queue_from(index))
        if is_done(manifest, args.max_shards):
            return
        seconds = 0.5 if sys.stderr.isatty() else 30  # between two updates of the progress bar
        units = dict(unit=" tokens", unit_scale=True, mininterval=seconds)
        with tqdm(total=expected_tokens, initial=manifest.num_tokens, **units) as bar:
            queue = queue_from(len(manifest.shards), bar.update)
            pack(manifest, queue, args.max_shards, lambda number: bar.set_description_str(f"shard {number}"))


def read_sample(source: DocumentSource, text_field: str, bad_rows: str, position: Position) -> list[str]:
    """The start of the first documents from a position on."""
    part = next(parts_from(source, text_field, position), None)
    texts = read_documents(part, text_field, bad_rows=bad_rows)[:SAMPLE_DOCUMENTS] if part else []
    return [text[:SAMPLE_CHARACTERS] for text in texts]


def is_done(manifest: Manifest, max_shards: int | None) -> bool:
    """Whether there is no shard to add."""
    return manifest.complete or (max_shards is not None and len(manifest.shards) >= max_shards)


def print_plan(args: Namespace, source: DocumentSource, manifest: Manifest, tokenizer: Tokenizer) -> int:
    """Prints what the build will need. Returns the expected number of tokens, finished shards included."""
    tokens, documents = source.estimate(args.text_field)
    if args.max_shards and args.max_shards * args.shard_tokens < tokens:
        documents = documents * args.max_shards * args.shard_tokens // tokens
        tokens = args.max_shards * args.shard_tokens
    remaining = max(0, tokens - manifest.num_tokens)
    rate = TOKENS_PER_SECOND if tokenizer.ranks and has_tiktoken() else LIBRARY_TOKENS_PER_SECOND
    minutes = remaining / rate / args.num_workers / 60
    token_bytes, free = token_dtype(tokenizer.vocab_size).itemsize, shutil.disk_usage(args.output_dir).free
    needed = token_bytes * remaining
    say(
        f"{args.output_dir}: about {tokens:,} tokens of {documents:,} documents in {len(source)} files; "
        f"{needed / 1e9:,.2f} GB to write, {free / 1e9:,.1f} GB free; "
        f"about {minutes:,.1f} minutes with {args.num_workers} processes"
    )
    if isinstance(source, HubFiles):
        name = " ".join(source.description[key] for key in ("dataset", "subset", "revision"))
        say(f"hub: {name}: {source.num_bytes / 1e9:,.1f} GB to download, except what the hub's cache has")
    if manifest.shards:
        say(f"continuing after {len(manifest.shards)} finished shards ({manifest.num_tokens:,} tokens)")
    if needed > free:
        warn(f"{needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free")
    return tokens


# ------------------------------------------------------------------------------------------------------------
# The script


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Creates the output folder if it is missing and holds its lock.

    Raises UserError if the folder cannot be written, has shards of unknown origin, or another build is at
    work in it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shards = find_all_shards(folder)
            if shards and not (folder / FILE_NAME).exists():
                what = f"{folder} has {shards[0].name}, but no {FILE_NAME} that says how it was built"
                raise UserError(what, "use another --output-dir, or move the shards away")
            stack.enter_context(locked(folder / ".lock"))
            check_writable(folder / "probe")  # fails now rather than after hours
        except BlockingIOError as error:
            raise UserError(f"another build is at work in {folder}", "wait for it, or stop it") from error
        except OSError as error:
            what = f"cannot write to output dir {folder}: {error.strerror}"
            raise UserError(what, "give another --output-dir") from error
        yield


def open_source(args: Namespace, manifest: Manifest | None) -> DocumentSource:
    """The files of `--input`, or those on the hub, at the revision recorded by an earlier start."""
    if args.input:
        with announced("looking for the input files"):
            paths, left_out = find_files(args.input)
        if left_out:
            say(f"left out of --input: {describe_left_out(left_out)}")
        return LocalFiles(paths)
    recorded = manifest.settings["source"] if manifest else {}
    if recorded.get("kind") == "files" and manifest.shards:
        names = ", ".join(entry[0] for entry in recorded["files"][:4])
        what = f"{args.output_dir} was built from {len(recorded['files'])} files ({names})"
        raise UserError(what, "name them again with --input, or use another --output-dir")
    if not find_spec("huggingface_hub"):
        raise UserError("huggingface_hub is not installed", "pip install datasets, or give --input")
    read_ahead = args.max_shards is None  # otherwise the next file may not be needed
    same = (recorded.get("dataset"), recorded.get("subset")) == (args.dataset, args.subset)
    if same and args.revision in (None, recorded["revision"]):
        return HubFiles(recorded, read_ahead=read_ahead)
    return HubFiles.resolve(args.dataset, args.subset, args.revision, read_ahead=read_ahead)


def train(args: Namespace, source: DocumentSource, vocab_size: int) -> dict[str, Any]:
    """State of a BPE trained on the part of the corpus that will be train, as far as can be known."""
    num_tokens, _ = source.estimate(args.text_field)
    is_small = num_tokens < args.shard_tokens
    val_tokens = int(num_tokens * SMALL_CORPUS_VAL_FRACTION) if is_small else args.shard_tokens
    size = args.val_tokens or val_tokens
    return train_on_corpus(source, args.text_field, args.bad_rows, vocab_size, num_tokens, size)


def settings_of(args: Namespace, source: DocumentSource, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines the bytes of the shards; `tokenizer` is its state."""
    return {
        "tokenizer": args.tokenizer if args.tokenizer.startswith("bpe:") else tokenizer["name"],
        **recorded_as(tokenizer),
        "shard_tokens": args.shard_tokens,
        "val_tokens": args.val_tokens,
        "text_field": args.text_field if not all(map(is_text, source.kinds)) else None,
        "bad_rows": args.bad_rows,
        "source": source.describe(),
    }


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.verify:
        return verify(args.output_dir, inputs=args.inputs)
    if args.tokenizer == "gpt2" and not has_tiktoken():
        raise UserError("tiktoken is not installed", "pip install tiktoken")
    with locked_folder(args.output_dir):
        manifest = Manifest.load(args.output_dir)
        source = open_source(args, manifest)
        tokenizer = choose_tokenizer(args.tokenizer, args.output_dir, manifest, partial(train, args, source))
        settings = settings_of(args, source, tokenizer)
        if manifest is None or not manifest.shards:  # an attempt without a shard may be replaced
            manifest = Manifest(args.output_dir, settings)
        if args.bad_rows == "skip":  # what a build that stops at bad rows has written has none
            manifest.settings["bad_rows"] = "skip"
        manifest.check_settings(settings)
        done = is_done(manifest, args.max_shards)
        manifest.check_folder(next_allowed=not done)
        for pattern in ("edufineweb_*.npy", FILE_NAME, "tokenizer*.json", "probe*"):
            for name in remove_temporary_files(args.output_dir, pattern):
                say(f"removed {name}, left unfinished by an earlier build")
        done = done and not manifest.missing()
        if not done:
            check_inputs(manifest, source)
            manifest.save()
            store_tokenizer(args.output_dir, tokenizer)
            build(args, source, manifest, tokenizer_from_state(tokenizer))
    documents = manifest.shards[-1]["documents"]
    skipped = f"; {manifest.skipped_rows:,} rows without text skipped" if args.bad_rows == "skip" else ""
    say(
        f"{'nothing to do' if done else 'done'}: {len(manifest.shards)} shards in {args.output_dir}, "
        f"{manifest.num_tokens:,} tokens of {documents:,} documents{skipped}"
    )
    return 0


def stop(signal_number: int, frame: object) -> None:
    """SIGTERM: exits as on Ctrl-C, so that temporary files are removed."""
    print(f"stopped by SIGTERM; {KEPT}", file=sys.stderr)
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    code = run_script(main)
    if code == 130:
        print(KEPT, file=sys.stderr)
    sys.exit(code)
