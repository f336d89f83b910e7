"""Error messages for files that were given as a model and hold something else: what they are, what to do."""

import json
from pathlib import Path

from utils.command_line import UserError
from utils.text_files import describe_bytes, first_bytes, free_name, kind_of_bytes, quoted

LEGACY = "a file of torch.save before PyTorch 1.6"
UNPACK = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc"}
WHAT_TO_GIVE = "give a model_*.pt that train_gpt.py wrote, a GPT-2 size, or a transformers folder"


def is_zip(path: Path) -> bool:
    """Whether a file begins as torch.save's do. Raises OSError."""
    return kind_of_bytes(first_bytes(path)) == "a zip archive"


def refuse(path: Path) -> UserError:
    """The error for a file that is no zip archive, and therefore no checkpoint. Raises OSError."""
    data = first_bytes(path)
    kind = describe_bytes(data)
    if kind == "empty":
        return UserError(
            f"checkpoint {path} is damaged: the file is empty", "copy it again or use another one"
        )
    if kind == "a Git LFS pointer":
        hint = f"fetch the file it stands for: git -C {quoted(path.parent)} lfs pull"
        return UserError(f"{path} is a git-lfs pointer, not a checkpoint", hint)
    if kind == "HTML":
        what = f"{path} is an HTML page, not a checkpoint: a download that failed, perhaps"
        return UserError(what, "download it again")
    if kind == "safetensors":
        hint = "put it as model.safetensors with its config.json into a folder, and give the folder"
        return UserError(f"{path} is a safetensors file, without the sizes of its model", hint)
    if kind == LEGACY:
        return UserError(f"{path} is {LEGACY}, not a zip archive", f"convert it: {_resave_command(path)}")
    if kind in UNPACK:
        is_named_so = path.suffix in (".gz", ".bz2", ".xz", ".zst")
        unpacked = path.with_suffix("") if is_named_so else path.with_name(f"{path.stem}_unpacked.pt")
        unpacked = free_name(unpacked)
        hint = f"unpack it: {UNPACK[kind]} {quoted(path)} > {quoted(unpacked)}"
        return UserError(f"{path} is compressed ({kind}), not a checkpoint", hint)
    if kind == "text":
        kind = "a text" if _is_text(data) else "of no known kind, or its beginning is damaged"
    return UserError(f"{path} is {kind}, not a checkpoint", WHAT_TO_GIVE)


def _is_text(data: bytes) -> bool:
    # The last character may be cut off.
    return "\ufffd" not in data.decode("utf-8", errors="replace")[:-1]


def _resave_command(path: Path) -> str:
    new = free_name(path.with_name(f"{path.stem}_zip.pt"))
    return python_command(
        f'import torch; c = torch.load({literal(path)}, map_location="cpu", weights_only=True); '
        f"torch.save(c, {literal(new)})"
    )


def literal(path: Path) -> str:
    """A path as a literal of Python in double quotes, of ASCII only."""
    return json.dumps(str(path))


def python_command(code: str) -> str:
    """A shell command that runs a line of Python."""
    return f"python -c {quoted(code)}"
