"""OpenAI's GPT-2 and transformers folders: their weights as a state dict of ours, and their tokenizer."""

import json
import pickle
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from utils.command_line import UserError, shown
from utils.schema import is_int
from utils.tokenizer_json import FILE_NAME, read_tokenizer, state_of
from utils.weights.file_kinds import WHAT_TO_GIVE
from utils.weights.schema import LARGEST_SIZES, check_sizes

# OpenAI's code multiplies by (in, out) matrices, nn.Linear stores (out, in): these four are transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints store beside the weights

# Our name of each size, and that in config.json.
SIZES = {name: name for name in LARGEST_SIZES} | {"block_size": "n_positions"}
CHARACTERS_FILE = "characters.json"  # ids of a character model that utils/weights/export.py exported
TOKENIZER_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def load_gpt2_weights(name_or_dir: str, names: Collection[str]) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Reads a released GPT-2 by its name, one of `names`, or a folder written by `save_pretrained`.

    Returns (arguments for GPTConfig, state dict with our names and shapes). Raises UserError for an unknown
    name, without transformers, if the weights are not available, or if it is not a plain GPT-2.
    """
    if name_or_dir not in names and not Path(name_or_dir).is_dir():
        hint = "or give a folder that save_pretrained of transformers wrote"
        raise UserError(f"unknown model {name_or_dir!r}; choose {', '.join(names)}", hint)
    if name_or_dir not in names:
        _check_config_file(Path(name_or_dir))  # transformers would build what it says, of any size
    source, loading_info = _load_with_transformers(name_or_dir)
    config = source.config
    _check_is_plain_gpt2(config, name_or_dir)  # first: another kind of model has other weights, too
    _check_all_weights_found(loading_info, name_or_dir)
    if not source.lm_head.weight.equal(source.transformer.wte.weight):
        raise UserError(f"{name_or_dir}: lm_head and wte differ (expected one tensor)", "give a GPT-2 model")
    sizes = {ours: getattr(config, theirs) for ours, theirs in SIZES.items()}
    state_dict = {
        name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in source.state_dict().items()
        if not name.endswith(CAUSAL_MASKS)
    }
    return sizes, state_dict


def tokenizer_state_of(name_or_dir: str) -> dict[str, Any]:
    """State for `tokenizer_from_state`; {"name": "folder"} is one that no tokenizer.json can describe.

    Raises UserError for damaged files.
    """
    folder = Path(name_or_dir)
    path = folder / CHARACTERS_FILE
    if not path.is_file():
        if (folder / FILE_NAME).is_file():
            return read_tokenizer(folder)
        if folder.is_dir() and any((folder / name).exists() for name in TOKENIZER_FILES):
            return FolderTokenizer(folder).state()
        return {"name": "gpt2"}
    ids = read_json(path)
    characters = "".join(sorted(ids, key=ids.get)) if all(map(is_int, ids.values())) else ""
    if not characters or [ids.get(character) for character in characters] != list(range(len(ids))):
        what = f"{path} holds no characters (expected their ids, 0, 1, 2, ...)"
        raise UserError(what, "export the checkpoint again")
    return {"name": "char", "characters": characters}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing, or anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict):
            raise ValueError(f"found {shown(content)}")
        return content
    except FileNotFoundError as error:
        what = f"{path.parent} is a folder without {path.name}, so not a transformers folder"
        raise UserError(what, WHAT_TO_GIVE) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        what = f"{path} cannot be read as an object of JSON: {reason}"
        raise UserError(what, "copy the folder again, or export the model again") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _check_config_file(folder: Path) -> None:
    """Raises UserError if a folder's config.json is not that of a GPT-2 that this machine can hold."""
    path = folder / "config.json"
    config = read_json(path)
    if (kind := config.get("model_type", "gpt2")) != "gpt2":
        what = f"{folder} differs from the released GPT-2: model_type={shown(kind)} (expected 'gpt2')"
        raise UserError(what, "give a GPT-2 model")
    # Where config.json does not give a size, transformers has a default, which is small.
    check_sizes({ours: config.get(theirs, 1) for ours, theirs in SIZES.items()}, path)


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed", "pip install transformers") from error
    return transformers


