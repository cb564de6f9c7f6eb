"""fastres.classification: image files in folders, whatever else is there; lists of them; files that change."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastres.classification import listing, sources
from fastres.classification.listing import HIDDEN, Listing, difference
from fastres.errors import ImageError, OutputError, SourceError

from .conftest import encoded
from .listed import errors, listed, listed_and_skipped, names, rows, write_list

FUZZ = 60  # folders


def relative(found: list[Any], place: Path) -> dict[str, Any]:
    return {os.path.relpath(row["path"], place): content for row, content in found}


class TestFolders:
    def test_in_order_without_what_is_no_image(self, folder: Path, tmp_path: Path) -> None:
        images, skipped = listed_and_skipped(folder, tmp_path)
        assert names(images) == [f"{letter}.jpg" for letter in "abcdefghijklmnopqrsuvwxt"[:19] + "xtuvw"]
        assert skipped == {HIDDEN: 1}

    def test_parts(self, folder: Path, tmp_path: Path) -> None:
        identity, contents = listed(folder, tmp_path).read(5, 7)
        assert identity["path"] == list(contents) == [str(folder / name) for name in ("f.jpg", "g.jpg")]

    def test_odd_names(self, digits: list[Image.Image], tmp_path: Path) -> None:
        place = tmp_path / "odd [names]"
        place.mkdir()
        content = encoded(digits[0])
        odd = ["ünï ☃.JPG".encode(), b"latin-\xe9.jpg", b"new\nline.jpg", b"\xff\xfe.png", b"x" * 251 + b".jpg"]
        for name in odd:
            (place / os.fsdecode(name)).write_bytes(content)
        found = rows(listed(place, tmp_path))
        assert all(Path(path).read_bytes() == content for _, path in found)
        assert {row["path"].rsplit("/")[-1] for row, _ in found} == {
            "latin-\\xe9.jpg", "ünï ☃.JPG", "new\nline.jpg", "\\xff\\xfe.png", "x" * 251 + ".jpg",
        }  # fmt: skip

    def test_source_and_work_folder_with_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        place = tmp_path / os.fsdecode(b"\xe9")
        (place / os.fsdecode(b"d\xff")).mkdir(parents=True)
        (place / os.fsdecode(b"d\xff/x\xe8.jpg")).write_bytes(b"x")
        for source in (place, f"{place}/**/*.jpg", f"{place}/d?/*", place / os.fsdecode(b"d\xff/x\xe8.jpg")):
            found = rows(listed(source, place))
            assert [row["path"] for row, _ in found] == [f"{tmp_path}/\\xe9/d\\xff/x\\xe8.jpg"]
            assert Path(found[0][1]).read_bytes() == b"x"
        (place / "none").mkdir()
        with pytest.raises(SourceError, match=r"no images in .*\\\\xe9/none"):
            listed(place / "none", place)

    def test_links_to_files_and_hard_links_are_rows(self, tmp_path: Path) -> None:
        place = tmp_path / "d"
        place.mkdir()
        (place / "a.jpg").write_bytes(b"x")
        (place / "b.jpg").symlink_to("a.jpg")
        os.link(place / "a.jpg", place / "c.jpg")
        (place / "d.jpg").symlink_to("gone")
        found = relative(rows(listed(place, tmp_path)), place)
        assert list(found) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
        assert "leads nowhere" in str(found["d.jpg"])

    @pytest.mark.parametrize("pattern", ["", "/**/*.jpg"])
    def test_folders_that_link_to_each_other(self, pattern: str, tmp_path: Path) -> None:
        place = tmp_path / "d"
        for number in range(7):
            (place / f"{number}").mkdir(parents=True)
            (place / f"{number}" / "x.jpg").write_bytes(b"x")
            for other in range(7):
                (place / f"{number}" / f"to{other}").symlink_to(f"../{other}")
        for name in ("0a", "0b"):
            (place / name).symlink_to(".")
        (place / "1" / "up").symlink_to("..")
        began = time.monotonic()
        found = relative(rows(listed(f"{place}{pattern}", tmp_path)), place)
        assert list(found) == [f"{number}/x.jpg" for number in range(7)]
        assert time.monotonic() - began < 5

    def test_links_to_other_folders_are_followed_once(self, tmp_path: Path) -> None:
        place, outside = tmp_path / "d", tmp_path / "outside"
        for path in (place / ".hidden" / "h.jpg", place / "in.jpg", outside / "sub" / "o.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        for name, target in (("a", outside), ("b", outside / "sub"), ("c", place / ".hidden"), ("e", place)):
            (place / name).symlink_to(target)
        for pattern in ("", "/**"):
            found = relative(rows(listed(f"{place}{pattern}", tmp_path)), place)
            assert sorted(found) == ["a/sub/o.jpg", "c/h.jpg", "in.jpg"]
        assert len(listed([place, outside, place / "a", str(place) + "/"], tmp_path)) == 3
        assert "outside/sub/o.jpg" in str(rows(listed([place, outside], tmp_path)))  # under its real path

    def test_special_files_are_error_rows(self, tmp_path: Path) -> None:
        place = tmp_path / "d"
        place.mkdir()
        os.mkfifo(place / "a.jpg")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(place / "b.png"))
        (place / "c.gif").symlink_to("/dev/null")
        kinds = {"a.jpg": "FIFO", "b.png": "socket", "c.gif": "device"}
        for source in (place, f"{place}/*", [place / name for name in kinds]):
            found = relative(rows(listed(source, tmp_path)), place)
            assert list(found) == list(kinds)
            assert all(kind in str(found[name]) for name, kind in kinds.items())

    def test_what_cannot_be_listed_is_an_error_row(self, tmp_path: Path, forbidden: str) -> None:
        place = tmp_path / "d"
        (place / forbidden).mkdir(parents=True)
        (place / "a.jpg").write_bytes(b"x")
        for name, target in (("loop", "loop"), ("gone", "nowhere"), ("notes.txt", "nowhere"), ("v.jpg", "v.jpg")):
            (place / name).symlink_to(target)
        found = relative(rows(listed(place, tmp_path)), place)
        assert list(found) == ["a.jpg", "gone", "loop", forbidden, "v.jpg"]
        assert "Images in it are missing" in str(found[forbidden])
        assert all("leads nowhere" in str(found[name]) for name in ("gone", "loop", "v.jpg"))
        with pytest.raises(SourceError, match="cannot be listed"):
            listed(place / forbidden, tmp_path)

    def test_an_entry_that_vanishes_is_an_error_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a/x.jpg", "b/x.jpg", "c.jpg"):
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).write_bytes(b"x")
        entries = sources.find(tmp_path / "d").entries()
        first = next(entries)
        (tmp_path / "d/b/x.jpg").unlink()
        (tmp_path / "d/b").rmdir()
        (tmp_path / "d/c.jpg").unlink()
        assert "error" not in first
        assert [os.path.basename(entry["path"]) for entry in entries if "No such file" in entry["error"]] == [
            b"b",
            b"c.jpg",
        ]

    def test_very_deep(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "d"
        place.mkdir()
        monkeypatch.chdir(place)
        for _ in range(2500):
            os.mkdir("x")
            os.chdir("x")
        try:
            for pattern in ("", "/**/*.jpg"):
                found = rows(listed(f"{place}{pattern}", tmp_path))
                assert "too long" in errors(found)[0]
                assert len(found) == 1
        finally:
            for _ in range(2500):
                os.chdir("..")
                os.rmdir("x")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("a\0b", "cannot be the name of a file"),
            ("a\ud800*", "cannot be the name of a file"),
            ("", "pass a folder"),
            (["x", ""], "pass a folder"),
            (None, "pass a folder"),
            ([None], "pass a folder"),
            (b"x.jpg", "pass a folder"),
        ],
    )
    def test_impossible_names(self, source: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=message):
            listed(source, tmp_path)


KINDS = ["image", "folder", "fifo", "socket", "device", "self", "dangling", "link", "up", "outside", "hidden"]


def test_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forbidden: str) -> None:
    """Whatever is in a folder, each image is found once, as file and by a glob, and the rest is at most an error."""
    monkeypatch.chdir(tmp_path)  # and back at the end
    for seed in range(FUZZ):
        (tmp_path / f"{seed}").mkdir()
        check_folder(tmp_path / f"{seed}", random.Random(seed), forbidden)


def check_folder(tmp_path: Path, chance: random.Random, forbidden: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "o.jpg").write_bytes(b"x")
    folders, expected, linked = [tmp_path / "d"], set(), False
    folders[0].mkdir()
    for place in folders:
        os.chdir(place)
        for number in range(chance.randrange(8)):
            kind = chance.choice(KINDS)
            odd = [f"{number}\n", os.fsdecode(b"\xff%d" % number), f"{number}" * 200, "ü*[x]"]
            stem = chance.choice([f"{number}", *odd])
            name = stem + chance.choice([".jpg", ".PNG"])
            if os.path.lexists(name) or os.path.lexists(stem):
                continue
            if kind in ("image", "hidden"):
                Path("." * (kind == "hidden") + name).write_bytes(b"x")
                if kind == "image":
                    expected.add(os.path.realpath(name))
            elif kind == "folder":
                folders.append(place / chance.choice([stem, name]))
                folders[-1].mkdir()
            elif kind == "fifo":
                os.mkfifo(name)
            elif kind == "socket" and len(os.fsencode(name)) < 100:
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(name)
            elif kind in ("device", "self", "dangling", "up", "outside", "link"):
                target = {"device": "/dev/null", "self": name, "dangling": "no", "up": "..", "outside": str(outside)}
                os.symlink(target.get(kind) or chance.choice(folders), name)
                linked |= kind == "outside" or (kind == "up" and place == folders[0])
        if chance.random() < 0.1 and not (place / forbidden).exists():
            (place / forbidden).mkdir()
    if linked:
        expected.add(os.path.realpath(outside / "o.jpg"))
    top = chance.choice(["", "/**", "/**/*"])
    (tmp_path / "work").mkdir()
    if not expected:
        with suppress(SourceError):  # there is nothing, or only what has an error
            assert len(errors(rows(listed(f"{tmp_path}/d{top}", tmp_path / "work")))) > 0
        return
    found = rows(listed(f"{tmp_path}/d{top}", tmp_path / "work"))
    images = [os.path.realpath(content) for _, content in found if isinstance(content, str)]
    assert sorted(images) == sorted(expected)


class TestLists:
    def test_a_change_is_named(self, folder: Path, tmp_path: Path) -> None:
        sums = []
        for name in ("before", "again", "after"):
            if name == "after":
                (folder / "c.jpg").write_bytes(b"other")
            found = sources.find(folder)
            sums.append(write_list(found.entries(), found.kind, tmp_path / name))
        assert sums[0] == sums[1] != sums[2]
        assert "c.jpg' (size 5" in difference(tmp_path / "before", tmp_path / "after")
        (tmp_path / "before").write_bytes(b"no list")
        assert "cannot be compared" in difference(tmp_path / "before", tmp_path / "after")
        assert "cannot be compared" in difference(tmp_path / "gone", tmp_path / "after")

    def test_parts_of_a_long_list(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listing, "CHUNK", 10)
        entries = [{"path": b"%d" % number, "size": number} for number in range(95)]
        write_list(entries, "files", tmp_path / "x")
        long = Listing(tmp_path / "x")
        assert len(long) == 95
        for start, stop in ((0, 95), (9, 11), (10, 20), (94, 95), (0, 1), (35, 62)):
            assert [entry["size"] for entry in long.rows(start, stop)] == list(range(start, stop))
        assert [entry["size"] for entry in long.entries()] == list(range(95))

    def test_damage_is_named(self, folder: Path, tmp_path: Path) -> None:
        sound = rows(listed(folder, tmp_path))
        path = tmp_path / "listing.jsonl"
        whole = path.read_bytes()
        chance = random.Random(0)
        for _ in range(200):
            content = bytearray(whole)
            content[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
            path.write_bytes(content if chance.random() < 0.8 else whole[: chance.randrange(len(whole))])
            images = sources.FileImages(Listing(path))
            with suppress(OutputError):  # only the case of a digit of a checksum may differ
                assert list(map(str, rows(images))) == list(map(str, sound))
        images = sources.FileImages(Listing(path))
        path.unlink()
        with pytest.raises(OutputError, match="cannot be read"):
            images.read(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"other"), "it had 3 bytes and now has 5"),
        (lambda path: os.utime(path, (0, 0)), "changed after it was listed"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "FIFO"),
        (lambda path: (path.unlink(), path.mkdir()), "a folder"),
    ],
)
def test_files_that_change(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"one")
    images = listed([tmp_path / "a.jpg", tmp_path / "b.jpg"], tmp_path)
    change(tmp_path / "a.jpg")
    first, second = images.read(0, 2)[1]
    assert isinstance(first, ImageError)
    assert message in str(first)
    assert second == str(tmp_path / "b.jpg")
