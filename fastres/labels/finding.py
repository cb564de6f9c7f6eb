"""Find the class of every image of a source, and check all labels before a model runs."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from fastres.classification.listing import FILES, PARQUET, TAR
from fastres.classification.remote import shown
from fastres.classification.sources import FileImages, Found, Images
from fastres.classification.tars import TarImages
from fastres.classification.walking import has_image_suffix
from fastres.errors import LabelError
from fastres.images.categories import load
from fastres.images.classes import AUTO, TEXT, WORDNET, Matched, as_label, check_order, match_classes, match_labels
from fastres.storage.urls import is_url
from fastres.text import path_text

from .collected import NONE, Collected
from .files import FOLDERS, LabelFile, read_labels
from .folders import ClassFolders
from .named import Entries
from .tars import EXTENSION, tar_labels, tar_names

ACCEPTED = (
    "'folders' (one folder for each class), the path of a file with labels, a mapping from names to labels, or a list "
    "with one label for each image"
)


@dataclass(frozen=True)
class ImageLabels:
    """The classes of the images of a source.

    ``indices`` is int64 ``[images]``, with -1 for an image that has none: one that is damaged, or whose label is.
    ``source`` says where the labels are, ``order`` is the rule that gave the classes (one of
    :data:`fastres.images.classes.ORDERS`), and ``text`` says both in sentences. ``names`` are names of the classes if
    the model has none and the labels do. ``missing`` are the classes without any image.
    """

    indices: np.ndarray
    source: str
    order: str
    text: str
    names: tuple[str, ...] | None
    missing: tuple[int, ...]


def find_labels(
    given: Any,
    found: Found,
    images: Images,
    num_classes: int,
    categories: tuple[str, ...] | None,
    *,
    order: str = AUTO,
    label_column: str | None = None,
    allow_empty: bool = False,
    allow_extra: bool = False,
    setting: str = "order",
) -> ImageLabels:
    """Return the class of each of ``images``, which are those of ``found``, for a model with these classes.

    ``given`` is ``"folders"``, the path of a file (or what :func:`fastres.labels.files.read_labels` has read from it),
    a mapping from names to labels, a sequence with one label for each image, or ``"auto"``: the folders of a folder,
    the column of labels of Parquet files, the ``.cls`` members of tars.
    ``order`` is that of :func:`fastres.images.classes.match_classes`, and ``setting`` is what it is called in messages.
    ``label_column`` is a column of Parquet files or of a table, or the name of the member in a sample of a tar.
    ``allow_empty`` allows class folders without images, ``allow_extra`` entries of a file that match no image.

    Raises ``LabelError`` if labels are missing, wrong or ambiguous, and ``SourceError`` if a source has changed.
    """
    check_order(order, setting)
    if not num_classes:
        raise LabelError("labels were given, but the model has no classifier; leave them out")
    return _Finder(found, images, num_classes, categories or None, order, setting, label_column).find(
        _choice(given, found), allow_empty, allow_extra
    )


def _choice(given: Any, found: Found) -> Any:
    """Return what ``"auto"`` means for a source: ``"folders"``, or ``"auto"`` for labels in the source itself."""
    if isinstance(given, str) and given == FOLDERS and found.kind != FILES:
        raise LabelError(
            f"labels is 'folders', but a {found.kind} file has none; give 'auto' for the labels in the file, the path "
            "of a file with labels, a mapping or a list"
        )
    if not (isinstance(given, str) and given == AUTO) or found.kind != FILES:
        return given
    if all(part.is_folder for part in found.parts):
        return FOLDERS
    shown = path_text(found.description[0])
    raise LabelError(f"The images are files ({shown!r}), so it is not clear where their labels are; give {ACCEPTED}")


@dataclass(frozen=True)
class _Finder:
    found: Found
    images: Images
    num_classes: int
    categories: tuple[str, ...] | None
    order: str
    setting: str
    column: str | None

    def find(self, given: Any, allow_empty: bool, allow_extra: bool) -> ImageLabels:
        if isinstance(given, str) and given == FOLDERS:
            self._refuse_column("labels are 'folders'")
            return self._of_folders(allow_empty)
        if isinstance(given, str) and given == AUTO:
            return self._of_columns() if self.found.kind == PARQUET else self._of_members()
        if isinstance(given, (str, os.PathLike)):
            given = read_labels(given, self.column)
        if isinstance(given, LabelFile):
            if given.named is not None:
                return self._of_entries(given.named, given.text, allow_extra)
            return self._of_sequence(given.ordered or [], given.text)
        self._refuse_column("labels are not in columns")
        given = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(given, Mapping):
            return self._of_entries(given.items(), "labels", allow_extra)
        if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray, set, frozenset)):
            raise LabelError(f"labels is {reprlib.repr(given)}; give {ACCEPTED}")
        if isinstance(given, Iterator):  # it may have no end
            given = islice(given, len(self.images) + 1)
        return self._of_sequence(list(given), "labels")

    def _refuse_column(self, reason: str) -> None:
        if self.column is not None:
            raise LabelError(f"label_column is {self.column!r}, but {reason}; leave it out")

    def _of_folders(self, allow_empty: bool) -> ImageLabels:
        folders = ClassFolders(self.found)
        if self.order == AUTO and not set(folders.names) <= set(self.categories or ()):
            folders.check_splits()
        collected = folders.labels(self._entries(), len(self.images), allow_empty)
        names = {**dict.fromkeys(folders.names), **dict.fromkeys(map(str, collected.places))}
        matched = match_classes(
            list(names), self.num_classes, self.categories, self.order, setting=self.setting,
            where={str(name): place for name, place in collected.places.items()},
        )  # fmt: skip
        return self._result(collected, matched, "folders", matched.text)

    def _of_columns(self) -> ImageLabels:
        from fastres.classification.parquet import ParquetImages

        from .parquet import LabelColumn

        assert isinstance(self.images, ParquetImages)
        column = LabelColumn(self.images, self.column)
        collected, damaged = column.labels()
        source = f"column {column.name!r}"
        matched, are_indices = column.match(
            collected.places, self.num_classes, self.categories, self.order, self.setting
        )
        names = column.names if are_indices and column.names and len(column.names) == self.num_classes else None
        return self._result(collected, matched, source, f"{source}: {matched.text}", damaged, names)

    def _of_members(self) -> ImageLabels:
        extension = (self.column or EXTENSION).removeprefix(".")
        collected, damaged = tar_labels(self._entries(), len(self.images), extension)
        matched = self._match(collected.places)
        source = f".{extension} members"
        return self._result(collected, matched, source, f"{source}: {matched.text}", damaged)

    def _of_entries(self, pairs: Iterable[tuple[Any, Any]], source: str, extra: bool) -> ImageLabels:
        if self.found.kind == PARQUET:
            raise LabelError(
                f"{source} has labels by name, but rows of Parquet files have no names; give a list with one label for "
                "each row, or 'auto' for a column of the files"
            )
        entries = Entries(pairs, source, stems=self.found.kind == TAR)
        lost = any(map(_stands_for_several, self._entries()))
        collected = entries.match(self._names, len(self.images), extra or lost)
        matched = self._match(collected.places)
        return self._result(collected, matched, source, f"{source}: {matched.text}")

    def _of_sequence(self, given: list[Any], source: str) -> ImageLabels:
        count = len(self.images)
        if len(given) != count:
            raise LabelError(
                f"There {'is' if len(given) == 1 else 'are'} {len(given):,} label{'s' * (len(given) != 1)} for "
                f"{count:,} image{'s' * (count != 1)}; give one for each image"
            )
        collected = Collected(count)
        for row, value in enumerate(given):
            place = f"{source}[{row}]"
            collected.set(row, as_label(value, place), partial(str, place))
        matched = self._match(collected.places)
        return self._result(collected, matched, source, f"{source}, in the order of the images: {matched.text}")

    def _match(self, places: Mapping[int | str, str]) -> Matched:
        return match_labels(places, self.num_classes, self.categories, self.order, setting=self.setting)

    def _entries(self) -> Iterator[dict[str, Any]]:
        assert isinstance(self.images, (FileImages, TarImages))
        yield from self.images.listing.entries()

    def _names(self) -> Iterator[tuple[str | None, bool]]:
        """Yield the name of each image, for the entries of a file, and whether it can be read."""
        if self.found.kind == TAR:
            yield from tar_names(self._entries())
            return
        for entry in self._entries():
            path = os.fsdecode(entry["path"])
            yield (shown(path) if is_url(path) else path_text(os.path.abspath(path))), entry["error"] is None

    def _result(
        self, collected: Collected, matched: Matched, source: str, text: str, damaged: int = 0,
        names: tuple[str, ...] | None = None,
    ) -> ImageLabels:  # fmt: skip
        indices = collected.indices(matched.index)
        if self.categories is not None:
            names = None
        elif matched.order == TEXT and len(matched.index) == self.num_classes:
            names = tuple(path_text(name) for name in sorted(matched.index))
        elif matched.order == WORDNET:
            names = load("imagenet")
        if damaged:
            text += f". {damaged:,} label{'s are' if damaged > 1 else ' is'} in damaged parts of the files"
        present = np.bincount(indices[indices != NONE], minlength=self.num_classes)
        missing = tuple(np.flatnonzero(present == 0).tolist())
        return ImageLabels(indices, source, matched.order, text[:1].upper() + text[1:] + ".", names, missing)


def _stands_for_several(entry: Mapping[str, Any]) -> bool:
    """Return True for the entry of a damaged part of a tar, or of a folder that cannot be listed."""
    if entry["error"] is None:
        return False
    return entry["key"] is None if "key" in entry else not has_image_suffix(os.fsdecode(entry["path"]))
