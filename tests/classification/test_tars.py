"""fastres.classification: tar files, sound ones and damaged ones. No image of a damaged tar is lost without a word."""

from __future__ import annotations

import io
import os
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastres.classification.listing import FURTHER, HIDDEN
from fastres.classification.tars import split_name
from fastres.errors import ImageError, SourceError

from .listed import Row, errors, listed, listed_and_skipped, names, rows

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
LONG = "long/" * 30
FUZZ = 300  # mutants of each kind of tar


Given = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> Given:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    return info, data


def tar(members: dict[str, bytes] | list[Given], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as file:
        for info, data in [member(*item) for item in members.items()] if isinstance(members, dict) else members:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image(number: int, size: int = 700) -> bytes:
    """Return bytes that are unique in a tar and have no runs of zeros."""
    return random.Random(number).randbytes(size).replace(b"\0", b"x")


SIX = {f"{i}.jpg": image(i) for i in range(6)}  # 3 blocks each


def read(content: bytes, tmp_path: Path) -> list[Row]:
    (tmp_path / "x.tar").write_bytes(content)
    return rows(listed(tmp_path / "x.tar", tmp_path))


def keys(found: list[Row]) -> dict[str | None, bytes | str]:
    return {row["key"]: str(data) if isinstance(data, ImageError) else data for row, data in found}


class TestSound:
    def test_samples(self, tmp_path: Path) -> None:
        first = {"a/1.cls": b"7", "a/1.jpg": b"one", "a/1.seg.png": b"no", "a/2.png": b"two"}
        (tmp_path / "0.tar").write_bytes(tar(first))
        (tmp_path / "1.tar").write_bytes(tar({"a/1.JPEG": b"three", "b.c/x.txt": b"no"}))
        images, skipped = listed_and_skipped(str(tmp_path / "*.tar"), tmp_path)
        identity, contents = images.read(0, 3)
        assert list(contents) == [b"one", b"two", b"three"]
        assert identity["key"] == ["a/1", "a/2", "a/1"]
        assert names(images) == ["0.tar", "0.tar", "1.tar"]
        assert list(images.read(1, 2)[1]) == [b"two"]
        assert skipped == {FURTHER: 1}

    def test_keys_end_at_the_first_dot_of_the_name(self) -> None:
        assert split_name("a.b/c.left.jpg") == ("a.b/c", "left.jpg")
        assert split_name("c") == ("c", "")

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_formats_and_long_names(self, format: int, tmp_path: Path) -> None:
        long = LONG + "a" * (60 if format == tarfile.USTAR_FORMAT else 200)
        members = {f"{long}.jpg": b"one", "ünï ☃.png": b"two", "3.jpg": b""}
        if format == tarfile.USTAR_FORMAT:
            del members["ünï ☃.png"]
        found = keys(read(tar(members, format), tmp_path))
        assert found == {split_name(name)[0]: data for name, data in members.items()}

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        place = tmp_path / os.fsdecode(b"d\xff")
        place.mkdir()
        content = tar({os.fsdecode(b"\xe9.jpg"): b"x", "\\xe9.jpg": b"y"})
        (place / os.fsdecode(b"\xe8.tar")).write_bytes(content)
        for source in (place / os.fsdecode(b"\xe8.tar"), f"{tmp_path}/d*/*.tar"):
            found = rows(listed(source, place))
            assert {row["path"] for row, _ in found} == {f"{tmp_path}/d\\xff/\\xe8.tar"}
            assert keys(found) == {"\\xe9": b"x", "\\\\xe9": b"y"}  # different names give different keys

    def test_hidden_names_are_skipped_and_counted(self, tmp_path: Path) -> None:
        members = {"d/._cat.jpg": b"no", "d/cat.jpg": b"yes", ".h/x.jpg": b"no", "./a.jpg": b"a", "d/.x.txt": b"no"}
        (tmp_path / "x.tar").write_bytes(tar(members))
        images, skipped = listed_and_skipped(tmp_path / "x.tar", tmp_path)
        assert keys(rows(images)) == {"d/cat": b"yes", "./a": b"a"}
        assert skipped == {HIDDEN: 2}

    def test_links_are_rows_with_the_bytes_of_their_targets(self, tmp_path: Path) -> None:
        found = read(
            tar(
                [
                    member("d/a.jpg", b"one"),
                    member("hard.jpg", kind=tarfile.LNKTYPE, target="d/a.jpg"),
                    member("d/soft.jpg", kind=tarfile.SYMTYPE, target="../later.png"),
                    member("chain.jpg", kind=tarfile.SYMTYPE, target="hard.jpg"),
                    member("gone.jpg", kind=tarfile.LNKTYPE, target="later.png"),  # it is not there yet
                    member("loop.jpg", kind=tarfile.SYMTYPE, target="loop.jpg"),
                    member("text.txt", kind=tarfile.LNKTYPE, target="d/a.jpg"),
                    member("later.png", b"two"),
                    member("folder.jpg", kind=tarfile.DIRTYPE),
                ]
            ),
            tmp_path,
        )
        assert list(keys(found)) == ["d/a", "hard", "d/soft", "chain", "gone", "loop", "later"]
        assert [data for _, data in found if isinstance(data, bytes)] == [b"one", b"one", b"two", b"one", b"two"]
        assert [text[:22] for text in errors(found)] == ["The link leads nowhere"] * 2

    def test_tar_of_gnu_with_a_hard_link_and_a_sparse_file(self, tmp_path: Path) -> None:
        place = tmp_path / "d"
        place.mkdir()
        (place / "a.jpg").write_bytes(b"one")
        os.link(place / "a.jpg", place / "b.jpg")
        with (place / "c.jpg").open("wb") as file:
            file.truncate(1 << 20)
            file.write(b"x")
        for format in ("gnu", "pax"):
            command = [
                "tar",
                "cSf",
                str(tmp_path / "x.tar"),
                "--sort=name",
                f"--format={format}",
                "-C",
                str(place),
                ".",
            ]
            subprocess.run(command, check=True)
            found = keys(rows(listed(tmp_path / "x.tar", tmp_path)))
            assert found.keys() == {"./a", "./b", "./c"}
            assert found["./a"] == found["./b"] == b"one"
            assert "sparse" in str(found["./c"])

    def test_joined_archives_are_read_on(self, tmp_path: Path) -> None:
        parts = [tar({f"{n}-{i}.jpg": image(n + i) for i in range(n)}) for n in (3, 20, 1)]
        found = read(b"".join(parts), tmp_path)
        assert len(found) == 24
        assert not errors(found)

    def test_old_format_without_a_magic_number(self, tmp_path: Path) -> None:
        content = bytearray(tar({"a.jpg": b"one", "b.jpg": b"two"}))
        for position in (0, 2 * BLOCK):
            content[position + 257 : position + 500] = bytes(243)
            sign(content, position)
        assert keys(read(bytes(content), tmp_path)) == {"a": b"one", "b": b"two"}


def sign(content: bytearray, position: int) -> None:
    """Correct the checksum of the header at ``position``."""
    content[position + 148 : position + 156] = b" " * 8
    content[position + 148 : position + 156] = b"%06o\0 " % sum(content[position : position + BLOCK])


class TestDamage:
    def test_without_a_clean_end(self, tmp_path: Path) -> None:
        whole = tar(SIX)
        end = 18 * BLOCK
        for content in (
            whole[:end],
            whole[: end + BLOCK],
            whole[: end + 100],
            whole[: 15 * BLOCK + 100],
            whole[: 15 * BLOCK],
            whole + b"x",
            whole[:end] + bytes(BLOCK) + whole[: 3 * BLOCK] + bytes(2 * BLOCK),
        ):
            found = read(content, tmp_path)
            assert len(errors(found)) == 1
            assert {row["key"] for row, _ in found} >= {"0", "1", "2", "3", "4", None}
        assert not errors(read(whole[: end + 2 * BLOCK], tmp_path))

    def test_a_damaged_or_zeroed_header_loses_one_image(self, tmp_path: Path) -> None:
        for replacement in (bytes(BLOCK), b"x" * BLOCK):
            content = bytearray(tar(SIX))
            content[6 * BLOCK : 7 * BLOCK] = replacement
            found = read(bytes(content), tmp_path)
            assert [row["key"] for row, _ in found] == ["0", "1", None, "3", "4", "5"]
            assert "between bytes 3,072 and 4,608" in errors(found)[0]

    def test_a_hole(self, tmp_path: Path) -> None:
        content = bytearray(tar(SIX))
        content[5 * BLOCK : 11 * BLOCK] = bytes(6 * BLOCK)
        found = keys(read(bytes(content), tmp_path))
        assert [found[key] for key in "045"] == [image(int(key)) for key in "045"]
        assert "zeros" in str(found[None])

    def test_a_damaged_first_header(self, tmp_path: Path) -> None:
        content = bytearray(tar(SIX))
        content[5] ^= 1
        assert [row["key"] for row, _ in read(bytes(content), tmp_path)] == [None, *"12345"]

    def test_a_cut_image_has_a_row_with_its_key(self, tmp_path: Path) -> None:
        found = read(tar(SIX)[: 17 * BLOCK], tmp_path)
        assert [row["key"] for row, _ in found] == [*"012345"]
        assert "cut off" in errors(found)[0]

    def test_another_image_does_not_take_the_place_of_a_lost_one(self, tmp_path: Path) -> None:
        members = {f"{i}.{name}": image(i, 10) for i in range(3) for name in ("jpg", "seg.png")}
        content = bytearray(tar(members))
        content[4 * BLOCK] ^= 1  # 1.jpg
        found = read(bytes(content), tmp_path)
        assert [row["key"] for row, _ in found] == ["0", None, "1", "2"]
        assert "may be in the damaged part" in errors(found)[1]

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_damaged_names_and_attributes(self, format: int, tmp_path: Path) -> None:
        whole = tar({"a.jpg": b"one", LONG + "b" * 100 + ".jpg": b"two", "c.jpg": b"three"}, format)
        length = 255 if format == tarfile.GNU_FORMAT else 264
        for offset, byte in ((0, b"\0"), (length - 1, b"x")):
            content = bytearray(whole)
            content[3 * BLOCK + offset : 3 * BLOCK + offset + 1] = byte
            found = read(bytes(content), tmp_path)
            assert found[0][0]["key"] == "a"
            assert found[-1][0]["key"] == "c"
            assert len(errors(found)) == 1

    def test_contradicting_sizes(self, tmp_path: Path) -> None:
        for size, is_sound in ((3, True), (1500, False), (10**12, False)):
            info, data = member("b.jpg", b"two")
            info.pax_headers = {"size": str(size)}
            content = tar([member("a.jpg", b"one"), (info, data), member("c.jpg", b"three")], tarfile.PAX_FORMAT)
            found = read(content, tmp_path)
            assert len(found) == 3
            assert found[0][1] == b"one"
            assert found[2][1] == b"three"
            assert isinstance(found[1][1], bytes) is is_sound

    @pytest.mark.parametrize("size", [-1, -512, -(1 << 62), 1 << 40, (1 << 63) - 1, 1 << 80])
    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"Z"])
    def test_impossible_sizes(self, size: int, kind: bytes, tmp_path: Path) -> None:
        content = bytearray(tar(SIX))
        at = 6 * BLOCK
        content[at + 124 : at + 136] = (b"\x80" if size > 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
        content[at + 156 : at + 157] = kind
        sign(content, at)
        found = keys(read(bytes(content), tmp_path))
        assert {key for key in found if key} >= {*"01345"}
        assert sum(isinstance(data, str) for data in found.values()) == 1

    def test_time_is_bounded(self, tmp_path: Path) -> None:
        chain = bytearray(BLOCK)
        chain[:1], chain[156:157], chain[257:265] = b"x", b"L", b"ustar  \0"
        chain[124:136] = b"00000000000\0"
        sign(chain, 0)
        extended = chain.copy()
        extended[156:157], extended[124:136] = b"x", b"00003777000\0"
        sign(extended, 0)
        began = time.monotonic()
        # The last of the extended headers takes what follows for its attributes.
        for block, count in ((bytes(chain), 13), (bytes(extended), 7), (bytes(BLOCK) + b"x" * BLOCK, 13)):
            found = read(tar(SIX)[: 18 * BLOCK] + block * 4000 + tar(SIX), tmp_path)
            assert len(found) == count
            assert len(errors(found)) == 1
        assert time.monotonic() - began < 20

    def test_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text.tar").write_bytes(tar({"a.txt": b"x"}))
        with pytest.raises(SourceError, match="no images"):
            listed(tmp_path / "text.tar", tmp_path)
        for content in (b"no tar file" * 100, b"", bytes(RECORD) + b"x" * 1000, b"\0"):
            (tmp_path / "no.tar").write_bytes(content)
            with pytest.raises(SourceError, match=r"no\.tar"):
                listed(tmp_path / "no.tar", tmp_path)


class TestChangesWhileItIsRead:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda path: os.truncate(path, 1000), "shorter"),
            (lambda path: path.unlink(), r"0\.tar' cannot be read: No such file"),
            (lambda path: path.open("ab").write(b"x"), "longer"),
            (lambda path: os.utime(path, (0, 0)), "changed"),
            (lambda path: (path.unlink(), os.mkfifo(path)), "FIFO"),
        ],
    )
    def test_named(self, change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
        (tmp_path / "0.tar").write_bytes(tar({"a.jpg": b"x" * 5000}))
        images = listed(tmp_path / "0.tar", tmp_path)
        change(tmp_path / "0.tar")
        with pytest.raises(SourceError, match=message):
            list(images.read(0, 1)[1])


def mutants(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield ``whole`` with one byte changed, a range zeroed, or cut."""
    random_ = random.Random(seed)
    for _ in range(count):
        content = bytearray(whole)
        start = random_.randrange(len(whole))
        kind = random_.choice(["byte", "byte", "zeros", "blocks", "cut", "block cut"])
        if kind == "byte":
            content[start] ^= random_.randrange(1, 256)
        elif kind == "zeros":
            stop = min(start + random_.randrange(1, 5000), len(whole))
            content[start:stop] = bytes(stop - start)
        elif kind == "blocks":
            start -= start % BLOCK
            stop = min(start + random_.randrange(1, 12) * BLOCK, len(whole))
            content[start:stop] = bytes(stop - start)
        else:
            del content[start - (start % BLOCK if kind == "block cut" else 0) :]
        if content != whole:
            yield bytes(content)


def is_shorter_archive(content: bytes, headers: list[int], ends: list[int]) -> bool:
    """Return True if the tar was cut behind an end mark, or zeroed from a header to an end: nothing shows the loss."""
    if len(content) <= ends[0] and not any(content[-2 * BLOCK :]):
        return True
    return any(not any(content[at : next(end for end in ends if end > at)]) for at in headers if at < len(content))


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
def test_fuzz(format: str, tmp_path: Path) -> None:
    """Whatever happens to a tar, each image is a row with its bytes, or there is an error."""
    numbers = range(8)
    one = tar(
        [
            *(member(f"{i:03}.{kind}", image(i, 10 + 199 * i)) for i in numbers for kind in ("jpg", "txt", "seg.png")),
            member("link.jpg", kind=tarfile.LNKTYPE, target="003.jpg"),
            *(member(f"d/{i}.png", image(90 + i, 512)) for i in range(4)),
        ],
        FORMATS[format],
    )
    whole = one + tar({f"{i}.jpg": image(40 + i, 900) for i in range(3)}, FORMATS[format])
    ends = [len(one), len(whole)]
    headers = [match.start() - 257 for match in re.finditer(b"ustar", whole)]
    original = keys(read(whole, tmp_path))
    assert len(original) == 16
    for content in mutants(whole, FUZZ, seed=0):
        try:
            found = read(content, tmp_path)
        except SourceError:
            continue
        images = keys(found)
        if not errors(found) and not is_shorter_archive(content, headers, ends):
            assert list(images) == list(original)
        for key, data in images.items():  # the bytes themselves can be damaged; nothing in a tar shows it
            assert isinstance(data, str) or len(data) == len(original[key])
