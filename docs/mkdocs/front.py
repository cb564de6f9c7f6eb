"""Draw the picture of the front page from the results: the time of one image and of the first answer, per engine.

:func:`table` is the README's table of the same results.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawings import MARGIN, Drawing

NAME = "front.svg"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu-intel-xeon-2-threads" / "cold" / "results.json"
ENGINES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "compile_max_autotune": "… max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fastres": "fastres",
}
BATCH = 1
DTYPES = ("float32", "bfloat16")
LEFT, MIDDLE, BAR, ROW = 128, 290, 96, 23  # where the two columns of bars begin, their longest bar, the rows' height


def seconds(value: float) -> str:
    """Return a number of seconds with two digits."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def milliseconds(value: float) -> str:
    """Return a number of milliseconds with one decimal."""
    return f"{value:.1f} ms"


@functools.cache
def document() -> dict[str, Any]:
    """Return what the run measured, with the machine and the versions."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def measured(dtype: str, batch: int = BATCH) -> dict[str, dict[str, Any]]:
    """Return the rows of the engines that ran in ``dtype``, in the order of the picture.

    Eager PyTorch has no 8 bit: its row there is in float32, and left out.
    """
    rows = document()["rows"]
    found = {row["engine"]: row for row in rows if (row["dtype"], row["batch"], row["status"]) == (dtype, batch, "ok")}
    return {engine: found[engine] for engine in ENGINES if engine in found and (engine, dtype) != ("eager", "int8")}


def front() -> str:
    """Draw the picture: for each dtype a row for each engine, with two bars. The shorter one is better in both."""
    tables = {dtype: measured(dtype) for dtype in DTYPES}
    height = 64 + sum(34 + ROW * len(rows) for rows in tables.values())
    drawing = Drawing(height)
    drawing.text(MARGIN, 28, "ResNet-50, one image, on a CPU: shorter is better", size=15, bold=True)
    y = 44
    for dtype, rows in tables.items():
        drawing.text(MARGIN, y + 18, dtype, bold=True)
        drawing.text(LEFT, y + 18, "each image")
        drawing.text(MIDDLE, y + 18, "the first answer")
        y += 28
        times = ("p50_ms", LEFT, milliseconds), ("first_call_s", MIDDLE, seconds)
        for engine, row in rows.items():
            drawing.text(MARGIN, y + 15, ENGINES[engine], bold=engine == "fastres")
            for key, x, words in times:
                values = [other[key] for other in rows.values()]
                _bar(drawing, x, y, row[key], values, words(row[key]), engine == "fastres")
            y += ROW
        y += 6
    return drawing.svg(description())


def _bar(drawing: Drawing, x: int, y: int, value: float, values: Sequence[float], words: str, own: bool) -> None:
    length = max(2.0, BAR * value / max(values))
    place = f'x="{x}" y="{y + 2}" width="{length:.1f}" height="{ROW - 6}"'
    drawing.shapes.append(f'<rect {place} rx="2" class="{"own" if own else "other"}"/>')
    drawing.text(x + length + 5, y + 15, words, bold=value == min(values))


def _full(engine: str) -> str:
    """Return the name of an engine where no other stands before it."""
    return ENGINES[engine].replace("… ", "torch.compile with ")


def description() -> str:
    """Return the picture in words, for those who do not see it."""
    parts = []
    for dtype in DTYPES:
        rows = measured(dtype)
        parts.append(
            f"{dtype}: "
            + ", ".join(
                f"{_full(name)} {milliseconds(row['p50_ms'])} and {seconds(row['first_call_s'])}"
                for name, row in rows.items()
            )
        )
    return f"ResNet-50 on a CPU, milliseconds for one image and seconds to the first answer. {'; '.join(parts)}"


def section(pictures: str, root: str) -> str:
    """Return the picture and its source in Markdown, for a page from which ``pictures`` and ``root`` are reached."""
    facts = document()["environment"]
    link = f"{root}{RESULTS.relative_to(ROOT).as_posix()}"
    versions = f"{facts['date'][:10]}, torch {facts['torch'].partition('+')[0]}"
    caption = (
        f"Two threads of an Intel Xeon with AMX, {versions}: medians of one interleaved run, and first answers with "
        "empty caches and everything that comes before them"
    )
    return f"![{description()}]({pictures}images/{NAME})\n\n{caption}: [results.json]({link}).\n"


def table() -> str:
    """Return the README's table: the time of a batch in each dtype, and of the first answer. The fastest is bold."""
    points = [(dtype, batch) for dtype in (*DTYPES, "int8") for batch in (1, 8)]
    columns = [measured(*point) for point in points]
    kinds = {"int8": "8 bit"}
    names = [f"{kinds.get(dtype, dtype)}, batch 1" if batch == 1 else f"batch {batch}" for dtype, batch in points]
    lines = [f"| | {' | '.join(names)} | first answer |", "|---|" + "---|" * (len(points) + 1)]
    first = {engine: row["first_call_s"] for engine, row in columns[0].items()}
    for engine, words in ENGINES.items():
        cells = [_cell(column, engine) for column in columns]
        label = f"**{words}**" if engine == "fastres" else _full(engine)
        end = _bold(seconds(first[engine]), first[engine] == min(first.values()))
        lines.append(f"| {label} | {' | '.join(cells)} | {end} |")
    return "\n".join([*lines, ""])


def _cell(rows: dict[str, dict[str, Any]], engine: str) -> str:
    if engine not in rows:
        return ""
    value = rows[engine]["p50_ms"]
    words = milliseconds(value) if value < 100 else f"{value:.0f} ms"
    return _bold(words, value == min(row["p50_ms"] for row in rows.values()))


def _bold(words: str, bold: bool) -> str:
    return f"**{words}**" if bold else words
