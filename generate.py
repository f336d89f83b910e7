"""Samples text from a checkpoint or from OpenAI's GPT-2.

    python generate.py                                        the newest checkpoint; asks for prompts
    python generate.py -m log -p "To be, or not to be"        the last checkpoint in a folder
    python generate.py -m gpt2-xl -p FILE:prompt.txt -n 3     three samples from OpenAI's largest GPT-2

From Python, `complete(GPT.load("log/model_01000.pt"), "To be, or not to be")` returns a text.
"""

from utils.start import begin_script

if __name__ == "__main__":
    begin_script()

import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from gpt_model import GPT
from utils.command_line import ArgumentParser, UserError, path_text, run_script
from utils.console import announced, no_second_interrupt, warn
from utils.decoding import check_sampling
from utils.distributed import environment_local_rank
from utils.runtime import DTYPES, choose_device, choose_dtype, choose_matmul, eval_mode
from utils.suggestions import similar_file
from utils.text_files import quoted, read_text
from utils.tokenizer import Tokenizer, check_vocab_size, tokenizer_from_state
from utils.weights.find_model import newest_run

ROOT = Path(__file__).resolve().parent


def encode_prompt(prompt: str, tokenizer: Tokenizer, block_size: int) -> Tensor:
    """Token ids (1, T) of a prompt; only the last `block_size`, with a message, if there are more.

    An empty prompt becomes <|endoftext|>, which starts a document, or id 0 where the vocabulary has none.
    """
    ids = tokenizer.encode(prompt, allow_special=True).tolist() or [tokenizer.end_of_text or 0]
    if len(ids) > block_size:
        warn(f"the prompt has {len(ids)} tokens: only the last {block_size}, the block size, are used")
    return torch.tensor([ids[-block_size:]])


def complete(
    model: GPT, prompt: str, max_new_tokens: int = 100, temperature: float = 0.8, top_k: int | None = 50,
    top_p: float | None = None, seed: int = 42,
) -> str:  # fmt: skip
    """The prompt with one continuation; the arguments and their defaults are those of the command line.

    The continuation ends before the first <|endoftext|>. Raises UserError for impossible arguments, or if the
    model has no tokenizer here; FloatingPointError for non-finite logits.
    """
    tokenizer = tokenizer_from_state(model.tokenizer_state)
    check_vocab_size(tokenizer, model.config.vocab_size)
    return sample_texts(model, tokenizer, prompt, 1, max_new_tokens, seed, temperature, top_k, top_p)[0]


def sample_texts(
    model: GPT, tokenizer: Tokenizer, prompt: str, num_samples: int, max_new_tokens: int, seed: int,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
) -> list[str]:  # fmt: skip
    """Continues a prompt several times, with a random number generator of its own.

    `model` is the raw module; its dropout is off meanwhile. Returns `num_samples` texts, each the prompt and
    a continuation up to the first <|endoftext|>. Raises UserError for impossible arguments (see
    `GPT.generate`), FloatingPointError for non-finite logits.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples)
    device, end_of_text = model.lm_head.weight.device, tokenizer.end_of_text
    idx = encode_prompt(prompt, tokenizer, model.config.block_size).to(device).repeat(num_samples, 1)
    generator = torch.Generator(device).manual_seed(seed)
    sampling = (temperature, top_k, top_p, generator, tokenizer.vocab_size)
    with eval_mode(model):
        continuations = model.generate(idx, max_new_tokens, *sampling)[:, idx.size(1) :].tolist()
    before = idx[0].tolist() if prompt else []
    texts = (takewhile(lambda token: token != end_of_text, ids) for ids in continuations)
    return [prompt + decode_after(before, ids, tokenizer) for ids in texts]


def decode_after(before: list[int], ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """Text of tokens that follow others: some decoders omit the space before the first token of a text."""
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def read_prompt(argument: str | None) -> str:
    """The prompt that -p names: None or `-` is standard input, `FILE:path` a file, anything else is text."""
    if argument is not None and argument.startswith("FILE:"):
        path = Path(os.path.expanduser(argument[len("FILE:") :]))
        close = None if "\0" in argument or os.path.exists(path) else similar_file(path)
        if close and close.is_file():
            raise UserError(f"cannot read {path}: no such file", f"did you mean -p FILE:{quoted(close)}?")
        return read_text(path, flag="-p FILE:")
    name = "standard input" if argument in (None, "-") else "-p"
    try:
        # Bytes that are not UTF-8 arrive as surrogates.
        text = argument
        if name == "standard input":
            text = sys.stdin.read() if sys.stdin else ""  # None: it is closed
        text.encode("utf-8")
    except UnicodeError as error:
        hint = "give it in UTF-8, or in a file: -p FILE:PATH"
        raise UserError(f"{name}: the prompt is not UTF-8 ({error})", hint) from error
    return text.removeprefix("\ufeff")


def interact(
    model: GPT, tokenizer: Tokenizer, max_new_tokens: int, seed: int,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
) -> None:  # fmt: skip
    """Reads prompts and streams continuations until an empty line or the end of input.

    Ctrl-C ends a continuation; at the prompt, it is raised as KeyboardInterrupt.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    sampling = (temperature, top_k, top_p, generator, tokenizer.vocab_size)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is typed or pasted may not be UTF-8
    while prompt := read_line("prompt (an empty line quits): "):
        idx = encode_prompt(prompt, tokenizer, model.config.block_size).to(device)
        tokens = map(Tensor.item, model.stream(idx, max_new_tokens, *sampling))
        try:
            before = idx[0].tolist()
            stream_text(takewhile(lambda token: token != tokenizer.end_of_text, tokens), tokenizer, before)
        except KeyboardInterrupt:
            print()


