"""Write the tables of ``docs/results.md`` from the committed result files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastres.bench.report import results, standing
from fastres.bench.report.words import device_name, milliseconds, todays_command

DOCS = Path(__file__).parents[1]
FOLDER = DOCS.parent / "bench" / "results"
MANY = 4  # batches
CHARTS = {
    "throughput.png": "Images per second of every engine, as bars",
    "throughput_by_batch.png": "Images per second and share of the roofline over the batch, a line for every engine",
    "layers.png": "Time of each step beside its roofline",
}
FILES = (results.JSON_NAME, results.CSV_NAME, results.REPORT_NAME)


def measured() -> str:
    """Return a section for each machine: the verdict, a table for each network, and the charts."""
    runs = {path: results.read(path) for path in sorted(FOLDER.rglob(results.JSON_NAME)) if path.is_file()}
    devices = Counter(device_name(run.environment) for run in runs.values())
    return "\n".join(
        _section(run, path.parent, devices[device_name(run.environment)] > 1) for path, run in runs.items()
    )


def had_empty_caches(run: results.Results) -> bool:
    """Return True if the run measured first calls with empty compilation caches."""
    return str(run.environment.get("first_call", "")).startswith("empty")


def _section(run: results.Results, folder: Path, named: bool) -> str:
    """Return the section of a run; its heading is ``named`` after the networks if the device has several runs."""
    facts = run.environment
    cold = ", with empty caches" if had_empty_caches(run) else ""
    networks = f": {', '.join(dict.fromkeys(row.model for row in run.rows))}{cold}" if named else ""
    command = todays_command(facts.get("command", "python -m bench.run"))
    headline, lost = standing.verdict(run.rows)
    lines = [
        f"## {device_name(facts)}{networks}",
        "",
        f"{facts['date'][:10]}, torch {facts['torch']}, Triton {facts['triton']}, fastres {facts['fastres']}. "
        f"`{command}`",
        "",
        headline,
        "",
        *(f"- {standing.sentence(point)}" for point in lost),
        "",
    ]
    for (model, size, dtype), batches in standing.groups(run.rows):
        lines += [f"### {model}, {dtype}, {size}×{size}", "", *_table(batches), ""]
    link = Path(os.path.relpath(folder, DOCS)).as_posix()
    for name, shown in CHARTS.items():
        if (folder / name).exists():
            lines += [f"![{device_name(facts)}{networks}. {shown}]({link}/{name})", ""]
    data = [f"[{name}]({link}/{name})" for name in FILES if (folder / name).exists()]
    return "\n".join([*lines, f"Data: {', '.join(data)}.", ""])


def _table(batches: Sequence[Sequence[results.Row]]) -> list[str]:
    """Return the table: milliseconds per batch, speed relative to eager, share of the roofline; the fastest in bold.

    Of many batches, it has the milliseconds alone.
    """
    many = len(batches) > MANY
    shown = [{row.engine: row for row in standing.timed(rows)} for rows in batches]
    engines = dict.fromkeys(row.engine for rows in batches for row in rows)
    others = "" if many else " × eager | of roofline |"
    header = "".join(f" batch {rows[0].batch} |{others}" for rows in batches)
    lines = [f"| engine |{header} first call |", "|---|" + "---|" * header.count("|") + "---|"]
    best = [standing.fastest(rows) for rows in batches]
    for engine in engines:
        rows = [timed.get(engine) for timed in shown]
        if not any(rows):
            continue
        cells = [cell for row, fastest in zip(rows, best, strict=True) for cell in _cells(row, row is fastest, many)]
        first = next((row.first_call_s for row in rows if row is not None), None)
        lines.append(f"| {engine} | {' | '.join(cells)} | {'' if first is None else f'{first:.1f} s'} |")
    return lines


def _cells(row: results.Row | None, bold: bool, many: bool) -> list[str]:
    if row is None:
        return [""] if many else ["", "", ""]
    time = f"{milliseconds(row.p50_ms)} ms"
    if many:
        return [f"**{time}**" if bold else time]
    ratio = "" if row.ratio_to_eager is None else f"{row.ratio_to_eager:.2f}"
    share = "" if row.roofline_share is None else f"{row.roofline_share:.0%}"
    return [f"**{time}**" if bold else time, ratio, share]
