"""tokenizer.json: newly trained BPEs, and other projects' tokenizers, by the tokenizers library.

What makes a tokenizer is its tokenizer.json and the name of its end-of-text token: in a checkpoint as plain
values, in a folder as transformers reads and writes them, the name in tokenizer_config.json.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.command_line import UserError, path_text
from utils.console import warn
from utils.files import whole_file
from utils.suggestions import similar, similar_file
from utils.text_files import read_text
from utils.tokenizer import (
    END_OF_TEXT,
    GPT2Tokenizer,
    byte_alphabet,
    bytes_of,
    encode_text,
    has_tiktoken,
    make_encoding,
    pieces_of,
    valid_text,
)

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
MODELS = ("bpe", "unigram", "wordpiece", "wordlevel")  # of the library, as names of tokenizers
SMALLEST_BPE, LARGEST_BPE = 257, 2**18  # 256 bytes and <|endoftext|>; that of Gemma, the largest in use
LARGEST_VOCABULARY = 2**24  # that of a model
MIN_FREQUENCY = 2  # a pair of tokens that occurs once is not worth a token
PAD_TO = 128  # the vocabulary of a model, for efficient matmuls
# Its ids tell GPT-2's own tokenizer from others; additional tokens may exist beside GPT-2's.
PROBE = "The cats' 1,234 naïve  owners\nain't here: \u2014 日本 [step] [header] [title]"
# What the ids depend on in no way here: no text is cut or padded, and no token is added around it.
NOT_USED = dict.fromkeys(("truncation", "padding", "post_processor"))
GPT2_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def tokenizer_name(text: str, kinds: tuple[str, ...] = ("gpt2", "char"), *, must_exist: bool = False) -> str:
    """The value of `--tokenizer`: one of `kinds`, "bpe:N", or the path of a tokenizer.json or its folder.

    Unless it `must_exist`, the file of a path may be gone: a resumed run does not need it.
    """
    if text in kinds:
        return text
    if text.startswith("bpe:"):
        size = text.removeprefix("bpe:")
        if not (size.isascii() and size.isdecimal() and len(size) < 10):
            raise argparse.ArgumentTypeError(f"{text[:60]}: expected bpe:N with the number of tokens N")
        if not SMALLEST_BPE <= int(size) <= LARGEST_BPE:
            expected = f"from {SMALLEST_BPE} (256 bytes and {END_OF_TEXT}) to {LARGEST_BPE:,} tokens"
            raise argparse.ArgumentTypeError(f"{text} has {int(size):,} tokens (expected {expected})")
        return f"bpe:{int(size)}"
    path = Path(path_text(text))
    if not must_exist and not os.path.exists(path) and (os.sep in text or path.suffix == ".json"):
        return str(path)
    is_folder = os.path.isdir(path)
    file = path / FILE_NAME if is_folder else path
    if not os.path.exists(file):
        expected = f"{', '.join(kinds)}, bpe:N, or the path of a {FILE_NAME}"
        close = None if is_folder else similar(text, kinds) or similar_file(path)
        meant = f"; did you mean {close}?" if close else ""
        raise argparse.ArgumentTypeError(f"no file {file} (expected {expected}){meant}")
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# States: plain values


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """State of a byte-level BPE of `vocab_size` tokens, <|endoftext|> among them, trained on texts.

    Deterministic: the same texts give the same tokenizer. Warns if they are too short for so many tokens.
    Raises UserError without the tokenizers library.
    """
    library = _import_library()
    # Whoever forks this process later need not be warned that threads have been used here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=list(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces_of(valid_text(text))), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        warn(f"the text is too short for a BPE of {vocab_size:,} tokens: it has {found:,}")
    return state_of(tokenizer.to_str(), END_OF_TEXT)


def read_tokenizer(path: Path) -> dict[str, Any]:
    """State of a tokenizer.json, or of the one in a folder; {"name": "gpt2"} if it is GPT-2's.

    Its end-of-text token is the eos_token of the tokenizer_config.json beside it, else <|endoftext|>, if it
    has that. Raises UserError if the file is missing, damaged or of another kind.
    """
    path = path / FILE_NAME if os.path.isdir(path) else path
    text, eos_token = read_text(path, flag="--tokenizer"), None
    if problem := find_json_problem(text):
        raise UserError(f"{path} is not a {FILE_NAME}: {problem}", "restore the file, or use another one")
    config = path.with_name(CONFIG_NAME)
    if config.exists():
        settings = read_text(config, flag="--tokenizer")
        try:
            eos_token = json.loads(settings).get("eos_token")
        except (ValueError, AttributeError, RecursionError) as error:
            hint = f"restore it; without that file the end-of-text token is {END_OF_TEXT}"
            raise UserError(f"cannot read {config}: {error}", hint) from error
    return state_of(text, eos_token["content"] if isinstance(eos_token, dict) else eos_token)


def state_of(text: str, eos_token: str | None) -> dict[str, Any]:
    """State of a valid tokenizer.json; {"name": "gpt2"} if it is GPT-2's."""
    text = json.dumps({**json.loads(text), **NOT_USED}, ensure_ascii=False, separators=(",", ":"))
    tokenizer = _load(text)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if has_tiktoken() and ids == GPT2Tokenizer().encode(PROBE).tolist():
        return {"name": "gpt2"}
    vocabulary = _vocabulary(tokenizer)
    end_of_text = next((token for token in (eos_token, END_OF_TEXT) if token in vocabulary), None)
    return {"name": type(tokenizer.model).__name__.lower(), "json": text, "end_of_text": end_of_text}


