"""Classes of image files from folders: the first folder below the source, or the folder of a file given by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial

from fastres.classification.listing import Entry
from fastres.classification.remote import class_folders
from fastres.classification.sources import Found
from fastres.classification.walking import children, has_image_suffix
from fastres.errors import LabelError, SourceError
from fastres.storage.urls import is_url
from fastres.text import path_text

from .collected import Collected

_SHOWN = 3
_SPLITS = frozenset(
    "train training val valid validation validate test testing eval evaluation dev holdout held_out".split()  # noqa: SIM905
)


class ClassFolders:
    """The class folders of a source of files.

    ``names`` are the names of the folders directly below the folders that were given, also empty ones and links to
    folders, but not hidden ones. They are as the system has them, and can have surrogates where they are not UTF-8.
    """

    def __init__(self, found: Found) -> None:
        self._tops = {
            part.path.rstrip("/"): part.path
            for part in reversed(found.parts)  # of two spellings of one folder, the first one
            if part.is_folder
        }
        self._order = {path: place for place, path in enumerate(reversed(self._tops))}
        self.names: dict[str, str] = {}  # and the path of the first folder with this name
        for path in self._tops.values():
            if is_url(path):
                for name in class_folders(path):
                    if not name.startswith("."):
                        self.names.setdefault(name, path + name)
                continue
            try:
                below = children(path)
            except OSError as error:
                raise SourceError(
                    f"{path_text(path)!r} cannot be listed: {error.strerror}; check its permissions"
                ) from error
            for child in below:
                if child.is_folder and not child.name.startswith("."):
                    self.names.setdefault(child.name, child.path)

    def of(self, path: str, is_error: bool = False) -> str | None:
        """Return the class folder of an image, or ``None`` if the image is directly in a folder that was given.

        The entry of an error can be a folder itself: one that cannot be listed.
        """
        tops = [end for end in _slashes(path) if path[:end] in self._order]
        if not tops:
            folder = os.path.dirname(path)
            return os.path.basename(folder if is_url(path) else os.path.abspath(folder))
        top = min(tops, key=lambda end: self._order[path[:end]])
        first, inside, _ = path[top:].lstrip("/").partition("/")
        if inside or (is_error and not has_image_suffix(first)):
            return first
        return None

    def labels(self, entries: Iterable[Entry], count: int, allow_empty: bool) -> Collected:
        """Return the names of the class folders of the images. Also those of folders without images are in ``places``.

        Raises ``LabelError`` if an image is in no class folder or, unless ``allow_empty``, a class folder has no image.
        """
        collected = Collected(count)
        outside: list[str] = []
        errors: list[tuple[int, str]] = []
        for row, entry in enumerate(entries):
            path, is_error = os.fsdecode(entry["path"]), entry["error"] is not None
            name = self.of(path, is_error)
            if name is None:
                outside += [path] * (not is_error)
            elif is_error:
                errors.append((row, name))
            else:
                collected.set(row, name, partial(_shown, path))
        for row, name in errors:
            if name in collected.places or name in self.names:
                collected.set(row, name, partial(_shown, self.names.get(name, name)))
        if outside:
            others = f" and {len(outside) - 1:,} more" * (len(outside) > 1)
            raise LabelError(
                f"{path_text(outside[0])!r}{others} {'are' if others else 'is'} directly in the source folder, and not "
                "in the folder of a class; give a folder with one folder for each class, or labels= with a file"
            )
        empty = [name for name in self.names if name not in collected.places]
        if empty and not allow_empty:
            shown = ", ".join(repr(path_text(self.names[name])) for name in empty[:_SHOWN])
            link = os.path.islink(self.names[empty[0]].rstrip("/"))
            raise LabelError(
                f"{len(empty):,} of {len(self.names):,} class folders {'has' if len(empty) == 1 else 'have'} no image: "
                f"{shown}{', …' * (len(empty) > _SHOWN)}; add images or remove the folder{'s' * (len(empty) > 1)}, or "
                f"allow empty folders (allow_empty){'. A link to a folder of the source counts as empty' * link}"
            )
        return collected

    def check_splits(self) -> None:
        """Raise ``LabelError`` if the folders are parts of a data set, such as ``train`` and ``val``."""
        if self.names and all(name.lower() in _SPLITS for name in self.names):
            first = min(self.names, key=lambda name: not name.lower().startswith(("val", "test")))
            raise LabelError(
                f"The folders are called {', '.join(map(repr, self.names))}, like parts of a data set, not classes; "
                f"give one of them, such as {path_text(self.names[first])!r}"
            )


def _shown(path: str) -> str:
    return f"the folder of {path_text(path)!r}"


def _slashes(path: str) -> Iterator[int]:
    """Yield the positions of the slashes in ``path``."""
    position = path.find("/")
    while position >= 0:
        yield position
        position = path.find("/", position + 1)