def _load_with_transformers(name_or_dir: str) -> tuple[Any, dict[str, Any]]:
    """(model, loading info: weights missing, unexpected or mismatched), offline if it is in the cache."""
    transformers = _import_transformers()
    is_folder = Path(name_or_dir).is_dir()
    source = name_or_dir if is_folder else f"openai-community/{name_or_dir}"
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    load = partial(transformers.GPT2LMHeadModel.from_pretrained, source, **options)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        try:
            return load(local_files_only=True)
        except OSError:
            if is_folder:
                raise
            return load()
    except Exception as error:  # a damaged file raises many types
        verb, reason = "load", str(error).strip().split("\n")[0]
        hint = "check that save_pretrained wrote all its files; if git-lfs stores them, run git lfs pull"
        if isinstance(error, pickle.UnpicklingError):
            reason = "not plain tensors"  # transformers' message suggests weights_only=False
        elif isinstance(error, OSError) and not is_folder:  # as is every network error of the hub
            verb = "download"
            hint = "run once with a network, set HF_HOME to a cache that holds the model, or give its folder"
        raise UserError(f"cannot {verb} {source}: {reason}", hint) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_all_weights_found(loading_info: dict[str, Any], name: str) -> None:
    """Raises UserError if a file does not match its config.json: transformers initialises missing weights."""
    harmless = (*CAUSAL_MASKS, "lm_head.weight")  # lm_head is tied to the embedding: files need not hold it
    wrong = [
        f"{kind} {weight}"
        for kind in ("missing", "unexpected", "mismatched")
        for weight in sorted(map(str, loading_info[f"{kind}_keys"]))
        if not weight.endswith(harmless)
        and not (kind == "unexpected" and "head." in weight)  # an additional head does not change the logits
    ]
    if wrong:
        what = f"{name} does not hold the weights of its config.json: {len(wrong)} differ"
        hint = "copy the folder again, or export the model again with save_pretrained"
        raise UserError(f"{what} ({', '.join(wrong[:3])})", hint)


def _check_is_plain_gpt2(config: Any, name: str) -> None:
    """Raises UserError for options of transformers that compute something else than the released GPT-2."""
    expected = {
        "activation_function": ["gelu_new"],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "tie_word_embeddings": [True],
        "add_cross_attention": [False],
        "n_inner": [None, 4 * getattr(config, "n_embd", 0)],
    }
    wrong = [
        f"{option}={getattr(config, option, None)!r} (expected {' or '.join(map(repr, values))})"
        for option, values in expected.items()
        if getattr(config, option, None) not in values
    ]
    if wrong:
        raise UserError(f"{name} differs from the released GPT-2: {', '.join(wrong)}", "give a GPT-2 model")


class FolderTokenizer:
    """A transformers folder's tokenizer without tokenizer.json; special tokens in a text are recognised."""

    name = "folder"
    ranks = None

    def __init__(self, folder: Path):
        transformers = _import_transformers()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.encode("a b")
        except BaseException as error:  # damaged files raise many types, Rust's panics among them
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            hint = "restore its tokenizer files; without any, the folder would be read with GPT-2's BPE"
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"cannot load the tokenizer in {folder}: {reason[:200]}", hint) from error
        self.vocab_size = self.padded_vocab_size = len(self._tokenizer)
        self.end_of_text: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str, allow_special: bool = True) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def state(self) -> dict[str, Any]:
        """That of the tokenizer.json which transformers makes of other files, if it can."""
        made = getattr(self._tokenizer, "backend_tokenizer", None)
        return state_of(made.to_str(), self._tokenizer.eos_token) if made else {"name": self.name}
