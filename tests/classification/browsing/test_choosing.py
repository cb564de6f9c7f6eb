"""Which images of a table a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastres.classification.browsing import choosing, table
from fastres.classification.browsing.choosing import Chosen, choose
from fastres.classification.browsing.table import ResultTable


def write(
    path: Path, index: Sequence[int | None], score: Sequence[float | None], second: Sequence[float | None] | None = None
) -> None:
    """Write a table. A row without a class has an error."""
    columns = {
        "path": pa.array([f"{row}.jpg" for row in range(len(index))]),
        "error": pa.array([None if each is not None else "broken" for each in index], pa.string()),
        "label_1": pa.array([None if each is None else f"class {each}" for each in index], pa.string()),
        "index_1": pa.array(index, pa.int32()),
        "score_1": pa.array(score, pa.float32()),
    }
    if second is not None:
        columns["score_2"] = pa.array(second, pa.float32())
    pq.write_table(pa.table(columns), path)


def chosen(path: Path, pictures: int) -> Chosen:
    return choose(ResultTable(str(path)), pictures, False)


@pytest.mark.parametrize("batch", [1, 7, 1 << 16])
def test_the_extremes_of_every_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(table, "BATCH", batch)
    generator = np.random.default_rng(1)
    index, score = generator.integers(0, 3, 200), generator.permutation(200) / 256
    write(tmp_path / "t.parquet", index.tolist(), score.tolist())
    found = chosen(tmp_path / "t.parquet", 50)
    assert (found.images, found.errors, found.by_margin) == (200, 0, False)
    assert sorted(each.images for each in found.classes) == sorted(np.bincount(index).tolist())
    assert [each.images for each in found.classes] == sorted((each.images for each in found.classes), reverse=True)
    for each in found.classes:
        rows = np.flatnonzero(index == each.index)
        ranked = rows[np.argsort(score[rows])].tolist()
        assert each.label == f"class {each.index}"
        assert each.least == ranked[:2]
        assert each.most == ranked[::-1][:2]
        assert each.total_score == pytest.approx(score[rows].sum())
    assert found.doubtful == np.argsort(score)[:10].tolist()


def test_doubt_is_the_margin_of_the_two_best(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [0] * 10, [0.9] * 5 + [0.5] * 5, [0.1, 0.85, 0.1, 0.1, 0.1] + [0.1] * 5)
    found = chosen(tmp_path / "t.parquet", 5)
    assert found.by_margin
    assert found.doubtful == [1]


def test_what_is_not_a_number_is_doubtful_and_never_certain(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [0] * 50, [0.5] * 49 + [float("nan")], [0.2] * 49 + [float("nan")])
    found = chosen(tmp_path / "t.parquet", 10)
    assert found.doubtful[0] == 49
    assert found.classes[0].least[0] == 49
    assert 49 not in found.classes[0].most
    assert found.classes[0].total_score == pytest.approx(24.5)


def test_equal_scores_are_not_shown_twice(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [0] * 100, [0.5] * 100)
    (each,) = chosen(tmp_path / "t.parquet", 60).classes
    assert len({*each.most, *each.least}) == each.shown == 6


@pytest.mark.parametrize("pictures", [1, 2, 5, 9, 20, 100, 1000])
@pytest.mark.parametrize("classes", [1, 4, 30])
def test_never_more_pictures_than_wanted(tmp_path: Path, pictures: int, classes: int) -> None:
    generator = np.random.default_rng(2)
    index = generator.integers(0, classes, 300).tolist()
    write(tmp_path / "t.parquet", index, generator.random(300).tolist())
    found = chosen(tmp_path / "t.parquet", pictures)
    assert 0 < len(found.pictures) <= pictures
    for each in found.classes:
        assert len({*each.most, *each.least}) == each.shown
    assert found.classes[0].most, "the largest class comes first"


def test_a_small_class_is_shown_once_most_certain_first(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [0, 0, 0], [0.2, 0.9, 0.5])
    (each,) = chosen(tmp_path / "t.parquet", 100).classes
    assert (each.most, each.least) == ([1, 2, 0], [])


def test_errors_are_counted_and_the_first_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "ERRORS", 3)
    monkeypatch.setattr(table, "BATCH", 4)
    index = [None, 0, None, 0, 0, None, None, 0]
    write(tmp_path / "t.parquet", index, [None if each is None else 0.5 for each in index])
    found = chosen(tmp_path / "t.parquet", 10)
    assert (found.images, found.errors, found.error_rows) == (8, 4, [0, 2, 5])
    assert set(found.pictures) <= {1, 3, 4, 7}


def test_only_errors(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [None, None], [None, None])
    found = chosen(tmp_path / "t.parquet", 10)
    assert (found.classes, found.doubtful, found.pictures, found.errors) == ([], [], [], 2)
