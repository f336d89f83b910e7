"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

    python eval_hellaswag.py -m gpt2          or gpt2-medium, -large, -xl, a folder of transformers
    python eval_hellaswag.py -m log/model_19073.pt --output ours.jsonl
    python eval_hellaswag.py --compare gpt2.jsonl ours.jsonl

Only the tokens of an ending are scored, given the context. Written plainly, that is four padded rows an
example and logits for every position. Here an example is a prefix tree: a beginning that several rows share
goes through the model once; a row's last token, which predicts nothing, not at all; and only positions that
predict an ending's token are multiplied with the vocabulary. That is half the positions and a third of the
logits; the losses are the same up to rounding.

Shapes: R rows (one an example), T positions, C channels, V vocabulary, S scored tokens, U positions that
predict them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_model import GPT
from utils.command_line import ArgumentParser, positive_int
from utils.cpu_matmul import linear
from utils.distributed import Distributed, environment_local_rank
from utils.errors import UserError, run_script
from utils.hellaswag import results
from utils.hellaswag.dataset import NUM_ENDINGS, choose_directory, find_or_download, read_rows
from utils.hellaswag.examples import Example, choose_tokenizer, crop_rows, load_examples, tokenize
from utils.runtime import DTYPES, autocast, choose_device, choose_dtype, peak_memory_bytes
from utils.tokenizer import GPT2Tokenizer

# Positions that go through the model at one time: enough to keep the device busy, and little memory.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536, "mps": 8192}
# Logits that exist at one time. On a CPU they should stay in its caches, a GPU wants large products.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27, "mps": 1 << 25}

# ------------------------------------------------------------------------------------------------------------
# The plain form: one example, four rows


