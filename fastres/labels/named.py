"""Match the names in a file or mapping of labels with images: by path, by the end of the path, or by file name."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from fastres.classification.walking import has_image_suffix
from fastres.errors import LabelError
from fastres.images.classes import as_label
from fastres.text import path_text

from .collected import NONE, Collected

_SHOWN = 3


class Entries:
    """Labels by name, as a file or mapping gives them. ``source`` is its name in messages.

    With ``stems``, the images' names have no suffix, as the keys of samples in tars. Raises ``LabelError`` if an entry
    is no label, or a name has two different labels.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], source: str, stems: bool = False) -> None:
        self.source = source
        self.labels: dict[str, int | str] = {}
        for given, value in pairs:
            name = _normal(_text(given))
            if stems and has_image_suffix(name):
                name = posixpath.splitext(name)[0]
            label = as_label(value, self.place(name))
            if self.labels.setdefault(name, label) != label:
                raise LabelError(
                    f"{source} has two entries for {name!r}: {self.labels[name]!r} and {label!r}; keep one"
                )

    def place(self, name: str) -> str:
        """Return where the label of an image is, for messages."""
        return f"{self.source}: the label of {name!r}"

    def find(self, name: str) -> Iterator[str]:
        """Yield the entries that mean the image ``name`` (a path without ``.`` and ``..``), the longest first."""
        for end in _ends(name):
            if end in self.labels:
                yield end

    def match(self, names: Callable[[], Iterable[tuple[str | None, bool]]], count: int, extra: bool) -> Collected:
        """Return the labels of images. ``names`` yields, for each, its name (or ``None``) and if it can be read.

        Raises ``LabelError`` if an entry means two images, two entries that differ mean one image, an image that can be
        read has no entry, or an entry means no image, unless ``extra`` entries are allowed.
        """
        found = Collected(count)
        owner = dict.fromkeys(self.labels, NONE)
        shorter: dict[str, int] = {}  # entries that mean an image with a longer one
        absent: list[str] = []
        for row, (name, readable) in enumerate(names()):
            ends = self.find(name) if name is not None else iter(())
            entry = next(ends, None)
            if entry is None:
                if readable:
                    absent.append(str(name))
                continue
            if owner[entry] != NONE:
                rows = (owner[entry], row)
                raise self.ambiguous(
                    entry, *(str(other) for number, (other, _) in enumerate(names()) if number in rows)
                )
            owner[entry] = row
            found.set(row, self.labels[entry], partial(self.place, str(name)))
            for other in ends:
                shorter.setdefault(other, row)
        self._check_unused(owner, shorter, names, extra)
        if absent:
            raise LabelError(
                f"{self.source} has no entry for {_some(absent)}; give one for each image, by its path, the end of its "
                "path, or its file name"
            )
        return found

    def _check_unused(
        self, owner: dict[str, int], shorter: dict[str, int], names: Callable[[], Iterable[Any]], extra: bool
    ) -> None:
        unused = [entry for entry, row in owner.items() if row == NONE]
        rows = set(shorter.values())
        by_row = {row: entry for entry, row in owner.items() if row in rows}
        for entry in unused:
            longer = by_row.get(shorter.get(entry, NONE))
            if longer is not None and self.labels[longer] != self.labels[entry]:
                raise LabelError(
                    f"{self.source} has two entries for one image: {longer!r} is {self.labels[longer]!r}, and "
                    f"{entry!r} is {self.labels[entry]!r}; keep one of them"
                )
        nobody = [entry for entry in unused if entry not in shorter]
        if nobody and not extra:
            first = next((name for name, _ in names() if name is not None), "")
            raise LabelError(
                f"{self.source} has entries that match no image: {_some(nobody)}; the first image is {first!r}. Give "
                "names that end like the paths of the images, and leave out other entries"
                + ". Write '/' in place of '\\'"
                * any("\\" in entry for entry in nobody)
            )

    def ambiguous(self, entry: str, one: str, two: str) -> LabelError:
        return LabelError(
            f"{self.source} has the entry {entry!r}, which means several images: {one!r} and {two!r}; give their "
            "folders as well"
        )


def _text(name: Any) -> str:
    """Return the name of an entry as text; names of files that are not UTF-8 as :func:`path_text` writes them."""
    if isinstance(name, str) and name.isprintable():
        return name
    try:
        return path_text(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    except UnicodeEncodeError:  # half of a pair of surrogates, from JSON
        return str(name)


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _ends(name: str) -> Iterator[str]:
    """Yield a path, its ends without one and more folders, and these without the suffix of an image."""
    position = 0
    starts = [0]
    while (position := name.find("/", position) + 1) > 0:
        starts.append(position)
    yield from (name[start:] for start in starts)
    if has_image_suffix(name):
        stem = posixpath.splitext(name)[0]
        yield from (stem[start:] for start in starts)


def _some(names: list[str]) -> str:
    others = len(names) - _SHOWN
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"{shown} and {others:,} other{'s' * (others > 1)}" if others > 0 else shown
