"""Format the names of dtypes and types, and tables, as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def dtype_name(dtype: object) -> str:
    """Return ``"float16"`` for ``torch.float16``, for NumPy's float16 and for the name itself."""
    return str(dtype).removeprefix("torch.")


def article(value: object) -> str:
    """Return the type's name of ``value`` with its article: ``"an int"``, ``"a Tensor"``."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Format rows of cells as aligned columns, two spaces apart; ``right`` has the indices of right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
