"""The classes of calibration images, in any form in which users have them, as class indices."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from fastres.arguments import is_whole
from fastres.errors import InputError
from fastres.files import read_text_input
from fastres.model.model import Model

FOLDERS = "folders"


class Labels:
    """The class index of each image.

    ``given`` is a sequence or an iterator (in the order of the images), a mapping from images' names, the path of a
    file that holds either, or ``"folders"``: the name of the folder that an image file is in. A label is a class index
    or the name of a class. Raises ``InputError`` for what is none of these.
    """

    def __init__(self, given: Any, model: Model) -> None:
        if not model.num_classes:
            raise InputError("labels were given, but the model has no classifier; leave them out")
        self._count, self._arch = model.num_classes, model.architecture.name
        self._names = {name: index for index, name in enumerate(model.categories or ())}
        self._given: Any = given
        self._left: Iterator[Any] | None = None
        self.from_folders = isinstance(given, str) and given == FOLDERS
        if isinstance(given, (str, os.PathLike)) and not self.from_folders:
            self._given = _read(given)
        self._given = self._given.tolist() if hasattr(self._given, "tolist") else self._given
        if isinstance(self._given, Mapping):
            self._given = {str(name): self.index(label, f"labels[{name!r}]") for name, label in self._given.items()}
        elif not self.from_folders:
            if not isinstance(self._given, Iterable):
                raise InputError(
                    f"labels is {given!r}; give one label for each image, a mapping from names to labels, a file, or "
                    f"{FOLDERS!r}"
                )
            if isinstance(self._given, Sequence):
                self._given = [self.index(label, f"labels[{i}]") for i, label in enumerate(self._given)]
            else:
                self._left = iter(self._given)

    @property
    def in_order(self) -> bool:
        """True if the labels are an iterator, so that every image must be read in its order."""
        return self._left is not None

    def check_count(self, images: int) -> None:
        """Raise ``InputError`` if there are not as many labels as ``images``, as far as their number is known."""
        if isinstance(self._given, Sequence) and not self.from_folders and len(self._given) != images:
            raise InputError(f"There are {len(self._given)} labels for {images} images; give one for each image")

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ``InputError`` if an image file has no label; for folders, also find out what their names mean."""
        if self.from_folders:
            folders = sorted({_folder(name) for name in names})
            if len(folders) == self._count and not any(self._known(folder) for folder in folders):
                self._names = {folder: index for index, folder in enumerate(folders)}  # as torchvision's ImageFolder
            for folder in folders:
                self.index(folder, "A folder's name")
        elif isinstance(self._given, Mapping):
            absent = [name for name in names if self._named(name) is None]
            if absent:
                raise InputError(
                    f"labels has no entry for {absent[0]!r}{f' and {len(absent) - 1:,} others' * (len(absent) > 1)}; "
                    "give one for each image, by its path or file name"
                )

    def of(self, name: str, position: int) -> int:
        """Return the label of the next image, which has this name and position."""
        if self.from_folders:
            return self.index(_folder(name), f"The folder of {name!r}")
        if isinstance(self._given, Mapping):
            found = self._named(name)
            if found is None:
                raise InputError(f"labels has no entry for {name!r}; give one for each image")
            return found
        if self._left is None and position < len(self._given):
            return int(self._given[position])
        for label in self._left or ():
            return self.index(label, f"labels[{position}]")
        raise InputError(f"There are only {position} labels, but more images; give one for each image")

    def index(self, label: Any, what: str) -> int:
        """Return the class index of ``label``. Raises ``InputError``, which begins with ``what``."""
        found = self._known(label)
        if found is None:
            known = f"an index from 0 to {self._count - 1}" + (" or the name of a class" if self._names else "")
            raise InputError(
                f"{what} is {label!r}, which is no class of this {self._arch} with {self._count} classes; give {known}"
            )
        return found

    def _known(self, label: Any) -> int | None:
        if isinstance(label, str):
            label = self._names.get(label, int(label) if label.isdecimal() and len(label) < 10 else None)
        if label is None or not is_whole(label):
            return None
        return int(label) if 0 <= int(label) < self._count else None

    def _named(self, name: str) -> int | None:
        """Return the label of an image in a mapping: by its path, by the end of its path, or by its file name."""
        parts = name.split("/")
        return next((self._given[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in self._given), None)


def _folder(name: str) -> str:
    return os.path.basename(os.path.dirname(name))


def _read(path: str | os.PathLike[str]) -> Any:
    """Return the labels in a file: JSON, lines of ``name,label``, or one label a line."""
    try:
        text = read_text_input(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"labels: {os.fspath(path)!r} cannot be read ({reason}); give a file in UTF-8") from error
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"labels: {os.fspath(path)!r} is not JSON ({error})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    separator = "\t" if lines and "\t" in lines[0] else ","
    rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator))
    widths = set(map(len, rows))
    if widths == {2}:
        header = rows[0][1].strip().lower() in ("label", "class")
        return {name.strip(): label.strip() for name, label in rows[header:]}
    if widths == {1}:
        return [label.strip() for label in chain.from_iterable(rows)]
    raise InputError(
        f"labels: {os.fspath(path)!r} has lines with {', '.join(map(str, sorted(widths))) or 'no'} columns; give lines "
        "of 'name,label', one label a line, or JSON"
    )
