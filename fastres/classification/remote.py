"""Sources in object stores (``s3://bucket/photos/``): which objects they name, and the content of objects.

A name in a store is one text. Where it has slashes, it is treated like the path of a file in folders.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple

from fastres.errors import ImageError, InputError, SourceError, StorageError
from fastres.images.opening import NamedBytes
from fastres.storage import objects
from fastres.storage.objects import DeniedObject, MissingObject, Object, ObjectFile
from fastres.storage.urls import (
    MISTAKEN,
    NOT_LISTED,
    as_folder,
    checked,
    is_mistaken_url,
    is_url,
    last_name,
    protocol_of,
    url_text,
)
from fastres.text import path_text

from .listing import Entry
from .walking import has_image_suffix

MOST_AT_ONCE, MOST_BYTES = 32, 1 << 26  # objects that are requested together, and bytes, unless one has more
LARGEST = (1 << 31) - 4096  # bytes of an image
_NO, _HIDDEN, _YES = range(3)


class Named(NamedTuple):
    """What a URL names: the ``objects``, or a ``folder``; and how many hidden images a glob left out."""

    objects: list[Object]
    folder: str | None = None
    hidden: int = 0
    is_glob: bool = False


@contextmanager
def source_errors() -> Iterator[None]:
    """Turn the errors of an object store, and of a wrong URL, into a ``SourceError``."""
    try:
        yield
    except (StorageError, InputError) as error:
        raise SourceError(str(error)) from error


def shown(path: str | bytes) -> str:
    """Return a path or URL for tables and messages."""
    name = os.fsdecode(path)
    return url_text(name) if is_url(name) else path_text(name)


def is_remote(entry: Entry) -> bool:
    """Return True for the entry of an object."""
    return b"://" in entry["path"] and is_url(os.fsdecode(entry["path"]))


def refuse_mistaken(name: str) -> None:
    """Raise ``SourceError`` if ``name``, which does not exist, is nearly a URL."""
    if is_mistaken_url(name):
        raise SourceError(f"{path_text(name)!r} {MISTAKEN}")


def expand(name: str) -> Named:
    """Return what the URL ``name`` stands for. Raises ``SourceError`` if there is nothing."""
    with source_errors():
        url = checked(name)
        found = objects.info(url)
        if found is not None:
            return Named([found])
        lists = protocol_of(url) not in NOT_LISTED
        if lists and glob.has_magic(url):
            return _matched(url)
        if lists and objects.is_folder(url):
            return Named([], as_folder(url))
    text = url_text(url)
    if not lists:
        raise SourceError(f"{text!r} is no file, and {protocol_of(url)}:// has no lists of files; pass the URL of each")
    below = "there is nothing below it" if url.endswith("/") else "there is no such object, and nothing below it"
    raise SourceError(f"{text!r} does not exist: {below}; check the bucket and the path, in which case matters")


def _matched(url: str) -> Named:
    parts = url.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    if first < 3:
        raise SourceError(f"{url_text(url)!r} has a wildcard in the bucket; write its name, and wildcards behind it")
    top = as_folder("/".join(parts[:first]))
    components = [part for part in parts[first:] if part] + [""] * url.endswith("/")
    start = re.split(r"[*?\[]", components[0])[0]
    pattern = _Pattern(components)
    found, hidden = [], 0
    for each in objects.matching(top, start, len(components) > 1 or components[0] == "**"):
        match = pattern.match(each.url[len(top) :].split("/"))
        found += [each] * (match == _YES)
        hidden += match == _HIDDEN
    if not found:
        raise SourceError(
            f"{url_text(url)!r} matches no object; to search everything below a place, use a glob such as "
            "'s3://bucket/photos/**/*.jpg'"
        )
    return Named(sorted(found), None, hidden, True)


class _Pattern:
    """The components of a glob, with the meaning that they have for files (:class:`.globs.Glob`)."""

    def __init__(self, components: Sequence[str]) -> None:
        self._components = components
        self._matchers = [_matcher(component) for component in components]

    def match(self, names: Sequence[str], start: int = 0, index: int = 0) -> int:
        """Return ``_YES``, ``_NO``, or ``_HIDDEN`` for an image that would match but for the dot of its name."""
        component, is_last = self._components[index], index == len(self._components) - 1
        left = len(names) - start
        if component != "**":
            if not left or is_last != (left == 1) or not self._matchers[index](names[start]):
                return _NO
            if names[start].startswith(".") and not component.startswith("."):
                return _HIDDEN if is_last and has_image_suffix(names[start]) else _NO
            return _YES if is_last else self.match(names, start + 1, index + 1)
        if is_last:
            return _YES if left and not any(name.startswith(".") for name in names[start:]) else _NO
        best = _NO
        for position in range(start, len(names)):
            best = max(best, self.match(names, position, index + 1))
            if best == _YES or names[position].startswith("."):
                break
        return best


def _matcher(component: str) -> Callable[[str], Any]:
    return re.compile(fnmatch.translate(component)).match if glob.has_magic(component) else component.__eq__


def object_entry(found: Object) -> Entry:
    """Return the entry of an image."""
    return {"path": os.fsencode(found.url), "size": found.size, "mtime_ns": found.mtime_ns}


class ObjectWalk:
    """The objects of all sources of a run; see :class:`.walking.Walk`."""

    def __init__(self) -> None:
        self.hidden = 0  # names of images that were left out because they begin with a dot
        self._visited: list[str] = []
        self._given: set[str] = set()

    def folder(self, url: str) -> Iterator[Entry]:
        """Yield the images below ``url``, in order; skip names that begin with a dot."""
        for found in objects.listed(url):
            *folders, name = found.url[len(url) :].split("/")
            if not has_image_suffix(name) or any(part.startswith(".") for part in folders):
                continue
            if self._was_visited(found.url):
                continue
            if name.startswith("."):
                self.hidden += 1
            elif found.url not in self._given:
                yield object_entry(found)
        self._visited.append(url)

    def is_new_match(self, url: str) -> bool:
        """Return True if a glob has matched ``url``, and no folder or glob before had it."""
        if url in self._given:
            return False
        self._given.add(url)
        name = last_name(url)
        return not has_image_suffix(name) or name.startswith(".") or not self._was_visited(url)

    def _was_visited(self, url: str) -> bool:
        return any(
            url.startswith(folder) and not any(part.startswith(".") for part in url[len(folder) :].split("/")[:-1])
            for folder in self._visited
        )


def suffixes_below(url: str) -> set[str]:
    """Return the suffixes of the names directly below ``url``, in lower case."""
    with source_errors():
        return {os.path.splitext(name)[1].lower() for name in objects.names(url) if not name.endswith("/")}


def class_folders(url: str) -> list[str]:
    """Return the names of the folders directly below ``url``."""
    with source_errors():
        return [name[:-1] for name in objects.names(url) if name.endswith("/")]


# -- content -----------------------------------------------------------------------------------------------------------


def file_contents(
    entries: Sequence[Entry], local: Callable[[Entry], str | ImageError]
) -> Iterator[str | bytes | ImageError]:
    """Yield what ``local`` returns for the entry of a file, and the content of an object, or an error."""
    for remote, group in groupby(entries, is_remote):
        if not remote:
            yield from map(local, group)
            continue
        for entry, data in requested(list(group), _whole):
            yield _image(entry, data)


def _whole(entry: Entry) -> tuple[int, int]:
    """Return the range of an object's content. One byte more than was listed shows if it has become longer."""
    return (0, entry["size"] + 1) if 0 < entry["size"] <= LARGEST else (0, 0)


