"""fastres.classification: Parquet files, sound ones and damaged ones."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastres.errors import FastresError, ImageError, SourceError

from .listed import Row, errors, listed, rows

FUZZ = 250  # mutants of each kind of file


class Tagged(pa.ExtensionType):
    """A type of one's own, whose values are not what is stored."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "fastres.tagged")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Tagged:
        return cls()


class TestSound:
    def test_rows_across_files_and_row_groups(self, tmp_path: Path) -> None:
        first = pa.table({"id": range(10), "jpg": [b"%d" % i for i in range(10)], "extra": ["x"] * 10})
        second = pa.table({"jpg": [b"%d" % i for i in range(10, 25)], "id": range(10, 25)})
        pq.write_table(first, tmp_path / "0.parquet", row_group_size=4)
        pq.write_table(second, tmp_path / "1.parquet", row_group_size=7)
        images = listed(str(tmp_path / "*.parquet"), tmp_path, columns=("id",))
        assert len(images) == 25
        for start, stop in [(0, 3), (3, 12), (20, 25), (4, 5), (4, 9), (15, 16), (0, 25)]:  # forward, back, across
            identity, contents = images.read(start, stop)
            assert list(contents) == [b"%d" % i for i in range(start, stop)]
            assert identity["id"].to_pylist() == list(range(start, stop))
            assert identity["row"] == [i if i < 10 else i - 10 for i in range(start, stop)]

    def test_structs_and_nulls(self, tmp_path: Path) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        given = [{"bytes": b"one", "path": None}, None, {"bytes": None, "path": "x"}]
        table = pa.table({"raw": pa.array([b"", b"", b""]), "image": pa.array(given, kind)})
        pq.write_table(table, tmp_path / "x.parquet")
        contents = list(listed(tmp_path / "x.parquet", tmp_path).read(0, 3)[1])
        assert contents[0] == b"one"
        assert all(isinstance(content, ImageError) for content in contents[1:])

    @pytest.mark.parametrize(
        "kind",
        [
            pa.binary(),
            pa.large_binary(),
            pa.binary_view(),
            pa.binary(3),
            pa.dictionary(pa.int32(), pa.binary()),
            Tagged(),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_forms_of_bytes(self, kind: pa.DataType, nested: bool, tmp_path: Path) -> None:
        values = [b"one", None, b"two", b"one"]
        is_dictionary = pa.types.is_dictionary(kind)
        storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        column = pa.array(values).dictionary_encode() if is_dictionary else pa.array(values, storage)
        if isinstance(kind, Tagged):
            column = pa.ExtensionArray.from_storage(kind, column)
            pa.register_extension_type(kind)
        try:
            if nested:
                column = pa.StructArray.from_arrays([column, pa.array("abcd")], ["bytes", "path"])
            pq.write_table(pa.table({"image": column, "id": range(4)}), tmp_path / "x.parquet")
            found = rows(listed(tmp_path / "x.parquet", tmp_path, columns=("id",)), 3)
        finally:
            if isinstance(kind, Tagged):
                pa.unregister_extension_type(kind.extension_name)
        assert [data for _, data in found if isinstance(data, bytes)] == [b"one", b"two", b"one"]
        assert errors(found) == ["The row holds no image (null)."]

    def test_carried_columns(self, tmp_path: Path) -> None:
        required = pa.struct([pa.field("z", pa.int32(), nullable=False)])
        words = [pa.array(words).dictionary_encode() for words in (["a", "b"], ["c", "a"])]
        table = pa.table(
            {
                "word": pa.chunked_array(words),
                "nested": pa.array([{"x": [1, 2]}, None, {"x": None}, {"x": []}]),
                "required": pa.array([{"z": 1}] * 4, required),
                "a.b": [1, 2, 3, 4],
                "a": [5, 6, 7, 8],
                "image": [b"1", b"2", b"3", b"4"],
            }
        )  # fmt: skip
        with pq.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
            for start in (0, 2):
                writer.write_table(table.slice(start, 2))
        columns = ("word", "nested", "required", "a.b", "a")
        for size in (1, 3, 4):
            found = rows(listed(tmp_path / "x.parquet", tmp_path, columns=columns), size)
            assert [[row[name] for name in columns] for row, _ in found] == [
                list(row.values()) for row in table.select(columns).to_pylist()
            ]
            assert [data for _, data in found] == [b"1", b"2", b"3", b"4"]

    def test_columns_of_one_name(self, tmp_path: Path) -> None:
        arrays = [pa.array([1]), pa.array([2]), pa.array([b"x"]), pa.array([3])]
        pq.write_table(pa.Table.from_arrays(arrays, ["twice", "twice", "image", "id"]), tmp_path / "x.parquet")
        assert rows(listed(tmp_path / "x.parquet", tmp_path, columns=("id",)))[0][0]["id"] == 3
        for image, columns in (("twice", ()), ("image", ("twice",))):
            with pytest.raises(SourceError, match="several columns 'twice'"):
                listed(tmp_path / "x.parquet", tmp_path, image, columns)

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        place = tmp_path / os.fsdecode(b"d\xff")
        place.mkdir()
        with open(place / os.fsdecode(b"\xe9.parquet"), "wb") as file:
            pq.write_table(pa.table({"image": [b"x", b"y"]}), file)
        for source in (place / os.fsdecode(b"\xe9.parquet"), f"{tmp_path}/d*/*.parquet"):
            found = rows(listed(source, place))
            assert [(row["path"], data) for row, data in found] == [
                (f"{tmp_path}/d\\xff/\\xe9.parquet", data) for data in (b"x", b"y")
            ]

    def test_a_folder_that_cannot_be_listed_is_an_error_row(self, tmp_path: Path, forbidden: str) -> None:
        (tmp_path / "d" / forbidden).mkdir(parents=True)
        pq.write_table(pa.table({"image": [b"x"], "id": [1]}), tmp_path / "d/x.parquet")
        found = rows(listed(f"{tmp_path}/d/**/*.parquet", tmp_path, columns=("id",)))
        assert [(Path(row["path"]).name, row["row"], row["id"]) for row, _ in found] == [
            (forbidden, None, None), ("x.parquet", 0, 1),
        ]  # fmt: skip
        assert "Images in it are missing" in errors(found)[0]


class TestRefused:
    @pytest.mark.parametrize(
        ("columns", "image_column", "message"),
        [
            ({"a": [b"x"], "b": [b"x"]}, None, r"several columns are binary \(a, b\)"),
            ({"a": [1]}, None, r"none of the columns is binary \(a"),
            ({"jpeg": [b"x"]}, "jpg", "Did you mean 'jpeg'"),
            ({"a": [b"x"], "b": [1]}, "b", "int64"),
            ({"a": [b"x"], "b": ["text"]}, "b", "string"),
            ({"a": pa.array([], pa.binary())}, None, "no rows"),
        ],
    )
    def test_columns(self, columns: dict[str, Any], image_column: str | None, message: str, tmp_path: Path) -> None:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=message):
            listed(tmp_path / "x.parquet", tmp_path, image_column)

    def test_files_that_are_none_or_differ(self, tmp_path: Path) -> None:
        (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really PAR1")
        with pytest.raises(SourceError, match=r"no\.parquet"):
            listed(tmp_path / "no.parquet", tmp_path)
        pq.write_table(pa.table({"a": [b"x"]}), tmp_path / "0.pq")
        pq.write_table(pa.table({"b": [b"x"]}), tmp_path / "1.pq")
        with pytest.raises(SourceError, match="does not have the same columns"):
            listed(str(tmp_path / "*.pq"), tmp_path)

    def test_a_footer_that_contradicts_itself(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"x"] * 77}), tmp_path / "x.parquet", store_schema=False)
        whole = (tmp_path / "x.parquet").read_bytes()
        places = [at for at in range(len(whole)) if whole[at : at + 1] == b"\x9a" and whole[at + 1] == 1]  # 77
        found = []
        for at in places:
            (tmp_path / "x.parquet").write_bytes(whole[:at] + b"\x98" + whole[at + 1 :])  # 76
            try:
                found.append(len(errors(rows(listed(tmp_path / "x.parquet", tmp_path)))))
            except SourceError as error:
                found.append(str(error))
        assert sum("contradicts itself" in str(result) for result in found) == 2  # of the file and of its row group
        assert 1 in found  # of the column: the last row is missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 1000), r"0\.parquet' (was changed|cannot be read)"),
        (lambda path: path.unlink(), r"0\.parquet' cannot be read as a Parquet file: .*No such file"),
        (lambda path: os.utime(path, (0, 0)), "was changed"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "FIFO"),
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_changes_while_it_is_read(
    change: Callable[[Path], object], message: str, is_open: bool, tmp_path: Path
) -> None:
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": [random.Random(i).randbytes(100_000) for i in range(100)]}), path)
    images = listed(path, tmp_path)
    if is_open:
        images.read(0, 2)
    change(path)
    if is_open and not path.is_file():  # the open file is still there, unchanged
        assert len(list(images.read(2, 9)[1])) == 7
    else:
        with pytest.raises(SourceError, match=message):
            list(images.read(2, 100)[1])


