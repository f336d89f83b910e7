"""Checkpoints of nanoGPT and build-nanogpt, converted to the content of a model file of this project.

nanoGPT's `ckpt.pt` holds `model` and the dict `model_args`; build-nanogpt's `model_*.pt` holds `model` and,
as `config`, a pickled object, which the safe loader refuses: `conversion_command` turns it into a dict. Both
use GPT-2's parameter names.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.command_line import UserError
from utils.console import warn
from utils.distributed import environment_rank
from utils.schema import find_problem, is_int, is_number
from utils.text_files import free_name
from utils.tokenizer import GPT2_VOCAB_SIZE
from utils.weights.file_kinds import literal, python_command
from utils.weights.pretrained import CAUSAL_MASKS
from utils.weights.schema import (
    LARGEST_SIZES,
    WEIGHTS,
    check_sizes,
    checked,
)

MAX_PADDING = 1024  # ids; a vocabulary that is at most this much larger than GPT-2's is GPT-2's, padded
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)*")  # added by torch.compile and by DistributedDataParallel


def is_foreign(content: Any) -> bool:
    """Whether a loaded file is a checkpoint of nanoGPT, or one of build-nanogpt with its config as a dict."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return False
    sizes = content.get("model_args", content.get("config"))
    return isinstance(sizes, dict) and all(is_int(sizes.get(name)) for name in LARGEST_SIZES)


def convert(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a model file, from that of a foreign one.

    Raises UserError if its content is not as nanoGPT writes it, or if its tokens are unknown.
    """
    is_nanogpt = "model_args" in content
    source = content["model_args" if is_nanogpt else "config"]
    check_sizes(source, path)
    if problem := find_problem(content["model"], WEIGHTS["model"], "model"):
        raise UserError(f"{path}: {problem}", "use an undamaged checkpoint")
    tensors = content["model"].items()
    weights = {WRAPPERS.sub("", name): tensor for name, tensor in tensors if not name.endswith(CAUSAL_MASKS)}
    if source.get("bias") is False:  # nanoGPT's option leaves all biases out: zeros give the same logits
        for name, weight in list(weights.items()):
            if name.startswith(("transformer.h.", "transformer.ln_f.")) and weight.dim():
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    if is_nanogpt and environment_rank() == 0:
        shift = "GPT-2's tanh approximation, used here, shifts its loss slightly"
        warn(f"{path} is nanoGPT's, whose newer versions compute GELU exactly; {shift}")
    val_loss = content.get("best_val_loss" if is_nanogpt else "val_loss")
    if isinstance(val_loss, torch.Tensor) and val_loss.numel() == 1:
        val_loss = val_loss.item()
    converted = {
        "model": weights,
        "config": {name: source[name] for name in LARGEST_SIZES},
        "step": content.get("iter_num" if is_nanogpt else "step", 0),
        "val_loss": val_loss if is_number(val_loss) else None,  # before the first validation it is infinite
        "tokenizer": tokenizer_state(source["vocab_size"], path),
    }
    return checked(converted, WEIGHTS, path)


def tokenizer_state(vocab_size: int, path: Path) -> dict[str, str]:
    """State for `tokenizer_from_state`: GPT-2's by the vocabulary size, else characters from meta.pkl."""
    if 0 <= vocab_size - GPT2_VOCAB_SIZE < MAX_PADDING:
        return {"name": "gpt2"}
    meta_path = path.with_name("meta.pkl")
    try:
        with open(meta_path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(vocab_size))
    except Exception as error:  # a damaged pickle raises many types
        reason = f"{meta_path} does not list them ({type(error).__name__})"
        what = f"{path} has a vocabulary of {vocab_size} tokens, which is not GPT-2's, and {reason}"
        hint = "copy the meta.pkl of its data folder (nanoGPT: data/shakespeare_char/) beside the checkpoint"
        raise UserError(what, hint) from error
    return {"name": "char", "characters": characters}


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; refuses objects that need code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name}")


def conversion_command(path: Path) -> str:
    """A shell command that rewrites a build-nanogpt checkpoint with its config as a dict.

    It runs no code from the file: an empty class replaces GPTConfig, and the loader remains the safe one.
    """
    plain = free_name(path.with_name(f"{path.stem}_plain.pt"))
    return python_command(
        'import torch; GPTConfig = type("GPTConfig", (), {}); '
        "torch.serialization.add_safe_globals([GPTConfig]); "
        f'c = torch.load({literal(path)}, map_location="cpu", weights_only=True); '
        f'c["config"] = vars(c["config"]); torch.save(c, {literal(plain)})'
    )
