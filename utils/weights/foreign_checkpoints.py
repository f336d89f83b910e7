"""Checkpoints of nanoGPT and build-nanogpt, as if train_gpt.py had written them.

nanoGPT's `ckpt.pt` holds `model` and the dict `model_args`; build-nanogpt's `model_*.pt` holds `model` and,
as `config`, a pickled object, which the safe loader refuses: `conversion_command` makes a plain dict of it.
Both use GPT-2's parameter names, as we do.
"""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.distributed import environment_rank
from utils.errors import UserError

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
GPT2_WORDS, MOST_PADDING = 50257, 1024  # a vocabulary a little larger than GPT-2's is GPT-2's, padded
PREFIXES = ("_orig_mod.", "module.")  # of a compiled model, of one under DistributedDataParallel


def is_foreign(content: Any) -> bool:
    """Whether a loaded file is a nanoGPT checkpoint, or one of build-nanogpt with its config as a dict."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return False
    sizes = content.get("model_args", content.get("config"))
    return isinstance(sizes, dict) and all(isinstance(sizes.get(name), int) for name in SIZES)


def convert(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `load_model_file` returns, from a file for which `is_foreign` holds.

    Raises:
        UserError: its characters are unknown.
    """
    is_nanogpt = "model_args" in content
    source = content["model_args"] if is_nanogpt else content["config"]
    config = {name: source[name] for name in SIZES}
    weights = plain_weights(content["model"])
    if is_nanogpt and environment_rank() == 0:
        print(
            f"warning: {path} is nanoGPT's, whose newer versions compute GELU exactly; "
            "GPT-2's tanh form, used here, shifts its loss a little"
        )
    val_loss = content.get("best_val_loss" if is_nanogpt else "val_loss")
    return {
        "model": with_biases(weights, config) if source.get("bias") is False else weights,
        "config": config,
        "step": int(content.get("iter_num" if is_nanogpt else "step", 0)),
        "val_loss": None if val_loss is None else float(val_loss),
        "tokenizer": tokenizer_state(config["vocab_size"], path),
        "versions": {},
    }


def plain_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under their own names, without the causal masks that old versions store."""
    weights = {}
    for name, tensor in state_dict.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            weights[name] = tensor
    return weights


def with_biases(weights: dict[str, Tensor], config: dict[str, int]) -> dict[str, Tensor]:
    """Adds the biases that nanoGPT's `bias=False` leaves out: zeros compute the same."""
    weights = dict(weights)
    for name, tensor in list(weights.items()):
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            weights[name[: -len("weight")] + "bias"] = torch.zeros(tensor.size(0), dtype=tensor.dtype)
    return weights


def tokenizer_state(vocab_size: int, path: Path) -> dict[str, str]:
    """What `tokenizer_from_state` reads: by the size of the vocabulary, or from nanoGPT's meta.pkl."""
    if 0 <= vocab_size - GPT2_WORDS < MOST_PADDING:
        return {"name": "gpt2"}
    meta_path = path.with_name("meta.pkl")
    try:
        with open(meta_path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(vocab_size))
    except Exception as error:  # a damaged pickle fails in many ways
        raise UserError(
            f"{path} has {vocab_size} words, which is not GPT-2's vocabulary, and {meta_path} does not name "
            f"them ({type(error).__name__})",
            "copy the meta.pkl of its data folder (nanoGPT: data/shakespeare_char/) beside the checkpoint",
        ) from error
    return {"name": "char", "characters": characters}


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; whatever would need code is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name}")


def conversion_command(path: Path) -> str:
    """A command that rewrites a build-nanogpt checkpoint with its config as a dict.

    It runs no code from the file: an empty class stands in for GPTConfig, and the loader stays the safe one.
    """
    plain = path.with_name(f"{path.stem}_plain.pt")
    code = (
        "import torch; GPTConfig = type('GPTConfig', (), {}); "
        "torch.serialization.add_safe_globals([GPTConfig]); "
        f"c = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        f"c['config'] = vars(c['config']); torch.save(c, {str(plain)!r})"
    )
    return f'python -c "{code}"' if '"' not in code and "$" not in code else f"python -c {shlex.quote(code)}"
