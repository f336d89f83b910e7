"""OpenAI's GPT-2 weights, through transformers, as a state dict of ours."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from utils.errors import UserError

# OpenAI's code multiplied by (in, out) matrices, a Linear holds (out, in): these four are transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

CHARACTERS_FILE = "characters.json"  # in a folder that utils/export_hf.py wrote: ids of a character model


def load_gpt2_weights(name_or_dir: str, known: dict) -> tuple[dict, dict[str, Tensor]]:
    """Reads a released GPT-2, or a folder written by `save_pretrained`.

    Args:
        name_or_dir: a key of `known`, or a folder.
        known: the released sizes, by name.

    Returns:
        (arguments for GPTConfig, state dict with our names and shapes).

    Raises:
        UserError: unknown name, transformers missing, weights not to be had, or a model that is no GPT-2.
    """
    is_folder = Path(name_or_dir).is_dir()
    if name_or_dir not in known and not is_folder:
        raise UserError(
            f"unknown model {name_or_dir!r}; choose {', '.join(known)}",
            "or give a folder that save_pretrained of transformers wrote",
        )
    source = _load_with_transformers(
        name_or_dir if is_folder or "/" in name_or_dir else f"openai-community/{name_or_dir}"
    )
    config = source.config
    _check_is_plain_gpt2(config, name_or_dir)
    state_dict = {}
    for name, tensor in source.state_dict().items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, stored by old versions
            continue
        state_dict[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    sizes = dict(
        block_size=config.n_positions,
        vocab_size=config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
    )
    return sizes, state_dict


def tokenizer_state_of(name_or_dir: str) -> dict:
    """What `tokenizer_from_state` needs: GPT-2's BPE, or the characters that are in the folder.

    Raises:
        UserError: the folder's characters.json is damaged.
    """
    path = Path(name_or_dir) / CHARACTERS_FILE
    if not path.is_file():
        return {"name": "gpt2"}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        characters = "".join(sorted(ids, key=ids.get))
        if [ids[character] for character in characters] != list(range(len(characters))):
            raise ValueError("ids are not 0, 1, 2, ...")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no characters: {error}", "export the checkpoint again") from error
    return {"name": "char", "characters": characters}


def _load_with_transformers(source: str):
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed", "pip install transformers") from error
    load = transformers.GPT2LMHeadModel.from_pretrained
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        try:
            return load(source, local_files_only=True)  # what is on disk is used without asking the network
        except OSError:
            if Path(source).is_dir():
                raise
            return load(source)
    except OSError as error:  # every network error of the hub is one
        reason = str(error).strip().split("\n")[0]
        if Path(source).is_dir():
            raise UserError(
                f"cannot load {source}: {reason}", "is it a folder that save_pretrained wrote?"
            ) from error
        raise UserError(
            f"cannot download {source}: {reason}",
            "run once with a network, or set HF_HOME to a cache that holds the model, or give its folder",
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_is_plain_gpt2(config, name: str) -> None:
    """Raises UserError for the options of transformers that GPT-2 as released does not have."""
    expected = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_inner": (None, 4 * getattr(config, "n_embd", 0)),
    }
    wrong = []
    for key, value in expected.items():
        found = getattr(config, key, None)
        if found not in (value if isinstance(value, tuple) else (value,)):
            wrong.append(f"{key}={found!r} (expected {value!r})")
    if wrong:
        raise UserError(f"{name} is no GPT-2 as released: " + ", ".join(wrong), "give a GPT-2 model")