def read_line(question: str) -> str:
    """A line typed at the terminal, with a history and cursor keys where Python has readline.

    Returns "" at the end of input. After Ctrl-C and Ctrl-D, which leave the cursor behind the prompt, it
    prints a line break.
    """
    with suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401 - input() uses it once it is imported
    try:
        return input(question)
    except EOFError:
        print()
        return ""
    except KeyboardInterrupt:
        print()
        raise


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer, before: list[int]) -> None:
    """Prints the text of tokens as they come, and a line break; `before` are those of the prompt."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        # A token may end within a character: U+FFFD is held back until the next token completes it.
        text = decode_after(before, ids, tokenizer)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(decode_after(before, ids, tokenizer)[len(shown) :])


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line; see `--help`."""
    parser = ArgumentParser(prog="generate.py", doc=__doc__)
    add = parser.add_argument
    model_help = "checkpoint, gpt2[-medium|-large|-xl] or folder; default: newest in log/ and runs/*/"
    add("-m", "--model-name", type=path_text, metavar="MODEL", help=model_help)
    add("-p", "--prompt", help="text, FILE:path, or - for standard input; default: ask at the terminal")
    add("-n", "--num-samples", type=int, default=1, help="number of continuations")
    add("--max-new-tokens", type=int, default=100, help="tokens per continuation")
    add("--temperature", type=float, default=0.8, help="0 is greedy decoding")
    add("--top-k", type=int, default=50, help="sample from the k likeliest tokens")
    add("--top-p", type=float, help="of those, the likeliest of this total probability; default: off")
    add("--seed", type=int, default=42, help="seed of the random number generator")
    add("-d", "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of weights and matmuls")
    args = parser.parse_args(argv)
    if not -(2**63) <= args.seed < 2**64:  # what torch.Generator takes
        raise UserError(f"--seed {args.seed} does not fit into 64 bits", "give a smaller number")
    check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_samples)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device).value
    dtype = choose_dtype(args.dtype, device).value
    source = args.model_name or newest_run(ROOT)
    if source is None:
        what = f"no checkpoint in {ROOT / 'log'} or {ROOT / 'runs'}"
        raise UserError(what, "run train_gpt.py first, or name a model: -m gpt2")
    # Converted once instead of autocast: half the bytes to read for each token, and no casts of activations.
    with announced(f"loading {source}"):
        model = GPT.load(source, device).to(dtype)
    choose_matmul(model)
    tokenizer = tokenizer_from_state(model.tokenizer_state)
    check_vocab_size(tokenizer, model.config.vocab_size)
    sampling = (args.max_new_tokens, args.seed, args.temperature, args.top_k, args.top_p)
    try:
        if args.prompt is None and sys.stdin and sys.stdin.isatty():
            with no_second_interrupt():
                interact(model, tokenizer, *sampling)
            return 0
        prompt = read_prompt(args.prompt)
        with announced("sampling"):
            texts = sample_texts(model, tokenizer, prompt, args.num_samples, *sampling)
    except FloatingPointError as error:
        hint = "the weights are broken: use an earlier checkpoint; or float16 overflowed: use --dtype float32"
        raise UserError(f"{source}: {error}", hint) from error
    for number, text in enumerate(texts, 1):
        if args.num_samples > 1:
            print(f"--- sample {number} of {args.num_samples}")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, environment_local_rank, result_is_stdout=True))
