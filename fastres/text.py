"""Format the names of dtypes, types and files, and tables, as plain text."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

_ESCAPE = re.compile(r"\\x[89a-f][0-9a-f]")
_ESCAPED = re.compile(rb"\\(?:\\|x([89a-f][0-9a-f]))")


def dtype_name(dtype: object) -> str:
    """Return ``"float16"`` for ``torch.float16``, for NumPy's float16 and for the name itself."""
    return str(dtype).removeprefix("torch.")


def article(value: object) -> str:
    """Return the type's name of ``value`` with its article: ``"an int"``, ``"a Tensor"``."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    """Return a file's name as text that every encoding of Unicode can write; different names give different texts.

    A name in UTF-8 is returned as it is. In other names, each byte that is not UTF-8 is written as ``\\xe9`` and each
    backslash is doubled. So are the backslashes of names that look like that themselves.
    """
    data = os.fsencode(path)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    return text.replace("\\", r"\\") if _ESCAPE.search(text) else text


def path_of_text(text: str) -> str:
    """Return the name of a file that :func:`path_text` has written as ``text``."""
    if not _ESCAPE.search(text):
        return text
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes.fromhex((found[1] or b"5c").decode()), text.encode()))


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = (), width: int | None = None) -> str:
    """Format rows of cells as aligned columns, two spaces apart; ``right`` has the indices of right-aligned columns.

    A table that is wider than ``width`` characters is written as several, one below the other. Each begins with the
    first column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = [[0]]
    for column in range(1, len(widths)):
        taken = sum(widths[other] + 2 for other in parts[-1])
        if width is not None and taken + widths[column] > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(column)
    return "\n\n".join(_lines(rows, widths, right, columns) for columns in parts)


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int], right: Collection[int], columns: Sequence[int]) -> str:
    lines = []
    for row in rows:
        cells = [(row[column].rjust if column in right else row[column].ljust)(widths[column]) for column in columns]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