def iter_examples(split: str, directory: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a split ("train", "val" or "test") as dicts; downloads the file if it is not there."""
    yield from read_rows(find_or_download(choose_directory(directory), split), split)


def render_multiple_choice_tensors(
    example: dict[str, Any], tokenizer=None, block_size: int | None = None, style: str = "completion"
) -> tuple[dict[str, Any], Tensor, Tensor, int | None]:
    """An example as four rows: context and ending, padded with zeros to the longest.

    Args:
        example: a row of the data set.
        tokenizer: GPT-2's by default.
        block_size: a longer row keeps its last block_size tokens.
        style: "completion" or "lm-eval", see README.

    Returns:
        (data: dict with label, ctx_tokens and ending_tokens as lists of ids, for comparisons with other code;
        tokens (4, N) int64; mask (4, N) int64, 1 where a token belongs to the ending; label 0..3, or None in
        test).
    """
    context, endings = tokenize(example, tokenizer or GPT2Tokenizer(), style)
    rows, starts = crop_rows(context, endings, block_size)
    N = max(map(len, rows))
    tokens = torch.zeros(NUM_ENDINGS, N, dtype=torch.int64)
    mask = torch.zeros(NUM_ENDINGS, N, dtype=torch.int64)
    for ending, (row, start) in enumerate(zip(rows, starts)):
        tokens[ending, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[ending, start : len(row)] = 1
    label = example.get("label")
    label = None if label in (None, "") else int(label)
    ending_tokens = [ids.tolist() for ids in endings]
    data = {"label": label, "ctx_tokens": context.tolist(), "ending_tokens": ending_tokens}
    return data, tokens, mask, label


def most_likely_completion_index(tokens: Tensor, mask: Tensor, logits: Tensor) -> int:
    """The ending with the lowest mean loss of its tokens.

    Args:
        tokens, mask: (4, N), as rendered.
        logits: (4, N, V) of the model on `tokens`.
    """
    loss_sum, num_scored = completion_losses(tokens, mask, logits)
    return int((loss_sum / num_scored).argmin())


def completion_losses(tokens: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of each ending in nats, (4,), and how many of its tokens that are, (4,)."""
    shifted_logits = logits[:, :-1].flatten(0, 1)  # position i predicts token i + 1
    targets, scored = tokens[:, 1:], mask[:, 1:]
    losses = F.cross_entropy(shifted_logits, targets.flatten(), reduction="none").view_as(targets)
    return (losses * scored).sum(dim=1), scored.sum(dim=1)


# ------------------------------------------------------------------------------------------------------------
# The fast form: a prefix tree an example, many examples a batch


def plan_batches(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    """Which examples go through the model together: of similar length, so that little is padding.

    Returns:
        Indices into `examples`, longest first (memory runs out at once, if it does), every index once.
    """
    lengths = [len(example.tokens) for example in examples]
    batches: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        # A row of less than nine tenths of the longest would be padded too much: it starts a batch.
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens or lengths[i] < 0.9 * longest:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.inference_mode()
def score_batch(model: GPT, batch: Sequence[Example], dtype: torch.dtype) -> np.ndarray:
    """Summed loss of each ending in nats, (R, 4) float64, by one pass of R trees under a block mask."""
    R, T = len(batch), max(len(example.tokens) for example in batch)
    idx, positions = np.zeros((R, T), dtype=np.int64), np.zeros((R, T), dtype=np.int64)
    owners = np.zeros((R, T), dtype=np.uint8)
    for row, example in enumerate(batch):
        idx[row, : len(example.tokens)] = example.tokens
        positions[row, : len(example.tokens)] = example.positions
        owners[row, : len(example.tokens)] = example.owners
    num_predictors = np.cumsum([0, *(len(example.predictors) for example in batch)])
    predictors = np.concatenate([example.predictors + row * T for row, example in enumerate(batch)])
    predicted_by = np.concatenate([e.predicted_by + first for e, first in zip(batch, num_predictors)])
    targets = np.concatenate([example.targets for example in batch])

    weight = model.lm_head.weight
    arrays = (idx, positions, owners, predictors, predicted_by, targets)
    idx, positions, owners, predictors, predicted_by, targets = (
        torch.from_numpy(array).to(weight.device) for array in arrays
    )
    with autocast(weight.device, dtype):
        hidden = model.hidden_states(idx, positions, attention_mask=tree_mask(owners))  # (R, T, C)
    hidden = hidden.flatten(0, 1)[predictors].to(dtype)  # (U, C)
    weight = weight.to(dtype)  # (V, C)
    target_logits = (hidden[predicted_by].float() * weight[targets].float()).sum(dim=1)  # (S,)
    losses = log_normalizers(hidden, weight)[predicted_by] - target_logits  # -log softmax at the target
    endings = np.concatenate([example.endings + row * NUM_ENDINGS for row, example in enumerate(batch)])
    sums = np.bincount(endings, weights=losses.cpu().numpy(), minlength=R * NUM_ENDINGS)
    return sums.reshape(R, NUM_ENDINGS)


def tree_mask(owners: Tensor) -> Tensor:
    """Who sees whom: itself and its ancestors, the earlier positions that belong to all of its own rows.

    Args:
        owners: (R, T) uint8, a bit an ending. Padding belongs to none, so it sees all before it, and none
            sees it, because it comes last.

    Returns:
        (R, 1, T, T) True where a row's position sees a column's.
    """
    T = owners.size(1)
    see, seen = owners.unsqueeze(2), owners.unsqueeze(1)
    earlier = torch.ones(T, T, dtype=torch.bool, device=owners.device).tril()
    return (((see & seen) == see) & earlier).unsqueeze(1)


def log_normalizers(hidden: Tensor, weight: Tensor) -> Tensor:
    """log of the sum of exp(logits) over all words, (U,) float32, a block of words at a time.

    Args:
        hidden: (U, C).
        weight: (V, C), of the same dtype.
    """
    U, V = len(hidden), len(weight)
    words = min(V, max(256, LOGITS_AT_ONCE.get(weight.device.type, 1 << 22) // U // 64 * 64))
    normalizers = [_log_normalizer(hidden, block) for block in weight.split(words)]
    return torch.stack(normalizers, dim=1).logsumexp(dim=1)


def _log_normalizer(hidden: Tensor, block: Tensor) -> Tensor:
    """The same, (U,), of the words of a block; the logits end with this call."""
    logits = linear(hidden, block).float()  # (U, words)
    first = logits[:, 0].clone()  # log_softmax(x) is x - normalizer: one column tells it
    return first - torch.log_softmax(logits, dim=1, out=logits)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The evaluation, for the training loop and for the command line


class HellaSwagResult(NamedTuple):
    """Counts over all ranks."""

    num_correct_norm: int  # the right ending has the lowest mean loss
    num_correct: int  # the right ending has the lowest summed loss
    num_total: int

    @property
    def acc_norm(self) -> float:
        return self.num_correct_norm / self.num_total

    @property
    def acc(self) -> float:
        return self.num_correct / self.num_total


def evaluate_hellaswag(
    model: GPT, examples: Sequence[Example], dist: Distributed, dtype: torch.dtype,
    batch_tokens: int | None = None, poll: Callable[[], None] | None = None,
) -> HellaSwagResult:  # fmt: skip
    """Accuracy on labelled examples, each of which is scored by one rank.

    Args:
        model: the raw module, neither compiled nor wrapped, on dist's device.
        examples: the same on all ranks.
        dtype: of the matrix products.
        batch_tokens: positions that go through the model at one time; by default what suits the device.
        poll: called after each batch, equally often on all ranks; what it raises ends the evaluation.
    """
    mine = examples[dist.rank :: dist.world_size]
    counts = [0, 0, 0]
    for batch in score_examples(model, mine, dtype, batch_tokens, dist):
        if batch is not None:
            counts = [before + more for before, more in zip(counts, count_correct(*batch))]
        if poll is not None:
            poll()
    return HellaSwagResult(*(int(count) for count in dist.sum_numbers(*counts)))


def score_examples(
    model: GPT, examples: Sequence[Example], dtype: torch.dtype, batch_tokens: int | None, dist: Distributed
) -> Iterator[tuple[list[Example], np.ndarray] | None]:
    """Batches of examples with the summed losses (R, 4) of their endings; None where only others go on."""
    batches = plan_batches(examples, batch_tokens or BATCH_TOKENS[dist.device.type])
    was_training = model.training
    model.eval()
    try:
        for number in range(int(dist.max_number(len(batches)))):
            batch = [examples[i] for i in batches[number]] if number < len(batches) else None
            yield None if batch is None else (batch, score_batch(model, batch, dtype))
    finally:
        model.train(was_training)


def predictions(batch: Sequence[Example], loss_sum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Endings (R,) with the lowest summed and with the lowest mean loss."""
    return loss_sum.argmin(axis=1), (loss_sum / np.stack([e.divisors for e in batch])).argmin(axis=1)


def count_correct(batch: Sequence[Example], loss_sum: np.ndarray) -> tuple[int, int, int]:
    """(right by mean loss, right by summed loss, examples)."""
    by_sum, by_mean = predictions(batch, loss_sum)
    labels = np.array([example.label for example in batch])
    return int((by_mean == labels).sum()), int((by_sum == labels).sum()), len(batch)


# ------------------------------------------------------------------------------------------------------------
# The command line


class Progress:
    """The running acc_norm: a bar on a terminal, else a line each tenth of the way.

    The longest examples come first, so the early values are no fair sample.
    """

    def __init__(self, total: int, labelled: bool):
        self.total, self.labelled = total, labelled
        self.done = self.correct = 0
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" examples")

    def advance(self, num_examples: int, num_correct: int) -> None:
        tenths_before = 10 * self.done // self.total
        self.done += num_examples
        self.correct += num_correct
        accuracy = f"acc_norm {self.correct / self.done:.4f}" if self.labelled else ""
        if self.bar is not None:
            self.bar.set_postfix_str(accuracy)
            self.bar.update(num_examples)
            if self.done == self.total:
                self.bar.close()
        elif 10 * self.done // self.total > tenths_before:
            print(f"{self.done:,}/{self.total:,} {accuracy}".rstrip(), flush=True)


def score_style(
    model: GPT, examples: Sequence[Example], dtype: torch.dtype, batch_tokens: int | None, style: str
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Scores all examples on this process, showing progress.

    Returns:
        (a record an example, in file order; how many are right by mean loss and by summed loss).
    """
    labelled = examples[0].label is not None
    progress = Progress(len(examples), labelled)
    records, correct, correct_norm = [], 0, 0
    dist = Distributed(model.lm_head.weight.device)
    for batch, loss_sum in score_examples(model, examples, dtype, batch_tokens, dist):
        if not np.isfinite(loss_sum).all():
            raise UserError("the model's losses are not finite", "use --dtype float32, or other weights")
        by_sum, by_mean = predictions(batch, loss_sum)
        records += results.batch_records(batch, loss_sum, by_sum, by_mean, style)
        num_norm, num, total = count_correct(batch, loss_sum)
        correct_norm, correct = correct_norm + num_norm, correct + num
        progress.advance(total, num_norm)
    return sorted(records, key=lambda record: record["index"]), (correct_norm, correct)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="eval_hellaswag.py", description="HellaSwag accuracy of a model.")
    add = parser.add_argument
    add("-m", "--model-name", default="gpt2", help="gpt2[-medium|-large|-xl], checkpoint or folder")
    add("-d", "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--split", choices=("val", "train", "test"), default="val", help="test, unlabelled, needs --output")
    add("--limit", type=positive_int, metavar="N", help="the first N examples only")
    add("--style", choices=(*results.STYLES, "both"), default="completion", help="convention of the numbers")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix products")
    add("--batch-tokens", type=positive_int, metavar="N", help="positions at one time; default: by device")
    add("--hellaswag-dir", type=Path, metavar="DIR", help="default: HELLASWAG_DIR, or hellaswag/")
    add("--output", type=Path, metavar="FILE", help="write a JSON line for each example, in file order")
    add("--compare", type=Path, nargs=2, metavar="FILE", help="two files of --output: McNemar's paired test")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.compare:
        print(results.compare(*args.compare))
        return 0
    if args.split == "test" and args.output is None:
        raise UserError("test has no labels, so no accuracy", "add --output FILE for the predictions")
    if args.output is not None:
        results.check_writable(args.output)
    find_or_download(choose_directory(args.hellaswag_dir), args.split)  # fails before the model is loaded
    device = choose_device(args.device).value
    dtype, reason = choose_dtype(args.dtype, device)
    model = GPT.load(args.model_name, device)
    tokenizer = choose_tokenizer(model, args.model_name)
    all_records = {}
    for style in results.STYLES if args.style == "both" else (args.style,):
        examples = load_examples(
            args.hellaswag_dir, args.split, args.limit, tokenizer, model.config.block_size, style,
            say=print if not all_records else lambda line: None,
        )  # fmt: skip
        num_shortened = sum(example.num_shortened for example in examples)
        if num_shortened:
            print(f"{num_shortened} rows keep their last {model.config.block_size} tokens, the block size")
        started = time.perf_counter()
        all_records[style], correct = score_style(model, examples, dtype, args.batch_tokens, style)
        seconds = time.perf_counter() - started
        if args.split != "test":
            print(results.summary(style, *correct, len(examples), args.model_name))
        print(
            f"  {len(examples) / seconds:,.1f} examples/s on {device} in {str(dtype)[6:]} ({reason}), "
            f"peak memory {peak_memory_bytes(device) / 1e9:.2f} GB"
        )
    if args.output is not None:
        results.write_results(args.output, results.merge_styles(all_records))
        print(f"{len(examples):,} lines in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, environment_local_rank()))
