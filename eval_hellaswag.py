"""HellaSwag (Zellers et al. 2019): how often a model prefers the true ending of a text to three wrong ones.

    python eval_hellaswag.py -m gpt2                            OpenAI's GPT-2 124M, after a download
    python eval_hellaswag.py -m log --output ours.jsonl         the last checkpoint in a folder
    python eval_hellaswag.py --compare gpt2.jsonl ours.jsonl    a paired test of two models

The model's answer is the ending with the lowest loss given the context: the mean over the ending's tokens
(acc_norm) or the sum (acc). The losses are computed in two forms. The plain form runs four padded rows per
example and computes logits at every position. The fast form, used by training and by this script, computes
half of the positions and a third of the logits; the losses agree up to rounding.

Shapes: B examples, N tokens of the longest row, T nodes of the largest prefix tree, C channels, V vocabulary,
S scored tokens, U nodes that predict them.
"""

from utils.start import begin_script

if __name__ == "__main__":
    begin_script()

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gpt_model import GPT, PRETRAINED_CONFIGS
from utils.command_line import ArgumentParser, UserError, path_text, positive_int, run_script
from utils.console import announced, say, warn
from utils.cpu_matmul import linear
from utils.distributed import Distributed, environment_local_rank
from utils.hellaswag.dataset import NUM_ENDINGS, choose_directory, find_or_download, read_rows
from utils.hellaswag.results import STYLES, check_output, compare, make_record, summary, write_results
from utils.hellaswag.tokenization import crop_rows, harness_text, tokenize, tokenizer_for
from utils.runtime import (
    DTYPES,
    autocast,
    choose_device,
    choose_dtype,
    choose_matmul,
    eval_mode,
    peak_memory_bytes,
)
from utils.tokenizer import GPT2Tokenizer, Tokenizer
from utils.weights.find_model import find_model

# Nodes per forward pass: enough to keep the device busy at little memory.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536, "mps": 8192}
# Logits in memory at one time: on a CPU they should stay in its caches, a GPU needs large matmuls.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27, "mps": 1 << 25}

# ------------------------------------------------------------------------------------------------------------
# The plain form: four padded rows per example


