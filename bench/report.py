"""Results as a table on screen and as a chart: made from :class:`fastres.bench.results.Results` and nothing else.

``python -m fastres.bench.report FOLDER`` shows the run that lies in a folder and draws its chart again.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.errors import FastresError

from .results import CHART_NAME, JSON_NAME, OK, Results, Row, read, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PLAIN_WIDTH = 120  # columns of a table that goes to a file or pipe
COLUMNS = 3  # panels side by side
BUSY = 0.5  # load average a core, before the run, above which times are called disturbed
FASTRES_COLOUR, PEER_COLOUR, ROOFLINE_COLOUR = "#d1495b", "#8fa3b5", "#222222"

Key = tuple[str, int, str]  # model, size, dtype


def groups(rows: Sequence[Row]) -> Iterator[tuple[Key, list[list[Row]]]]:
    """The rows by (model, size, dtype), each a list of lists by batch."""
    by_key: dict[Key, dict[int, list[Row]]] = {}
    for row in rows:
        by_key.setdefault((row.model, row.size, row.dtype), {}).setdefault(row.batch, []).append(row)
    for key, batches in by_key.items():
        yield key, list(batches.values())


def show(results: Results, file: Any = None) -> None:
    """Print the tables, what was not timed and why, and the ceilings, to ``file`` (default: the screen)."""
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    where = results.environment
    console.print(f"fastres {where['fastres']}, torch {where['torch']} on {device_name(where)}", markup=False)
    for dtype, ceiling in where["ceilings"].items():
        console.print(
            f"Ceilings measured in this run, {dtype}: "
            f"{ceiling['tflops']:,.3g} TFLOP/s (matmul), {ceiling['gb_per_s']:,.4g} GB/s (copy)"
        )
    load = where.get("load_average")
    if not where["gpu"] and load is not None and load > BUSY * where.get("cpu_count", 1):
        console.print(f"Other programs were running (load average {load:.1f}): these times are disturbed", style="red")
    for key, batches in groups(results.rows):
        console.print()
        console.print(table(key, batches, console.width))
    for note in notes(results.rows):
        console.print(note, markup=False)


def device_name(environment: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = environment.get("threads")
    return f"{environment['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def table(key: Key, batches: list[list[Row]], width: int = PLAIN_WIDTH) -> Table:
    """One model in one dtype: a row for each engine, a section for each batch. A small ``width`` leaves columns out."""
    from rich import box
    from rich.table import Table

    model, size, dtype = key
    columns = [
        column for column in _COLUMNS if column[1] <= width and not (dtype == "float32" and column[0] == _OF_FLOAT32)
    ]
    title = f"{model}, {dtype}, {size}×{size}"
    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("batch", justify="right", no_wrap=True)
    result.add_column("engine", no_wrap=True)
    for name, _, _ in columns:
        result.add_column(name, justify="right", no_wrap=True)
    for rows in batches:
        for row in rows:
            style = "bold" if row.engine == "fastres" else ("dim" if row.status != OK else "")
            cells = [cell(row) for _, _, cell in columns]
            result.add_row(str(row.batch), row.engine, *cells, style=style)
        result.add_section()
    return result


def _number(field: str, form: str) -> Callable[[Row], str]:
    """A cell with ``field`` in the format ``form``; empty where it was not measured."""

    def cell(row: Row) -> str:
        value = getattr(row, field)
        return "" if value is None else format(value, form)

    return cell


def _time(row: Row) -> str:
    """The median, or what became of an engine that was not timed."""
    return row.status if row.p50_ms is None else _ms(row.p50_ms)


def _quantiles(row: Row) -> str:
    return "" if row.p20_ms is None or row.p80_ms is None else f"{_ms(row.p20_ms)}–{_ms(row.p80_ms)}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _speed(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_OF_FLOAT32 = "× eager\nfloat32"

# Heading, least width of the screen at which the column is shown, cell.
_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("ms", 0, _time),
    ("p20–p80", 86, _quantiles),
    ("images/s", 0, lambda row: _speed(row.images_per_s)),
    ("× eager", 0, _number("ratio_to_eager", ".2f")),
    (_OF_FLOAT32, 119, _number("ratio_to_eager_float32", ".2f")),
    ("error", 0, _number("max_rel_error", ".1e")),
    ("peak\nMB", 101, _number("peak_memory_mb", ",.0f")),
    ("first\ncall s", 94, _number("first_call_s", ".3g")),
    ("TFLOP/s", 110, _number("tflops", ".3g")),
    ("roof-\nline", 0, _number("roofline_share", ".0%")),
)


def notes(rows: Sequence[Row]) -> list[str]:
    """A sentence for each engine that was not timed, said once where it is the same for several batches."""
    said: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row.status != OK:
            batches = said.setdefault((row.engine, row.dtype, row.status, row.note), [])
            batches.append(f"{row.model} batch {row.batch}")
    return [
        f"{engine}, {dtype}: {status}: {note} ({', '.join(batches)})"
        for (engine, dtype, status, note), batches in said.items()
    ]


def draw(results: Results, folder: Path) -> Path | None:
    """Write ``throughput.png``: images a second of each engine, a panel for each setting, the roofline as a line.

    Whiskers go from the 20th to the 80th percentile. Returns the path, or ``None`` where there is nothing to compare.
    """
    from matplotlib.figure import Figure

    panels = [
        (f"{model}, {dtype}, {size}×{size}, batch {rows[0].batch}", [row for row in rows if row.status == OK])
        for (model, size, dtype), batches in groups(results.rows)
        for rows in batches
        if any(row.engine != "eager" and row.status == OK for row in rows)
    ]
    if not panels:
        return None
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    bars = max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(5.2 * columns + 0.6, (0.42 * bars + 1.3) * lines + 0.6), layout="constrained")
    where = results.environment
    figure.suptitle(f"Images a second on {device_name(where)}\nfastres {where['fastres']}, torch {where['torch']}")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.axis("off")
        else:
            _draw_panel(axis, *panel)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    path = folder / CHART_NAME
    write_whole(path, content.getvalue())
    return path


def _draw_panel(axis: Axes, title: str, rows: list[Row]) -> None:
    """Horizontal bars, the fastest on top, each with its figure and its ratio to eager."""
    rows = sorted(rows, key=lambda row: row.images_per_s or 0.0)
    speeds = [row.images_per_s or 0.0 for row in rows]
    slow, fast = (
        [1e3 * row.batch / (ms or 1.0) for row, ms in zip(rows, times, strict=True)] for times in _edges(rows)
    )
    whiskers = (
        [max(0.0, speed - low) for speed, low in zip(speeds, slow, strict=True)],
        [max(0.0, high - speed) for speed, high in zip(speeds, fast, strict=True)],
    )
    colours = [FASTRES_COLOUR if row.engine == "fastres" else PEER_COLOUR for row in rows]
    axis.barh([row.engine for row in rows], speeds, height=0.7, color=colours)
    axis.errorbar(speeds, range(len(rows)), xerr=whiskers, fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
    bound_ms = rows[0].roofline_ms
    bound = 1e3 * rows[0].batch / bound_ms if bound_ms else 0.0
    right = max([bound, *fast])
    for place, (row, speed, high) in enumerate(zip(rows, speeds, fast, strict=True)):
        ratio = "" if row.ratio_to_eager is None else f"  {row.ratio_to_eager:.2f}×"
        weight = "bold" if row.engine == "fastres" else "normal"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axis.text(
            max(speed, high) + 0.015 * right,
            place,
            f"{_speed(speed)}{ratio}",
            va="center",
            fontsize=9,
            fontweight=weight,
            bbox=box,
            zorder=3,
        )
    if bound:
        axis.axvline(bound, color=ROOFLINE_COLOUR, linestyle="--", linewidth=1.2)
        axis.text(
            bound, len(rows) - 0.42, f"roofline {_speed(bound)}", ha="center", va="bottom", fontsize=8.5, clip_on=False
        )
    axis.set_xlim(0, max(right * 1.06, max(fast) * 1.32))
    axis.set_ylim(-0.5, len(rows) - 0.45)
    axis.set_title(title, fontsize=10, pad=16)
    axis.set_xlabel("images/s (× eager in the same dtype)", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _edges(rows: list[Row]) -> tuple[list[float | None], list[float | None]]:
    """Times at the slow and at the fast end of the whiskers."""
    return [row.p80_ms for row in rows], [row.p20_ms for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: show the run in a folder, and draw its chart again."""
    parser = argparse.ArgumentParser(prog="python -m fastres.bench.report", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"a folder with a {JSON_NAME}")
    folder = parser.parse_args(arguments).folder
    try:
        results = read(folder / JSON_NAME)
        show(results)
        draw(results, folder)
    except FastresError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
