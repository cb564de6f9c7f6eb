"""Tables are read in batches, the same from each format."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import fastres
from fastres.classification.browsing import table
from fastres.classification.browsing.table import TYPES, ResultTable
from fastres.classification.formats import FORMATS
from fastres.errors import InputError, SourceError
from tests.classification.conftest import classify
from tests.classification.tables import write_pieces

ODD = ["a,b.jpg", 'with "quotes"', "new\nline", "café", "", "x" * 10_000, "a\\b", "\u2028", "'"]


def written(path: Path, content: pa.Table) -> ResultTable:
    with path.open("wb") as file:
        write_pieces(file, path.suffix, [content])
    return ResultTable(str(path))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("batch", [2, 1 << 16])
def test_every_format_has_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, batch: int
) -> None:
    monkeypatch.setattr(table, "BATCH", batch)
    count = len(ODD)
    content = pa.table(
        {
            "path": ODD,
            "row": pa.array(range(count), pa.int64()),
            "other": pa.array([b"\0"] * count),
            "error": pa.array([None, "broken", *[None] * (count - 2)], pa.string()),
            "label_1": pa.array(ODD),
            "index_1": pa.array([None, *range(1, count)], pa.int32()),
            "score_1": pa.array([float("nan"), float("inf"), *[0.25] * (count - 2)], pa.float32()),
        }
    )
    read = written(tmp_path / f"t{suffix}", content)
    assert read.names == content.column_names
    assert read.kind == "parquet"
    found = pa.Table.from_batches(read.batches(list(TYPES)))
    wanted = [name for name in TYPES if name in content.column_names]
    expected = content.select(wanted).cast(pa.schema([(name, TYPES[name]) for name in wanted]))
    assert repr(found.to_pylist()) == repr(expected.to_pylist())  # NaN is not equal to itself
    assert read.facts == ({"model": "m"} if suffix == ".parquet" else {})


@pytest.mark.parametrize(("names", "kind"), [([], "files"), (["key"], "tar"), (["row", "key"], "parquet")])
def test_kinds(tmp_path: Path, names: list[str], kind: str) -> None:
    columns = {name: ["1"] for name in ("path", *names, "error", "label_1", "index_1", "score_1")}
    assert written(tmp_path / "t.jsonl", pa.table(columns)).kind == kind


def test_a_table_without_classes(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    classify(folder, tmp_path / "t.parquet", model, top_k=0, embed=True)
    with pytest.raises(InputError, match=r"no column 'label_1'.*--top-k of at least 1"):
        ResultTable(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_tables(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    with pytest.raises(SourceError, match="does not exist"):
        ResultTable(str(path))
    for content in (b"", b"\x80\x81 no table", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises((SourceError, InputError), match=r"cannot be read|has no column"):
            ResultTable(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceError, match=r"folder|directory"):
        ResultTable(str(path))


def test_a_line_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"path": "a", "error": null, "label_1": "x", "index_1": 1, "score_1": 0.5}\n7\n')
    with pytest.raises(SourceError, match="line 2 is no JSON object"):
        list(ResultTable(str(path)).batches(["path"]))


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.parquet, \.csv, \.jsonl"):
        ResultTable(str(tmp_path / "t.txt"))
