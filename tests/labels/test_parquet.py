"""Labels in Parquet files: every type of column, Hugging Face's class names, damage."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastres.errors import FastresError, LabelError
from fastres.images.categories import load
from fastres.images.classes import wordnet_ids

from .found import ANIMALS, labels


def write(
    path: Path, values: Any, column: str = "label", names: Sequence[str] | None = None, groups: int = 4, **more: Any
) -> Path:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    table = pa.table({"image": [b"x"] * len(array), column: array, **more})
    if names is not None:
        features = {"info": {"features": {column: {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=groups, compression="none", use_dictionary=False)
    return path


class TestColumns:
    @pytest.mark.parametrize(
        "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string", "large_string"]
    )
    @pytest.mark.parametrize("encoded", [False, True])
    def test_types(self, kind: str, encoded: bool, tmp_path: Path) -> None:
        array = pa.array([2, 0, 1, 2, 2], pa.int64()).cast(kind)
        path = write(tmp_path / "x.parquet", array.dictionary_encode() if encoded else array)
        for classes in (3, ANIMALS):
            found = labels(path, "auto", tmp_path, classes)
            assert found.indices.tolist() == [2, 0, 1, 2, 2]
            assert (found.order, found.source, found.names) == ("numbers", "column 'label'", None)

    def test_bools_and_names(self, tmp_path: Path) -> None:
        assert labels(write(tmp_path / "a.parquet", [True, False]), "auto", tmp_path, 2).indices.tolist() == [1, 0]
        found = labels(write(tmp_path / "b.parquet", ["owl", "Cat", "owl"]), "auto", tmp_path, ANIMALS)
        assert found.indices.tolist() == [2, 0, 2]
        assert found.text.startswith("Column 'label': 2 labels, named as the model's classes")
        found = labels(write(tmp_path / "c.parquet", ["x", "w", "x"]), "auto", tmp_path, 2)
        assert (found.indices.tolist(), found.names) == ([1, 0, 1], ("w", "x"))

    def test_several_files_and_row_groups(self, tmp_path: Path) -> None:
        expected = [random.Random(0).randrange(7) for _ in range(50)]
        for number, (start, stop) in enumerate([(0, 3), (3, 30), (30, 50)]):
            write(tmp_path / f"{number}.parquet", expected[start:stop], groups=4 + number)
        assert labels(str(tmp_path / "*.parquet"), "auto", tmp_path, 7).indices.tolist() == expected

    @pytest.mark.parametrize("column", ["label", "labels", "cls", "class", "target"])
    def test_usual_names(self, column: str, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [1, 0], column)
        assert labels(path, "auto", tmp_path).indices.tolist() == [1, 0]

    def test_other_names(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [1, 0], "breed")
        assert labels(path, "auto", tmp_path, label_column="breed").indices.tolist() == [1, 0]
        with pytest.raises(LabelError, match=r"there is no column 'label'\. It has image, breed; give one of them"):
            labels(path, "auto", tmp_path)
        with pytest.raises(LabelError, match=r"has no column 'bred'; it has image, breed\. Did you mean 'breed'"):
            labels(path, "auto", tmp_path, label_column="bred")
        both = write(tmp_path / "y.parquet", [1, 0], "target", cls=[0, 0])
        with pytest.raises(LabelError, match=r"several columns may hold labels \(cls, target\)"):
            labels(both, "auto", tmp_path)
        both = write(tmp_path / "y.parquet", [1, 0], "label", cls=[0, 0])
        assert labels(both, "auto", tmp_path).indices.tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1, 0, -1], r"Column 'label' of '.*x.parquet', row 2 is -1, .* A test set without labels cannot be used"),
            ([1, None, 0], r"row 1 is null; every image needs a label"),
            (pa.nulls(3), "row 0 is null"),
            (["cat", ""], "row 1 is empty"),
            ([1.0, 2.0], r"row 0 is 1\.0; a label is a whole number or a text"),
            (
                [0, 1, 2, 1, 2, 3],
                r"row 5 is 3, which is no class of this model with 3 classes; give an index",
            ),
            (["cat", "lion"], r"'lion' \(Column 'label' of .* row 1\)"),
            ([[1], [2]], "Column 'label' of .* has type list<.*label_column"),
            ([b"1", b"2"], "has type binary"),
        ],
    )
    def test_what_is_no_label(self, values: Any, message: str, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", values)
        with pytest.raises(LabelError, match=message):
            labels(path, "auto", tmp_path, ANIMALS, image_column="image")

    def test_digits_as_text_need_a_choice(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", ["10", "2"])
        with pytest.raises(LabelError, match="not clear which classes the labels mean: as a number, '10'"):
            labels(path, "auto", tmp_path, 11)
        assert labels(path, "auto", tmp_path, 11, order="numbers").indices.tolist() == [10, 2]

    def test_what_parquet_has_not(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [1, 0])
        assert labels(path, [2, 1], tmp_path).indices.tolist() == [2, 1]
        (tmp_path / "l.txt").write_text("2\n1\n")
        assert labels(path, tmp_path / "l.txt", tmp_path).indices.tolist() == [2, 1]
        with pytest.raises(LabelError, match="rows of Parquet files have no names"):
            labels(path, {"a": 1}, tmp_path)
        with pytest.raises(LabelError, match="a parquet file has none"):
            labels(path, "folders", tmp_path)


class TestHuggingFace:
    def test_names_of_the_models_classes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [0, 1, 1], names=["tench", "Garbage_Truck"])
        found = labels(path, "auto", tmp_path, load("imagenet"))
        assert found.indices.tolist() == [0, 569, 569]
        assert "the numbers have names in the file: 2 class names, named as the model's classes" in found.text
        assert labels(path, "auto", tmp_path, 1000).indices.tolist() == [0, 1, 1]
        assert labels(path, "auto", tmp_path, load("imagenet"), order="numbers").indices.tolist() == [0, 1, 1]

    def test_wordnet_ids(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [1, 0], names=[wordnet_ids()[5], wordnet_ids()[900]])
        for classes in (1000, load("imagenet")):
            found = labels(path, "auto", tmp_path, classes)
            assert (found.indices.tolist(), found.order) == ([900, 5], "wordnet")

    def test_names_that_the_model_does_not_have(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [2, 0], names=["x", "w", "v"])
        found = labels(path, "auto", tmp_path, ANIMALS)
        assert (found.indices.tolist(), found.order, found.names) == ([2, 0], "numbers", None)
        assert "read as class indices, and not by the class names in the file ('x', 'w', 'v')" in found.text
        assert labels(path, "auto", tmp_path, 3).names == ("x", "w", "v")
        assert labels(path, "auto", tmp_path, 7).names is None
        assert labels(path, "auto", tmp_path, 3, order="text").indices.tolist() == [0, 2]
        with pytest.raises(LabelError, match="3 of 3 class names are not named as a class"):
            labels(path, "auto", tmp_path, ANIMALS, order="names")

    def test_some_names(self, tmp_path: Path) -> None:
        spelled = [f"{name}, {name} x" if number % 2 else name for number, name in enumerate(load("imagenet"))]
        same = write(tmp_path / "a.parquet", [3, 517], names=spelled)
        assert labels(same, "auto", tmp_path, load("imagenet")).indices.tolist() == [3, 517], "the numbers agree"
        other = write(tmp_path / "b.parquet", [0, 1], names=["dog", "lion"])
        with pytest.raises(LabelError, match=r"1 of the 2 class names .* but 'lion' is not; give order='numbers'"):
            labels(other, "auto", tmp_path, ANIMALS)
        assert labels(other, "auto", tmp_path, ANIMALS, order="numbers").indices.tolist() == [0, 1]

    def test_numbers_without_names(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", [0, 2], names=["dog", "cat"])
        with pytest.raises(LabelError, match="row 1 is 2, but the file names only 2 classes"):
            labels(path, "auto", tmp_path, ANIMALS)

    def test_files_with_other_names(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", [0, 1], names=["dog", "cat"])
        write(tmp_path / "b.parquet", [0, 1], names=["cat", "dog"])
        with pytest.raises(LabelError, match=r"has other class names in '.*b.parquet' than in '.*a.parquet'"):
            labels(str(tmp_path / "*.parquet"), "auto", tmp_path, ANIMALS)

    @pytest.mark.parametrize(
        "metadata", [b"", b"[", b"[]", b"\xff", b'{"info": 3}', b'{"info": {"features": {"label": {"_type": "x"}}}}',
                     b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}', b"[" * 100_000]
    )  # fmt: skip
    def test_metadata_that_say_nothing(self, metadata: bytes, tmp_path: Path) -> None:
        table = pa.table({"image": [b"x"], "label": [1]}).replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, tmp_path / "x.parquet")
        assert labels(tmp_path / "x.parquet", "auto", tmp_path).indices.tolist() == [1]


class TestDamage:
    def test_damaged_labels_are_none(self, tmp_path: Path) -> None:
        values = [b"%03d" % number for number in range(12)]
        names = [value.decode() for value in values]
        path = write(tmp_path / "x.parquet", names)
        data = path.read_bytes()
        path.write_bytes(data.replace(b"005", b"\xff\xff\xff", 1))  # not UTF-8
        found = labels(path, "auto", tmp_path, 12)
        assert found.indices[[0, 3, 8, 11]].tolist() == [0, 3, 8, 11]
        assert found.indices[5] == -1
        assert set(found.indices[4:8].tolist()) <= {-1, 4}
        assert "in damaged parts of the files" in found.text

    def test_no_damage_raises_other_errors(self, tmp_path: Path) -> None:
        whole = write(tmp_path / "whole.parquet", ["cat", "dog", "owl"] * 9).read_bytes()
        for seed in range(120):
            rng = random.Random(seed)
            data = bytearray(whole)
            for _ in range(rng.choice([1, 3])):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "x.parquet").write_bytes(data)
            try:
                found = labels(tmp_path / "x.parquet", "auto", tmp_path, ANIMALS, image_column="image")
            except FastresError:
                continue
            assert set(found.indices.tolist()) <= {-1, 0, 1, 2}
