"""Write the tables of ``docs/quantize.md`` from the committed result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastres.bench.report import results
from fastres.bench.report.words import device_name, milliseconds, todays_command

FOLDER = Path(__file__).parents[2] / "bench" / "results"
FILE = FOLDER / "quantisation" / "quantisation.json"


def measured() -> str:
    """Return the table of all networks, and sentences about the memory and the machine."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    lines = [
        "| network | weights | pixels | chosen | error of the logits | same class | of clear images "
        "| accuracy in float32 | in 8 bit |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in found["networks"]),
    ]
    facts, used = found["environment"], found["memory"]
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    lines += [
        "",
        f"Trained networks: digits, judged on {found['networks'][0]['images']:,} images, the held-out scans in "
        f"{found['places']} places each. Random networks: smooth random pictures.",
        "",
        f"Memory: a calibration of {used['model']} on {used['images']:,} JPEGs of up to 1600×1200 pixels, "
        f"{used['skipped']} of them broken, took {used['peak_above_model_mb']:,.0f} MB more than the model, worker "
        f"processes included, and {used['seconds']:,.0f} s with torch on {threads}.",
        "",
        f"{facts['date'][:10]}, {facts['cpu']}, torch {facts['torch']}, fastres {facts['fastres']}: "
        f"`{facts['command']}`. Data: [{FILE.name}](../bench/results/quantisation/{FILE.name}).",
    ]
    return "\n".join([*lines, ""])


def speed() -> str:
    """Return a table for each machine whose results have 8 bit: fastres in every dtype, and other engines in 8 bit."""
    runs = (results.read(path) for path in sorted(FOLDER.rglob(results.JSON_NAME)) if path.is_file())
    found = [_speeds(run) for run in runs if any(row.dtype == "int8" for row in run.rows)]
    return "\n".join(found) if found else "The speed has not been measured with this version yet.\n"


def _speeds(run: results.Results) -> str:
    """Return the medians of one run, and how many times faster than fastres in float32 they are."""
    rows = [row for row in run.rows if row.p50_ms and (row.engine == "fastres" or row.dtype == "int8")]
    rows = [row for row in rows if row.engine != "eager"]
    batches = sorted({row.batch for row in rows})
    by_key = {(row.model, row.engine, row.dtype, row.batch): row for row in rows}
    lines = [
        f"{device_name(run.environment)}, {run.environment['date'][:10]}:",
        "",
        "| engine | " + " | ".join(f"batch {batch} | × float32" for batch in batches) + " | first call |",
        "|---|" + "---|---|" * len(batches) + "---|",
    ]
    for model, engine, dtype in dict.fromkeys((row.model, row.engine, row.dtype) for row in rows):
        cells = []
        for batch in batches:
            row, base = by_key.get((model, engine, dtype, batch)), by_key.get((model, "fastres", "float32", batch))
            cells.append("" if row is None else f"{milliseconds(row.p50_ms)} ms")
            known = row is not None and base is not None
            cells.append(f"{base.p50_ms / row.p50_ms:.2f}" if known else "")  # type: ignore[union-attr,operator]
        first = next(row.first_call_s for key, row in by_key.items() if key[:3] == (model, engine, dtype))
        cells.append("" if first is None else f"{first:.1f} s")
        lines.append(f"| {model}, {engine}, {dtype} | {' | '.join(cells)} |")
    lines += ["", f"`{todays_command(run.environment['command'])}`", ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    chosen = [row["method"], *(name for name in ("equalised", "corrected") if row[name])]
    accuracy = row["accuracy"]
    shares = [f"{accuracy[name]:.2%}" for name in ("float32", "int8")] if accuracy else ["", ""]
    clear = "none" if row["clear_agreement"] is None else f"{row['clear_agreement']:.1%} of {row['clear']}"
    size = f"{row['size']}×{row['size']}"
    error, same = f"{row['logit_error']:.1%}", f"{row['agreement']:.1%} of {row['images']}"
    return [row["model"], row["weights"], size, ", ".join(chosen), error, same, clear, *shares]
