"""Walk through folders. Each real folder is visited once, whatever links lead to it, and no error stops the walk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from fastres.errors import SourceError
from fastres.files import other_kind
from fastres.text import path_text

if TYPE_CHECKING:
    from .listing import Entry

# Files in folders and tars count as images if they have one of these suffixes. Paths and globs may have any name.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .heif .jp2 .j2k".split()  # noqa: SIM905
)

Place = tuple[int, int]  # device and inode


class Child(NamedTuple):
    """An entry of a folder. If it is a link to nowhere, or may be a folder but cannot be asked, it has an ``error``."""

    name: str
    path: str
    is_folder: bool
    is_link: bool
    error: str | None


def has_image_suffix(name: str) -> bool:
    """Return True if ``name`` ends like the name of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def place(path: str) -> Place:
    """Return what identifies a folder under all its names. Raises ``OSError``."""
    facts = os.stat(path or os.curdir)
    return facts.st_dev, facts.st_ino


def children(folder: str) -> list[Child]:
    """Return the entries of ``folder``, sorted by name; ``""`` is the current folder. Raises ``OSError``."""
    with os.scandir(folder or os.curdir) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    return [_child(entry, os.path.join(folder, entry.name)) for entry in entries]


def _child(entry: os.DirEntry[str], path: str) -> Child:
    error, is_link, is_folder = None, entry.is_symlink(), False
    try:
        is_folder = entry.is_dir()
        if is_link and not is_folder:
            entry.stat()  # raises an error if the link leads nowhere
    except OSError as failure:
        error = f"{'The link' if is_link else 'The entry'} leads nowhere: {failure.strerror}."
    return Child(entry.name, path, is_folder, is_link, error)


def may_be_folder(child: Child) -> bool:
    """Return True if ``child`` cannot be asked what it is and, having no suffix, may well be a folder."""
    return child.error is not None and not os.path.splitext(child.name)[1]


def error_entry(path: str, error: str) -> Entry:
    """Return the entry of something that holds images, or should be one, but cannot be read."""
    return {"path": os.fsencode(path), "error": error}


def folder_error(path: str, error: OSError) -> Entry:
    """Return the entry of a folder that cannot be listed."""
    return error_entry(path, f"The folder cannot be listed: {error.strerror}. Images in it are missing.")


def file_entry(path: str) -> Entry:
    """Return the entry of an image file, with an error if it is not a regular file."""
    try:
        facts = os.stat(path)
    except OSError as error:
        kind = "link leads nowhere" if os.path.islink(path) else "file cannot be read"
        return error_entry(path, f"The {kind}: {error.strerror}.")
    if (other := other_kind(facts.st_mode)) is not None:
        return error_entry(path, f"It is {other}, not a regular file.")
    return {"path": os.fsencode(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


class Walk:
    """A walk through the folders of all sources of a run, one after another.

    Links to folders are followed at the end of the walk, if their targets have not been visited until then. So paths
    are real ones where possible, and images are found once.
    """

    def __init__(self) -> None:
        self.hidden = 0  # names of images that were left out because they begin with a dot
        self._visited: set[Place] = set()
        self._links: deque[str] = deque()
        self._given: set[tuple[Place, str]] = set()  # folder and name of the files that globs have matched
        self._folder: tuple[str | None, Place] = None, (0, 0)  # of the last match

    def folder(self, path: str) -> Iterator[Entry]:
        """Yield the images in a source folder and its subfolders. Raises ``SourceError`` if it cannot be listed."""
        try:
            os.scandir(path).close()
        except OSError as error:
            raise SourceError(
                f"{path_text(path)!r} cannot be listed: {error.strerror}; check its permissions"
            ) from error
        yield from self._tree(path)

    def links(self) -> Iterator[Entry]:
        """Yield the images in the folders that are left: the targets of links."""
        while self._links:
            yield from self._tree(self._links.popleft())

    def is_new_match(self, path: str) -> bool:
        """Return True if a glob has matched the file ``path`` and no folder or glob before had it."""
        folder, name = os.path.split(path)
        try:
            if folder != self._folder[0]:
                self._folder = folder, place(folder)
        except OSError:
            return True  # the caller will find out
        where = self._folder[1], name
        if where in self._given:
            return False
        self._given.add(where)
        return where[0] not in self._visited or not has_image_suffix(name) or name.startswith(".")

    def _tree(self, top: str) -> Iterator[Entry]:
        """Yield the images in the tree, sorted by name; skip names that begin with a dot."""
        stack = [self._visit(top)]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
            elif isinstance(item, str):
                stack.append(self._visit(item))
            else:
                yield item

    def _visit(self, folder: str) -> Iterator[Entry | str]:
        """Yield the images in ``folder`` and the paths of its subfolders, in order."""
        try:
            where = place(folder)
            if where in self._visited:
                return
            self._visited.add(where)
            found = children(folder)
        except OSError as error:
            yield folder_error(folder, error)
            return
        for child in found:
            image = not child.is_folder and has_image_suffix(child.name)
            if child.name.startswith("."):
                self.hidden += image
            elif child.is_folder and child.is_link:
                self._links.append(child.path)
            elif child.is_folder:
                yield child.path
            elif image and (where, child.name) not in self._given:
                yield file_entry(child.path)
            elif child.error is not None and may_be_folder(child):
                yield error_entry(child.path, child.error)
