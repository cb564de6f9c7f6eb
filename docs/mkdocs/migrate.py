"""Write the speed of fastres beside another engine into the pages of ``docs/migrate/``, from the committed results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from results import had_empty_caches

from fastres.bench.report import results
from fastres.bench.report.results import Row
from fastres.bench.report.standing import EAGER, FASTRES, median, timed
from fastres.bench.report.words import milliseconds

PAGES = Path(__file__).parents[1] / "migrate"
FOLDER = Path(__file__).parents[2] / "bench" / "results"
ENGINES = {
    "from-torchvision.md": EAGER,
    "from-timm.md": EAGER,
    "from-hugging-face.md": EAGER,
    "from-onnxruntime.md": "onnxruntime",
    "from-torch-compile.md": "compile",
}
WORDS = {EAGER: "eager PyTorch", "onnxruntime": "ONNX Runtime", "compile": "torch.compile"}
SHOWN = "resnet50"
BATCHES = (1, 8, 64, 256)

Pair = tuple[Row, Row]  # of the other engine, and of fastres


def speed(engine: str) -> str:
    """Return a table of ResNet-50 with ``engine`` and fastres, and sentences about all networks that were measured."""
    files = [path for path in sorted(FOLDER.rglob(results.JSON_NAME)) if path.is_file()]
    runs = {path: run for path in files for run in [results.read(path)] if any(_pairs(run, engine))}
    measured = {own.batch for run in runs.values() for _, own in _pairs(run, engine)}
    batches = [batch for batch in BATCHES if batch in measured]
    lines = [
        f"ResNet-50 at 224×224: the median time of a batch, {WORDS[engine]} → fastres, and the ratio of the two. "
        "*First call* includes building or compiling the network, at the smallest batch.",
        "",
        f"| machine, dtype | {' | '.join(f'batch {batch}' for batch in batches)} | first call |",
        "|---|" + "---|" * (len(batches) + 1),
        *(line for path, run in runs.items() for line in _table(path, run, engine, batches)),
        "",
        *_verdict(runs.values(), engine),
        "",
        f"{'; '.join(dict.fromkeys(_origin(run) for run in runs.values()))}.",
    ]
    return "\n".join([*lines, ""])


def _verdict(runs: Iterable[results.Results], engine: str) -> list[str]:
    """Return at how many points fastres is faster, and those at which it is not."""
    pairs = [(run, *pair) for run in runs for pair in _pairs(run, engine)]
    lost = [(run, other, own) for run, other, own in pairs if median(own) >= median(other)]
    networks = ", ".join(sorted({own.model for _, _, own in pairs}))
    measured = f"A point is one network, dtype and batch on one machine. With {networks}, fastres is faster at"
    if not lost:
        return [f"{measured} all {len(pairs)} points."]
    sentences = [
        f"- {_machine(run)}: {own.model}, {own.dtype}, batch {own.batch}, {_times(other, own)}"
        for run, other, own in lost
    ]
    return [f"{measured} {len(pairs) - len(lost)} of {len(pairs)} points. The others:", "", *sentences]


def _machine(run: results.Results) -> str:
    facts = run.environment
    cold = ", empty caches" if had_empty_caches(run) else ""
    device = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    return f"{device}{cold}"


def _origin(run: results.Results) -> str:
    facts = run.environment
    return f"{_machine(run)}: {facts['date'][:10]}, torch {facts['torch']}, fastres {facts['fastres']}"


def _pairs(run: results.Results, engine: str) -> Iterator[Pair]:
    """Yield the rows of ``engine`` and of fastres at the same point. Eager's rows in int8 are of float32."""
    rows = {(row.engine, row.model, row.dtype, row.size, row.batch): row for row in timed(run.rows)}
    for (name, *point), other in rows.items():
        own = rows.get((FASTRES, *point))
        if name == engine and own is not None and not (name == EAGER and own.dtype == "int8"):
            yield other, own


def _table(path: Path, run: results.Results, engine: str, batches: list[int]) -> Iterator[str]:
    """Yield a line for each dtype of ResNet-50 in a file."""
    pairs = [pair for pair in _pairs(run, engine) if pair[1].model == SHOWN]
    link = Path(os.path.relpath(path, PAGES)).as_posix()
    for dtype in dict.fromkeys(own.dtype for _, own in pairs):
        found = {own.batch: (other, own) for other, own in pairs if own.dtype == dtype}
        cells = [_cell(*found[batch]) if batch in found else "" for batch in batches]
        other, own = found[min(found)]
        cells.append(f"{other.first_call_s:.1f} → {own.first_call_s:.1f} s")
        yield f"| [{_machine(run)}]({link}), {dtype} | {' | '.join(cells)} |"


def _cell(other: Row, own: Row) -> str:
    return f"{_times(other, own)}, {median(other) / median(own):.2f}×"


def _times(other: Row, own: Row) -> str:
    return f"{milliseconds(median(other))} → {milliseconds(median(own))} ms"
