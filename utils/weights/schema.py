"""What a file must hold before anything is built from it: one schema for each, as data.

A schema is a `Rule`, or a dict of schemas by key. Only what it names is used: unknown keys are left out, so a
later version may add some. A new field of GPTConfig, tokenizer or optimizer is a line here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.command_line import LARGEST_INT, LARGEST_NUMBER, UserError, format_bytes, shown
from utils.runtime import memory_bytes
from utils.tokenizer_json import MODELS
from utils.tokenizer_json import find_problem as find_json_problem

FORMAT, VERSION = "minigpt-ckpt", 1
UNCHANGED = "use a file that train_gpt.py wrote, unchanged"  # a hint
MAX_PARAMETERS = 10**13  # 40 TB of float32


class Rule(NamedTuple):
    """What a value must be."""

    expected: str  # continues "expected"
    holds: Callable[[Any], bool]
    required: bool = True  # of a key that may be missing it is False


Schema = Rule | Mapping[str, "Schema"]


def find_problem(value: Any, schema: Schema, place: str = "") -> str | None:
    """Says at which key a value differs from its schema, and how; None if it does not."""
    here = f"key {place}" if place else "the content"
    if isinstance(schema, Rule):
        return None if schema.holds(value) else f"{here} is {shown(value)} (expected {schema.expected})"
    if not isinstance(value, dict):
        return f"{here} is {shown(value)} (expected a dict)"
    for key, inner in schema.items():
        name = f"{place}.{key}" if place else key
        if key not in value:
            if not isinstance(inner, Rule) or inner.required:
                return f"key {name} is missing"
        elif problem := find_problem(value[key], inner, name):
            return problem
    return None


# ------------------------------------------------------------------------------------------------------------
# Values


def is_int(value: Any, lowest: int = 0, largest: int = LARGEST_INT) -> bool:
    """Whether it is a whole number in this range; True and False are not."""
    return type(value) is int and lowest <= value <= largest


def is_number(value: Any) -> bool:
    """Whether it is a finite number that is not too large to calculate with."""
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether it is None, a number, a text, or a list or dict of these, nested at most `depth` deep."""
    if isinstance(value, (list, tuple, dict)):
        values = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(is_plain(entry, depth - 1) for entry in values)
    return value is None or isinstance(value, (bool, str)) or is_number(value)


def is_plain_dict(value: Any) -> bool:
    """Whether it is a dict of plain values by texts."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value) and is_plain(value)


def is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether it is a list whose entries all pass."""
    return isinstance(value, list) and all(map(holds, value))


def is_strided(tensor: Any) -> bool:
    """Whether it is an ordinary tensor of floating-point numbers in this machine's memory."""
    ordinary = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return ordinary and tensor.is_floating_point()


count = Rule("a whole number, zero or above", is_int)
positive = Rule("a whole number above zero", lambda value: is_int(value, 1))
number = Rule("a finite number", is_number)
duration = Rule("a number of seconds", lambda value: is_number(value) and value >= 0)
a_dict = Rule("a dict", lambda value: isinstance(value, dict))
text = Rule("a text", lambda value: isinstance(value, str))
texts = Rule("a list of texts", lambda value: is_list(value, lambda entry: isinstance(entry, str)))
plain_dict = Rule("a dict of plain values", is_plain_dict)
number_or_none = Rule("a finite number or None", lambda value: value is None or is_number(value))


def optional(rule: Rule) -> Rule:
    """The same rule for a key that may be missing."""
    return rule._replace(required=False)


# ------------------------------------------------------------------------------------------------------------
# The sizes of a model

# The fields of GPTConfig, each with its largest value: far above any model, far below what ends a machine.
LARGEST_SIZES = {
    "block_size": 2**24,
    "vocab_size": 2**24,
    "n_layer": 2048,
    "n_head": 2**18,
    "n_embd": 2**18,
}


