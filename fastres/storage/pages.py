"""Lists of objects, one page of the store's answer at a time, put into the order of a walk through folders.

Stores list names in the order of their bytes, in which ``a-b/x.jpg`` and ``a.jpg`` come before ``a/x.jpg``. A walk
visits the folder ``a`` first, then ``a-b``, then ``a.jpg``. So an object waits while one with a name like that may
still follow it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from .failures import LIST, retried
from .filesystems import filesystem, path_of
from .urls import GS, S3, as_folder, joined, protocol_of

WAITING = 10_000  # objects that wait before the store is asked whether they have to
_TIMES = ("LastModified", "updated", "mtime", "last_modified", "modified", "created")
_TAGS = ("ETag", "etag", "md5Hash", "blob_id")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Object(NamedTuple):
    """An object in a store: its size in bytes, and when it was written, in nanoseconds since 1970 (0: not known)."""

    url: str
    size: int
    mtime_ns: int
    etag: str | None


def objects_below(url: str, start: str = "", deep: bool = True) -> Iterator[Object]:
    """Yield the objects below ``url`` whose names begin with ``start``, in the order of their names' bytes.

    Unless ``deep``, only those directly below. Names that end in ``/``, which stand for folders, are left out.
    """
    base = as_folder(url)
    for found, _ in _pages(base, start, deep):
        yield from found


def names_below(url: str) -> list[str]:
    """Return the names directly below ``url``, sorted; the names of folders end in ``/``."""
    base = as_folder(url)
    names: set[str] = set()
    for found, folders in _pages(base, "", False):
        names.update(each.url[len(base) :] for each in found)
        names.update(folders)
    return sorted(names)


def is_folder(url: str) -> bool:
    """Return True if there is anything below ``url``, also a name that stands for an empty folder."""
    base = as_folder(url)
    fs = filesystem(base)
    if protocol_of(base) in S3:
        bucket, key = _split(fs, base)
        page = retried(base, LIST, lambda: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1))
        return bool(page.get("Contents")) or not key
    if protocol_of(base) in GS:
        bucket, key = _split(fs, base)
        page = retried(base, LIST, lambda: _gs_page(fs, bucket, prefix=key, maxResults=1))
        return bool(page.get("items")) or not key
    fs.invalidate_cache()
    return bool(retried(base, LIST, lambda: fs.isdir(path_of(base))))


def in_walking_order(
    found: Iterable[Object], base: int, is_there: Callable[[str], bool], waiting: int = WAITING
) -> Iterator[Object]:
    """Yield objects that come in the order of their bytes in that of a walk through folders.

    ``base`` is the length of the URL that all begin with. If more than ``waiting`` objects wait for a folder that may
    follow them, ``is_there`` is asked for its URL.
    """
    heap: list[tuple[str, Object]] = []
    known: dict[str, bool] = {}  # whether a folder follows
    for latest in found:
        while heap:
            doubt = _doubt(heap[0][1].url, latest.url, base, known)
            if doubt is None:
                yield heapq.heappop(heap)[1]
            elif len(heap) > waiting and doubt not in known:
                known[doubt] = is_there(doubt)
            else:
                break
        heapq.heappush(heap, (latest.url.replace("/", "\0"), latest))
    while heap:
        yield heapq.heappop(heap)[1]


def _doubt(url: str, latest: str, base: int, known: dict[str, bool]) -> str | None:
    """Return the URL of a folder that may follow ``latest`` and comes before ``url`` in a walk, if there may be one.

    That is a beginning of ``url`` in front of a character less than ``/``.
    """
    for position in range(base, len(url)):
        same = position < len(latest) and url[position] == latest[position]
        if url[position] < "/" and latest[position : position + 1] <= "/":
            folder = f"{url[:position]}/"
            if known.get(folder, True):
                return folder
        if not same:
            return None
    return None


def _pages(base: str, start: str, deep: bool) -> Iterator[tuple[list[Object], list[str]]]:
    """Yield objects below ``base``, and the names of folders (only if not ``deep``), a page at a time."""
    protocol = protocol_of(base)
    if protocol in S3:
        yield from _s3_pages(base, start, deep)
    elif protocol in GS:
        yield from _gs_pages(base, start, deep)
    elif deep:
        yield _all_below(base, start), []
    else:
        yield _directly_below(base, start)


def _s3_pages(base: str, start: str, deep: bool) -> Iterator[tuple[list[Object], list[str]]]:
    fs = filesystem(base)
    bucket, key = _split(fs, base)
    options = {"Bucket": bucket, "Prefix": key + start} | ({} if deep else {"Delimiter": "/"})
    while True:
        page = retried(base, LIST, lambda: fs.call_s3("list_objects_v2", **options))
        found = [
            to_object(base + each["Key"][len(key) :], {**each, "size": each["Size"]})
            for each in page.get("Contents", [])
            if not each["Key"].endswith("/")
        ]
        yield found, [each["Prefix"][len(key) :] for each in page.get("CommonPrefixes", [])]
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def _gs_pages(base: str, start: str, deep: bool) -> Iterator[tuple[list[Object], list[str]]]:
    fs = filesystem(base)
    bucket, key = _split(fs, base)
    options = {"prefix": key + start} | ({} if deep else {"delimiter": "/"})
    while True:
        page = retried(base, LIST, lambda: _gs_page(fs, bucket, **options))
        found = [
            to_object(base + each["name"][len(key) :], each)
            for each in page.get("items", [])
            if not each["name"].endswith("/")
        ]
        yield found, [prefix[len(key) :] for prefix in page.get("prefixes", [])]
        if not page.get("nextPageToken"):
            return
        options["pageToken"] = page["nextPageToken"]


def _gs_page(fs: Any, bucket: str, **options: Any) -> dict[str, Any]:
    page: dict[str, Any] = fs.call("GET", "b/{}/o", bucket, json_out=True, **options)
    return page


def _split(fs: Any, url: str) -> tuple[str, str]:
    """Return bucket and key of ``url``."""
    bucket, key = fs.split_path(url)[:2]
    return bucket, key.lstrip("/") if key.strip("/") == "" else key


def _all_below(base: str, start: str) -> list[Object]:
    fs = filesystem(base)
    fs.invalidate_cache()
    top = path_of(base)
    found = retried(base, LIST, lambda: fs.find(top, detail=True))
    listed = [
        to_object(joined(base, name[len(top) :].lstrip("/")), facts)
        for name, facts in found.items()
        if facts.get("type", "file") == "file" and name.startswith(top) and not name.endswith("/")
    ]
    return sorted(each for each in listed if each.url.startswith(base + start))


def _directly_below(base: str, start: str) -> tuple[list[Object], list[str]]:
    fs = filesystem(base)
    fs.invalidate_cache()
    top = path_of(base)
    objects, folders = [], []
    for facts in retried(base, LIST, lambda: fs.ls(top, detail=True)):
        name = facts["name"][len(top) :].strip("/")
        if not name or not name.startswith(start):
            continue
        if facts["type"] == "directory":
            folders.append(f"{name}/")
        else:
            objects.append(to_object(joined(base, name), facts))
    return sorted(objects), folders


def to_object(url: str, facts: dict[str, Any]) -> Object:
    """Return an object with the facts that its file system gives; its size is -1 if that is not known."""
    time = next((facts[name] for name in _TIMES if facts.get(name) is not None), None)
    tag = next((facts[name] for name in _TAGS if facts.get(name) is not None), None)
    if isinstance(time, datetime) and protocol_of(url) in S3:
        time = time.replace(microsecond=0)  # a list may have more digits than the answer for one object
    size = facts.get("size")
    return Object(url, -1 if size is None else int(size), _nanoseconds(time), None if tag is None else str(tag))


def _nanoseconds(time: Any) -> int:
    """Return a time, in one of the forms in which stores give it, as nanoseconds since 1970, without rounding."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return 0
    if isinstance(time, (int, float)):
        return int(time * 1_000_000_000)
    if not isinstance(time, datetime):
        return 0
    since = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)) - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
