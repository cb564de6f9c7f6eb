"""Test the benchmark result files: they read back as written, and errors name invalid entries."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastres.bench.report import results
from fastres.bench.report.results import Results, Row
from fastres.errors import FastresError

ENVIRONMENT: dict[str, Any] = {
    "gpu": None,
    "cpu": "A processor",
    "torch": "2.13.0",
    "triton": None,
    "fastres": "0.1.0",
    "date": "2026-01-01T00:00:00+00:00",
    "ceilings": {"float32": {"tflops": 0.2, "gb_per_s": 30.0}},
}
TIMED = Row("resnet50", 224, 8, "float32", "fastres", "ok", 9.0, 10.0, 12.5, 800.0, 2.0, samples=15)
ABSENT = Row("resnet50", 224, 8, "float32", "compile", "absent", note='no compiler, or "none" found')


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    run = Results(ENVIRONMENT, (TIMED, ABSENT))
    paths = results.write(run, tmp_path / "new" / "folder")
    assert results.read(paths[0]) == run
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["results.csv", "results.json"]


def test_json_has_the_fields_that_readers_rely_on() -> None:
    data = json.loads(Results(ENVIRONMENT, (TIMED,)).as_json())
    promised = "model size batch dtype engine p20_ms p50_ms p80_ms images_per_s ratio_to_eager max_rel_error"
    assert set(promised.split()) | {"peak_memory_mb", "first_call_s"} <= set(data["rows"][0])
    assert data["rows"][0]["p50_ms"] == 10.0
    assert data["rows"][0]["peak_memory_mb"] is None


def test_csv_has_one_line_a_row_and_empty_cells_for_what_is_unknown() -> None:
    lines = list(csv.DictReader(Results(ENVIRONMENT, (TIMED, ABSENT)).as_csv().splitlines()))
    assert [line["engine"] for line in lines] == ["fastres", "compile"]
    assert tuple(lines[0]) == results.FIELDS
    assert lines[0]["p80_ms"] == "12.5"
    assert lines[1]["p50_ms"] == ""
    assert lines[1]["note"] == ABSENT.note


LAYER = results.LayerRow(
    "resnet50", 224, 8, "float32", "stem", "7×7/2", "stem_pool", "2 threads", 11.5, 10**12, 10**6, "memory", 4.0, 0.35
)


def test_layers_are_kept_and_files_without_them_are_read() -> None:
    run = Results(ENVIRONMENT, (TIMED,), (LAYER,))
    data = json.loads(run.as_json())
    assert results.from_dict(data) == run
    del data["layers"]
    assert results.from_dict(data) == Results(ENVIRONMENT, (TIMED,))
    for name, value in (("us", "fast"), ("flops", 1.5), ("bound", None)):
        data["layers"] = [{**dataclasses.asdict(LAYER), name: value}]
        with pytest.raises(FastresError, match=rf"layer 0: {name} is"):
            results.from_dict(data)
    data["layers"] = [{"step": "stem"}]
    with pytest.raises(FastresError, match="layer 0"):
        results.from_dict(data)


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Results(ENVIRONMENT, (replace(TIMED, p50_ms=float("nan")),)).as_json()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(123456.7, 123460.0), (0.000123456, 0.00012346), (None, None), (float("nan"), None), (float("inf"), None)],
)
def test_figures_are_rounded_to_five_digits(value: float | None, rounded: float | None) -> None:
    assert results.significant(value) == rounded


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("p50_ms", "10", "p50_ms is '10'"),
        ("p50_ms", float("nan"), "p50_ms is nan"),
        ("batch", 8.0, "batch is 8.0"),
        ("batch", True, "batch is True"),
        ("engine", None, "engine is None"),
        ("status", "fine", "status is 'fine'"),
        ("speed", 1.0, r"\['speed'\]"),
    ],
)
def test_rows_that_do_not_fit_are_named(field: str, value: object, said: str) -> None:
    data = copy.deepcopy(Results(ENVIRONMENT, (TIMED, ABSENT)).as_dict())
    data["rows"][1][field] = value
    with pytest.raises(FastresError, match=rf"row 1.*{said}"):
        results.from_dict(data)


def test_rows_of_before_there_were_commits_have_none() -> None:
    data = Results(ENVIRONMENT, (TIMED,)).as_dict()
    del data["rows"][0]["commit"]
    assert results.from_dict(data).rows == (TIMED,)
    assert TIMED.commit == ""


@pytest.mark.parametrize("field", [field for field in results.FIELDS if field != "commit"])
def test_a_missing_field_is_named(field: str) -> None:
    data = Results(ENVIRONMENT, (TIMED,)).as_dict()
    del data["rows"][0][field]
    with pytest.raises(FastresError, match=f"row 0.*{field}"):
        results.from_dict(data)


@pytest.mark.parametrize("data", [[], {}, {"environment": {}, "rows": {}}, {"environment": {}, "rows": [], "more": 1}])
def test_other_documents_are_refused(data: object) -> None:
    with pytest.raises(FastresError, match="environment"):
        results.from_dict(data)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(FastresError, match=name):
            results.read(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FastresError, match="Permission denied"):
        results.write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastresError, match="--out"):
        results.write_whole(tmp_path / "file" / "results.json", b"")


def test_ratios_to_float32_are_of_the_same_batch() -> None:
    half = replace(TIMED, dtype="float16", p50_ms=5.0)
    rows = (
        replace(TIMED, engine="eager", p50_ms=30.0),
        replace(TIMED, engine="eager", dtype="float16", p50_ms=20.0),
        half,
        replace(half, batch=1),
        ABSENT,
    )
    found = results.with_float32_ratios(rows)
    assert [row.ratio_to_eager_float32 for row in found] == [1.0, 1.5, 6.0, None, None]
    assert [replace(row, ratio_to_eager_float32=None) for row in found] == list(rows)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok"], 0),
        (["ok", "unsupported"], 0),
        (["unsupported"], 1),
        (["ok", "wrong"], 1),
        (["ok", "failed"], 1),
        ([], 1),
    ],
)
def test_exit_code_is_about_fastres(statuses: list[str], code: int) -> None:
    rows = [replace(TIMED, status=status) for status in statuses]
    assert results.exit_code([*rows, replace(ABSENT, status="wrong")]) == code
