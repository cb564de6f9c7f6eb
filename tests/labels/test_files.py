"""Files of labels: tables with and without headers, one label a line, JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastres.errors import LabelError
from fastres.labels.files import read_labels

PAIRS = [("a.jpg", "cat"), ("b.jpg", "dog")]


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg,cat\nb.jpg,dog\n",
        "a.jpg, cat\r\nb.jpg , dog\r\n",
        "path,label\na.jpg,cat\nb.jpg,dog",
        "filename,class\na.jpg,cat\n\nb.jpg,dog\n",
        "label,image\ncat,a.jpg\ndog,b.jpg\n",
        "id,breed\na.jpg,cat\nb.jpg,dog\n",
        "photo,label\na.jpg,cat\nb.jpg,dog\n",
        "\ufeffFile Name;Label\na.jpg;cat\nb.jpg;dog\n",
        "a.jpg\tcat\nb.jpg\tdog\n",
        "image_id,label,split\na.jpg,cat,val\nb.jpg,dog,val\n",
        ",path,score,class_name,label\n0,a.jpg,1,x,cat\n1,b.jpg,0,y,dog\n",
        'path,label\n"a.jpg","cat"\n"b.jpg","dog"\n',
        "a.jpg cat\nb.jpg  dog\n",
        '{"a.jpg": "cat", "b.jpg": "dog"}',
    ],
)
def test_names_and_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "l").write_text(text, encoding="utf-8")
    found = read_labels(tmp_path / "l")
    assert found.named == PAIRS
    assert found.ordered is None


def test_the_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("path,label,coarse\na.jpg,0,cat\nb.jpg,1,dog\n")
    assert read_labels(tmp_path / "l").text == f"'{tmp_path}/l', columns 'path' and 'label'"
    assert read_labels(tmp_path / "l", "coarse").named == PAIRS


@pytest.mark.parametrize(
    ("text", "ordered"),
    [
        ("cat\ndog\n", ["cat", "dog"]),
        ("label\ncat\ndog\n", ["cat", "dog"]),
        ("label\ncat\nlabel\n", ["label", "cat", "label"]),
        ("great white shark\ntiger shark\n", ["great white shark", "tiger shark"]),
        ("3\n1\n", ["3", "1"]),
        ("[3, 1]", [3, 1]),
        ('["cat", 1]', ["cat", 1]),
    ],
)
def test_labels_in_order(text: str, ordered: list[object], tmp_path: Path) -> None:
    (tmp_path / "l").write_text(text)
    assert read_labels(tmp_path / "l").ordered == ordered


def test_repetitions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "l").write_text('{"a.jpg": 1, "a.jpg": 2}')
    assert read_labels(tmp_path / "l").named == [("a.jpg", 1), ("a.jpg", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", r"3 columns, and its first line \(a, b, c\) does not name a column of labels"),
        ("x,label,c\n1,2,3\n", "does not name a column of names"),
        ("path,a,b\n1,2,3\n", "does not name a column of labels .'label' or 'class'.; label_column names it"),
        ("a.jpg,1\nb.jpg\n", "lines with 1, 2 columns: the first has 2, and 'b.jpg' has 1"),
        ("[1, 2", "is not JSON"),
        ("", "is empty; give lines of"),
        (" \n\n", "is empty"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(LabelError, match=message):
        read_labels(tmp_path / "l")


def test_wrong_columns_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("path,label\na.jpg,1\n")
    with pytest.raises(LabelError, match=r"no column 'lable' in its header \(path, label\). Did you mean 'label'"):
        read_labels(tmp_path / "l", "lable")
    (tmp_path / "j").write_text("[1]")
    with pytest.raises(LabelError, match="is JSON, which has no columns"):
        read_labels(tmp_path / "j", "label")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for path, reason in [("b", "utf-8"), ("nowhere.csv", "No such file"), (".", "a folder")]:
        with pytest.raises(LabelError, match=f"cannot be read .*{reason}.*give a file in UTF-8"):
            read_labels(tmp_path / path)
