"""Samples text from a checkpoint or from OpenAI's GPT-2.

python generate.py -m log/model_01000.pt -p "To be, or not to be"
python generate.py -m gpt2-xl -p FILE:prompt.txt --temperature 0
python generate.py                       newest checkpoint in log/, prompts typed at the terminal
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from gpt_model import GPT
from utils.command_line import ArgumentParser, non_negative_float, positive_float, positive_int
from utils.data_loader import read_text
from utils.distributed import environment_local_rank
from utils.errors import UserError, run_script
from utils.runtime import choose_device
from utils.tokenizer import tokenizer_from_state
from utils.training.settings import check_model_reads
from utils.weights.checkpoint import newest_model_file

LOG_DIR = Path(__file__).resolve().parent / "log"


def encode_prompt(prompt: str, tokenizer, block_size: int, say=print) -> torch.Tensor:
    """Ids (1, T) of a prompt.

    An empty one starts from <|endoftext|>; of one longer than the block the end is kept.
    """
    ids = tokenizer.encode(prompt, allow_special=True).astype("int64")
    if len(ids) == 0:
        ids = np.array([tokenizer.end_of_text or 0])
    if len(ids) > block_size:
        say(f"the prompt has {len(ids)} tokens, the model reads {block_size}: its last {block_size} are kept")
        ids = ids[-block_size:]
    return torch.from_numpy(ids).unsqueeze(0)


def sample_texts(
    model: GPT,
    tokenizer,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    say=print,
    **sampling,
) -> list[str]:
    """Continues a prompt several times.

    Args:
        model: the raw module; `sampling` goes to its `generate`.
        tokenizer: the one it was trained with.
        seed: of a generator of its own: the global one is not touched.

    Returns:
        Prompt and continuation, `num_samples` texts. A text ends before the first <|endoftext|> the model
        writes.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    device = model.lm_head.weight.device
    idx = encode_prompt(prompt, tokenizer, model.config.block_size, say).to(device).repeat(num_samples, 1)
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = model.generate(
        idx, max_new_tokens, generator=generator, num_words=tokenizer.num_words, **sampling
    ).tolist()
    continuations = (row[idx.size(1) :] for row in rows)
    return [prompt + tokenizer.decode(until_end_of_text(ids, tokenizer.end_of_text)) for ids in continuations]


def until_end_of_text(ids: list[int], end_of_text: int | None) -> list[int]:
    """The ids before the first <|endoftext|>."""
    return ids[: ids.index(end_of_text)] if end_of_text in ids else ids


def read_prompt(argument: str) -> str:
    """`-` reads standard input, `FILE:path` a file; anything else is the prompt itself."""
    if argument == "-":
        return sys.stdin.read()
    if argument.startswith("FILE:"):
        return read_text(Path(argument[len("FILE:") :]), flag="-p FILE:")
    return argument


def prompt_at_terminal(model: GPT, tokenizer, args) -> None:
    """Reads prompts and streams continuations until an empty line or the end of input."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(args.seed)
    while True:
        try:
            prompt = input("prompt (empty line ends): ")
        except EOFError:
            return
        if not prompt:
            return
        idx = encode_prompt(prompt, tokenizer, model.config.block_size).to(device)
        ids: list[int] = []
        shown = ""
        sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        for token in model.stream(
            idx, args.max_new_tokens, generator=generator, num_words=tokenizer.num_words, **sampling
        ):
            ids.append(token.item())
            if ids[-1] == tokenizer.end_of_text:
                break
            # A token may hold part of a character: what is not a whole one yet (U+FFFD) waits for the next
            # token.
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()


def parse_arguments(argv: list[str] | None):
    parser = ArgumentParser(prog="generate.py", description="Sample text from a checkpoint or a GPT-2 size.")
    parser.add_argument(
        "-m", "--model-name", help="checkpoint, gpt2[-medium|-large|-xl] or folder; default: newest in log/"
    )
    parser.add_argument(
        "-p", "--prompt", help="text, FILE:path, or - for standard input; default: ask at the terminal"
    )
    parser.add_argument(
        "-n", "--num-samples", type=positive_int, default=1, help="continuations of the prompt"
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=100, help="length of a continuation")
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=positive_int, default=50, help="sample from the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=positive_float, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("-d", "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args(argv)
    if args.top_p is not None and args.top_p > 1:
        raise UserError(
            f"--top-p {args.top_p} is not a probability (expected at most 1)",
            "give at most 1, or leave it out (--top-k still applies)",
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device).value
    source = args.model_name or newest_model_file(LOG_DIR)
    if source is None:
        raise UserError(
            f"no checkpoint in {LOG_DIR}", "python train_gpt.py makes one; or name a model: -m gpt2"
        )
    model = GPT.load(source, device).eval()
    tokenizer = tokenizer_from_state(model.tokenizer_state)
    check_model_reads(model.config, 1, tokenizer.num_words)
    try:
        return continue_prompts(model, tokenizer, args)
    except FloatingPointError as error:
        raise UserError(f"{source}: {error}", "its weights are broken: use an earlier checkpoint") from error


def continue_prompts(model: GPT, tokenizer, args) -> int:
    """The work of the script, for whatever gives the prompts."""
    if args.prompt is None and sys.stdin.isatty():
        prompt_at_terminal(model, tokenizer, args)
        return 0
    prompt = read_prompt(args.prompt if args.prompt is not None else "-")
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    texts = sample_texts(
        model, tokenizer, prompt, args.num_samples, args.max_new_tokens, args.seed, **sampling
    )
    for number, text in enumerate(texts, 1):
        if args.num_samples > 1:
            print(f"--- sample {number} of {args.num_samples}")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, environment_local_rank()))
