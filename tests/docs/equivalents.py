"""Run the tables that put another library's code beside fastres's: every piece of code in their two columns.

Such a table begins ``| To | LIBRARY | fastres |``. Its code runs row by row, in the names that the page's blocks leave.
If the last piece of both cells is an expression for a tensor of floats, the two tensors must be close. Code that names
``cuda`` runs if there is a GPU.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADER = re.compile(r"^\| To \| [^|]+ \| fastres \|$")
_CODE = re.compile(r"`([^`]+)`")
TOLERANCE = 1e-3  # absolute and relative, in float32
HALF_TOLERANCE = 5e-2  # of values in half precision


@dataclass(frozen=True)
class Equivalent:
    """A row: what it is for, and the pieces of code of the other library and of fastres, at a line of the page."""

    line: int
    purpose: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]


def equivalents(page: Path) -> Iterator[Equivalent]:
    """Yield the rows of the page's tables of equivalents."""
    inside = False
    for line, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        inside = bool(_HEADER.match(text)) or (inside and text.startswith("|"))
        if inside and not _HEADER.match(text) and not text.startswith("|---"):
            purpose, theirs, ours = (cell.strip() for cell in text.strip("|").split(" | "))
            yield Equivalent(line, purpose, tuple(_CODE.findall(theirs)), tuple(_CODE.findall(ours)))


def run(row: Equivalent, names: dict[str, Any], page: str) -> None:
    """Run the code of both cells. Raises what the code raises, and ``AssertionError`` if the tensors differ."""
    import torch

    results = []
    for cell in (row.theirs, row.ours):
        found = None
        for code in cell:
            if "cuda" not in code or torch.cuda.is_available():
                found = evaluated(code, names, f"{page}:{row.line}")
        results.append(found)
    theirs, ours = results
    if all(isinstance(result, torch.Tensor) and result.is_floating_point() for result in results):
        half = any(result.element_size() == 2 for result in results)
        limit = HALF_TOLERANCE if half else TOLERANCE
        theirs, ours = (result.detach().cpu().float() for result in results)
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=limit, atol=limit)


def evaluated(code: str, names: dict[str, Any], place: str) -> Any:
    """Run ``code`` in ``names``; return the value of an expression, and ``None`` for a statement."""
    try:
        expression = compile(ast.parse(code, place, "eval"), place, "eval")
    except SyntaxError:
        exec(compile(code, place, "exec"), names)
        return None
    return eval(expression, names)
