"""fastres.ray.Classifier without Ray: a plain callable on batches in every format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import fastres
from fastres.errors import ClassifierError, DeviceError, FastresError, InputError, RayError
from fastres.extras import install
from fastres.ray import Classifier

from .conftest import BATCH, classify

FORMATS = ("numpy", "pandas", "pyarrow")


def in_format(table: pa.Table, name: str) -> Any:
    """Return ``table`` as Ray gives it to ``map_batches`` with this ``batch_format``."""
    if name == "pyarrow":
        return table
    if name == "pandas":
        return table.to_pandas()
    return {column: table[column].to_numpy() for column in table.column_names}


def as_table(batch: Any) -> pa.Table:
    """Return a batch as Ray stores it."""
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, pd.DataFrame):
        return pa.Table.from_pandas(batch, preserve_index=False)
    return pa.table({name: pa.array(list(v)) if v.ndim > 1 else pa.array(v) for name, v in batch.items()})


@pytest.mark.parametrize("format", FORMATS)
class TestFormats:
    def test_rows_are_those_of_classify(self, table: pa.Table, tmp_path: Path, format: str) -> None:
        expected = classify(table, tmp_path, top_k=3)
        found = Classifier("resnet20_digits", top_k=3, batch_size=BATCH)(in_format(table, format))
        found = as_table(found)
        assert found.column_names == [*table.column_names, *expected.column_names]
        assert found.select(expected.column_names).equals(expected)  # types, nulls and bits
        assert found.select(table.column_names).to_pylist() == table.to_pylist()
        assert 0 < expected["error"].null_count < len(expected)

    def test_types_do_not_depend_on_the_rows(self, table: pa.Table, format: str) -> None:
        classifier = Classifier("resnet20_digits", top_k=2)
        is_bad = pa.compute.is_valid(as_table(classifier(in_format(table, format)))["error"])
        bad, good = table.filter(is_bad), table.filter(pa.compute.invert(is_bad))
        assert 0 < len(bad) < len(table)
        added = slice(table.num_columns, None)
        schemas = [list(as_table(classifier(in_format(part, format))).schema)[added] for part in (table, bad, good)]
        assert schemas[0] == schemas[1] == schemas[2]
        if format != "numpy":  # pandas and Arrow know the types of nothing as well
            assert list(as_table(classifier(in_format(table[:0], format))).schema)[added] == schemas[0]

    def test_structs_nulls_and_names(self, table: pa.Table, format: str) -> None:
        images = [None if value is None else {"bytes": value, "path": "x"} for value in table["image"].to_pylist()]
        images[0] = {"bytes": None, "path": "x"}
        nested = pa.table({"id": table["id"], "picture": images})
        found = as_table(Classifier("resnet20_digits", top_k=1)(in_format(nested, format)))
        plain = as_table(Classifier("resnet20_digits", top_k=1)(in_format(table, format)))
        assert found["label_1"][1:].to_pylist() == plain["label_1"][1:].to_pylist()
        assert found["error"][0].as_py() == "The row holds no image (null)."
        assert found["error"].to_pylist().count("The row holds no image (null).") == 2

    def test_a_column_of_nulls(self, format: str) -> None:
        table = pa.table({"image": pa.nulls(2, pa.binary())})
        found = as_table(Classifier("resnet20_digits", top_k=1)(in_format(table, format)))
        assert found["error"].to_pylist() == ["The row holds no image (null)."] * 2
        assert found["index_1"].to_pylist() == [None, None]

    def test_images_can_be_dropped(self, table: pa.Table, format: str) -> None:
        batch = in_format(table, format)
        found = as_table(Classifier("resnet20_digits", top_k=1, drop_images=True)(batch))
        assert found.column_names == ["id", "error", "label_1", "index_1", "score_1"]
        assert "image" in list(batch if format != "pyarrow" else batch.column_names)  # the given batch is unchanged

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"image": [b""], "error": ["x"], "score_1": [0.5]}, r"already has columns .*\(error, score_1\); rename"),
            ({"id": [1], "name": ["x"]}, r"None of the columns holds images \(id: .*, name: .*\)"),
            ({"front": [b"x"], "back": [b"y"]}, r"Several columns are binary \(front, back\); pass one"),
        ],
    )
    def test_wrong_columns(self, columns: dict[str, Any], message: str, format: str) -> None:
        with pytest.raises(InputError, match=message):
            Classifier("resnet20_digits")(in_format(pa.table(columns), format))

    @pytest.mark.parametrize(
        ("name", "message"),
        [("imago", r"no column 'imago' \(id, image\)\. Did you mean 'image'"), ("id", "Column 'id' holds int.*binary")],
    )
    def test_wrong_image_column(self, table: pa.Table, name: str, message: str, format: str) -> None:
        with pytest.raises(InputError, match=message):
            Classifier("resnet20_digits", image_column=name)(in_format(table, format))


class TestNumpy:
    def test_values(self, table: pa.Table, model: fastres.Model) -> None:
        found = Classifier(model, top_k=1, embed=True)(in_format(table, "numpy"))
        rows = as_table(Classifier(model, top_k=1, embed=True)(table))
        failed = found["error"] != ""
        assert [value or None for value in found["error"]] == rows["error"].to_pylist()
        assert [value or None for value in found["label_1"]] == rows["label_1"].to_pylist()
        assert found["embedding"].dtype == found["score_1"].dtype == np.float32
        assert found["embedding"].shape == (len(table), model.architecture.features)
        np.testing.assert_array_equal(np.isnan(found["score_1"]), failed)
        np.testing.assert_array_equal(np.isnan(found["embedding"]).all(axis=1), failed)
        assert found["index_1"].dtype == np.int32
        assert [None if value < 0 else value for value in found["index_1"]] == rows["index_1"].to_pylist()
        assert rows["embedding"].type == pa.list_(pa.float32(), model.architecture.features)
        expected = [value for value in rows["embedding"].to_pylist() if value is not None]
        np.testing.assert_array_equal(found["embedding"][~failed], np.array(expected, np.float32))

    def test_columns_behave_as_arrays(self, table: pa.Table) -> None:
        found = Classifier("resnet20_digits", top_k=1)(in_format(table, "numpy"))
        sure = found["score_1"] > 0.9
        assert type(sure) is np.ndarray
        assert pa.array(sure).type == pa.bool_()
        assert pa.array(found["score_1"] * 2).null_count == 0
        assert pa.array(found["score_1"].astype(np.float64)).type == pa.float64()
        assert pa.array(found["error"][sure]).type == pa.string()  # all of them null
        assert pa.array(found["error"][sure]).null_count == sure.sum() > 0

    def test_decoded_images_are_refused(self) -> None:
        with pytest.raises(InputError, match="read_binary_files"):
            Classifier("resnet20_digits", image_column="image")({"image": np.zeros((2, 8, 8, 3), np.uint8)})

    def test_other_values_beside_images_are_refused(self, table: pa.Table) -> None:
        values = np.array([table["image"][0].as_py(), "a.jpg"], object)
        with pytest.raises(InputError, match="holds str beside images"):
            Classifier("resnet20_digits")({"image": values})


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"top_k": 0}, InputError, "top_k"),
            ({"batch_size": 0}, InputError, "batch_size"),
            ({"threads": 0}, InputError, "threads"),
            ({"decoder": "quick"}, InputError, "decoder is 'quick'; use 'exact' or 'fast'"),
            ({"device": "cuda:99"}, DeviceError, "CUDA"),
            ({"device": "gpu"}, DeviceError, "device is 'gpu'"),
            ({"model": "resnet51"}, FastresError, "resnet50"),
        ],
    )
    def test_errors(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Classifier(**{"model": "resnet20_digits"} | options)

    def test_a_loaded_model_has_its_own_settings(self, model: fastres.Model) -> None:
        with pytest.raises(InputError, match="with a loaded model"):
            Classifier(model, dtype="float32")

    def test_a_network_without_classes(self, table: pa.Table) -> None:
        headless = fastres.load("resnet18", None, num_classes=0)
        with pytest.raises(ClassifierError):
            Classifier(headless)
        found = Classifier(headless, top_k=0, embed=True)(table[:2])
        assert found.column_names == ["id", "image", "error", "embedding"]

    def test_other_batches(self) -> None:
        with pytest.raises(InputError, match="A batch cannot be a list"):
            Classifier("resnet20_digits")([b""])

    def test_categories_and_exact_decoder(self, table: pa.Table, tmp_path: Path) -> None:
        options: dict[str, Any] = {"categories": [f"digit {i}" for i in range(10)], "decoder": "exact", "top_k": 1}
        expected = classify(table, tmp_path, **options)
        found = Classifier("resnet20_digits", **options, batch_size=BATCH)(table)
        assert found.select(expected.column_names).equals(expected)
        assert expected["label_1"][0].as_py().startswith("digit ")

    def test_threads_do_not_change_the_rows(self, table: pa.Table) -> None:
        one, four = (Classifier("resnet20_digits", threads=threads)(table) for threads in (1, 4))
        assert one.equals(four)


def test_parquet_files_of_several_batches_have_one_schema(table: pa.Table, tmp_path: Path) -> None:
    classifier = Classifier("resnet20_digits", top_k=1, drop_images=True)
    for start in range(0, len(table), 2):
        part = as_table(classifier(in_format(table[start : start + 2], "numpy")))
        pq.write_table(part, tmp_path / f"{start:02}.parquet")
    schemas = {str(pq.read_schema(path)) for path in tmp_path.iterdir()}
    assert len(schemas) == 1


MISSING = """
import sys
sys.modules["ray"] = None
import fastres
print("ray" in dir(fastres))
try:
    fastres.ray
except fastres.errors.MissingDependencyError as error:
    print(error)
"""


def test_ray_is_imported_by_none_and_needed_by_fastres_ray() -> None:
    def printed(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    assert printed("import sys, fastres; fastres.load; print('ray' in sys.modules)") == "False\n"
    assert printed("import sys, fastres; fastres.ray.Classifier; print('ray' in sys.modules)") == "False\n"
    assert f"(ray): {install('ray')}" in printed(MISSING)


def test_a_missing_token_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**options: object) -> None:
        raise ray.exceptions.AuthenticationError("no authentication token was found")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RayError, match=r"no authentication token was found.* RAY_AUTH_MODE=token"):
        fastres.ray.classify(tmp_path, tmp_path / "out.csv", model="resnet20_digits")
