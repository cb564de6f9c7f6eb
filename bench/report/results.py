"""What a benchmark run found, as data: ``results.json`` and ``results.csv``. Tables and charts are made of these alone.

A row is one engine on one setting (model, image size, batch, dtype). ``status`` says what became of it:

- ``ok``: its logits are right and it was timed
- ``wrong``: its logits are not, so it was not timed
- ``absent``: this machine does not have it, or it could not be built here
- ``unsupported``: fastres does not compute in this dtype on this device
- ``failed``: fastres itself raised an error

``note`` says why, for every status but ``ok``. Figures that were not measured are null.

A layer is one step of fastres on one setting. Results written before there were any are read as having none.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastres.errors import FastresError
from fastres.files import written_whole

OK, WRONG, ABSENT, UNSUPPORTED, FAILED = STATUSES = ("ok", "wrong", "absent", "unsupported", "failed")
ENVIRONMENT = ("gpu", "cpu", "torch", "triton", "fastres", "date", "ceilings")  # always there; see environment.py
JSON_NAME, CSV_NAME, REPORT_NAME = "results.json", "results.csv", "report.html"


@dataclass(frozen=True)
class Row:
    """One engine on one setting.

    ``p20_ms``, ``p50_ms`` and ``p80_ms`` are quantiles of one batch's time over ``samples`` calls, and ``images_per_s``
    is ``batch`` over the median. ``ratio_to_eager`` is the median of engine ``eager`` (PyTorch, contiguous NCHW) in the
    same dtype over this engine's; ``ratio_to_eager_float32`` the same with ``eager`` in float32. ``max_rel_error`` is
    the largest relative L2 error of an image's logits against float64, ``error_limit`` the largest accepted.
    ``peak_memory_mb`` (10⁶ bytes) is the growth of memory while the engine is built and called once,
    ``first_call_s`` how long that takes, with the compilation caches that the environment's ``first_call`` says.
    ``commit`` is the code's, where rows of several runs stand beside each other.
    ``tflops`` and ``gb_per_s`` are the plan's arithmetic and unavoidable traffic over the median, ``roofline_ms`` is
    the least time that the ceilings allow, ``roofline_share`` that over the median.
    """

    model: str
    size: int
    batch: int
    dtype: str
    engine: str
    status: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    images_per_s: float | None = None
    ratio_to_eager: float | None = None
    ratio_to_eager_float32: float | None = None
    max_rel_error: float | None = None
    error_limit: float | None = None
    peak_memory_mb: float | None = None
    first_call_s: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    roofline_ms: float | None = None
    roofline_share: float | None = None
    samples: int = 0
    note: str = ""
    commit: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One step of fastres: its median time ``us``, its arithmetic and unavoidable traffic, and its least time.

    ``bound`` is ``"compute"`` or ``"memory"``, the ceiling that binds the step; ``roofline_us`` the time at it,
    ``roofline_share`` that over ``us``. Steps are in the order in which they run.
    """

    model: str
    size: int
    batch: int
    dtype: str
    step: str
    op: str
    kernel: str
    config: str
    us: float | None
    flops: int
    bytes: int
    bound: str
    roofline_us: float | None
    roofline_share: float | None


FIELDS = tuple(field.name for field in fields(Row))
LAYER_FIELDS = tuple(field.name for field in fields(LayerRow))
_TEXTS = ("model", "dtype", "engine", "status", "note", "commit", "step", "op", "kernel", "config", "bound")
_WHOLES = ("size", "batch", "samples", "flops", "bytes")


@dataclass(frozen=True)
class Results:
    """A run: where and with what (``environment``), its rows in the order in which they were measured, its layers."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        rows, layers = ([asdict(row) for row in part] for part in (self.rows, self.layers))
        return {"environment": self.environment, "rows": rows, "layers": layers}

    def as_json(self) -> str:
        """JSON text; ``ValueError`` for a figure that is not finite, which JSON does not have."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """The rows with a header; figures that were not measured are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


