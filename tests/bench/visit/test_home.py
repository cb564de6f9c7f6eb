"""Importing the archive of a visit into the repository."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastres.bench.report import results
from fastres.bench.report.results import Results, Row
from fastres.bench.visit import home
from fastres.errors import FastresError
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Layer, Network, Table, Tuned
from tests.bench.report.test_report import ENVIRONMENT, LAYERS, ROWS


def run(commit: str, *rows: Row, **more: object) -> Results:
    return Results({**ENVIRONMENT, "gpu": "a GPU", "commit": commit, **more}, rows, LAYERS)


def test_the_later_row_counts_unless_it_was_not_measured() -> None:
    old, new = (replace(ROWS[0], p50_ms=ms, commit=commit) for ms, commit in ((2.0, "old"), (1.0, "new")))
    absent = replace(old, status=results.ABSENT, p50_ms=None, note="gone", commit="newest")
    wrong = replace(absent, status=results.WRONG, note="off")
    untimed = replace(old, p50_ms=None, commit="killed")
    assert home.merged([run("old", old), run("new", new)]).rows[0].commit == "new"
    assert home.merged([run("old", old), run("newest", absent)]).rows[0].commit == "old"
    assert home.merged([run("old", old), run("killed", untimed)]).rows[0].commit == "old"
    assert home.merged([run("old", old), run("newest", wrong)]).rows[0].status == results.WRONG, "a wrong result counts"
    found = home.merged([run("old", old), run("new", new)], [{"family": "fused", "status": "failed", "error": "e"}])
    assert found.environment["commits"] == ["new", "old"]
    assert found.environment["left_out"][0]["family"] == "fused"
    assert len(found.environment["runs"]) == 2


def test_tables_are_merged_entry_by_entry() -> None:
    layer = Layer(ConvShape(8, 14, 14, 64, 64, 3, 3, 1, 1), "float16", False)
    other = replace(layer, residual=True)
    config = ConvConfig("conv", 64, 64, 64, 4, 3)
    old = Table(
        (Tuned(layer, config, 2.0, 3.0), Tuned(other, config, 5.0, 5.0)), (), (Network("m", 1, 8, 8, "float16"),)
    )
    new = Table((Tuned(layer, config, 1.0, 3.0),), (), ())
    found = home.merged_tables(old, new)
    assert {entry.layer.residual: entry.microseconds for entry in found.layers} == {False: 1.0, True: 5.0}
    assert found.networks == old.networks


def test_what_is_no_visit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.tgz").write_text("text")
    assert home.main([str(tmp_path / "text.tgz")]) == 2
    assert "cannot be unpacked" in capsys.readouterr().err
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    assert home.main([str(tmp_path / "empty.tgz")]) == 2
    assert "contains no visit" in capsys.readouterr().err


def test_the_page_has_two_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{home.BEGIN}\nold\n{home.END}\nafter\n")
    home.write_page("new \\1", page)
    assert page.read_text() == f"before\n{home.BEGIN}\n\nnew \\1\n\n{home.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(FastresError, match="must have the marks"):
        home.write_page("new", page)


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    page = home.PAGE.read_text()
    between = page[page.index(home.BEGIN) + len(home.BEGIN) : page.index(home.END)]
    assert between.strip() == home.measured_text(home.cards_at_home(), home.estimated).strip()


def test_estimates_are_of_the_card_at_hand() -> None:
    h100, h200, like = (home.estimated(name, "resnet50", 256, 224, "float16")
                        for name in ("H100", "NVIDIA H200", "NVIDIA H100 80GB HBM3"))  # fmt: skip
    assert h100
    assert h200
    assert like == h100 > h200
    assert home.estimated("NVIDIA L40", "resnet50", 1, 224, "float16") is None, "an L4 is another card"


def test_measurements_stand_beside_estimates() -> None:
    rows = [
        replace(row, batch=8, dtype="float16", model="resnet50", size=224) for row in ROWS if row.engine == "fastres"
    ]
    left_out = [{"family": "fused", "status": "failed", "error": "RuntimeError: x\nmore"}]
    found = run("abc", *rows, left_out=left_out)
    text = home.measured_text([("a-gpu", found)], lambda gpu, model, batch, size, dtype: 0.00123)
    assert "| resnet50 | float16 | 8 | 1.23 |" in text
    assert "Left out: `fused`, failed: RuntimeError: x" in text
    assert "not" in home.measured_text([])
