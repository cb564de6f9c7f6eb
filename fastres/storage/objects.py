"""Read, list, write and delete objects. URLs are strings; see :mod:`fastres.storage.urls`.

All functions raise ``StorageError``, after three tries if the failure may pass: ``MissingObject``, ``DeniedObject`` or
``Unavailable`` (:mod:`fastres.storage.failures`) or, for what no further try changes, ``StorageError`` itself. They
raise ``InputError`` for URLs that cannot be used, and ``MissingDependencyError`` if a package is missing.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any

from fastres.errors import StorageError

from . import pages
from .failures import (
    DELETE,
    GS,
    READ,
    S3,
    TRIES,
    WRITE,
    DeniedObject,
    MissingObject,
    Unavailable,
    described,
    retried,
    wait,
)
from .filesystems import CONNECTIONS, filesystem, path_of
from .inputs import ObjectFile
from .pages import Object, to_object
from .urls import as_folder, protocol_of, url_text

__all__ = [
    "DeniedObject", "MissingObject", "Object", "ObjectFile", "Range", "Unavailable", "delete", "info", "is_folder",
    "listed", "matching", "names", "open_input", "open_output", "read", "read_many", "write",
]  # fmt: skip

PART = 1 << 24  # bytes of a part of an upload; a store takes 10,000 parts
THREADS = 8  # that delete objects

Range = tuple[str, int, int]  # a URL, the first byte, and the last byte + 1

is_folder = pages.is_folder


def info(url: str) -> Object | None:
    """Return size, time and tag of the object ``url``, or ``None`` if there is no object with this name."""
    fs = filesystem(url)
    if protocol_of(url) in S3:
        bucket, key, _ = fs.split_path(url)
        if not key or key.endswith("/"):
            return None
        ask = partial(fs.call_s3, "head_object", Bucket=bucket, Key=key)
        found = _or_none(url, ask)
        if found is not None:
            found = {
                "size": found["ContentLength"],
                "LastModified": found.get("LastModified"),
                "ETag": found.get("ETag"),
            }
    else:
        fs.invalidate_cache()
        found = None if url.endswith("/") else _or_none(url, partial(fs.info, path_of(url)))
        if found is not None and found.get("type", "file") != "file":
            return None
    if found is None:
        return None
    facts = to_object(url, found)
    if facts.size < 0:
        raise StorageError(f"{url_text(url)!r} cannot be read: the server does not say how many bytes it has")
    return facts


def _or_none(url: str, ask: Any) -> Any:
    try:
        return retried(url, READ, ask)
    except MissingObject:
        return None


def listed(url: str) -> Iterator[Object]:
    """Yield every object below ``url``, in the order in which a walk through folders finds files.

    Folders are entered where their name stands in the order of names. Memory is needed for a page of the list, and for
    objects that wait for a folder that may come before them. Names that end in ``/`` are left out.
    """
    return pages.in_walking_order(pages.objects_below(url), len(as_folder(url)), pages.is_folder)


def matching(url: str, start: str, deep: bool) -> Iterator[Object]:
    """Yield the objects below ``url`` whose names begin with ``start``, in the order of the bytes of their names.

    Unless ``deep``, only those directly below.
    """
    return pages.objects_below(url, start, deep)


def names(url: str) -> list[str]:
    """Return the names directly below ``url``, sorted, from the store itself. Names of folders end in ``/``."""
    try:
        return pages.names_below(url)
    except MissingObject:
        return []


def read(url: str, start: int, stop: int) -> bytes:
    """Return the bytes from ``start`` to ``stop``, all of them.

    If the object ends before ``stop``, that is ``StorageError``: it has changed, or the transfer was cut off.
    """

    def whole() -> bytes:
        data = _fetched([(url, start, stop)])[0]
        if isinstance(data, Exception):
            raise data
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data):,} bytes came, not {stop - start:,}")
        return data

    return retried(url, READ, whole)


def read_many(ranges: Sequence[Range]) -> list[bytes | StorageError]:
    """Return the bytes of ranges, or the error of each, requested at the same time.

    Like a slice, a range may end behind the end of its object.
    """
    results: list[bytes | StorageError] = [b""] * len(ranges)
    left = list(range(len(ranges)))
    for tried in range(1, TRIES + 1):
        again = []
        for index, data in zip(left, _fetched([ranges[index] for index in left]), strict=True):
            results[index] = described(data, ranges[index][0], READ, tried) if isinstance(data, Exception) else data
            if isinstance(results[index], Unavailable):
                again.append(index)
        left = again
        if not left or tried == TRIES:
            break
        wait(tried)
    return results


def _fetched(ranges: Sequence[Range]) -> list[bytes | Exception]:
    """Return what one request for each range gives: bytes or an error."""
    results: list[bytes | Exception] = [b""] * len(ranges)
    groups: dict[str, list[int]] = {}
    for index, (url, start, stop) in enumerate(ranges):
        if stop > start:
            groups.setdefault(protocol_of(url), []).append(index)
    for indices in groups.values():
        urls, starts, stops = zip(*(ranges[index] for index in indices), strict=True)
        fs = filesystem(urls[0])
        options = {"batch_size": CONNECTIONS} if fs.async_impl else {}
        try:
            found = fs.cat_ranges(
                [path_of(url) for url in urls], list(starts), list(stops), on_error="return", **options
            )
        except Exception as error:  # what concerns all of them, such as credentials
            found = [error] * len(indices)
        for index, data in zip(indices, found, strict=True):
            results[index] = b"" if _is_behind_end(data) else data
    return results


def _is_behind_end(data: Any) -> bool:
    """Return True if ``data`` is the error of a range that begins behind the end of its object."""
    if not isinstance(data, Exception):
        return False
    response = getattr(data.__cause__ or data, "response", None)
    code = (response.get("Error") or {}).get("Code") if isinstance(response, dict) else None
    return code in ("InvalidRange", "416") or str(getattr(data, "code", "")) == "416"


def open_input(url: str, found: Object | None = None) -> ObjectFile:
    """Return the object ``url`` as a file, unbuffered, that is read by requests for ranges.

    ``found`` is what :func:`info` has returned for it, if that is known already.
    """
    found = found or info(url)
    if found is None:
        raise MissingObject(f"{url_text(url)!r} does not exist")
    return ObjectFile(partial(read, url), found.size)


def write(url: str, data: bytes) -> None:
    """Write an object in one step: it has all of ``data``, or is what it was before."""
    fs = filesystem(url)
    retried(url, WRITE, lambda: fs.pipe_file(path_of(url), data))


@contextmanager
def open_output(url: str) -> Iterator[IO[bytes]]:
    """Yield a file whose content becomes the object ``url`` when the block ends.

    If the block raises, nothing is written, and an object that was there stays. Parts are sent to S3 and Google Cloud
    Storage while the file is written; for other stores it is kept on the local disk until it is complete.
    """
    if protocol_of(url) not in (*S3, *GS):
        fs = filesystem(url)
        with tempfile.NamedTemporaryFile(prefix="fastres-") as spooled:
            yield spooled
            spooled.flush()
            retried(url, WRITE, lambda: fs.put_file(spooled.name, path_of(url)))
        return
    upload = _Upload(url)
    try:
        yield upload  # type: ignore[misc]
        upload.commit()
    except BaseException:
        upload.discard()
        raise


class _Upload(io.RawIOBase):
    """The upload of an object in parts; it appears with :meth:`commit`."""

    def __init__(self, url: str) -> None:
        self._url, self._count = url, 0
        self._file = self._guarded(
            lambda: filesystem(url, uploads=True).open(path_of(url), "wb", block_size=PART, autocommit=False)
        )

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._guarded(lambda: self._file.write(view))
        self._count += len(view)
        return len(view)

    def commit(self) -> None:
        def end() -> None:
            self._file.close()
            self._file.commit()

        self._guarded(end)

    def discard(self) -> None:
        with suppress(Exception):  # another error is being raised already
            self._file.discard()
        self._file.closed = True  # otherwise it would be closed, and written, when it is deleted

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            raise described(error, self._url, WRITE, TRIES) from error


def delete(urls: Iterable[str]) -> None:
    """Delete objects; those that do not exist are no error."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_delete, urls):
            pass


def _delete(url: str) -> None:
    fs = filesystem(url)
    with suppress(MissingObject):
        retried(url, DELETE, lambda: fs.rm_file(path_of(url)))