class TestDamage:
    def test_the_other_rows_of_a_row_group_are_error_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        table = pa.table({"image": [b"%03d" % i * 300 for i in range(60)], "id": range(60), "word": ["ab"] * 60})
        options = {"compression": "none", "use_dictionary": False, "data_page_size": 4000, "write_batch_size": 1}
        pq.write_table(table, path, row_group_size=20, write_page_checksum=True, **options)
        content = bytearray(path.read_bytes())
        content[content.index(b"033033")] ^= 1
        path.write_bytes(content)
        seen = []
        for size in (1, 7, 20, 60):
            images = listed(path, tmp_path, columns=("id", "word"))
            found = rows(images, size)
            seen.append([(row, str(data)) for row, data in found])
            bad = [row["row"] for row, data in found if isinstance(data, ImageError)]
            assert 20 < bad[0] <= 33
            assert bad == list(range(bad[0], 40))
            assert all(
                (row["id"], row["word"]) == ((None, None) if row["row"] in bad else (row["row"], "ab"))
                for row, _ in found
            )
            assert "Row group 1" in errors(found)[0]
            assert rows(images, size)[50] == found[50]
        assert all(other == seen[0] for other in seen)

    def test_damaged_text_is_an_error_row(self, tmp_path: Path) -> None:
        table = pa.table({"image": [b"x"] * 3, "word": ["one", "two", "three"]})
        pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_statistics=False)
        content = (tmp_path / "x.parquet").read_bytes()
        (tmp_path / "x.parquet").write_bytes(content.replace(b"two", b"t\xffo", 1))
        found = rows(listed(tmp_path / "x.parquet", tmp_path, columns=("word",)))
        assert [row["word"] for row, _ in found] == ["one", None, None]
        assert len(errors(found)) == 2

    def test_an_error_that_comes_later_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pq.write_table(pa.table({"image": [b"x"] * 9}), tmp_path / "x.parquet")
        images = listed(tmp_path / "x.parquet", tmp_path)
        left = iter([0, 1])

        def iter_batches(*_: Any, **__: Any) -> Any:
            yield from [pa.record_batch({"image": [b"x"]})] * next(left, 0)
            raise OSError("the disk is gone")

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
        with pytest.raises(SourceError, match=r"x\.parquet' cannot be read: the disk is gone"):
            images.read(0, 5)


