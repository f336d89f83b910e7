"""Exports a checkpoint as a folder that Hugging Face transformers, and everything built on it, can read.

    python -m utils.weights.export log/model_19073.pt out/

writes config.json, model.safetensors and tokenizer files; `AutoModelForCausalLM.from_pretrained("out/")` then
computes the same logits, which is verified before the folder gets its name. GPT.from_pretrained("out/") reads
it back, bit for bit.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where utils is, also if started by its path
    from utils.start import begin_script

    begin_script()

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.command_line import ArgumentParser, Unfinished, UserError, run_script
from utils.console import announced
from utils.files import temporary_name
from utils.runtime import eval_mode
from utils.tokenizer import END_OF_TEXT, Tokenizer, read_merges, token_strings, tokenizer_from_state
from utils.tokenizer_json import write_tokenizer as write_tokenizer_json
from utils.weights.pretrained import CHARACTERS_FILE, TRANSPOSED

if TYPE_CHECKING:
    from gpt_model import GPT

MAX_DIFFERENCE = 1e-4  # of two logits; rounding in float64 is far below
NUM_CHECKED_TOKENS = 64  # per sequence


def hugging_face_config(model: "GPT", vocab_size: int, end_of_text: int | None) -> dict[str, Any]:
    """The content of config.json, with the dropout of training, which transformers applies in train mode."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # the old name of n_positions, which some converters still read
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")},
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": end_of_text,  # GPT-2 starts and ends a document with the same token
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def hugging_face_weights(model: "GPT", vocab_size: int) -> dict[str, Tensor]:
    """The state dict in transformers' shapes, without the padding rows of the vocabulary.

    Without `lm_head.weight`, too: it is the embedding, and safetensors stores a tensor once only.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    return weights


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a dict as indented JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> str:
    """Writes the tokenizer's files and returns a line that describes them."""
    if tokenizer.name == "char":
        characters = tokenizer.state()["characters"]
        write_json(folder / CHARACTERS_FILE, {character: i for i, character in enumerate(characters)})
        return f"{CHARACTERS_FILE}: ids of a character model, for which transformers has no tokenizer"
    if tokenizer.name != "gpt2":
        write_tokenizer_json(folder, tokenizer.state(), block_size)
        return "tokenizer.json: the model's own tokenizer, for AutoTokenizer"
    write_json(folder / "vocab.json", {token: i for i, token in enumerate([*token_strings(), END_OF_TEXT])})
    (folder / "merges.txt").write_bytes(read_merges().encode("utf-8"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "special_tokens_map.json", special)
    settings = {**special, "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    # Decoding must return the encoded text, also with a space before punctuation.
    settings.update(add_prefix_space=False, clean_up_tokenization_spaces=False)
    write_json(folder / "tokenizer_config.json", settings)
    return "vocab.json, merges.txt: GPT-2's tokenizer, for AutoTokenizer"


@announced("writing the weights")
def write_model(folder: Path, model: "GPT", tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Writes all files and returns lines that describe them."""
    from safetensors.torch import save_file  # a dependency of transformers

    write_json(folder / "config.json", hugging_face_config(model, vocab_size, tokenizer.end_of_text))
    weights = hugging_face_weights(model, vocab_size)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    # safetensors makes its file readable for the owner only.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    padding = model.config.vocab_size - vocab_size
    removed = f", {padding} padding rows of the vocabulary removed" if padding else ""
    num_parameters = sum(weight.numel() for weight in weights.values())
    return [
        f"config.json, model.safetensors: {num_parameters:,} parameters{removed}",
        write_tokenizer(folder, tokenizer, model.config.block_size),
    ]


@announced("comparing the logits with those of transformers")
@torch.no_grad()
def largest_difference(model: "GPT", folder: Path, vocab_size: int) -> float:
    """The largest difference between our logits and those of transformers, on random tokens.

    In float64, where a difference larger than rounding means that the models differ.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    T = min(NUM_CHECKED_TOKENS, model.config.block_size)
    idx = torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(0))  # (B, T)
    with eval_mode(model):
        ours = model.double()(idx)[0][..., :vocab_size]  # (B, T, V)
    model.float()  # exact: every number was a float32 before
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()(idx).logits
    return (ours - theirs).abs().max().item()


def export(model: "GPT", folder: Path, say: Callable[[str], None] = print) -> float:
    """Writes a model on the CPU as a new folder, which appears once its logits have been verified.

    Returns their largest difference to those of transformers. Raises UserError if transformers is missing, or
    if the folder is not empty or cannot be written; Unfinished if the logits differ.
    """
    for package in ("transformers", "safetensors"):
        if not find_spec(package):
            raise UserError(f"{package} is not installed", f"pip install {package}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder", "export into a new folder")
    from safetensors import SafetensorError  # what it raises for a full disk, for example

    tokenizer = tokenizer_from_state(model.tokenizer_state)
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    unverified = temporary_name(folder)
    try:
        unverified.mkdir(parents=True)
        lines = write_model(unverified, model, tokenizer, vocab_size)
        difference = largest_difference(model, unverified, vocab_size)
        if not difference <= MAX_DIFFERENCE:  # also true for NaN
            what = f"the exported logits differ by {difference:.1e} (expected at most {MAX_DIFFERENCE:g})"
            raise Unfinished(what, "check that the weights are finite and that transformers is unmodified")
        os.replace(unverified, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}", "choose another folder") from error
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    for line in (*lines, f"largest difference to the logits of transformers: {difference:.1e} (in float64)"):
        say(line)
    return difference


def main(argv: list[str] | None = None) -> int:
    from gpt_model import GPT

    parser = ArgumentParser(prog="-m utils.weights.export", doc=__doc__, usage="%(prog)s MODEL DIR")
    model_help = "log/model_*.pt, or any model that generate.py -m accepts"
    parser.add_argument("checkpoint", metavar="MODEL", help=model_help)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the model")
    args = parser.parse_args(argv)
    with announced(f"loading {args.checkpoint}"):
        model = GPT.load(args.checkpoint)
    export(model, args.folder.resolve())
    print(f'in {args.folder}: AutoModelForCausalLM.from_pretrained("{args.folder}") loads it')
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
