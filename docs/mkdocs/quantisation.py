"""Write the table of ``docs/quantize.md`` from the committed result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "bench" / "results" / "quantisation" / "quantisation.json"


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
        f"Trained networks: digits, judged on the {found['networks'][0]['images']} held-out scans. Random networks: "
        "smooth random pictures.",
        "",
        f"Memory: a calibration of {used['model']} on {used['images']:,} JPEGs of up to 1600×1200 pixels, "
        f"{used['skipped']} of them broken, took {used['peak_above_model_mb']:,.0f} MB more than the model, worker "
        f"processes included, and {used['seconds']:,.0f} s with torch on {threads}.",
        "",
        f"{facts['date'][:10]}, {facts['cpu']}, torch {facts['torch']}, fastres {facts['fastres']}: "
        f"`{facts['command']}`. Data: [{FILE.name}](../bench/results/quantisation/{FILE.name}).",
    ]
    return "\n".join([*lines, ""])


def _cells(row: dict[str, Any]) -> list[str]:
    chosen = [row["method"], *(name for name in ("equalised", "corrected") if row[name])]
    accuracy = row["accuracy"]
    shares = [f"{accuracy[name]:.2%}" for name in ("float32", "int8")] if accuracy else ["", ""]
    clear = "none" if row["clear_agreement"] is None else f"{row['clear_agreement']:.1%} of {row['clear']}"
    size = f"{row['size']}×{row['size']}"
    error, same = f"{row['logit_error']:.1%}", f"{row['agreement']:.1%} of {row['images']}"
    return [row["model"], row["weights"], size, ", ".join(chosen), error, same, clear, *shares]
