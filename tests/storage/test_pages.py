"""fastres.storage.pages: lists in the order of a walk through folders, and what stores say about objects."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from fastres.classification.walking import Walk
from fastres.storage import objects, pages
from fastres.storage.pages import Object, in_walking_order

TOP = "s3://b/"


def stored(names: list[str]) -> list[Object]:
    """Objects in the order in which a store lists them."""
    return [Object(TOP + name, 1, 1, None) for name in sorted(names, key=str.encode)]


def random_names(count: int) -> list[str]:
    alphabet = "ab-./0 é"
    names = {"".join(random.choices(alphabet, k=random.randint(1, 6))) for _ in range(count)}
    return [name for name in names if "" not in name.split("/")]


@pytest.mark.parametrize("waiting", [0, 3, 1000])
def test_the_order_is_that_of_components(waiting: int) -> None:
    random.seed(waiting)
    for _ in range(200):
        names = random_names(40)
        asked: list[str] = []

        def is_there(folder: str, names: list[str] = names, asked: list[str] = asked) -> bool:
            asked.append(folder)
            return any((TOP + name).startswith(folder) for name in names)

        found = [each.url[len(TOP) :] for each in in_walking_order(stored(names), len(TOP), is_there, waiting)]
        assert found == sorted(names, key=lambda name: name.split("/"))
        assert len(asked) == len(set(asked))
        assert not asked or waiting < 1000


def test_objects_do_not_wait_without_a_reason() -> None:
    """Few objects are in memory at once, whatever characters their names have."""
    ahead = 0

    def counted(found: list[Object]) -> Iterator[Object]:
        nonlocal ahead
        for each in found:
            ahead += 1
            yield each

    for names, most in (
        ([f"img_{number:05}.jpg" for number in range(3000)], 2),
        ([f"n{number % 7}/x-{number}.jpg" for number in range(3000)], 600),
        ([f"photo-{number:05}.jpg" for number in range(3000)], 102),
    ):
        ahead, longest = 0, 0
        for _ in in_walking_order(counted(stored(names)), len(TOP), lambda folder: False, 100):
            ahead -= 1
            longest = max(longest, ahead)
        assert longest <= most


def test_the_order_is_that_of_a_local_walk(memory: str, tmp_path: Path) -> None:
    random.seed(1)
    for name in random_names(200):
        path = tmp_path / f"{name}.jpg"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        except OSError:  # a file is where the folder would be
            continue
        objects.write(f"{memory}/{path.relative_to(tmp_path)}", b"x")
    local = [os.path.relpath(os.fsdecode(entry["path"]), tmp_path) for entry in Walk().folder(str(tmp_path))]
    remote = [each.url[len(memory) + 1 :] for each in objects.listed(memory)]
    assert [name for name in remote if not any(part.startswith(".") for part in name.split("/"))] == local
    assert len(local) > 50


def test_pages_of_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a-b/x", "a.jpg", "a/x", "a/b/c", "é?#%20 .jpg", "z"]
    fs = pages.filesystem(bucket)
    call = fs.call_s3
    for name in [*names, "a/", "folder/"]:
        call("put_object", Bucket=bucket[5:], Key=name, Body=b"x")
    monkeypatch.setattr(fs, "call_s3", lambda method, **options: call(method, **{"MaxKeys": 2, **options}))
    assert [each.url[len(bucket) + 1 :] for each in objects.listed(bucket)] == sorted(names, key=lambda n: n.split("/"))
    assert [each.url for each in objects.listed(f"{bucket}/a")] == [f"{bucket}/a/b/c", f"{bucket}/a/x"]
    assert objects.names(bucket) == ["a-b/", "a.jpg", "a/", "folder/", "z", "é?#%20 .jpg"]
    assert [each.url for each in objects.matching(bucket, "a", False)] == [f"{bucket}/a.jpg"]
    assert len(list(objects.matching(bucket, "a", True))) == 4
    assert [objects.is_folder(f"{bucket}/{name}") for name in ("a", "folder/", "a.jpg", "z", "none")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_lists_and_single_objects_have_the_same_facts(bucket: str) -> None:
    objects.write(f"{bucket}/a.jpg", b"abc")
    (listed,) = objects.listed(bucket)
    assert listed == objects.info(f"{bucket}/a.jpg")
    assert listed.size == 3
    assert listed.mtime_ns > 0
    assert listed.mtime_ns % 10**9 == 0


def test_lists_are_never_stale(bucket: str, memory: str) -> None:
    for place in (bucket, memory):
        for count in range(1, 4):
            objects.write(f"{place}/{count}", b"x")
            assert len(list(objects.listed(place))) == len(objects.names(place)) == count
        objects.delete([f"{place}/1"])
        assert objects.names(place) == ["2", "3"]
        assert objects.info(f"{place}/1") is None


def test_times() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone.utc)
    expected = int(time.timestamp()) * 10**9 + 678901 * 1000
    shifted = time.astimezone(timezone(timedelta(hours=5)))
    for given in (time, shifted, time.replace(tzinfo=None), "2026-01-02T03:04:05.678901Z"):
        assert pages.to_object("gs://b/x", {"updated": given, "size": 1}).mtime_ns == expected
    assert pages.to_object("sftp://b/x", {"mtime": 5, "size": 1}).mtime_ns == 5 * 10**9
    assert pages.to_object("hf://b/x", {"mtime": "soon", "size": 1}).mtime_ns == 0
    assert pages.to_object("hf://b/x", {}).mtime_ns == 0
