"""OpenAI's GPT-2 and folders of transformers: weights as a state dict of ours, and their tokenizer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.errors import UserError
from utils.tokenizer import GPT2Tokenizer

# OpenAI's code multiplied by (in, out) matrices, a Linear holds (out, in): these four are transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # stored by old versions
CHARACTERS_FILE = (
    "characters.json"  # in a folder that utils/weights/export.py wrote: ids of a character model
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")


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
    source, found = _load_with_transformers(
        name_or_dir if is_folder or "/" in name_or_dir else f"openai-community/{name_or_dir}"
    )
    config = source.config
    _check_is_plain_gpt2(config, name_or_dir)  # first: another kind of model has other weights, too
    _check_all_weights_found(found, name_or_dir)
    if not source.lm_head.weight.equal(source.transformer.wte.weight):
        raise UserError(f"{name_or_dir}: lm_head and wte differ (expected one tensor)", "give a GPT-2 model")
    state_dict = {}
    for name, tensor in source.state_dict().items():
        if not name.endswith(CAUSAL_MASKS):
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
    """What `tokenizer_from_state` needs: GPT-2's BPE, the characters in the folder, or that it has its own.

    Raises:
        UserError: the folder's characters.json or tokenizer files are damaged.
    """
    folder = Path(name_or_dir)
    path = folder / CHARACTERS_FILE
    if not path.is_file():
        has_files = folder.is_dir() and any((folder / name).exists() for name in TOKENIZER_FILES)
        return {"name": "folder" if has_files and not FolderTokenizer(folder).is_gpt2() else "gpt2"}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        characters = "".join(sorted(ids, key=ids.get))
        if [ids[character] for character in characters] != list(range(len(characters))):
            raise ValueError("ids are not 0, 1, 2, ...")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no characters: {error}", "export the checkpoint again") from error
    return {"name": "char", "characters": characters}


def _load_with_transformers(source: str) -> tuple:
    """(GPT2LMHeadModel, which weights were missing in its files, unexpected or of another size)."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed", "pip install transformers") from error
    load = transformers.GPT2LMHeadModel.from_pretrained
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        try:
            # What is on disk is used without asking the network.
            model, found = load(source, local_files_only=True, **options)
        except OSError:
            if Path(source).is_dir():
                raise
            model, found = load(source, **options)
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
    except Exception as error:  # a damaged file fails in many ways
        # In our words where it may hold code: transformers' would suggest to switch the protection off.
        is_pickle = isinstance(error, pickle.UnpicklingError)
        reason = "no plain tensors" if is_pickle else str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load {source}: {reason}", "is it whole? where git-lfs keeps its files: git lfs pull"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, found


def _check_all_weights_found(found: dict, name_or_dir: str) -> None:
    """Raises UserError if a file and its config.json differ: transformers makes up what is missing."""
    tied = ("lm_head.weight",)  # to the embedding, so files need not hold it
    wrong = [
        f"{kind} {name}"
        for kind in ("missing", "unexpected", "mismatched")
        for name in sorted(map(str, found[f"{kind}_keys"]))
        if not name.endswith((*CAUSAL_MASKS, *tied))
        and not (kind == "unexpected" and "head." in name)  # one more head changes no logits
    ]
    if wrong:
        first = ", ".join(wrong[:3])
        raise UserError(
            f"{name_or_dir} does not hold the weights of its config.json: {len(wrong)} differ ({first})",
            "copy the folder once more, or export the model again with save_pretrained",
        )


def _check_is_plain_gpt2(config, name: str) -> None:
    """Raises UserError for the options of transformers that GPT-2 as released does not have."""
    expected = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
        "n_inner": (None, 4 * getattr(config, "n_embd", 0)),
    }
    wrong = []
    for key, value in expected.items():
        found = getattr(config, key, None)
        if found not in (value if isinstance(value, tuple) else (value,)):
            wrong.append(f"{key}={found!r} (expected {value!r})")
    if wrong:
        raise UserError(f"{name} is no GPT-2 as released: " + ", ".join(wrong), "give a GPT-2 model")


class FolderTokenizer:
    """The tokenizer files in a folder of transformers, behind the few members that are needed here."""

    def __init__(self, folder: Path):
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except ImportError as error:
            raise UserError("transformers is not installed", "pip install transformers") from error
        except Exception as error:  # damaged files fail in many ways
            reason = str(error).strip().split("\n")[0]
            hint = "without its tokenizer files the folder would be read with GPT-2's BPE"
            raise UserError(f"cannot load the tokenizer in {folder}: {reason}", hint) from error
        self.num_words = len(self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32)

    def is_gpt2(self) -> bool:
        """Whether it makes of a text what GPT-2's BPE makes of it; it may have words of its own besides."""
        probe = "The cats' 1,234 naïve  owners\nain't here: \u2014 日本 [step] [header] [title]"
        return np.array_equal(self.encode(probe), GPT2Tokenizer().encode(probe))
