"""Labels in tars in WebDataset's convention."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

from fastres.errors import LabelError, SourceError
from fastres.labels.finding import find_labels

from .found import ANIMALS, labels, opened, write_tar


class TestMembers:
    def test_indices_and_names(self, tmp_path: Path) -> None:
        members = [("000.cls", "2\n"), ("000.jpg", "x"), ("a/1.jpg", "x"), ("a/1.cls", "0"), ("a/1.txt", "caption")]
        found = labels(write_tar(tmp_path / "x.tar", members), "auto", tmp_path)
        assert found.indices.tolist() == [2, 0]
        assert (found.order, found.source) == ("numbers", ".cls members")
        named = write_tar(tmp_path / "y.tar", [("0.jpg", "x"), ("0.cls", "owl"), ("1.cls", " Cat "), ("1.png", "x")])
        assert labels(named, "auto", tmp_path, ANIMALS).indices.tolist() == [2, 0]

    def test_several_tars_and_other_members(self, tmp_path: Path) -> None:
        for number in range(3):
            members = [(f"{i}.{kind}", str(i + number) if kind == "label" else "x") for i in range(4)
                       for kind in ("jpg", "left.jpg", "label", "json")]  # fmt: skip
            write_tar(tmp_path / f"{number}.tar", members)
        for column in ("label", ".label"):
            found = labels(str(tmp_path / "*.tar"), "auto", tmp_path, 12, label_column=column)
            assert found.indices.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]

    def test_any_order_and_keys_that_occur_twice(self, tmp_path: Path) -> None:
        apart = [("0.jpg", "x"), ("1.jpg", "x"), ("1.cls", "1"), ("0.cls", "2")]
        assert labels(write_tar(tmp_path / "x.tar", apart), "auto", tmp_path).indices.tolist() == [2, 1]
        twice = [("0.cls", "1"), ("0.jpg", "x"), ("1.cls", "0"), ("1.jpg", "x"), ("0.cls", "2"), ("0.jpg", "x")]
        assert labels(write_tar(tmp_path / "x.tar", twice), "auto", tmp_path).indices.tolist() == [1, 0, 2]
        with pytest.raises(LabelError, match=r"Sample '0' of '.*x.tar' has 1 files 0.cls for 2 images"):
            labels(write_tar(tmp_path / "x.tar", twice[1:]), "auto", tmp_path)
        with pytest.raises(LabelError, match=r"has 2 files 0.cls for 1 images"):
            labels(write_tar(tmp_path / "x.tar", [("0.cls", "1"), ("0.jpg", ""), ("0.cls", "2")]), "auto", tmp_path)

    def test_links(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("0.jpg", "x"), ("0.cls", "2"), ("1.jpg", "x")])
        with tarfile.open(path, "a") as tar:
            for name, kind in [("1.cls", tarfile.LNKTYPE), ("2.cls", tarfile.SYMTYPE)]:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "0.cls"
                tar.addfile(info)
            info = tarfile.TarInfo("2.jpg")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        assert labels(path, "auto", tmp_path).indices.tolist() == [2, 2, 2]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("3", r"1.cls in '.*x.tar' is '3', which is no class of this model with 3 classes; give an index"),
            ("-1", "1.cls in .* is '-1'"),
            ("lion", r"not named as a class of the model: 'lion' \(1.cls in '.*x.tar'\)"),
            ("", "1.cls in .* is b''; a label is a class index or the name of a class"),
            (b"\xff", "1.cls in .* is b'.xff'"),
            ("cat\ndog", "in one line"),
            ("x" * 5000, "in one line"),
        ],
    )
    def test_wrong_labels(self, content: Any, message: str, tmp_path: Path) -> None:
        first = ("0.cls", "0" if content in ("3", "-1") else "cat")
        path = write_tar(tmp_path / "x.tar", [first, ("0.jpg", "x"), ("1.jpg", "x"), ("1.cls", content)])
        with pytest.raises(LabelError, match=message):
            labels(path, "auto", tmp_path, ANIMALS)

    def test_no_label(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("0.jpg", "x"), ("0.cls", "1"), ("1.jpg", "x")])
        with pytest.raises(LabelError, match=r"Sample '1' of '.*x.tar' has no file 1.cls; every image needs one label"):
            labels(path, "auto", tmp_path)
        with pytest.raises(LabelError, match="a tar file has none"):
            labels(path, "folders", tmp_path)

    def test_a_tar_that_changed(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("0.jpg", "x"), ("0.cls", "1")])
        found, images = opened(path, tmp_path)
        write_tar(path, [("0.jpg", "x" * 20_000), ("0.cls", "2")])
        with pytest.raises(SourceError, match="became longer"):
            find_labels("auto", found, images, 3, None)


class TestNames:
    @pytest.mark.parametrize(
        "given", [{"a/0": 1, "a/1": 2}, {"0": 1, "1": 2}, {"x.tar/a/0": 1, "1": 2}, {"a/0.jpg": 1, "1.png": 2}, [1, 2]]
    )
    def test_keys(self, given: Any, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("a/0.jpg", "x"), ("a/1.left.jpg", "x")])
        assert labels(path, given, tmp_path).indices.tolist() == [1, 2]

    def test_keys_of_several_tars(self, tmp_path: Path) -> None:
        for name in ("x", "y"):
            write_tar(tmp_path / f"{name}.tar", [("0.jpg", "x")])
        tars = str(tmp_path / "*.tar")
        assert labels(tars, {"x.tar/0": 1, "y.tar/0": 2}, tmp_path).indices.tolist() == [1, 2]
        with pytest.raises(LabelError, match=r"the entry '0', which means several images: '.*x.tar/0' and '.*y.tar/0'"):
            labels(tars, {"0": 1}, tmp_path)
        with pytest.raises(LabelError, match="match no image: '7'"):
            labels(tars, {"x.tar/0": 1, "y.tar/0": 2, "7": 1}, tmp_path)


MEMBERS = [
    (f"{number:03}.{kind}", str(number % 3) if kind == "cls" else "x" * 600)
    for number in range(12)
    for kind in ("cls", "jpg")
]


class TestDamage:
    def test_lost_images_and_labels(self, tmp_path: Path) -> None:
        """Wherever a tar is damaged: labels are right or missing, and what is lost is no error."""
        path = write_tar(tmp_path / "x.tar", MEMBERS)
        whole = path.read_bytes()
        contents = {whole.index(name.encode()) // 512 + 1 for name, _ in MEMBERS if name.endswith("cls")}
        given = {f"{number:03}": number % 3 for number in range(12)}
        for seed in range(60):
            rng = random.Random(seed)
            start = rng.randrange(len(whole) // 512) * 512
            data = bytearray(whole)
            data[start : start + 512] = rng.randbytes(512)
            path.write_bytes(data[: rng.choice([len(data), start + 700])])
            try:
                _, images = opened(path, tmp_path)
            except SourceError:  # nothing is left
                continue
            keys = images.read(0, len(images))[0]["key"]
            found = labels(path, given, tmp_path)
            for key, index in zip(keys, found.indices.tolist(), strict=True):
                assert index == (-1 if key is None else given[key])
            if start // 512 in contents:  # what a label says is damaged, which no header shows
                continue
            own = labels(path, "auto", tmp_path)
            for key, index in zip(keys, own.indices.tolist(), strict=True):
                assert index in (-1, None if key is None else given[key])

    def test_a_label_that_is_lost(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", MEMBERS)
        data = bytearray(path.read_bytes())
        header = data.index(b"005.cls")
        data[header : header + 512] = bytes(range(256)) * 2
        path.write_bytes(data)
        found = labels(path, "auto", tmp_path)
        assert found.indices.tolist().count(-1) == 2, "one row for the damage, and one image without its label"
        assert found.text.endswith("1 label is in damaged parts of the files.")
