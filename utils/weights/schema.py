"""The schemas of checkpoints and models: what a file must hold before anything is built from it.

Only what a schema names is used. A new field of GPTConfig, tokenizer or optimizer is a line here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.command_line import UserError, format_bytes, shown
from utils.runtime import memory_bytes
from utils.schema import (
    Exactly,
    Optional,
    Rule,
    Schema,
    a_dict,
    a_list,
    count,
    duration,
    find_problem,
    is_int,
    is_number,
    number,
    one_of,
    or_none,
    plain_dict,
    positive,
    text,
    variants,
    whole,
)
from utils.tokenizer_json import MODELS, find_json_problem

FORMAT, VERSION = "minigpt-ckpt", 1
UNCHANGED = "use a file that train_gpt.py wrote, unchanged"  # a hint
MAX_PARAMETERS = 10**13  # 40 TB of float32

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
dropout = Rule("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
# Exactly, because an unknown key would mean another model.
CONFIG = Exactly({name: whole(1, n) for name, n in LARGEST_SIZES.items()}, dropout=Optional(dropout))


def size_problems(sizes: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sizes of a model, those of `LARGEST_SIZES`; none if one can be built."""
    problems = [
        f"{name}={shown(sizes[name])} is not {CONFIG[name].expected}"
        for name in LARGEST_SIZES
        if not CONFIG[name].holds(sizes[name])
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

characters = Rule(
    "a text of different characters", lambda value: text.holds(value) and 0 < len(value) == len(set(value))
)
json_text = Rule("the text of a tokenizer.json", lambda value: find_json_problem(value) is None)
# What the state of each kind of tokenizer holds besides its name.
TOKENIZERS: dict[str, dict[str, Schema]] = {
    "gpt2": {},
    "char": {"characters": characters},
    "folder": {},
    **dict.fromkeys(MODELS, {"json": json_text, "end_of_text": or_none(text)}),
}
# What each optimizer, by its key in an optimizer file, holds for every parameter: "step" is one number, the
# others have the shape of the parameter.
OPTIMIZERS = {"optimizer": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def _is_float_tensor(value: Any) -> bool:
    """Whether it is an ordinary tensor of floating-point numbers in this machine's memory."""
    ordinary = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return ordinary and value.is_floating_point()


def _is_weights(value: Any) -> bool:
    return a_dict.holds(value) and all(map(text.holds, value)) and all(map(_is_float_tensor, value.values()))


def _is_rng_state(value: Any) -> bool:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_cuda_rng_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == (16,)


def _states(holds: Callable[[Any], bool]) -> Rule:
    return Rule(
        "a list of states", lambda value: a_list.holds(value) and value != [] and all(map(holds, value))
    )


def _is_fingerprint(value: Any) -> bool:
    """Of a stream; that of shards has lists [name, number of tokens, ...]."""
    shards = value.get("shards", []) if plain_dict.holds(value) else None
    return a_list.holds(shards) and all(
        isinstance(shard, (list, tuple)) and len(shard) > 1 for shard in shards
    )


def _is_scaler(value: Any) -> bool:
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return value == {} or (isinstance(value, dict) and all(is_number(value.get(name)) for name in names))


fingerprint = Rule("the fingerprint of a stream", _is_fingerprint)
HEAD = {"format": one_of(FORMAT), "version": one_of(VERSION), "save_id": text}
WEIGHTS: dict[str, Schema] = {
    "config": CONFIG,
    "model": Rule("float tensors by name", _is_weights),
    "step": count,
    "val_loss": or_none(number),
    "tokenizer": variants("name", **TOKENIZERS),
}
MODEL_FILE: dict[str, Schema] = {**HEAD, **WEIGHTS, "versions": plain_dict}
STATE_FILE: dict[str, Schema] = {
    **HEAD,
    "step": count,
    "windows": count,
    "done": [text],
    "seconds": duration,
    "best_loss": Optional(or_none(number)),  # not in checkpoints of version 0.1
    "best_step": Optional(count),
    "since_best": Optional(count),
    **{name: Optional(a_dict) for name in OPTIMIZERS},
    "scaler": Rule("the state of a GradScaler, or an empty dict", _is_scaler),
    "spikes": {"accepted": [number], "skips": [one_of(0, 1)], "num_skipped": count},
    "train_args": plain_dict,
    "tokenizer": WEIGHTS["tokenizer"],
    "data": (fingerprint, fingerprint),
    "rng": {"cpu": _states(_is_rng_state), "cuda": Optional(_states(_is_cuda_rng_state))},
    "log": Rule("sizes by name", lambda value: plain_dict.holds(value) and all(map(is_int, value.values()))),
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
    num_characters = len(content["tokenizer"].get("characters", ""))
    if "config" in content and num_characters > content["config"]["vocab_size"]:
        size = f"{content['config']['vocab_size']:,}"
        return f"key tokenizer has {num_characters:,} characters (expected at most the vocabulary, {size})"
    if not is_int(micro_batch := content.get("train_args", {}).get("micro_batch", 1), 1):
        return f"key train_args.micro_batch is {shown(micro_batch)} (expected {positive.expected})"
    rng = content.get("rng", {"cpu": []})
    is_equal = len(rng.get("cuda", rng["cpu"])) == len(rng["cpu"])
    return None if is_equal else "key rng has unequal numbers of states"


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
    problem = find_problem(saved, {"state": a_dict, "param_groups": [{"params": [count]}]}, key)
    if problem is None:
        problem = _find_moment_problem(key, saved, parameters, may_be_empty=may_be_empty)
    if problem:
        raise UserError(f"{path}: {problem}", UNCHANGED)


def _find_moment_problem(
    key: str, saved: dict[str, Any], parameters: Sequence[Tensor], *, may_be_empty: bool
) -> str | None:
    indices, state = list(range(len(parameters))), saved["state"]
    if [index for group in saved["param_groups"] for index in group["params"]] != indices:
        return f"key {key}.param_groups has other parameters (expected 0 to {len(parameters) - 1}, in order)"
    if may_be_empty and not state:
        return None
    if state.keys() != set(indices):
        return f"key {key}.state has {len(state)} entries (expected {len(parameters)}, one a parameter)"
    for index, parameter in enumerate(parameters):
        moments = {
            name: _moment(parameter.shape if name != "step" else torch.Size()) for name in OPTIMIZERS[key]
        }
        if problem := find_problem(state[index], moments, f"{key}.state[{index}]"):
            return problem
    return None


def _moment(shape: torch.Size) -> Rule:
    return Rule(
        f"a float tensor {tuple(shape)}",
        lambda value: _is_float_tensor(value) and value.shape == shape and value.is_contiguous(),
    )