def from_dict(data: Any, source: str = "the results") -> Results:
    """Parse what :meth:`Results.as_dict` gives. Raises ``FastresError`` naming the first thing that does not fit."""
    if not isinstance(data, dict) or set(data) - {"layers"} != {"environment", "rows"}:
        raise FastresError(f"{source} must be an object with 'environment' and 'rows', as bench.run --out writes it")
    layers = data.get("layers", [])
    if not isinstance(data["environment"], dict) or not isinstance(data["rows"], list) or not isinstance(layers, list):
        raise FastresError(f"{source}: 'environment' must be an object, 'rows' and 'layers' lists")
    absent = [name for name in ENVIRONMENT if name not in data["environment"]]
    if absent:
        raise FastresError(f"{source}: the environment does not say {', '.join(absent)}")
    return Results(
        data["environment"],
        tuple(_row(entry, f"{source}, row {i}") for i, entry in enumerate(data["rows"])),
        tuple(LayerRow(**_checked(entry, LAYER_FIELDS, f"{source}, layer {i}")) for i, entry in enumerate(layers)),
    )


def _row(entry: Any, where: str) -> Row:
    if isinstance(entry, dict):
        entry = {"commit": "", **entry}  # results written before rows had one are read as having none
    row = Row(**_checked(entry, FIELDS, where))
    if row.status not in STATUSES:
        raise FastresError(f"{where}: status is {row.status!r}; it is one of {', '.join(STATUSES)}")
    return row


def _checked(entry: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    """``entry``, if it has exactly the fields ``names``, each of its type."""
    if not isinstance(entry, dict) or set(entry) != set(names):
        odd = sorted(set(names).symmetric_difference(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise FastresError(f"{where} does not have exactly the fields that it must have: {odd}")
    for name, value in entry.items():
        if name in _TEXTS:
            fits = isinstance(value, str)
        elif name in _WHOLES:
            fits = type(value) is int
        else:
            fits = value is None or (type(value) in (int, float) and math.isfinite(value))
        if not fits:
            raise FastresError(f"{where}: {name} is {value!r}")
    return entry


def read(path: Path) -> Results:
    """Read a ``results.json``. Raises ``FastresError`` where the file is missing or not what a run writes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastresError(f"{path} cannot be read as benchmark results: {error}") from error
    return from_dict(data, str(path))


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``results.json`` and ``results.csv`` into ``folder`` (made if needed); returns both paths."""
    paths = folder / JSON_NAME, folder / CSV_NAME
    write_whole(paths[0], results.as_json().encode())
    write_whole(paths[1], results.as_csv().encode())
    return paths


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises ``FastresError`` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise FastresError(f"{path} cannot be written ({error.strerror}); give another folder with --out") from error


def significant(value: float | None, digits: int = 5) -> float | None:
    """``value`` rounded to ``digits`` significant digits; ``None`` for what is not finite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def with_float32_ratios(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with ``ratio_to_eager_float32`` filled in wherever the run has that eager float32 row."""
    rows = tuple(rows)
    eager = {
        (row.model, row.size, row.batch): row.p50_ms for row in rows if (row.engine, row.dtype) == ("eager", "float32")
    }

    def filled(row: Row) -> Row:
        base = eager.get((row.model, row.size, row.batch))
        if base is None or row.p50_ms is None:
            return row
        return replace(row, ratio_to_eager_float32=significant(base / row.p50_ms))

    return tuple(filled(row) for row in rows)


def exit_code(rows: Sequence[Row], engine: str = "fastres") -> int:
    """0 where ``engine`` was right and was timed at least once; 1 where it was wrong, failed or ran nowhere."""
    statuses = {row.status for row in rows if row.engine == engine}
    return 0 if OK in statuses and not statuses & {WRONG, FAILED} else 1
