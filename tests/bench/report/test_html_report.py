"""Test the HTML report: it is self-contained, has every value, and escapes text."""

from __future__ import annotations

import re
from dataclasses import replace

from fastres.bench.report import html_report
from fastres.bench.report.results import Results
from tests.html_page import Page

from .test_report import ENVIRONMENT, LAYERS, ROWS


def page(*rows: object, charts: dict[str, bytes | None] | None = None, **environment: object) -> tuple[str, Page]:
    text = html_report.render(Results({**ENVIRONMENT, **environment}, rows or ROWS, LAYERS), charts or {})  # type: ignore[arg-type]
    return text, Page(text)


def test_every_figure_is_in_a_table() -> None:
    text, found = page()
    headline = next(row for row in found.rows if row[0] == "8" and len(row) == 4)
    assert headline == ["8", "160.0", "80.0", "250.0"]
    full = next(row for row in found.rows if row[:2] == ["1", "fastres"])
    assert full == ["1", "fastres", "7.200", "8.000", "9.600", "125.0", "2.50", "50%", "0.125", "", "1.5e-06", "",
                    "0.75", "321", "15"]  # fmt: skip
    assert ["stem", "1×1/1", "oneDNN", "2 threads", "400", "", "25%", "compute", "1,000.0", "1.00"] in found.rows
    assert ["CPU", "A processor"] in found.rows
    assert "0.2 TFLOP/s" in text
    assert "30 GB/s" in text


def test_what_was_not_timed_has_its_reason_once() -> None:
    _, found = page()
    assert ["compile", "float32", "absent", "no [bold] compiler"] in found.rows
    assert ["fastres", "bfloat16", "unsupported", "This CPU does not compute in bfloat16"] in found.rows
    assert sum(row[-1] == "no [bold] compiler" for row in found.rows) == 1
    assert next(row for row in found.rows if row[:2] == ["8", "bad"])[2:4] == ["wrong", "5.0e-01"]


def test_where_fastres_is_behind_is_a_table() -> None:
    text, found = page()
    assert "fastres is the fastest engine at all 2 points." in text
    assert not any("takes longer" in cell for row in found.rows for cell in row)
    text, found = page(*ROWS[:4], replace(ROWS[4], p20_ms=130.0, p50_ms=140.0))
    assert "fastres is the fastest engine at 1 of 2 points." in text
    assert ["resnet50", "float32", "224", "8", "140", "eager", "100", "40.0%", ""] in found.rows


def test_it_needs_nothing_else() -> None:
    text, found = page(
        charts={"layers.png": b"\x89PNG1", "throughput.png": b"\x89PNG2", "throughput_by_batch.png": None}
    )
    assert len(found.sources) == 2
    assert all(
        source.startswith("data:image/png;base64,iVBORz") or "data:image/png" in source for source in found.sources
    )
    assert not re.search(r"https?://|@import|url\(", text)
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)


def test_text_is_not_markup() -> None:
    bad = replace(ROWS[2], note="<script>alert('no')</script> & more")
    text, found = page(*ROWS[:2], bad, cpu="<b>A & B</b>")
    assert "<script>" not in text
    assert "script" not in found.tags
    assert ["CPU", "<b>A & B</b>"] in found.rows
    assert ["compile", "float32", "absent", bad.note] in found.rows


def test_an_interrupted_run_says_so() -> None:
    assert "was not completed" in page(complete=False)[0]
    assert "was not completed" not in page(complete=True)[0]
