"""Show the benchmark runs in folders, and write their charts and HTML report.

Run ``python -m bench.report FOLDER …``. Everything is made from the result files alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.errors import FastresError

from .charts import CHARTS
from .html_report import older
from .results import JSON_NAME, OK, REPORT_NAME, Results, Row, read, with_float32_ratios, write_whole
from .results import write as write_results
from .standing import Key, fastest, groups, sentence, verdict
from .words import device_name, milliseconds, speed

if TYPE_CHECKING:
    from rich.table import Table

# Runs in one report must have these in common: the machine and the versions.
SAME = ("gpu", "cpu", "cpu_instruction_sets", "cpu_limits", "torch", "triton", "fastres")
PLAIN_WIDTH = 120  # columns of a table that goes to a file or pipe
STAR = "★"
BUSY = 0.5  # above this load average per core before the run, the output warns of disturbed times


def show(results: Results, file: Any = None) -> None:
    """Print ceilings, tables, and the reasons why engines were not timed, to ``file`` (default: standard output)."""
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
        warning = f"Other programs were running (load average {load:.1f}), so these times are unreliable"
        console.print(warning, style="red")
    for key, batches in groups(results.rows):
        console.print()
        console.print(table(key, batches, console.width))
    said, lost = verdict(results.rows)
    console.print(said, style="bold", markup=False)
    for point in lost:
        console.print(f"Not the fastest: {sentence(point)}", markup=False)
    for note in notes(results.rows):
        console.print(note, markup=False)
    for entry in where.get("left_out", ()):
        error = " / ".join(entry["error"].splitlines())
        console.print(f"Left out: the kernels of {entry['family']}: {entry['status']}: {error}", markup=False)
    for note in older(results):
        console.print(note, markup=False)


def table(key: Key, batches: list[list[Row]], width: int = PLAIN_WIDTH) -> Table:
    """Return the table of one model in one dtype: a row per engine, a section per batch, and a star at the fastest.

    A small ``width`` leaves columns out.
    """
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
    result.add_column("", no_wrap=True)
    for rows in batches:
        best = fastest(rows)
        for row in rows:
            style = "bold" if row.engine == "fastres" else ("dim" if row.status != OK else "")
            cells = [cell(row) for _, _, cell in columns]
            result.add_row(str(row.batch), row.engine, *cells, STAR if row is best else "", style=style)
        result.add_section()
    return result


def _number(field: str, form: str) -> Callable[[Row], str]:
    """Return a function that formats ``field`` with ``form``, or gives an empty cell if it was not measured."""

    def cell(row: Row) -> str:
        value = getattr(row, field)
        return "" if value is None else format(value, form)

    return cell


def _time(row: Row) -> str:
    """Return the median, or the status of an engine that was not timed."""
    return row.status if row.p50_ms is None else milliseconds(row.p50_ms)


def _quantiles(row: Row) -> str:
    return "" if row.p20_ms is None or row.p80_ms is None else f"{milliseconds(row.p20_ms)}–{milliseconds(row.p80_ms)}"


_OF_FLOAT32 = "× eager\nfloat32"

# Heading, minimum terminal width for the column, cell.
_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("ms", 0, _time),
    ("p20–p80", 86, _quantiles),
    ("images/s", 0, lambda row: speed(row.images_per_s)),
    ("× eager", 0, _number("ratio_to_eager", ".2f")),
    (_OF_FLOAT32, 119, _number("ratio_to_eager_float32", ".2f")),
    ("error", 0, _number("max_rel_error", ".1e")),
    ("peak\nMB", 101, _number("peak_memory_mb", ",.0f")),
    ("first\ncall s", 94, _number("first_call_s", ".3g")),
    ("TFLOP/s", 110, _number("tflops", ".3g")),
    ("roof-\nline", 0, _number("roofline_share", ".0%")),
)


def notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each engine that was not timed; batches with the same reason share one sentence."""
    said: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row.status != OK:
            batches = said.setdefault((row.engine, row.dtype, row.status, row.note), [])
            batches.append(f"{row.model} batch {row.batch}")
    return [
        f"{engine}, {dtype}: {status}: {note} ({', '.join(batches)})"
        for (engine, dtype, status, note), batches in said.items()
    ]


def write(results: Results, folder: Path) -> list[Path]:
    """Write the run's charts and ``report.html`` into ``folder`` and return their paths.

    Charts of an earlier run that this run does not have are deleted.
    """
    from .html_report import render

    drawn = {name: chart(results) for name, chart in CHARTS.items()}
    files = {**drawn, REPORT_NAME: render(results, drawn).encode()}
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_whole(folder / name, content)
    return [folder / name for name, content in files.items() if content is not None]


def collect(folders: Sequence[Path], but: Path | None = None) -> Results:
    """Merge the runs in ``folders``, or one level below, except the run in ``but``.

    If several rows have the same engine and setting, the last one is kept. Raise ``FastresError`` if there is no run,
    or if the runs come from different machines or versions and so cannot be compared.
    """
    paths = [path for folder in folders for path in _result_files(folder, but)]
    runs = [read(path) for path in paths]
    first = runs[0].environment
    for path, run in zip(paths, runs, strict=True):
        for name in SAME:
            here, there = run.environment.get(name), first.get(name)
            if here != there:
                raise FastresError(
                    f"{path} has {name} {here!r}, but {paths[0]} has {there!r}; one report cannot contain runs "
                    "of different machines or versions. Make a report for each"
                )
    if len(runs) == 1:
        return runs[0]
    rows = {(r.model, r.size, r.batch, r.dtype, r.engine): r for run in runs for r in run.rows}
    steps = {(r.model, r.size, r.batch, r.dtype, r.step): r for run in runs for r in run.layers}
    ceilings = {dtype: measured for run in reversed(runs) for dtype, measured in run.environment["ceilings"].items()}
    complete = all(run.environment.get("complete", True) for run in runs)
    environment = {**first, "ceilings": ceilings, "complete": complete, "runs": [run.environment for run in runs]}
    ordered = sorted(rows.values(), key=lambda row: row.batch)
    return Results(environment, with_float32_ratios(ordered), tuple(steps.values()))


def _result_files(folder: Path, but: Path | None) -> list[Path]:
    if (folder / JSON_NAME).is_file():
        return [folder / JSON_NAME]
    merged = None if but is None else but.resolve()
    found = sorted(path for path in folder.glob(f"*/{JSON_NAME}") if path.parent.resolve() != merged)
    return found or [folder / JSON_NAME]  # reading it raises the error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: show the runs in folders as one, and write the charts and the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="+", help=f"a folder with a {JSON_NAME}, or a folder of such folders"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: the folder of the only run)")
    given = parser.parse_args(arguments)
    try:
        results = collect(given.folder, given.out)
        own = given.folder[0] if len(given.folder) == 1 and (given.folder[0] / JSON_NAME).is_file() else None
        out: Path | None = given.out or own
        if out is None:
            raise FastresError("Several runs were given; use --out to say where to write their common report")
        show(results)
        if out != own:
            write_results(results, out)
        write(results, out)
    except FastresError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0