def mutated(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    start = chance.randrange(len(whole))
    kind = chance.choice(["byte", "byte", "footer", "zeros", "cut", "middle"])
    if kind == "byte":
        content[start] ^= chance.randrange(1, 256)
    elif kind == "footer":
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        content[len(whole) - 1 - chance.randrange(footer)] ^= chance.randrange(1, 256)
    elif kind == "zeros":
        stop = min(start + chance.randrange(1, 300), len(whole))
        content[start:stop] = bytes(stop - start)
    elif kind == "cut":
        del content[start:]
    else:
        del content[start : start + chance.randrange(1, 50)]
    return bytes(content)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False, "data_page_size": 500},
    "dictionary": {"compression": "snappy"},
    "zstd": {"compression": "zstd", "data_page_version": "2.0", "use_dictionary": False},
    "checksums": {"compression": "gzip", "write_page_checksum": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind: str, tmp_path: Path) -> None:
    """Whatever happens to a Parquet file, all of its rows are there, or there is a named error."""
    chance = random.Random(0)
    data = [chance.randbytes(chance.randrange(60, 120)) if i % 7 else None for i in range(90)]
    table = pa.table(
        {
            "image": pa.array([data and {"bytes": data, "path": "x"} for data in data]),
            "id": range(90),
            "word": pa.array([f"{i % 9}" for i in range(90)]).dictionary_encode(),
            "list": [[i] * (i % 4) for i in range(90)],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=40, **KINDS[kind])
    whole = (tmp_path / "x.parquet").read_bytes()
    original = rows_of(whole, tmp_path)
    for _ in range(FUZZ):
        content = mutated(whole, chance)
        try:
            found = rows_of(content, tmp_path)
        except FastresError:
            continue
        assert len(found) == 90
        assert [row["row"] for row, _ in found] == list(range(90))
        if kind == "checksums":
            assert all(
                isinstance(data, ImageError) or data == own for (_, data), (_, own) in zip(found, original, strict=True)
            )


def rows_of(content: bytes, tmp_path: Path) -> list[Row]:
    (tmp_path / "x.parquet").write_bytes(content)
    return rows(listed(tmp_path / "x.parquet", tmp_path, "image", ("id", "word", "list")), 17)