def requested(
    entries: Sequence[Entry], place: Callable[[Entry], tuple[int, int]], check: Callable[[Entry], None] | None = None
) -> Iterator[tuple[Entry, bytes | StorageError]]:
    """Yield each entry with the bytes of its ``place`` in its object, or their error. Several are requested together.

    ``check`` is called once for each object of those that were requested together, before the first is yielded.
    """
    for part in _parts(entries, place):
        wanted = [entry for entry in part if entry["error"] is None]
        with source_errors():
            found = iter(objects.read_many([(os.fsdecode(entry["path"]), *place(entry)) for entry in wanted]))
        for entry in {entry["path"]: entry for entry in wanted}.values():
            if check is not None:
                check(entry)
        for entry in part:
            yield entry, next(found) if entry["error"] is None else b""


def _parts(entries: Sequence[Entry], place: Callable[[Entry], tuple[int, int]]) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    size = 0
    for entry in entries:
        start, stop = place(entry) if entry["error"] is None else (0, 0)
        if part and (len(part) == MOST_AT_ONCE or size + stop - start > MOST_BYTES):
            yield part
            part, size = [], 0
        part.append(entry)
        size += stop - start
    if part:
        yield part


def _image(entry: Entry, data: bytes | StorageError) -> bytes | ImageError:
    """Return the content of an image. Raises ``SourceError`` if the store failed, which says nothing of the image."""
    url = os.fsdecode(entry["path"])
    if entry["error"] is not None:
        return ImageError(entry["error"])
    if entry["size"] > LARGEST:
        return ImageError(f"The object has {entry['size']:,} bytes, more than fastres reads.")
    if isinstance(data, MissingObject):
        return ImageError("The object changed after it was listed: it does not exist any more.")
    if isinstance(data, DeniedObject):
        return ImageError(f"{data}.")
    if isinstance(data, StorageError):
        raise SourceError(str(data)) from data
    if len(data) == entry["size"]:
        return NamedBytes.of(data, url_text(url))
    with source_errors():
        now = objects.info(url)
        if now is not None and now.size == entry["size"]:  # the transfer was cut off
            return NamedBytes.of(objects.read(url, 0, now.size), url_text(url))
    has = "does not exist any more" if now is None else f"now has {now.size:,}"
    return ImageError(f"The object changed after it was listed: it had {entry['size']:,} bytes and {has}.")


@contextmanager
def opened_object(url: str) -> Iterator[tuple[BinaryIO, Callable[[], tuple[int, int]]]]:
    """Open an object for reading. The function asks the store for its present size in bytes and time in ns.

    Raises ``SourceError``, also for failures of the store in the block.
    """
    with source_errors():
        file, found = open_object(url)
        known = [(found.size, found.mtime_ns)]

        def facts() -> tuple[int, int]:
            return known.pop() if known else object_facts(url)

        yield io.BufferedReader(file), facts


def open_object(url: str) -> tuple[ObjectFile, Object]:
    """Return an object as a file, and what the store knows about it. Raises ``SourceError``."""
    with source_errors():
        found = objects.info(url)
        if found is None:
            raise SourceError(f"{url_text(url)!r} cannot be read: it does not exist any more; start again")
        return objects.open_input(url, found), found


def object_facts(url: str) -> tuple[int, int]:
    """Return the present size in bytes and time in ns of an object. Raises ``SourceError`` if it is gone."""
    with source_errors():
        found = objects.info(url)
    if found is None:
        raise SourceError(f"{url_text(url)!r} was deleted while it was being read; start again when it is complete")
    return found.size, found.mtime_ns
