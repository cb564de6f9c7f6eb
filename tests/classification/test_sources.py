"""fastres.classification: which sources are accepted, and what is said about the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import SourceError

from .listed import errors, listed, names, rows


def test_globs_and_single_files_are_taken_at_their_word(folder: Path, tmp_path: Path) -> None:
    assert names(listed(f"{folder}/[ab]*", tmp_path)) == ["a.jpg", "b.jpg"]
    assert names(listed(f"{folder}/**/x.jpg", tmp_path)) == ["x.jpg"]
    assert names(listed([folder / "notes.txt", str(folder / "a.jpg")], tmp_path)) == ["notes.txt", "a.jpg"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "no images"),
        ("missing", "does not exist"),
        ("images/*.tiff", "matches no file"),
        ("images/a.jpg/b.jpg", "Not a directory"),
        ([], "pass a folder"),
        ("x.tar.gz", "compressed"),
        (["images", "x.parquet"], "different kinds"),
        ("tars", r"\*\.tar"),
        ("pipe.tar", "is a named pipe"),
        ("pipe.parquet", "is a named pipe"),
        ("*.pq", "is a named pipe"),
        ("device.tar", "is a device"),
        ("folder.tar", r"is a folder, not a tar file; if it holds images, pass '.*folder\.tar/'"),
        ("folder.parquet", "is a folder, not a parquet file"),
        ("link", "is a link that leads nowhere"),
        ("gone.tar", "is a link that leads nowhere"),
    ],
)
def test_refused(source: Any, message: str, folder: Path, tmp_path: Path) -> None:
    for name in ("empty", "tars", "folder.tar", "folder.parquet"):
        (tmp_path / name).mkdir()
    for name in ("x.tar.gz", "x.parquet", "tars/0.tar"):
        (tmp_path / name).write_bytes(b"")
    for name in ("pipe.tar", "pipe.parquet", "pipe.pq"):
        os.mkfifo(tmp_path / name)
    for name, target in (("device.tar", "/dev/null"), ("link", "nowhere"), ("gone.tar", "nowhere")):
        (tmp_path / name).symlink_to(target)
    given = [str(tmp_path / s) for s in source] if isinstance(source, list) else str(tmp_path / source)
    with pytest.raises(SourceError, match=message):
        listed(given, tmp_path)


def test_a_folder_named_like_a_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.jpg").write_bytes(b"x")
    assert len(listed(f"{tmp_path}/x.tar/", tmp_path)) == 1


def test_a_named_link_to_nowhere_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("nowhere")
    assert "leads nowhere" in errors(rows(listed([tmp_path / "a.jpg"], tmp_path)))[0]


def test_columns_are_for_parquet(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="for Parquet"):
        listed(folder, tmp_path, columns=("id",))
