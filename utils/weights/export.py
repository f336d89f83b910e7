"""A checkpoint as a folder that Hugging Face transformers, and everything built on it, can read.

python -m utils.weights.export log/model_19073.pt out/

writes config.json, model.safetensors and tokenizer files; `AutoModelForCausalLM.from_pretrained("out/")` then
computes the same logits, which is checked before the folder gets its name. GPT.from_pretrained("out/") reads
it back, bit for bit.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from gpt_model import GPT
from utils.command_line import ArgumentParser
from utils.errors import Unfinished, UserError, run_script
from utils.tokenizer import END_OF_TEXT, MERGES_PATH, CharTokenizer, load_merges, tokenizer_from_state
from utils.weights.pretrained import CHARACTERS_FILE, TRANSPOSED

LARGEST_DIFFERENCE = 1e-4  # of two logits; what rounding leaves in float64 is far below
CHECKED_TOKENS = 64


def hugging_face_config(model: GPT, num_words: int, end_of_text: int | None) -> dict:
    """What config.json holds. Dropout is zero, as in our training."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": num_words,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # the old name of n_positions, which some converters still read
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "bos_token_id": end_of_text,  # GPT-2 starts and ends a document with the same token
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def hugging_face_weights(model: GPT, num_words: int) -> dict[str, Tensor]:
    """The state dict in transformers' shapes, without the padding of the vocabulary.

    The output projection is left out: it is the embedding, and a file of plain tensors can hold it once only.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[:num_words]
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    return weights


def write_tokenizer(folder: Path, tokenizer, block_size: int) -> str:
    """Writes the tokenizer's files. Returns a line that says what they are."""
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        write_json(folder / CHARACTERS_FILE, ids)
        return f"{CHARACTERS_FILE}: ids of a character model, for which transformers has no tokenizer"
    words, merges = gpt2_words_and_merges()
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_bytes(merges.encode("utf-8"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    # Decoding gives the text back, spaces before punctuation and all.
    settings.update(add_prefix_space=False, clean_up_tokenization_spaces=False)
    write_json(folder / "tokenizer_config.json", settings)
    return "vocab.json, merges.txt: GPT-2's tokenizer, for AutoTokenizer"


def gpt2_words_and_merges() -> tuple[list[str], str]:
    """The words of GPT-2's vocabulary by id, its bytes as characters that print, and its file of merges."""
    load_merges()  # compares the file's checksum
    merges = lzma.decompress(MERGES_PATH.read_bytes()).decode("utf-8")
    # The first 256 words are the bytes: those that print as themselves, the other 68 as U+0100 onwards.
    printable = [chr(i) for i in range(256) if chr(i).isprintable() and not chr(i).isspace()]
    words = [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]
    words += [line.replace(" ", "") for line in merges.split("\n")[1:-1]]  # the first line is a version
    return [*words, END_OF_TEXT], merges


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def largest_difference(model: GPT, folder: Path, num_words: int) -> float:
    """Largest difference between our logits and those of transformers, on random tokens.

    In float64: rounding is then so small that what is left would be a difference of the two models.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, model.config.block_size)
    idx = torch.randint(num_words, (2, length), generator=generator)  # (B, T)
    ours = model.double()(idx)[0][..., :num_words]
    model.float()  # exact: each number was a float32 before
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()(idx).logits
    return (ours - theirs).abs().max().item()


def export(model: GPT, folder: Path, say=print) -> float:
    """Writes `folder`, after the model in it has been checked.

    Args:
        model: with `tokenizer_state`, on the CPU.
        folder: new or empty.
        say: gets lines for the user.

    Returns:
        The largest difference between our logits and those of transformers.

    Raises:
        UserError: transformers is missing, the folder holds something or cannot be written.
        Unfinished: the logits differ; the folder does not exist then.
    """
    for package in ("transformers", "safetensors"):
        if not find_spec(package):
            raise UserError(f"{package} is not installed", f"pip install {package}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder", "export into a new folder")
    tokenizer = tokenizer_from_state(model.tokenizer_state)
    num_words = min(tokenizer.num_words, model.config.vocab_size)
    # Under another name until it has been checked: a folder of this name is a model that works.
    unfinished = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        lines = write_model(unfinished, model, tokenizer, num_words)
        difference = largest_difference(model, unfinished, num_words)
        if not difference <= LARGEST_DIFFERENCE:  # NaN is no success either
            raise Unfinished(
                f"the exported logits differ by {difference:.1e} (expected at most {LARGEST_DIFFERENCE:g})",
                "are the weights finite, and is this transformers' own GPT-2?",
            )
        os.replace(unfinished, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}", "choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for line in lines:
        say(line)
    say(f"largest difference of the logits to transformers' GPT-2: {difference:.1e} (in float64)")
    return difference


def write_model(folder: Path, model: GPT, tokenizer, num_words: int) -> list[str]:
    """Writes all files. Returns lines that say what they are."""
    from safetensors.torch import save_file  # comes with transformers

    write_json(folder / "config.json", hugging_face_config(model, num_words, tokenizer.end_of_text))
    weights = hugging_face_weights(model, num_words)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    # safetensors lets only the owner read; the file is for whoever may read the others.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    padding = model.config.vocab_size - num_words
    cut = f", {padding} padding rows of the vocabulary cut" if padding else ""
    num_parameters = sum(weight.numel() for weight in weights.values())
    return [
        f"config.json, model.safetensors: {num_parameters:,} parameters{cut}",
        write_tokenizer(folder, tokenizer, model.config.block_size),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="-m utils.weights.export", description="Export a checkpoint to Hugging Face."
    )
    parser.add_argument("checkpoint", help="log/model_*.pt, or whatever generate.py -m takes")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the model")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    export(GPT.load(args.checkpoint).eval(), folder)
    print(f'in {args.folder}: AutoModelForCausalLM.from_pretrained("{args.folder}") loads it')
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
