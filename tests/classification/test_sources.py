"""fastres.classification: images found in folders, globs, tar shards and Parquet files, and refused inputs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastres.classification import sources
from fastres.classification.listing import difference, write_listing
from fastres.classification.tars import split_name
from fastres.errors import ImageError, SourceError

from .conftest import encoded


def listed(
    source: Any, tmp_path: Path, image_column: str | None = None, columns: tuple[str, ...] = ()
) -> sources.Images:
    found = sources.find(source)
    with (tmp_path / "listing.arrow").open("wb+") as file:
        write_listing(found.entries(), found.kind, file, progress=False)
    images = sources.opened(found, tmp_path / "listing.arrow", image_column, columns)
    return pickle.loads(pickle.dumps(images))  # as a worker receives it


def names(images: sources.Images) -> list[str]:
    identity, _ = images.read(0, len(images))
    return [Path(path).name for path in identity["path"].to_pylist()]


class TestFiles:
    def test_folder_in_order_without_what_is_no_image(self, folder: Path, tmp_path: Path) -> None:
        images = listed(folder, tmp_path)
        assert names(images) == [f"{letter}.jpg" for letter in "abcdefghijklmnopqrsuvwxt"[:19] + "xtuvw"]

    def test_parts(self, folder: Path, tmp_path: Path) -> None:
        identity, contents = listed(folder, tmp_path).read(5, 7)
        assert identity["path"].to_pylist() == list(contents) == [str(folder / name) for name in ("f.jpg", "g.jpg")]

    def test_glob_and_single_files_are_taken_at_their_word(self, folder: Path, tmp_path: Path) -> None:
        assert names(listed(f"{folder}/[ab]*", tmp_path)) == ["a.jpg", "b.jpg"]
        assert names(listed(f"{folder}/**/x.jpg", tmp_path)) == ["x.jpg"]
        assert names(listed([folder / "notes.txt", str(folder / "a.jpg")], tmp_path)) == ["notes.txt", "a.jpg"]

    def test_odd_names(self, digits: list[Image.Image], tmp_path: Path) -> None:
        place = tmp_path / "odd [names]"
        place.mkdir()
        content = encoded(digits[0])
        for name in ("ünï ☃.JPG".encode(), b"latin-\xe9.jpg"):
            (place / os.fsdecode(name)).write_bytes(content)
        images = listed(place, tmp_path)
        identity, contents = images.read(0, 2)
        assert all(Path(path).read_bytes() == content for path in contents)
        assert [path.rsplit("/")[-1] for path in identity["path"].to_pylist()] == ["latin-\\xe9.jpg", "ünï ☃.JPG"]

    def test_links_in_a_circle_and_to_nowhere(self, folder: Path, tmp_path: Path) -> None:
        before = names(listed(folder, tmp_path))
        (folder / "sub" / "up").symlink_to(folder)
        (folder / "z.jpg").symlink_to(folder / "gone.jpg")
        assert names(listed(folder, tmp_path)) == [*before, "z.jpg"]

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("empty", "no images"),
            ("missing", "does not exist"),
            ("images/*.tiff", "matches no file"),
            ([], "pass a folder"),
            ("x.tar.gz", "compressed"),
            (["images", "x.parquet"], "different kinds"),
            ("tars", r"\*\.tar"),
        ],
    )
    def test_refused(self, source: Any, message: str, folder: Path, tmp_path: Path) -> None:
        for name in ("empty", "tars"):
            (tmp_path / name).mkdir()
        for name in ("x.tar.gz", "x.parquet", "tars/0.tar"):
            (tmp_path / name).write_bytes(b"")
        given = [str(tmp_path / s) for s in source] if isinstance(source, list) else str(tmp_path / source)
        with pytest.raises(SourceError, match=message):
            listed(given, tmp_path)

    def test_a_change_is_named(self, folder: Path, tmp_path: Path) -> None:
        sums = []
        for name in ("before", "again", "after"):
            if name == "after":
                (folder / "c.jpg").write_bytes(b"other")
            found = sources.find(folder)
            with (tmp_path / name).open("wb+") as file:
                sums.append(write_listing(found.entries(), found.kind, file, progress=False))
        assert sums[0] == sums[1] != sums[2]
        assert "c.jpg' (size 5" in difference(tmp_path / "before", tmp_path / "after")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


class TestTars:
    def test_samples(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {"a/1.cls": b"7", "a/1.jpg": b"one", "a/1.seg.png": b"no", "a/2.png": b"two"})
        write_tar(tmp_path / "1.tar", {"a/1.JPEG": b"three", "b.c/x.txt": b"no"})
        images = listed(str(tmp_path / "*.tar"), tmp_path)
        identity, contents = images.read(0, 3)
        assert list(contents) == [b"one", b"two", b"three"]
        assert identity["key"].to_pylist() == ["a/1", "a/2", "a/1"]
        assert names(images) == ["0.tar", "0.tar", "1.tar"]
        assert list(images.read(1, 2)[1]) == [b"two"]

    def test_keys_end_at_the_first_dot_of_the_name(self) -> None:
        assert split_name("a.b/c.left.jpg") == ("a.b/c", "left.jpg")
        assert split_name("c") == ("c", "")

    def test_refused(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "text.tar", {"a.txt": b"x"})
        with pytest.raises(SourceError, match="no images"):
            listed(tmp_path / "text.tar", tmp_path)
        (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
        with pytest.raises(SourceError, match=r"no\.tar"):
            listed(tmp_path / "no.tar", tmp_path)
        write_tar(tmp_path / "cut.tar", {"a.jpg": b"x" * 5000})
        (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:3000])
        with pytest.raises(SourceError, match=r"cut\.tar"):
            listed(tmp_path / "cut.tar", tmp_path)

    def test_a_shard_that_shrinks_while_it_is_read(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {"a.jpg": b"x" * 5000})
        images = listed(tmp_path / "0.tar", tmp_path)
        os.truncate(tmp_path / "0.tar", 1000)
        with pytest.raises(SourceError, match="shorter"):
            list(images.read(0, 1)[1])


class TestParquet:
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
            assert identity["row"].to_pylist() == [i if i < 10 else i - 10 for i in range(start, stop)]

    def test_structs_and_nulls(self, tmp_path: Path) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [{"bytes": b"one", "path": None}, None, {"bytes": None, "path": "x"}]
        table = pa.table({"raw": pa.array([b"", b"", b""]), "image": pa.array(rows, kind)})
        pq.write_table(table, tmp_path / "x.parquet")
        contents = list(listed(tmp_path / "x.parquet", tmp_path).read(0, 3)[1])
        assert contents[0] == b"one"
        assert all(isinstance(content, ImageError) for content in contents[1:])

    @pytest.mark.parametrize(
        ("columns", "image_column", "message"),
        [
            ({"a": [b"x"], "b": [b"x"]}, None, r"several columns are binary \(a, b\)"),
            ({"a": [1]}, None, r"none of the columns is binary \(a"),
            ({"jpeg": [b"x"]}, "jpg", "Did you mean 'jpeg'"),
            ({"a": [b"x"], "b": [1]}, "b", "int64"),
            ({"a": pa.array([], pa.binary())}, None, "no rows"),
        ],
    )
    def test_refused(self, columns: dict[str, Any], image_column: str | None, message: str, tmp_path: Path) -> None:
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

    def test_columns_are_for_parquet(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="for Parquet"):
            listed(folder, tmp_path, columns=("id",))
