"""The results of a benchmark run as data: ``results.json`` and ``results.csv``, the source of all tables and charts.

A row is one engine on one setting (model, image size, batch, dtype). Its ``status`` is one of:

- ``ok``: the logits are correct and the engine was timed
- ``wrong``: the logits are wrong, so the engine was not timed
- ``absent``: the engine is not installed or could not be built on this machine
- ``unsupported``: fastres does not support this dtype on this device
- ``failed``: fastres itself raised an error

For every status except ``ok``, ``note`` gives the reason. Values that were not measured are null.

A layer is one step of fastres on one setting. Older result files without layers are read as having none.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastres.errors import FastresError
from fastres.files import read_regular, written_whole

OK, WRONG, ABSENT, UNSUPPORTED, FAILED = STATUSES = ("ok", "wrong", "absent", "unsupported", "failed")
ENVIRONMENT = ("gpu", "cpu", "torch", "triton", "fastres", "date", "ceilings")  # always present
JSON_NAME, CSV_NAME, REPORT_NAME = "results.json", "results.csv", "report.html"


@dataclass(frozen=True)
class Row:
    """One engine on one setting.

    - ``p20_ms``, ``p50_ms``, ``p80_ms``: quantiles of the time of one batch over ``samples`` calls.
    - ``images_per_s``: ``batch`` divided by the median time.
    - ``ratio_to_eager``: the median of the engine ``eager`` (PyTorch, contiguous NCHW) in the same dtype (for int8, in
      float32), divided by this engine's median. ``ratio_to_eager_float32`` is the same with ``eager`` in float32.
    - ``max_rel_error``: the largest relative L2 error of an image's logits compared with float64; in int8, compared
      with exact arithmetic in 8 bit. ``error_limit`` is the largest error accepted.
    - ``peak_memory_mb``: the growth of memory (10⁶ bytes) while the engine is built and called once. ``first_call_s``
      is the time that this takes. The environment's ``first_call`` says how the compilation caches were set.
    - ``tflops``, ``gb_per_s``: the arithmetic and the minimum memory traffic of the plan, divided by the median time.
    - ``roofline_ms``: the shortest time that the ceilings allow. ``roofline_share`` is this time over the median.
    - ``commit``: the commit of the code, if rows of several runs are merged.
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
    """One step of fastres: its median time ``us``, its FLOPs and minimum memory traffic, and its shortest time.

    ``bound`` is the ceiling that limits the step, ``"compute"`` or ``"memory"``. ``roofline_us`` is the time at that
    ceiling, and ``roofline_share`` is this time over ``us``. Steps are in execution order.
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
    """A run: its ``environment`` (machine and versions), its rows in the order of measurement, and its layers."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        rows, layers = ([asdict(row) for row in part] for part in (self.rows, self.layers))
        return {"environment": self.environment, "rows": rows, "layers": layers}

    def as_json(self) -> str:
        """Return JSON text. Raise ``ValueError`` for a number that is not finite, because JSON has none."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """Return the rows as CSV with a header. Values that were not measured are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


def from_dict(data: Any, source: str = "the results") -> Results:
    """Parse the output of :meth:`Results.as_dict`. Raise ``FastresError`` that names the first invalid entry."""
    if not isinstance(data, dict) or set(data) - {"layers"} != {"environment", "rows"}:
        raise FastresError(f"{source} must be an object with 'environment' and 'rows', as bench.run --out writes")
    layers = data.get("layers", [])
    if not isinstance(data["environment"], dict) or not isinstance(data["rows"], list) or not isinstance(layers, list):
        raise FastresError(f"{source}: 'environment' must be an object, and 'rows' and 'layers' must be lists")
    if not isinstance(data["environment"].get("ceilings", {}), dict):
        raise FastresError(f"{source}: the environment's 'ceilings' must be an object")
    absent = [name for name in ENVIRONMENT if name not in data["environment"]]
    if absent:
        raise FastresError(f"{source}: the environment lacks {', '.join(absent)}")
    return Results(
        data["environment"],
        tuple(_row(entry, f"{source}, row {i}") for i, entry in enumerate(data["rows"])),
        tuple(LayerRow(**_checked(entry, LAYER_FIELDS, f"{source}, layer {i}")) for i, entry in enumerate(layers)),
    )


def _row(entry: Any, where: str) -> Row:
    if isinstance(entry, dict):
        entry = {"commit": "", **entry}  # older results have no commit in their rows
    row = Row(**_checked(entry, FIELDS, where))
    if row.status not in STATUSES:
        raise FastresError(f"{where}: status is {row.status!r}; it must be one of {', '.join(STATUSES)}")
    return row


def _checked(entry: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    """Return ``entry`` if it has exactly the fields ``names`` with the right types; otherwise raise."""
    if not isinstance(entry, dict) or set(entry) != set(names):
        odd = sorted(set(names).symmetric_difference(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise FastresError(f"{where} does not have exactly the required fields; missing or unknown: {odd}")
    for name, value in entry.items():
        if name in _TEXTS:
            fits = isinstance(value, str)
        elif name in _WHOLES:
            fits = type(value) is int
        else:
            fits = value is None or (type(value) in (int, float) and math.isfinite(value))
        if not fits:
            raise FastresError(f"{where}: {name} is {value!r}, which is not a valid value")
    return entry


def read(path: Path) -> Results:
    """Read a ``results.json``. Raise ``FastresError`` if the file is missing or not a result file."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FastresError(f"{path} cannot be read as benchmark results: {error}") from error
    return from_dict(data, str(path))


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``results.json`` and ``results.csv`` into ``folder``, creating it if needed. Return both paths."""
    paths = folder / JSON_NAME, folder / CSV_NAME
    write_whole(paths[0], results.as_json().encode())
    write_whole(paths[1], results.as_csv().encode())
    return paths


def read_text(path: Path) -> str:
    """Return the text of a regular file. Raise ``FastresError`` if it cannot be read or is not UTF-8."""
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise FastresError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise FastresError(f"{path} is not text in UTF-8 ({error}); it is damaged, move it away") from error


def check_folder(folder: Path) -> None:
    """Raise ``FastresError`` unless files can be written into ``folder``, and create it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise FastresError(
            f"The output folder {str(folder)!r} cannot be used ({reason}); give another with --out"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically. Raise ``FastresError`` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise FastresError(f"{path} cannot be written ({error.strerror}); choose another folder with --out") from error


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON, as :func:`write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def significant(value: float | None, digits: int = 5) -> float | None:
    """Return ``value`` rounded to ``digits`` significant digits, or ``None`` if it is not finite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def with_float32_ratios(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the rows with ``ratio_to_eager_float32`` filled in if the run has the matching eager float32 row."""
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
    """Return 0 if ``engine`` was timed at least once and was never wrong and never failed; otherwise return 1."""
    statuses = {row.status for row in rows if row.engine == engine}
    return 0 if OK in statuses and not statuses & {WRONG, FAILED} else 1
