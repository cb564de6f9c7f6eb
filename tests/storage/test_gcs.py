"""fastres.storage with Google Cloud Storage, as an emulator on loopback answers."""

from __future__ import annotations

import pytest

from fastres.errors import StorageError
from fastres.storage import objects
from fastres.storage.objects import MissingObject


def test_objects(gs: str) -> None:
    names = ["a-b/x.jpg", "a.jpg", "a/b/c.jpg", "a/x.jpg", "a b.jpg"]
    for name in names:
        objects.write(f"{gs}/{name}", b"12345")
    assert [each.url[len(gs) + 1 :] for each in objects.listed(gs)] == sorted(names, key=lambda name: name.split("/"))
    assert objects.names(gs) == ["a b.jpg", "a-b/", "a.jpg", "a/"]
    assert objects.is_folder(f"{gs}/a")
    assert not objects.is_folder(f"{gs}/none")
    found = objects.info(f"{gs}/a.jpg")
    assert found == next(each for each in objects.listed(gs) if each.url == f"{gs}/a.jpg")
    assert found.mtime_ns > 0
    first, none, behind = objects.read_many([(f"{gs}/a.jpg", 1, 9), (f"{gs}/none", 0, 6), (f"{gs}/a.jpg", 7, 9)])
    assert (first, behind) == (b"2345", b"")
    assert isinstance(none, MissingObject)
    with objects.open_output(f"{gs}/w/1") as file:
        file.write(b"y" * objects.PART)
        file.write(b"z" * objects.PART)
    assert objects.read(f"{gs}/w/1", objects.PART - 1, objects.PART + 1) == b"yz"
    objects.delete([f"{gs}/w/1", f"{gs}/w/none"])
    assert objects.names(f"{gs}/w") == []
    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        list(objects.listed("gs://nowhere/a"))
