"""The text of --help: flags in one column, each with its default, and examples that can be pasted."""

import argparse
import os
import re
import textwrap
from typing import Any

WORD = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""  # of a command, quoted or not


class HelpFormatter(argparse.HelpFormatter):
    """Flags in one column, each with its kind of value and its default.

    `defaults` replaces those of the parser. Where there is none, the help itself says what happens.
    """

    def __init__(self, prog: str, defaults: dict[str, Any] | None = None):
        super().__init__(prog, max_help_position=26)
        self._defaults = defaults or {}

    def _get_help_string(self, action: argparse.Action) -> str:
        value, text = self._defaults.get(action.dest, action.default), action.help or ""
        if value is None or value is False or value == argparse.SUPPRESS:
            return text
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        shown = shown.removeprefix(f"{os.getcwd()}/").replace("%", "%%")
        return f"{text.partition('; default:')[0]} (default: {shown})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "").lower()
        kinds = {"int": "N", "float": "X", "fraction": "X", "path": "PATH"}
        last_word = action.dest.split("_")[-1].upper()
        return next((name for part, name in kinds.items() if part in kind), last_word)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [line for line in text.splitlines() if line]
        fits = all(len(line) <= width for line in lines)
        return "\n".join(
            line if line.startswith(" ") and fits else self._fill_line(line, width) for line in lines
        )

    def _fill_line(self, line: str, width: int) -> str:
        """A paragraph in lines; an example, which is indented, as its purpose and a command to be pasted."""
        if not line.startswith(" "):
            return textwrap.fill(line, width)
        command, _, purpose = line.strip().partition("  ")
        lines = textwrap.wrap(f"{purpose.strip()}:", width - 2) if purpose else []
        lines = [*(f"  {line}" for line in lines), "   "]
        for word in re.findall(WORD, command):
            if len(lines[-1]) + len(word) + 3 > width and lines[-1].strip():
                lines[-1] += " \\"
                lines.append("     ")
            lines[-1] += f" {word}"
        return "\n".join(lines)
