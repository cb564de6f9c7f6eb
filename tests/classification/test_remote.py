"""fastres.classification: sources in object stores give the same rows as files, whatever the network does."""

from __future__ import annotations

import glob
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastres
from fastres.classification import remote, sources
from fastres.classification.listing import HIDDEN
from fastres.errors import SourceError
from fastres.storage import filesystems, inputs, objects
from fastres.storage.failures import TRIES
from tests.object_store import CUT, DENIED, EXPIRED, RESET, UNAVAILABLE, Faults, upload

from .conftest import classify
from .listed import errors, listed, listed_and_skipped, rows


@pytest.fixture
def tree(folder: Path) -> Path:
    """The folder of images with more folders, and the same images in two tars and a Parquet file, beside it."""
    for name in ("a-b/a.jpg", "a/b/c.jpg", "a/.d/e.jpg", "a/.f.jpg", ".g/h.jpg", "é #?%20/i.JPG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "a.jpg", folder / name)
    paths = sorted(folder.rglob("*.jpg"))
    place = folder.parent
    (place / "shards").mkdir()
    for number, part in enumerate((paths[::2], paths[1::2])):
        with tarfile.open(place / "shards" / f"{number}.tar", "w") as tar:
            for path in part:
                tar.add(path, path.relative_to(folder))
    table = pa.table({"id": [path.name for path in paths], "image": [path.read_bytes() for path in paths]})
    pq.write_table(table, place / "x.parquet", row_group_size=10)
    return place


def table_of(source: Any, output: Path, model: fastres.Model, **options: Any) -> list[dict[str, Any]]:
    classify(source, output, model, overwrite=True, top_k=2, **options)
    found: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    return found


def moved(table: list[dict[str, Any]], place: Path, url: str) -> list[dict[str, Any]]:
    """Return the rows of a local table as those of the store."""
    for row in table:
        row["path"] = row["path"].replace(str(place), url)
        row["error"] = row["error"] and row["error"].replace(str(place), url)
    return table


@pytest.mark.parametrize(
    ("kind", "workers"), [("images/", 2), ("images/**/*.jpg", 0), ("shards/*.tar", 2), ("x.parquet", 0)]
)
def test_the_table_is_that_of_the_files(
    kind: str, workers: int, tree: Path, bucket: str, model: fastres.Model, tmp_path: Path
) -> None:
    upload(tree, bucket, kind)
    local = table_of(f"{tree}/{kind}", tmp_path / "local.parquet", model)
    found = table_of(f"{bucket}/{kind}", tmp_path / "remote.parquet", model, workers=workers)
    assert found == moved(local, tree, bucket)
    assert len(found) > 20
    assert sum(row["error"] is not None for row in found) >= 3


@pytest.mark.parametrize("kind", ["images/sub/", "shards/*.tar"])
def test_google_cloud_storage(kind: str, tree: Path, gs: str, model: fastres.Model, tmp_path: Path) -> None:
    upload(tree, gs, kind)
    local = table_of(f"{tree}/{kind}", tmp_path / "local.parquet", model)
    assert table_of(f"{gs}/{kind}", tmp_path / "remote.parquet", model, workers=2) == moved(local, tree, gs)


@pytest.mark.parametrize(
    ("kind", "fault"), [("images/[a-h]*.jpg", CUT), ("shards/*.tar", RESET), ("x.parquet", UNAVAILABLE)]
)
def test_failures_of_a_moment_change_nothing(
    kind: str, fault: str, tree: Path, bucket: str, faults: Faults, tmp_path: Path
) -> None:
    upload(tree, bucket, kind)
    expected = content(rows(listed(f"{bucket}/{kind}", tmp_path), 7))
    faults.log.clear()
    faults.first(1, fault)
    assert content(rows(listed(f"{bucket}/{kind}", tmp_path), 7)) == expected
    assert len(faults.log) > len({path for _, path, _ in faults.log})


def content(found: list[Any]) -> list[Any]:
    return [(identity, image if isinstance(image, bytes) else str(image)) for identity, image in found]


@pytest.mark.parametrize(("kind", "workers"), [("images/", 0), ("shards/*.tar", 0), ("x.parquet", 2)])
def test_a_failure_that_stays_is_no_row(
    kind: str, workers: int, tree: Path, bucket: str, faults: Faults, model: fastres.Model, tmp_path: Path
) -> None:
    """It ends the run with an error, and no image is recorded as bad. The next run goes on."""
    upload(tree, bucket, kind)
    expected = table_of(f"{bucket}/{kind}", tmp_path / "whole.parquet", model)
    output = tmp_path / "output.parquet"
    names = {"images/": "s.jpg", "shards/*.tar": "1.tar", "x.parquet": "x.parquet"}
    seen = Counter[str]()

    def fault(method: str, path: str) -> str | None:
        if method != "GET" or not path.endswith(names[kind]):
            return None
        seen[path] += 1
        return UNAVAILABLE if seen[path] > (0 if kind == "images/" else 2) else None

    faults.fault = fault
    with pytest.raises(SourceError, match=rf"{names[kind]}' cannot be read: .* It was tried {TRIES} times"):
        classify(f"{bucket}/{kind}", output, model, top_k=2, workers=workers)
    assert not output.exists()
    faults.fault = lambda method, path: None
    classify(f"{bucket}/{kind}", output, model, top_k=2, workers=workers, resume=True)
    assert pq.read_table(output).to_pylist() == expected


def test_images_that_change_or_are_denied_are_error_rows(
    tree: Path, bucket: str, faults: Faults, tmp_path: Path
) -> None:
    upload(tree, bucket, "images/")
    images = listed(f"{bucket}/images/", tmp_path)
    objects.write(f"{bucket}/images/a.jpg", b"longer" * 10_000)
    objects.write(f"{bucket}/images/b.jpg", b"shorter")
    objects.write(f"{bucket}/images/c.jpg", b"")
    objects.delete([f"{bucket}/images/e.jpg"])
    faults.fault = lambda method, path: DENIED if path.endswith("/f.jpg") else None
    found = {row["path"].rpartition("/")[2]: str(image) for row, image in rows(images) if isinstance(image, Exception)}
    assert sorted(found) == ["a.jpg", "b.jpg", "c.jpg", "e.jpg", "f.jpg"]
    for name in "abce":
        assert "changed after it was listed" in found[f"{name}.jpg"]
    assert "now has 60,000" in found["a.jpg"]
    assert "does not exist any more" in found["e.jpg"]
    assert "access is denied. It needs the permission s3:GetObject" in found["f.jpg"]


def test_credentials_that_expire_are_no_rows(tree: Path, bucket: str, faults: Faults, tmp_path: Path) -> None:
    upload(tree, bucket, "images/")
    images = listed(f"{bucket}/images/", tmp_path)
    faults.fault = lambda method, path: EXPIRED
    with pytest.raises(SourceError, match="for lack of valid credentials"):
        rows(images)


@pytest.mark.parametrize("name", ["shards/0.tar", "x.parquet"])
def test_tars_and_parquet_files_that_change(name: str, tree: Path, bucket: str, tmp_path: Path) -> None:
    upload(tree, bucket, name)
    images = listed(f"{bucket}/{name}", tmp_path)
    data = (tree / name).read_bytes()
    objects.write(f"{bucket}/{name}", data + b"\0" * 512)
    with pytest.raises(SourceError, match=r"became longer|was changed|cannot be read as a Parquet file"):
        rows(images)
    objects.delete([f"{bucket}/{name}"])
    with pytest.raises(SourceError, match=r"does not exist|was deleted"):
        rows(pickle.loads(pickle.dumps(images)))


def test_the_list_shows_changes(tree: Path, bucket: str, tmp_path: Path) -> None:
    upload(tree, bucket, "images/")
    before = [*sources.find(f"{bucket}/images/").entries()]
    objects.write(f"{bucket}/images/a.jpg", b"x")
    after = [*sources.find(f"{bucket}/images/").entries()]
    assert [old["path"] for old, new in zip(before, after, strict=True) if old != new] == [
        f"{bucket}/images/a.jpg".encode()
    ]


def test_a_tar_is_not_transferred_to_list_it(bucket: str, faults: Faults, tmp_path: Path) -> None:
    big = tmp_path / "big.jpg"
    big.write_bytes(b"\1" * (3 << 20))
    with tarfile.open(tmp_path / "big.tar", "w") as tar:
        for number in range(4):
            tar.add(big, f"{number}.jpg")
    objects.write(f"{bucket}/big.tar", (tmp_path / "big.tar").read_bytes())
    faults.log.clear()
    images = listed(f"{bucket}/big.tar", tmp_path)
    ranges = [tuple(map(int, part[6:].split("-"))) for _, _, part in faults.log if part]
    assert 0 < sum(stop - start + 1 for start, stop in ranges) < 6 * inputs.LEAST
    assert [image for _, image in rows(images)] == [big.read_bytes()] * 4


def test_images_are_requested_together(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        objects.write(f"{bucket}/{number}.jpg", b"x" * 10)
    images = listed(bucket, tmp_path)
    counts: list[int] = []
    read_many = objects.read_many
    monkeypatch.setattr(objects, "read_many", lambda ranges: counts.append(len(ranges)) or read_many(ranges))
    assert len(rows(images)) == 10
    monkeypatch.setattr(remote, "MOST_BYTES", 35)
    assert len(rows(images)) == 10
    assert counts == [10, 3, 3, 3, 1]
    monkeypatch.setattr(remote, "LARGEST", 9)
    assert errors(rows(images)) == ["The object has 10 bytes, more than fastres reads."] * 10


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jpg", "**/*.jpg", "**", "a/**", "a/**/c.jpg", "*/b/*.jpg", "a*/*", "[ab]*/**/*.jpg", "?.jpg", "a/.*", ".*/*",
        "a/*/e.jpg", "a/.d/*", "**/b/**", "é*/*", "sub/*",
    ],
)  # fmt: skip
def test_globs_match_what_they_match_among_files(pattern: str, tree: Path, memory: str, tmp_path: Path) -> None:
    upload(tree, memory)
    if not glob.glob(f"{tree}/images/{pattern}", recursive=True):
        with pytest.raises(SourceError, match="matches no object"):
            listed(f"{memory}/images/{pattern}", tmp_path)
        return
    local, skipped = listed_and_skipped(f"{tree}/images/{pattern}", tmp_path)
    expected = [row["path"].replace(str(tree), memory) for row, _ in rows(local)]
    found, skipped_there = listed_and_skipped(f"{memory}/images/{pattern}", tmp_path)
    assert [row["path"] for row, _ in rows(found)] == expected
    assert skipped_there == skipped


def test_what_is_named_twice_is_one_row(tree: Path, memory: str, tmp_path: Path) -> None:
    upload(tree, memory)
    top = f"{memory}/images"
    count = len(listed(top, tmp_path))
    for source in (
        [top, f"{top}/"], [f"{top}/sub", top], [top, f"{top}/a", f"{top}/*.jpg"], [f"{top}/**/*.jpg", top],
        [f"{top}/*.jpg", f"{top}/a.*", top],
    ):  # fmt: skip
        assert len(listed(source, tmp_path)) == count
    images, skipped = listed_and_skipped([top, f"{top}/a/.d"], tmp_path)
    assert len(images) == count + 1
    assert skipped == {HIDDEN: 2}


def test_files_and_objects_together(tree: Path, memory: str, tmp_path: Path) -> None:
    upload(tree, memory)
    images = listed([f"{memory}/images/a.jpg", tree / "images" / "a.jpg", f"{memory}/images/b.jpg"], tmp_path)
    first, second, third = rows(images)
    assert first[1] == Path(second[1]).read_bytes()
    assert third[0]["path"] == f"{memory}/images/b.jpg"
    both = listed([f"{memory}/shards/0.tar", tree / "shards" / "1.tar"], tmp_path)
    assert len(both) == len(listed(tree / "shards" / "0.tar", tmp_path)) + len(
        listed(tree / "shards" / "1.tar", tmp_path)
    )
    assert content(rows(listed([f"{memory}/x.parquet", tree / "x.parquet"], tmp_path)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("TOP/none", r"does not exist: there is no such object, and nothing below it"),
        ("TOP/none/", r"does not exist: there is nothing below it"),
        ("TOP/none.tar", r"does not exist"),
        ("TOP/images/*.tiff", r"matches no object"),
        ("TOP/notes", r"no images in 'TOP/notes'.*if their names end in"),
        ("TOP/shards", r"It holds \.tar files; pass 'TOP/shards/\*\.tar'"),
        ("TOP/tables/", r"It holds \.parquet files; pass 'TOP/tables/\*\.parquet'"),
        ("TOP/folder.tar", r"is a folder, not a tar file; if it holds images, pass 'TOP/folder\.tar/'"),
        ("TOP/x.tar.gz", r"is a compressed tar"),
        (["TOP/x.parquet", "TOP/images"], r"different kinds"),
        (["TOP/x.parquet", "LOCAL/images"], r"different kinds"),
        ("memory://pl*/images/*.jpg", r"wildcard in the bucket"),
        ("memory://", r"incomplete"),
        ("file:///photos", r"is a local file; pass its path, such as '/photos'"),
        ("s3:/bucket/photos", r"neither a file nor a URL; a URL has two slashes"),
        (Path("s3://bucket/photos"), r"passed as text, because pathlib\.Path removes"),
        ("s4://bucket/photos", r"unknown protocol 's4'\. Did you mean 's3'"),
        ("sftp://me:secret@host/photos", r"has a password"),
    ],
)
def test_refused(source: Any, message: str, tree: Path, memory: str, tmp_path: Path) -> None:
    upload(tree, memory)
    for name in ("notes/a.txt", "tables/0.parquet", "folder.tar/a.jpg", "x.tar.gz"):
        objects.write(f"{memory}/{name}", b"x")

    def placed(name: Any) -> Any:
        return name.replace("TOP", memory).replace("LOCAL", str(tree)) if isinstance(name, str) else name

    given = [placed(each) for each in source] if isinstance(source, list) else placed(source)
    with pytest.raises(SourceError, match=message.replace("TOP", memory)) as caught:
        listed(given, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_list_that_fails_is_a_named_error(tree: Path, bucket: str, faults: Faults, tmp_path: Path) -> None:
    objects.write(f"{bucket}/images/a.jpg", b"x")
    for source in (f"{bucket}/images", f"{bucket}/images/*.jpg"):
        faults.fault = lambda method, path: UNAVAILABLE if method == "GET" else None
        with pytest.raises(SourceError, match=rf"cannot be listed: .* It was tried {TRIES} times"):
            listed(source, tmp_path)
        faults.fault = lambda method, path: DENIED if method == "GET" else None
        with pytest.raises(SourceError, match=r"It needs the permission s3:ListBucket"):
            listed(source, tmp_path)
    faults.fault = lambda method, path: None
    with pytest.raises(SourceError, match="the bucket 'nowhere' does not exist"):
        listed("s3://nowhere/photos", tmp_path)


def test_an_output_is_compared_with_files_only(memory: str, tree: Path) -> None:
    upload(tree, memory)
    found = sources.find([f"{memory}/images/", tree / "images"])
    assert found.paths == (str(tree / "images"),)
    assert found.description == (f"{memory}/images/", str(tree / "images"))


def test_the_resumed_run_is_the_same(tree: Path, bucket: str, model: fastres.Model, tmp_path: Path) -> None:
    upload(tree, bucket, "images/sub")
    output = tmp_path / "output.parquet"
    classify(f"{bucket}/images/", output, model)
    metadata = pq.read_schema(output).metadata[b"fastres"].decode()
    assert f"{bucket}/images/" in metadata
    report = classify(f"{bucket}/images/", output, model, overwrite=True, resume=True)
    assert report.rows == pq.read_table(output).num_rows
    assert filesystems.filesystem(bucket) is filesystems.filesystem(f"{bucket}/other")