def find_json_problem(text: Any) -> str | None:
    """Why a value is not the text of a tokenizer.json, in one line; None if it is one."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            return "it has no model"
        ids = _vocabulary(_load(text)).values()
        if not ids or max(ids) >= LARGEST_VOCABULARY:
            return f"it has no token, or ids that are not below {LARGEST_VOCABULARY:,}"
    except UserError:  # no library: whoever needs it will say so
        return None
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)[:200]
    return None


def identity(state: dict[str, Any]) -> str:
    """SHA-256 of a state, in hexadecimal."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_tokenizer(folder: Path, state: dict[str, Any], block_size: int | None = None) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for `read_tokenizer` and for AutoTokenizer."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if state["end_of_text"] is not None:
        settings.update(dict.fromkeys(("bos_token", "eos_token"), state["end_of_text"]))
    if block_size is not None:
        settings["model_max_length"] = block_size
    for name, text in ((FILE_NAME, state["json"]), (CONFIG_NAME, json.dumps(settings, indent=2) + "\n")):
        with whole_file(folder / name, durable=True) as file:
            file.write(text)


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=True)


def _import_library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("the package tokenizers is not installed", "pip install tokenizers") from error
    if not hasattr(tokenizers.Tokenizer, "encode_special_tokens"):
        what = f"tokenizers {tokenizers.__version__} is too old (expected at least 0.15.1)"
        raise UserError(what, "pip install -U tokenizers")
    return tokenizers


def _load(text: str) -> Any:
    """The library's Tokenizer. Raises ValueError for a damaged one."""
    library = _import_library()
    try:
        return library.Tokenizer.from_str(text)
    except BaseException as error:
        # It raises plain Exception for most files; Rust's PanicException is not even that.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error).strip().split("\n")[0]) from error


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


class JsonTokenizer:
    """The tokenizer of a state: {"name": one of MODELS, "json": tokenizer.json, "end_of_text": its token}.

    Without a tokenizer.json for which `ranks` exist, a text is encoded as a whole: that takes memory.
    """

    def __init__(self, state: dict[str, Any]):
        self._state, self.name = state, state["name"]
        try:
            self._library = _load(state["json"])
        except UserError:
            raise
        except ValueError as error:
            what = f"the model's {FILE_NAME} is damaged: {error}"
            raise UserError(what, "use an undamaged checkpoint or folder") from error
        self._content = json.loads(state["json"])
        self._vocabulary = _vocabulary(self._library)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.padded_vocab_size = -(-self.vocab_size // PAD_TO) * PAD_TO
        self.end_of_text: int | None = self._vocabulary.get(state["end_of_text"])

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        if self._encoding is not None:
            return encode_text(self._encoding, text, allow_special).astype(np.int64)
        self._library.encode_special_tokens = not allow_special
        ids = self._library.encode(valid_text(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """0 for special tokens, and for every token where the library's decoder works on more than bytes."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        if (self._content.get("decoder") or {}).get("type") == "ByteLevel":
            special = {token["content"] for token in self._added_tokens if token.get("special")}
            for token, i in self._vocabulary.items():
                if token not in special:  # a character for each byte, except in tokens that were added
                    sizes[i] = len(token.encode() if token in self._added_names else token)
        return sizes

    def state(self) -> dict[str, Any]:
        return self._state

    @cached_property
    def ranks(self) -> dict[bytes, int] | None:
        """Exist only where tiktoken gives the library's ids for every text.

        It merges the two neighbours that form the token of the lowest id; the library, those of the first
        rule that applies. Both are one if rules are in the order of ids, each token has one, and each token's
        own text becomes that token: then no other neighbours ever form it.
        """
        ordinary = {token: i for token, i in self._vocabulary.items() if token not in self._added_names}
        alphabet = byte_alphabet().keys()
        if not self._is_gpt2s_kind() or not alphabet <= ordinary.keys():
            return None
        rules = [
            "".join(rule if isinstance(rule, list) else rule.split(" "))
            for rule in self._content["model"]["merges"]
        ]
        longer = sorted(ordinary.keys() - alphabet, key=ordinary.get)
        if rules != longer or not set("".join(longer)) <= alphabet:
            return None
        model = self._library.model
        if any([part.id for part in model.tokenize(token)] != [ordinary[token]] for token in longer):
            return None
        return dict(zip(bytes_of(ordinary), ordinary.values()))

    @cached_property
    def _encoding(self) -> Any:
        if self.ranks is None or not has_tiktoken():
            return None
        special = {name: self._vocabulary[name] for name in self._added_names}
        return make_encoding(self.name, self.ranks, special)

    @property
    def _added_tokens(self) -> list[dict[str, Any]]:
        return self._content.get("added_tokens") or []

    @cached_property
    def _added_names(self) -> set[str]:
        return {token["content"] for token in self._added_tokens}

    def _is_gpt2s_kind(self) -> bool:
        """Whether texts are split as GPT-2's are, and into bytes; special tokens stand for themselves."""
        model, pre_tokenizer = self._content["model"], self._content.get("pre_tokenizer") or {}
        options = ("dropout", "byte_fallback", "ignore_merges")
        options += ("continuing_subword_prefix", "end_of_word_suffix")
        return (
            self.name == "bpe"
            and not any(model.get(option) for option in options)
            and self._content.get("normalizer") is None
            and all(pre_tokenizer.get(key, True) == value for key, value in GPT2_PRE_TOKENIZER.items())
            and all(token.get("special") for token in self._added_tokens)
            and not any(
                token.get(option)
                for token in self._added_tokens
                for option in ("lstrip", "rstrip", "single_word")
            )
        )
