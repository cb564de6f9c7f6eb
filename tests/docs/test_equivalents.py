"""The tables of equivalents are found, and a wrong row fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .blocks import ROOT, page_name
from .equivalents import Equivalent, equivalents, run

PAGES = sorted((ROOT / "docs" / "migrate").glob("from-*.md"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_page_for_users_of_a_library_has_a_table(page: Path) -> None:
    rows = list(equivalents(page))
    assert len(rows) >= 10
    assert all(row.theirs or row.ours for row in rows)


def test_rows_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "| To | read |\n|---|---|\n| a | `b` |\n\n"
        "| To | timm | fastres |\n|---|---|---|\n| add | `x = 1`, `x + 1` | words; [`y`](z.md) |\n\n| To | `c` | d |\n"
    )
    assert list(equivalents(page)) == [Equivalent(7, "add", ("x = 1", "x + 1"), ("y",))]


def test_code_runs_in_the_names_of_the_page() -> None:
    names = {"torch": torch, "x": torch.ones(1, 2)}
    run(Equivalent(1, "add", ("y = x + 1", "y"), ("x[0] + 1",)), names, "page")  # the shapes may differ
    run(Equivalent(1, "name", ("'a'",), ()), names, "page")
    run(Equivalent(1, "halve", ("x.half()",), ("x + 0.01",)), names, "page")


@pytest.mark.parametrize(
    ("theirs", "ours", "error"),
    [
        (("x",), ("x + 0.01",), AssertionError),
        (("x",), ("torch.ones(1, 3)",), RuntimeError),
        (("nothing",), (), NameError),
        ((), ("x.nothing()",), AttributeError),
        ((), ("x = = 1",), SyntaxError),
    ],
)
def test_a_wrong_row_fails(theirs: tuple[str, ...], ours: tuple[str, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        run(Equivalent(1, "", theirs, ours), {"torch": torch, "x": torch.ones(1, 2)}, "page")