def iter_examples(split: str, directory: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split ("train", "val" or "test"), downloading the file if it is missing."""
    yield from read_rows(find_or_download(choose_directory(directory), split), split)


def render_multiple_choice_tensors(
    example: dict[str, Any], tokenizer: Tokenizer | None = None, block_size: int | None = None,
    style: str = "completion",
) -> tuple[dict[str, Any], Tensor, Tensor, int | None]:  # fmt: skip
    """Tokenizes an example into four rows, context and ending, padded with zeros to equal length.

    Rows longer than block_size keep their last tokens; `style` is a key of `STYLES`. Returns (data:
    dict with label, ctx_tokens and ending_tokens as lists of ids, to compare with other code; tokens (4, N)
    int64; mask (4, N) int64, 1 at tokens of the ending; label 0..3, or None if unlabelled).
    """
    context, endings = tokenize(example, tokenizer or GPT2Tokenizer(), style)
    rows, starts = crop_rows(context, endings, block_size)
    tokens, mask = torch.zeros(2, NUM_ENDINGS, max(map(len, rows)), dtype=torch.int64)  # (4, N), (4, N)
    for ending, (row, start) in enumerate(zip(rows, starts)):
        tokens[ending, : len(row)] = torch.from_numpy(row)
        # Padding needs no attention mask: it comes last, and causal attention never looks ahead.
        mask[ending, start : len(row)] = 1
    label = example.get("label")
    label = None if label in (None, "") else int(label)  # the copy on the Hugging Face hub has strings
    data = dict(label=label, ctx_tokens=context.tolist(), ending_tokens=[ids.tolist() for ids in endings])
    return data, tokens, mask, label


def most_likely_completion_index(tokens: Tensor, mask: Tensor, logits: Tensor) -> int:
    """Returns the ending with the lowest mean loss per token; tokens and mask (4, N), logits (4, N, V)."""
    loss_sum, num_scored = completion_losses(tokens, mask, logits)
    return int((loss_sum / num_scored).argmin())


def completion_losses(tokens: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of each ending in nats, (4,), and its number of scored tokens, (4,)."""
    # Position i predicts token i + 1: the last logits and the first token have no counterpart.
    shifted_logits = logits[:, :-1].flatten(0, 1)  # (4, N, V) -> (4 * (N - 1), V)
    targets, scored = tokens[:, 1:], mask[:, 1:]  # (4, N - 1)
    losses = F.cross_entropy(shifted_logits, targets.flatten(), reduction="none").view_as(targets)
    return (losses * scored).sum(dim=1), scored.sum(dim=1)


# ------------------------------------------------------------------------------------------------------------
# The fast form: one prefix tree per example, many trees per batch


class Example(NamedTuple):
    """A tokenized example as a prefix tree.

    Take the context "Hello, I'm a" with the endings "language model,", "language", "model", "a language":

        row 0   Hello  ,  I  'm  a  language  model  ,
        row 1   Hello  ,  I  'm  a  language
        row 2   Hello  ,  I  'm  a  model
        row 3   Hello  ,  I  'm  a  a  language

    Under causal attention a hidden state depends only on its own token and on those before it, so rows have
    equal hidden states as far as they begin alike. Each distinct prefix is computed once, as a node of a
    tree. The last token of a row predicts nothing and needs no node. 8 nodes replace 4 x 8 padded positions:

        0 Hello - 1 , - 2 I - 3 'm - 4 a +- 5 a                    only row 3 passes through 5
                                         +- 6 language - 7 model   only row 0 passes through 6 and 7

    Node 4 predicts the first token of all four endings: one hidden state and one softmax, three targets.

    The model receives the nodes as one sequence, with two changes: the position of a node is its depth (5 for
    nodes 5 and 6), and it attends to itself and its ancestors only (node 6 to 0..4, not to 5).
    """

    index: int  # row of the file, from 0
    label: int | None
    tokens: np.ndarray  # (T,) token of each node
    positions: np.ndarray  # (T,) depth of each node, its position in every row that it belongs to
    row_sets: np.ndarray  # (T,) uint8: bit e is set if row e passes through the node
    targets: np.ndarray  # (S,) the scored tokens
    predicted_by: np.ndarray  # (S,) node that predicts each scored token
    endings: np.ndarray  # (S,) ending that each scored token belongs to, 0..3
    divisors: np.ndarray  # (4,) scored tokens of each ending, or its characters in lm-eval style
    num_shortened: int  # rows longer than the block size


def build_tree(rows: Sequence[list[int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the token of each node (T,), and for each row the nodes along it, from first token to last."""
    node_of: dict[tuple[int, int], int] = {}  # (parent node, token) -> node, in the order of creation
    paths = [np.empty(0, dtype=np.int64)] * len(rows)
    # Sorted, so that the tree, and thus the rounding, does not depend on the order of the rows.
    for number in sorted(range(len(rows)), key=rows.__getitem__):
        path = [-1]  # parent of the first node
        for token in rows[number]:
            path.append(node_of.setdefault((path[-1], token), len(node_of)))
        paths[number] = np.array(path[1:], dtype=np.int64)
    return np.array([token for _, token in node_of]), paths


def make_example(
    row: dict[str, Any], index: int, tokenizer: Tokenizer, block_size: int, style: str = "completion"
) -> Example:
    """Tokenizes a row of the data set. Raises UserError for a block size of 1: nothing could be predicted."""
    if block_size < 2:
        what = f"HellaSwag needs a block size of at least 2 (found {block_size})"
        raise UserError(what, "use a model with a larger block size")
    context, endings = tokenize(row, tokenizer, style)
    rows, starts = crop_rows(context, endings, block_size)
    tokens, paths = build_tree([ids[:-1].tolist() for ids in rows])
    positions, row_sets = np.zeros(len(tokens), dtype=np.int64), np.zeros(len(tokens), dtype=np.uint8)
    for ending, path in enumerate(paths):
        positions[path] = np.arange(len(path))
        row_sets[path] |= 1 << ending
    # A row cropped to its ending has nothing before its first token, which therefore cannot be scored.
    firsts = [max(start, 1) for start in starts]
    counts = [len(ids) - first for ids, first in zip(rows, firsts)]
    divisors = counts if style == "completion" else [len(text) for text in harness_text(row)[1]]
    return Example(
        index=index,
        label=row["label"],
        tokens=tokens,
        positions=positions,
        row_sets=row_sets,
        targets=np.concatenate([ids[first:] for ids, first in zip(rows, firsts)]),
        predicted_by=np.concatenate([path[first - 1 :] for path, first in zip(paths, firsts)]),
        endings=np.repeat(np.arange(NUM_ENDINGS), counts),
        divisors=np.maximum(divisors, 1).astype(np.float64),
        num_shortened=sum(len(context) + len(ids) > block_size for ids in endings),
    )


def plan_batches(examples: Sequence[Example], batch_tokens: int) -> list[list[Example]]:
    """Groups examples of similar size, so that batches of about batch_tokens nodes have little padding.

    The largest come first: if memory runs out, it does so at the start.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        largest = len(batches[-1][0].tokens) if batches else 0
        is_full = not batches or (len(batches[-1]) + 1) * largest > batch_tokens
        # Below nine tenths of the largest size, too much of the row would be padding.
        if is_full or len(example.tokens) < 0.9 * largest:
            batches.append([])
        batches[-1].append(example)
    return batches


@torch.inference_mode()
def score_batch(model: GPT, batch: Sequence[Example], dtype: torch.dtype) -> np.ndarray:
    """Returns the summed loss of each ending in nats, (B, 4) float64, from one forward pass over B trees."""
    weight = model.lm_head.weight  # (V, C)

    def padded(arrays: Iterable[np.ndarray]) -> Tensor:  # (B, T), zeros at the end
        return pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True).to(weight.device)

    tokens = padded(example.tokens for example in batch)
    positions = padded(example.positions for example in batch)
    mask = tree_mask(padded(example.row_sets for example in batch))
    # Node t of tree i is row i * T + t of the flattened batch. It may predict several tokens by one softmax.
    nodes = np.concatenate([example.predicted_by + i * tokens.size(1) for i, example in enumerate(batch)])
    targets = np.concatenate([example.targets for example in batch])
    arrays = (*np.unique(nodes, return_inverse=True), targets)  # (U,), (S,), (S,)
    predictors, predicted_by, targets = (torch.from_numpy(array).to(weight.device) for array in arrays)
    with autocast(weight.device, dtype):
        hidden = model.hidden_states(tokens, positions, attention_mask=mask)  # (B, T, C)
    hidden = hidden.flatten(0, 1)[predictors].to(dtype)  # (B, T, C) -> (B * T, C) -> (U, C)
    weight = weight.to(dtype)
    # -log softmax(logits)[target] = log sum exp(logits) - logits[target]. Only the sum needs all V logits,
    # once per node; the target's logit is one dot product per scored token.
    target_logits = (hidden[predicted_by].float() * weight[targets].float()).sum(dim=1)  # (S, C) -> (S,)
    losses = log_normalizers(hidden, weight)[predicted_by] - target_logits  # (U,) -> (S,)
    endings = np.concatenate([example.endings + i * NUM_ENDINGS for i, example in enumerate(batch)])
    sums = np.bincount(endings, weights=losses.cpu().numpy(), minlength=len(batch) * NUM_ENDINGS)
    return sums.reshape(len(batch), NUM_ENDINGS)


def tree_mask(row_sets: Tensor) -> Tensor:
    """Returns the attention mask (B, 1, T, T) of trees with row_sets (B, T); True where a node attends."""
    T = row_sets.size(1)
    query, key = row_sets.unsqueeze(2), row_sets.unsqueeze(1)  # (B, T, 1), (B, 1, T)
    # An ancestor is an earlier node that all rows of the query pass through: its set contains the query's.
    # Padding has the empty set, which all contain, so it attends to everything before it: with nothing to
    # attend to, its softmax would be NaN. No node attends to padding, which comes last.
    earlier = torch.ones(T, T, dtype=torch.bool, device=row_sets.device).tril()
    return (((query & key) == query) & earlier).unsqueeze(1)


def log_normalizers(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns log sum exp over the vocabulary of the logits of hidden (U, C) and weight (V, C), (U,) float32.

    The (U, V) logits, the largest tensor by far, are never in memory at once.
    """
    chunk_size = max(256, LOGITS_AT_ONCE[weight.device.type] // len(hidden) // 64 * 64)
    normalizers = []
    for chunk in weight.split(chunk_size):
        logits = linear(hidden, chunk).float()  # (U, chunk_size)
        # In place, unlike torch.logsumexp: log_softmax(x) = x - log sum exp(x), so one column gives the sum.
        first = logits[:, 0].clone()
        normalizers.append(first - torch.log_softmax(logits, dim=1, out=logits)[:, 0])
        del logits  # before the next chunk is computed, not after
    return torch.stack(normalizers, dim=1).logsumexp(dim=1)


# ------------------------------------------------------------------------------------------------------------
# The evaluation, for the training loop and for the command line


class HellaSwagResult(NamedTuple):
    """Counts over all ranks."""

    num_correct_norm: int  # the true ending has the lowest mean loss
    num_correct: int  # the true ending has the lowest summed loss
    num_total: int


def examples_for_training(
    directory: Path | None, limit: int | None, tokenizer: Tokenizer, block_size: int, dist: Distributed
) -> list[Example]:
    """Loads the first `limit` validation examples, or all, for `evaluate_hellaswag`; the same on all ranks.

    Without a valid file, or with a character tokenizer: an empty list on all ranks, after one warning.
    """
    try:
        if tokenizer.name == "char":
            raise UserError("its text needs GPT-2's BPE, not a character tokenizer", "use --tokenizer gpt2")
        # Rank 0 alone looks for the file and sends its rows, so ranks cannot disagree about the examples.
        rows = dist.on_master(lambda: list(iter_examples("val", directory))[:limit])
        with announced("tokenizing HellaSwag", shown=dist.is_master):
            return [make_example(row, index, tokenizer, block_size) for index, row in enumerate(rows)]
    except UserError as error:
        if dist.is_master:
            warn(f"HellaSwag is off: {error}")
        return []


def evaluate_hellaswag(
    model: GPT, examples: Sequence[Example], dist: Distributed, dtype: torch.dtype,
    batch_tokens: int | None = None, poll: Callable[[], None] = lambda: None,
) -> HellaSwagResult:  # fmt: skip
    """Counts correct answers on labelled examples, the same ones on all ranks, each scored by one rank.

    Args:
        model: the raw module, neither compiled nor wrapped, on dist's device.
        batch_tokens: nodes per forward pass; by default BATCH_TOKENS of the device.
        poll: called after each batch, equally often on all ranks; an exception from it ends the evaluation.
    """
    counts = np.zeros(3)
    own = examples[dist.rank :: dist.world_size]
    with announced("HellaSwag", len(own), " examples", shown=dist.is_master) as advance:
        for batch, loss_sum in score_examples(model, own, dtype, batch_tokens, dist):
            for example, losses in zip(batch, loss_sum):
                is_correct_norm = (losses / example.divisors).argmin() == example.label
                counts += is_correct_norm, losses.argmin() == example.label, 1
            advance(len(batch))
            poll()
    return HellaSwagResult(*map(int, dist.sum_numbers(*counts)))


def score_examples(
    model: GPT, examples: Sequence[Example], dtype: torch.dtype, batch_tokens: int | None, dist: Distributed
) -> Iterator[tuple[list[Example], np.ndarray]]:
    """Yields batches of this rank's examples with their summed losses (B, 4).

    All ranks yield equally often, for collectives in between: one that has finished yields empty batches.
    """
    batches = plan_batches(examples, batch_tokens or BATCH_TOKENS[dist.device.type])
    batches += [[]] * (int(dist.max_number(len(batches))) - len(batches))
    with eval_mode(model):  # left also if the caller stops early
        for batch in batches:
            yield batch, score_batch(model, batch, dtype) if batch else np.empty((0, NUM_ENDINGS))


# ------------------------------------------------------------------------------------------------------------
# The command line


def score_style(
    model: GPT, examples: Sequence[Example], dtype: torch.dtype, batch_tokens: int | None, style: str
) -> list[dict[str, Any]]:
    """Scores all examples in this process and returns their records (`make_record`), in file order.

    Shows the running acc_norm: a progress bar on a terminal, else one line per tenth of the examples. The
    largest examples come first, so early values are not a fair sample.
    """
    from tqdm import tqdm

    records, num_correct, accuracy = [], 0, ""
    dist = Distributed(model.lm_head.weight.device)
    bar = tqdm(total=len(examples), unit=" examples", disable=None)  # None: only on a terminal
    with bar, announced(f"scoring {len(examples):,} examples", shown=bar.disable):
        for batch, loss_sum in score_examples(model, examples, dtype, batch_tokens, dist):
            if not np.isfinite(loss_sum).all():  # argmin would pick 0, and be right by chance in 1 of 4
                raise UserError("the model's losses are not finite", "use --dtype float32, or other weights")
            tenths_before = 10 * len(records) // len(examples)
            for example, losses in zip(batch, loss_sum):
                records.append(make_record(example.index, example.label, style, losses, example.divisors))
                num_correct += records[-1]["prediction_norm"] == example.label
            if examples[0].label is not None:
                accuracy = f" acc_norm {num_correct / len(records):.4f}"
            bar.set_postfix_str(accuracy.strip(), refresh=False)
            bar.update(len(batch))
            if bar.disable and 10 * len(records) // len(examples) > tenths_before:
                print(f"{len(records):,}/{len(examples):,}{accuracy}", flush=True)
    return sorted(records, key=lambda record: record["index"])


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="eval_hellaswag.py", doc=__doc__)
    add = parser.add_argument
    model_help = "gpt2[-medium|-large|-xl], checkpoint, run's folder, transformers folder"
    add("-m", "--model-name", type=path_text, default="gpt2", metavar="MODEL", help=model_help)
    add("-d", "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--split", choices=("val", "train", "test"), default="val", help="test has no labels: use --output")
    add("--limit", type=positive_int, metavar="N", help="score the first N examples only")
    style_help = "completion: as in build-nanogpt; lm-eval: as in EleutherAI's evaluation harness"
    add("--style", choices=(*STYLES, "both"), default="completion", help=style_help)
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the matmuls")
    add("--batch-tokens", type=positive_int, metavar="N", help="tokens per forward pass; default: by device")
    add("--hellaswag-dir", type=Path, metavar="DIR", help="folder; default: $HELLASWAG_DIR, else hellaswag/")
    add("--output", type=Path, metavar="FILE", help="write one JSON line per example, in file order")
    add("--compare", type=Path, nargs=2, metavar="FILE", help="McNemar's test of two files from --output")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.compare:
        parser.warn_of_others(argv, {"compare"}, "with --compare")
        print(compare(*args.compare))
        return 0
    if args.split == "test" and args.output is None:
        raise UserError("test has no labels, so no accuracy", "add --output FILE for the predictions")
    if args.output is not None:
        check_output(args.output)
    styles = tuple(STYLES) if args.style == "both" else (args.style,)
    # Everything that can fail quickly comes before loading the model.
    source = find_model(args.model_name, PRETRAINED_CONFIGS)
    path = find_or_download(choose_directory(args.hellaswag_dir), args.split)
    rows = read_rows(path, args.split, for_harness="lm-eval" in styles)[: args.limit]
    device = choose_device(args.device).value
    dtype, reason = choose_dtype(args.dtype, device)
    with announced(f"loading {source}"):
        model = GPT.load(source, device)
    choose_matmul(model)
    tokenizer = tokenizer_for(source, model.tokenizer_state, model.config.vocab_size)
    block_size = model.config.block_size
    records = {}
    for style in styles:
        with announced("tokenizing HellaSwag"):
            examples = [make_example(row, i, tokenizer, block_size, style) for i, row in enumerate(rows)]
        if num_shortened := sum(example.num_shortened for example in examples):
            print(f"{num_shortened} rows keep their last {block_size} tokens, the block size")
        started = time.perf_counter()
        records[style] = score_style(model, examples, dtype, args.batch_tokens, style)
        seconds = time.perf_counter() - started
        if args.split != "test":
            print(summary(style, records[style], str(source)))
        say(
            f"  {len(rows) / seconds:,.1f} examples/s on {device} in {str(dtype)[6:]} ({reason}), "
            f"peak memory {peak_memory_bytes(device) / 1e9:.2f} GB"
        )
    if args.output is not None:
        write_results(args.output, records)
        print(f"{len(rows):,} lines in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, environment_local_rank))
