"""fastres.classification: globs match what Python's glob module matches, but each real file once."""

from __future__ import annotations

import glob
import os
import random
from pathlib import Path

import pytest

from fastres.classification.globs import Glob
from fastres.classification.listing import HIDDEN
from fastres.errors import SourceError

from .listed import errors, listed_and_skipped, rows

FUZZ = 400  # patterns

NAMES = ["a", "b", "ab", ".h", ".a", "a.jpg", "b.JPG", ".a.jpg", "x y.jpg", "[a]", "ü.png"]
PARTS = ["**", "**", "*", "*", "?", "a", "b", "*.jpg", "[ab]", "[!a]*", ".*", ".h", "a*", "[[]a]", "..", ".", "*.*"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of folders and empty files without links."""
    chance = random.Random(0)
    top = tmp_path / "1/2/3/4/5"  # patterns with ".." must not leave the tree
    top.mkdir(parents=True)
    folders = [top / "t"]
    for folder in folders:
        folder.mkdir()
        for name in chance.sample(NAMES, 6):
            if "." not in name[1:] and len(folders) < 60:
                folders.append(folder / name)
            else:
                (folder / name).touch()
    return top / "t"


def test_fuzz(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without links, a pattern matches the same files as Python's glob module, however it is written."""
    monkeypatch.chdir(tree)
    chance = random.Random(0)
    for _ in range(FUZZ):
        parts = [chance.choice(PARTS) for _ in range(chance.randrange(1, 5))]
        pattern = chance.choice(["", "", f"{tree}/", "./", "../t/"]) + chance.choice(["/", "/", "//"]).join(parts)
        if not glob.has_magic(pattern):
            continue
        expected = {path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)}
        expected = {path for path in expected if not path.endswith("/")}  # a file that "file/**" matched
        matches = list(Glob(pattern).matches())
        assert matches == sorted(matches)
        if {".", ".."} & set(parts):  # then files have several paths
            assert set(matches) <= expected
            assert {os.path.realpath(path) for path in matches} == {os.path.realpath(path) for path in expected}
        else:
            assert set(matches) == expected, pattern


def test_links_are_followed_once(tree: Path) -> None:
    expected = [path for path in glob.glob(f"{tree}/**/*.jpg", recursive=True) if os.path.isfile(path)]
    (tree / "0").symlink_to(".")
    (tree / "1").symlink_to(".")
    (tree / "a" / "up").symlink_to("..") if (tree / "a").is_dir() else None
    assert sorted(Glob(f"{tree}/**/*.jpg").matches()) == sorted(expected)
    assert Glob(f"{tree}/0/*").matches()  # a link that is named is followed


def test_hidden_names_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", "._a.txt", ".b.png"):
        (tmp_path / name).write_bytes(b"x")
    images, skipped = listed_and_skipped(f"{tmp_path}/*.jpg", tmp_path)
    assert len(images) == 1
    assert skipped == {HIDDEN: 1}


def test_what_cannot_be_listed_is_an_error_row(tmp_path: Path, forbidden: str) -> None:
    place = tmp_path / "d"
    (place / forbidden).mkdir(parents=True)
    (place / "a.jpg").write_bytes(b"x")
    (place / "loop").symlink_to("loop")
    (place / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(place / "pipe.jpg")
    found = rows(listed_and_skipped(f"{place}/**/*.jpg", tmp_path)[0])
    assert [Path(row["path"]).name for row, _ in found] == ["a.jpg", "gone.jpg", "loop", forbidden, "pipe.jpg"]
    assert len(errors(found)) == 4
    with pytest.raises(SourceError, match="cannot be listed"):
        listed_and_skipped(f"{place}/{forbidden}/*.jpg", tmp_path)


def test_files_matched_twice_are_one_row(tree: Path, tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg", "3.png"):
        (tree / name).write_bytes(b"x")
    globs = [f"{tree}/*.jpg", f"{tree}/1*", f"{tree}/*.png", f"{tree}/../t/3.*"]
    names = {Path(path).name for pattern in globs for path in glob.glob(pattern) if os.path.isfile(path)}
    found = rows(listed_and_skipped(globs, tmp_path)[0])
    assert sorted(Path(row["path"]).name for row, _ in found) == sorted(names)
    both = [rows(listed_and_skipped(given, tmp_path)[0]) for given in ([*globs, tree], [tree, *globs], [tree])]
    assert len({len(found) for found in both}) == 1
    named = rows(listed_and_skipped([tree / "1.jpg", tree / "1.jpg", tree / "1.jpg"], tmp_path)[0])
    assert len(named) == 3
