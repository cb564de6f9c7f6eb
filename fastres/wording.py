"""Say in the words of the command line what errors say in the words of Python.

The functions of the library raise errors for programs: ``pass weights=<path>``, ``fastres.list_models() lists all``. On
the command line the same advice is ``--weights PATH`` and ``'fastres list' lists all``. Only arguments that are options
of the command are rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a command line has instead of a call, and what only a program can pass.
_PHRASES = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"fastres\.list_models\(\)", "'fastres list'"),
        (r"[Cc]all fastres\.load\('([^'()]*)'\)", r"give --model '\1'"),
        (r"fastres\.load\('([^'()]*)'\)", r"--model '\1'"),
        (r"fastres\.load\('([^'()]*)', weights='([^'()]*)'\)", r"--model '\1' --weights '\2'"),
        (r"call fastres\.quantize\(model, images\)", "run 'fastres quantize'"),
        (r"model\.to\('cpu'\) always works", "--device cpu always works"),
        (r"give a list of names, or a file:", "give a file:"),
        (r"[Pp]ass weights=None \(random weights\), the path of a checkpoint (\([^)]*\)) or a state dict",
         r"Give the path of a checkpoint with --weights PATH \1"),
        (r", or weights=None for random weights|, a torchvision enum member", ""),
        (r", a state dict, or None for random weights", ""),
        (r"weights=<path>, a state dict or None", "--weights PATH"),
    )
)  # fmt: skip
_VALUE = r"(?:<(?P<placeholder>\w+)>|(?P<value>'[^']*'|[\w.-]+)|)"


class Wording:
    """A function that rewrites messages. ``options`` are those of the command, such as ``--top-k``."""

    def __init__(self, options: Iterable[str] = ()) -> None:
        self.options = tuple(options)

    def __call__(self, message: str) -> str:
        names = {option[2:].replace("-", "_"): option for option in self.options if option.startswith("--")}
        for pattern, words in _PHRASES:
            message = pattern.sub(words, message)
        known = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"

        def option(match: re.Match[str]) -> str:
            given = match["placeholder"].upper() if match["placeholder"] else match["value"]
            return f"{names[match['name']]} {given}" if given else names[match["name"]]

        message = re.sub(rf"(?<![\w.'\"(-])(?P<name>{known})={_VALUE}(?!=)", option, message)
        return re.sub(rf"^(?:{known})(?= is | has )", lambda match: names[match[0]], message)
