"""The job of ``fastres classify``: the best classes of each image, and its embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fastres.images.categories import placeholders
from fastres.images.transforms import Transforms
from fastres.model.model import Model
from fastres.network.plan import LOGITS, POOLED
from fastres.text import dtype_name, path_text

from .batches import Reading
from .columns import Kinds
from .formats import PARQUET
from .lines import lines_of
from .parcels import Batch, padded
from .run import Rows
from .sources import Images
from .tables import Layout, Results


class ClassifyJob:
    """Classes and embeddings by ``model``; an output with this ``suffix`` must be able to hold them."""

    verb = "classify"

    def __init__(
        self, model: Model, reading: Reading, *, top_k: int, embed: bool, image_column: str | None, suffix: str
    ) -> None:
        self._model, self._reading = model, reading
        self._top_k, self._embed = top_k, embed
        self._image_column, self._suffix = image_column, suffix

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return self._reading.batch_size

    @property
    def workers(self) -> int:
        """Processes that decode images."""
        return self._reading.workers

    def begin(self, images: Images) -> tuple[Any, dict[str, Any]]:
        self._layout = layout_of(self._model, images.identity, self._top_k, self._embed)
        self._layout.check(self._suffix)
        columns, self._formed = _form(self._layout, self._suffix)
        return columns, self._settings()

    def pieces(self, images: Images, ranges: Sequence[range]) -> Generator[Batch, None, None]:
        return self._reading.batches(images, ranges, self._model.device)

    def rows(self, piece: Batch) -> Rows:
        rows = self._formed(classified(self._model, piece, self._reading.batch_size, self._layout))
        return Rows(piece.start, rows, sum(error is not None for error in piece.errors))

    def _settings(self) -> dict[str, Any]:
        model, layout = self._model, self._layout
        return {
            "model": model.architecture.name,
            "weights": path_text(model.weights) if model.weights else None,
            "weights_sha256": weights_sha256(model),
            "dtype": dtype_name(model.dtype),
            "transforms": transforms_setting(model.transforms),
            "class_names_sha256": sha256(json.dumps(_labels(model)).encode()) if layout.top_k else None,
            "decoder": self._reading.decoder,
            "image_column": self._image_column,
            "columns": layout.names,
        }


def _form(layout: Layout, suffix: str) -> tuple[Any, Callable[[Results], Any]]:
    """Return the columns as ``formats.open_writer`` wants them, and the function that makes the rows."""
    if suffix != PARQUET:
        return layout.names, partial(lines_of, layout, suffix)
    from .arrow_rows import ArrowRows

    rows = ArrowRows(layout)
    return rows.schema, rows.of


def layout_of(model: Model, identity: Kinds, top_k: int, embed: bool) -> Layout:
    """Return the columns for the ``top_k`` best classes of ``model``, and its embedding if ``embed``."""
    features = model.architecture.features if embed else 0
    return Layout(identity, min(top_k, model.num_classes), _labels(model), features)


def classified(model: Model, batch: Batch, batch_size: int, layout: Layout) -> Results:
    """Return what the rows of ``batch`` say; its pixels are on the model's device. A GPU gets ``batch_size`` images."""
    count, pixels = len(batch.errors), batch.pixels
    if pixels.is_cuda:
        pixels = padded(pixels, batch_size)
    wanted = ({"logits": LOGITS} if layout.top_k else {}) | ({"embedding": POOLED} if layout.embedding else {})
    values = model.values(pixels, wanted)
    logits = values["logits"][:count] if layout.top_k else torch.empty(count, 0, dtype=torch.float32, device="cpu")
    scores, indices = logits.softmax(1).topk(layout.top_k, dim=1)  # highest score first
    embedding = values["embedding"][:count].flatten(1).float().cpu() if layout.embedding else None
    return Results(batch.identity, batch.errors, indices.cpu(), scores.cpu(), embedding)


def transforms_setting(transforms: Transforms) -> dict[str, Any]:
    """Return ``transforms`` as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(transforms).items()}


def _labels(model: Model) -> tuple[str, ...]:
    return model.categories or placeholders(model.num_classes)


def sha256(content: bytes) -> str:
    """Return the sha256 of ``content`` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def weights_sha256(model: Model) -> str:
    """Return the sha256 of the parameters' names and values. It also identifies random and edited weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
