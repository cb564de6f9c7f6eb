"""HTML for notebooks: tables and pictures as fragments that need no style sheet, in light and dark."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from html import escape

_CELL = "padding:2px 10px 2px 0;white-space:nowrap;text-align:{side};background:none"
MOST_ROWS = 400  # of a table in a notebook


def table(rows: Sequence[Sequence[str]], right: Collection[int] = (), title: str = "") -> str:
    """Return an HTML table. The first of ``rows`` is the header; ``right`` has the indices of right-aligned columns.

    All text is escaped. The table scrolls sideways in a narrow window. After :data:`MOST_ROWS` rows it says how many it
    leaves out.
    """
    shown = rows[: MOST_ROWS + 1]
    lines = [_row(row, "td" if index else "th", right) for index, row in enumerate(shown)]
    left_out = f"<div>… and {len(rows) - len(shown):,} more rows</div>" if len(rows) > len(shown) else ""
    caption = f"<div style='padding-bottom:4px'><b>{escape(title)}</b></div>" if title else ""
    return (
        f"<div style='overflow-x:auto'>{caption}<table style='font-size:90%'>{''.join(lines)}</table>{left_out}</div>"
    )


def picture(jpeg: bytes, alt: str) -> str:
    """Return an ``<img>`` that holds the bytes of a JPEG file; ``alt`` is its text for those who do not see it."""
    data = base64.b64encode(jpeg).decode("ascii")
    return f"<img src='data:image/jpeg;base64,{data}' alt='{escape(alt)}' style='max-width:100%;height:auto'>"


def _row(cells: Sequence[str], tag: str, right: Collection[int]) -> str:
    sides = ["right" if column in right else "left" for column in range(len(cells))]
    inner = (
        f"<{tag} style='{_CELL.format(side=side)}'>{escape(cell)}</{tag}>"
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(inner)}</tr>"
