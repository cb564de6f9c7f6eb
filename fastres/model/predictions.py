"""What ``model.predict`` returns: the most probable classes of an image."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from PIL import Image

from fastres import markup
from fastres.errors import ImageError
from fastres.images.decoding import load_image
from fastres.text import path_text

PICTURE_SIDE = 224  # pixels of the longer side of a picture in a notebook
_SHOWN = 3  # classes in the repr


@dataclass(frozen=True)
class Prediction:
    """One class of an image: its name, its index and its softmax probability."""

    label: str
    index: int
    score: float


@dataclass(frozen=True, repr=False)
class Predictions(Sequence[Prediction]):
    """The most probable classes of one image, the most probable first.

    It is a sequence: ``found[0]`` is the most probable :class:`Prediction`, and ``for prediction in found`` visits all
    in order. ``print(found)`` shows a line for each class, and a notebook shows the picture beside them. ``image`` is
    what ``predict`` was given if that was a single image; for an image of a list it is its path, or ``None`` if it has
    none, so that results keep no pixels alive.
    """

    ranked: tuple[Prediction, ...]
    image: Any = field(default=None, compare=False)

    @overload
    def __getitem__(self, rank: int) -> Prediction: ...
    @overload
    def __getitem__(self, rank: slice) -> Predictions: ...
    def __getitem__(self, rank: int | slice) -> Prediction | Predictions:
        return Predictions(self.ranked[rank], self.image) if isinstance(rank, slice) else self.ranked[rank]

    def __len__(self) -> int:
        return len(self.ranked)

    @property
    def top1(self) -> Prediction:
        """The most probable class."""
        return self.ranked[0]

    @property
    def name(self) -> str | None:
        """The image's path as text, or ``None`` if it has none."""
        path = _path(self.image)
        return None if path is None else path_text(path)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: ``{"image": name, "predictions": [{"label": …, "index": …, "score": …}, …]}``.

        These are the rows of ``fastres predict --json``. A score that is not finite is ``None``, because JSON has none.
        """
        rows = [
            {"label": p.label, "index": p.index, "score": p.score if math.isfinite(p.score) else None}
            for p in self.ranked
        ]
        return {"image": self.name, "predictions": rows}

    def __str__(self) -> str:
        lines = [f"  {prediction.score:7.2%}  {prediction.label}" for prediction in self.ranked]
        return "\n".join([self.name or "image", *lines])

    def __repr__(self) -> str:
        shown = [f"{prediction.label} {prediction.score:.1%}" for prediction in self.ranked[:_SHOWN]]
        more = ["…"] if len(self.ranked) > _SHOWN else []
        return f"Predictions({', '.join(shown + more)})"

    def _repr_html_(self) -> str:
        """Return the picture and a table, for notebooks. The picture is left out if it can no longer be read."""
        rows = [(f"{p.score:.2%}", p.label, f"{p.index}") for p in self.ranked]
        shown = markup.table([("score", "class", "index"), *rows], right=(0, 2), title=self.name or "")
        jpeg = self._picture()
        if jpeg is None:
            return shown
        picture = markup.picture(jpeg, self.name or "the image")
        return f"<div style='display:flex;flex-wrap:wrap;gap:16px;align-items:center'>{picture}{shown}</div>"

    def _picture(self) -> bytes | None:
        """Return the image as a small JPEG file, or ``None`` if it cannot be read (any more)."""
        if self.image is None:
            return None
        with contextlib.suppress(ImageError):
            if hasattr(self.image, "seek"):
                with contextlib.suppress(OSError, ValueError):  # a pipe, or closed
                    self.image.seek(0)
            small = load_image(self.image).copy()
            small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            small.save(file := io.BytesIO(), "jpeg", quality=85)
            return file.getvalue()
        return None


def kept_image(image: Any, alone: bool) -> Any:
    """Return what the result of ``image`` keeps: of an image in a list, or of an open file, only its path."""
    return image if alone and (isinstance(image, io.BytesIO) or not hasattr(image, "read")) else _path(image)


def _path(image: Any) -> str | None:
    """Return the path of an image that is a path, an open file, or a PIL image that was read from a file."""
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    attribute = "filename" if isinstance(image, Image.Image) else "name" if hasattr(image, "read") else ""
    found = getattr(image, attribute, None) if attribute else None
    return found if isinstance(found, str) and found else None