def size_problems(sizes: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sizes of a model, those of `LARGEST_SIZES`; none if one can be built."""
    problems = [
        f"{name}={shown(sizes[name])} is not a whole number from 1 to {largest:,}"
        for name, largest in LARGEST_SIZES.items()
        if not is_int(sizes[name], 1, largest)
    ]
    if not problems and sizes["n_embd"] % sizes["n_head"]:
        problems.append(f"n_embd={sizes['n_embd']} is not a multiple of n_head={sizes['n_head']}")
    if not problems and (total := about_parameters(sizes)) > MAX_PARAMETERS:
        problems.append(f"about {total:,} parameters are more than {MAX_PARAMETERS:,}")
    return problems


def about_parameters(sizes: Mapping[str, int]) -> int:
    """Number of parameters, without biases and layer norms."""
    L, C = sizes["n_layer"], sizes["n_embd"]
    return 12 * L * C**2 + (sizes["vocab_size"] + sizes["block_size"]) * C


def check_sizes(sizes: Mapping[str, Any], source: str | Path) -> None:
    """Raises UserError if no model of these sizes can be built, or if its weights exceed the memory."""
    if problems := size_problems(sizes):
        raise UserError(f"{source}: {'; '.join(problems)}", "use an undamaged model")
    needed, memory = 4 * about_parameters(sizes), memory_bytes(torch.device("cpu"))
    if memory is not None and needed > memory:
        what = f"{source}: its weights need {format_bytes(needed)}, this machine has {format_bytes(memory)}"
        raise UserError(what, "use a machine with more memory, or a smaller model")


# ------------------------------------------------------------------------------------------------------------
# The two files of a checkpoint

# What the state of each kind of tokenizer holds besides its name.
TOKENIZERS: dict[str, Schema] = {
    "gpt2": {},
    "char": {
        "characters": Rule(
            "a text of different characters",
            lambda value: isinstance(value, str) and 0 < len(value) == len(set(value)),
        )
    },
    "folder": {},
    **dict.fromkeys(
        MODELS,
        {
            "json": Rule("the text of a tokenizer.json", lambda value: find_json_problem(value) is None),
            "end_of_text": Rule("a text or None", lambda value: value is None or isinstance(value, str)),
        },
    ),
}
# What each optimizer, by its key in an optimizer file, holds for every parameter: "step" is one number, the
# others have the shape of the parameter.
OPTIMIZERS = {"optimizer": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and is_strided(tensor) for name, tensor in value.items()
    )


def _is_rng_state(value: Any) -> bool:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_cuda_rng_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == (16,)


def _is_data(value: Any) -> bool:
    """Fingerprints of both streams; those of shards are lists [name, number of tokens, ...]."""
    return (
        is_list(value, is_plain_dict)
        and len(value) == 2
        and all(
            is_list(
                stream.get("shards", []), lambda entry: isinstance(entry, (list, tuple)) and len(entry) > 1
            )
            for stream in value
        )
    )


def _is_scaler(value: Any) -> bool:
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return value == {} or (isinstance(value, dict) and all(is_number(value.get(name)) for name in names))


CONFIG = {
    name: Rule(
        f"a whole number from 1 to {largest:,}", lambda value, largest=largest: is_int(value, 1, largest)
    )
    for name, largest in LARGEST_SIZES.items()
}
CONFIG["dropout"] = optional(
    Rule("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
)
HEAD = {
    "format": Rule(repr(FORMAT), lambda value: value == FORMAT),
    "version": Rule(str(VERSION), lambda value: is_int(value, VERSION, VERSION)),
    "save_id": text,
}
WEIGHTS: dict[str, Schema] = {
    "config": CONFIG,
    "model": Rule("float tensors by name", _is_weights),
    "step": count,
    "val_loss": number_or_none,
    "tokenizer": {"name": Rule(" or ".join(map(repr, TOKENIZERS)), lambda value: value in tuple(TOKENIZERS))},
}
MODEL_FILE: dict[str, Schema] = {**HEAD, **WEIGHTS, "versions": plain_dict}
STATE_FILE: dict[str, Schema] = {
    **HEAD,
    "step": count,
    "windows": count,
    "done": texts,
    "seconds": duration,
    "best_loss": optional(number_or_none),  # not in checkpoints of version 0.1
    "best_step": optional(count),
    "since_best": optional(count),
    **{name: optional(a_dict) for name in OPTIMIZERS},
    "scaler": Rule("the state of a GradScaler, or an empty dict", _is_scaler),
    "spikes": {
        "accepted": Rule("a list of numbers", lambda value: is_list(value, is_number)),
        "skips": Rule("a list of 0 and 1", lambda value: is_list(value, lambda skip: is_int(skip, 0, 1))),
        "num_skipped": count,
    },
    "train_args": plain_dict,
    "tokenizer": WEIGHTS["tokenizer"],
    "data": Rule("the fingerprints of two streams", _is_data),
    "rng": {
        "cpu": Rule("a list of states", lambda value: is_list(value, _is_rng_state) and value != []),
        "cuda": optional(Rule("a list of states", lambda value: is_list(value, _is_cuda_rng_state))),
    },
    "log": Rule("sizes by name", lambda value: is_plain_dict(value) and all(map(is_int, value.values()))),
    "environment": plain_dict,
}


def checked(content: Any, schema: Mapping[str, Schema], path: Path) -> dict[str, Any]:
    """What a schema names of a file's content. Raises UserError, with the key, if it is not as described."""
    problem = find_problem(content, schema)
    if problem is None:
        content = {key: content[key] for key in schema if key in content}
        problem = _find_contradiction(content)
    if problem:
        raise UserError(f"{path}: {problem}", UNCHANGED)
    return content


def _find_contradiction(content: dict[str, Any]) -> str | None:
    """What single keys cannot tell: rules about several of them."""
    tokenizer, config = content["tokenizer"], content.get("config", {})
    state = TOKENIZERS[tokenizer["name"]]
    if problem := find_problem(tokenizer, state, "tokenizer"):
        return problem
    # Here an unknown key would mean another model.
    for key, found, known in (("config", config, CONFIG), ("tokenizer", tokenizer, {"name": text, **state})):
        if unknown := [shown(name) for name in found if name not in known]:
            return f"key {key} has the unknown {', '.join(unknown[:3])}"
    num_characters = len(tokenizer.get("characters", ""))
    if config and num_characters > config["vocab_size"]:
        size = f"{config['vocab_size']:,}"
        return f"key tokenizer has {num_characters:,} characters (expected at most the vocabulary, {size})"
    if not is_int(micro_batch := content.get("train_args", {}).get("micro_batch", 1), 1):
        return f"key train_args.micro_batch is {shown(micro_batch)} (expected {positive.expected})"
    rng = content.get("rng", {"cpu": []})
    return (
        None
        if len(rng.get("cuda", rng["cpu"])) == len(rng["cpu"])
        else "key rng has unequal numbers of states"
    )


# ------------------------------------------------------------------------------------------------------------
# Tensors, against the model and the optimizers that they are for


def check_weights(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError unless names and shapes are those of a model's state dict, which may be on meta."""
    if problem := _first_difference(expected, weights):
        what = f"{path}: the weights do not match the config: {problem}"
        raise UserError(what, "use an undamaged checkpoint")


def _first_difference(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    for name, tensor in expected.items():
        if name not in weights:
            return f"{name} is missing"
        if weights[name].shape != tensor.shape:
            return f"{name} is {tuple(weights[name].shape)} (expected {tuple(tensor.shape)})"
    unknown = next((name for name in weights if name not in expected), None)
    return None if unknown is None else f"{shown(unknown)} is not in the model"


def check_moments(
    path: Path, key: str, saved: Any, groups: Iterable[Mapping[str, Any]], *, may_be_empty: bool
) -> None:
    """Raises UserError unless an optimizer's saved state fits its parameter groups.

    A fused optimizer writes beyond the end of a moment of another shape or stride. `may_be_empty`: before the
    first update.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    problem = find_problem(saved, {"state": a_dict, "param_groups": _groups(len(parameters))}, key)
    if problem is None and (saved["state"] or not may_be_empty):
        problem = _find_moment_problem(key, saved["state"], parameters)
    if problem:
        raise UserError(f"{path}: {problem}", UNCHANGED)


def _find_moment_problem(key: str, state: dict, parameters: Sequence[Tensor]) -> str | None:
    if state.keys() != set(range(len(parameters))):
        return f"key {key}.state has {len(state)} entries (expected {len(parameters)}, one a parameter)"
    for index, parameter in enumerate(parameters):
        moments = {
            name: _moment(parameter.shape if name != "step" else torch.Size()) for name in OPTIMIZERS[key]
        }
        if problem := find_problem(state[index], moments, f"{key}.state[{index}]"):
            return problem
    return None


def _groups(num_parameters: int) -> Rule:
    def holds(value: Any) -> bool:
        if not is_list(
            value, lambda group: isinstance(group, dict) and isinstance(group.get("params"), list)
        ):
            return False
        return [index for group in value for index in group["params"]] == list(range(num_parameters))

    return Rule(f"groups of {num_parameters} parameters", holds)


def _moment(shape: torch.Size) -> Rule:
    def holds(value: Any) -> bool:
        return is_strided(value) and value.shape == shape and value.is_contiguous()

    return Rule(f"a float tensor {tuple(shape)}", holds)
