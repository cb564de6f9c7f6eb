"""The classes of calibration images, in any form in which users have them, as class indices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastres.errors import LabelError
from fastres.images.classes import AUTO, as_label, check_order, match_classes, match_labels
from fastres.labels.files import FOLDERS, LabelFile, read_labels
from fastres.labels.named import Entries
from fastres.model.model import Model

if TYPE_CHECKING:
    from fastres.classification.sources import Found, Images

ORDER = "labels_order"  # the argument of ``quantize``


class Labels:
    """The class index of each image.

    ``given`` is a sequence or an iterator (in the order of the images), a mapping from images' names, the path of a
    file that holds either, ``"folders"``: the name of the folder that an image file is in, or ``"auto"``: the labels
    that the source of the images has. A label is a class index or the name of a class; ``order`` says what names mean,
    as in :func:`fastres.images.classes.match_classes`. Raises ``LabelError`` for what is none of these.

    Images of a source get their labels from :mod:`fastres.labels`, all at once. Single images of an iterable get them
    here, one after another.
    """

    def __init__(self, given: Any, model: Model, order: str = AUTO) -> None:
        check_order(order, ORDER)
        if not model.num_classes:
            raise LabelError("labels were given, but the model has no classifier; leave them out")
        self._count, self._categories, self._order = model.num_classes, model.categories, order
        self._ordered: list[int] | None = None
        self._entries: Entries | None = None
        self._left: Iterator[Any] | None = None
        self._index: dict[int | str, int] = {}  # the classes of the labels so far
        self._users: dict[str, str] = {}  # entries, and the images that have them
        self._of_source: np.ndarray | None = None
        self._from_source = isinstance(given, str) and given in (FOLDERS, AUTO)
        if isinstance(given, (str, os.PathLike)) and not self._from_source:
            given = read_labels(given)
        self._given = given = given.tolist() if hasattr(given, "tolist") else given
        if not self._from_source:
            self._read(given)

    def _read(self, given: Any) -> None:
        """Check labels that are known before the images are read."""
        name = given.text if isinstance(given, LabelFile) else "labels"
        named = given.named if isinstance(given, LabelFile) else None
        ordered = given.ordered if isinstance(given, LabelFile) else given
        if isinstance(given, Mapping):
            named = list(given.items())
        if named is not None:
            self._entries = Entries(named, name)
            places = {label: self._entries.place(entry) for entry, label in reversed(self._entries.labels.items())}
            self._index = self._matched(places)
        elif isinstance(ordered, Sequence) and not isinstance(ordered, (bytes, bytearray)):
            labels = [as_label(label, f"{name}[{number}]") for number, label in enumerate(ordered)]
            first = {label: f"{name}[{number}]" for number, label in reversed([*enumerate(labels)])}
            self._index = self._matched({label: first[label] for label in labels})
            self._ordered = [self._index[label] for label in labels]
        elif isinstance(ordered, Iterable):
            self._left = iter(ordered)
        else:
            raise LabelError(
                f"labels is {given!r}; give one label for each image, a mapping from names to labels, a file, or "
                f"{FOLDERS!r}"
            )

    def _matched(self, places: Mapping[int | str, str]) -> dict[int | str, int]:
        return dict(match_labels(places, self._count, self._categories, self._order, setting=ORDER).index)

    @property
    def in_order(self) -> bool:
        """True if the labels are an iterator, so that every image must be read in its order."""
        return self._left is not None

    def check_source(self, found: Found, images: Images) -> None:
        """Find the labels of all images of a source. Raises ``LabelError`` if they do not fit."""
        from fastres.labels.finding import find_labels

        if self._left is None:
            self._of_source = find_labels(
                self._given, found, images, self._count, self._categories,
                order=self._order, setting=ORDER, allow_empty=True, allow_extra=True,
            ).indices  # fmt: skip

    def check_count(self, images: int) -> None:
        """Raise ``LabelError`` if there are not as many labels as ``images``, as far as their number is known."""
        if self._ordered is not None and len(self._ordered) != images:
            raise LabelError(f"There are {len(self._ordered)} labels for {images} images; give one for each image")

    def of(self, name: str, position: int) -> int | None:
        """Return the label of the next image, which has this name and position.

        An image of a source has none (``None``) if its label is in a damaged part of the source.
        """
        if self._of_source is not None:
            found = int(self._of_source[position])
            return found if found >= 0 else None
        if self._from_source:
            return self._of_folder(name)
        if self._entries is not None:
            return self._of_name(name)
        if self._ordered is not None and position < len(self._ordered):
            return self._ordered[position]
        for label in self._left or ():
            place = f"labels[{position}]"
            label = as_label(label, place)
            if label not in self._index:
                self._index |= self._matched({label: place})
            return self._index[label]
        raise LabelError(f"There are only {position} labels, but more images; give one for each image")

    def _of_folder(self, name: str) -> int:
        if self._given != FOLDERS:
            raise LabelError(
                f"labels is {self._given!r}, but images is no folder, tar or Parquet file; give one label for each "
                "image"
            )
        folder = os.path.basename(os.path.dirname(name))
        if folder not in self._index:
            self._index |= match_classes(
                [folder], self._count, self._categories, self._order, setting=ORDER, where={folder: repr(name)}
            ).index
        return self._index[folder]

    def _of_name(self, name: str) -> int:
        assert self._entries is not None
        entry = next(self._entries.find(os.path.abspath(name)), None)
        if entry is None:
            raise LabelError(
                f"labels has no entry for {name!r}; give one for each image, by its path, the end of its path, or its "
                "file name"
            )
        other = self._users.setdefault(entry, name)
        if other != name:
            raise self._entries.ambiguous(entry, other, name)
        return self._index[self._entries.labels[entry]]
