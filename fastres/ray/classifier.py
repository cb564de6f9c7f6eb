"""The classes of the images in a table, batch by batch: a callable class for Ray's ``map_batches``."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from fastres.arguments import whole_number
from fastres.classification import CPU_BATCH, GPU_BATCH
from fastres.classification.arrow_rows import ArrowRows
from fastres.classification.batches import decode_into
from fastres.classification.job import classified, layout_of
from fastres.classification.parcels import Batch, black
from fastres.classification.requests import check_decoder_package, refuse_options_of_loaded
from fastres.errors import ImageError, InputError
from fastres.images.jpeg import FAST, check_decoder, decoder
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.predict import require_classifier

from .batches import column_names, find_image_column, images, with_columns
from .share import assigned, suitable_device, use_threads


class Classifier:
    """Classify the images of a batch: a callable class for ``map_batches`` of Ray, which also works without Ray.

    ``model``, ``weights``, ``top_k``, ``embed``, ``decoder``, ``dtype`` and ``categories`` are those of
    ``fastres.classify``. Paths must exist on every node. ``device`` defaults to the GPU that Ray has assigned to the
    actor (``num_gpus``), and to the CPU if it has assigned none; without Ray, to a GPU if there is one.
    ``image_column`` is a column of bytes, or of structs with a field ``bytes``. It defaults to ``image``, or to the
    only such column. ``drop_images`` leaves it out of the result.

    ``batch_size`` is the largest number of images that the model gets at once; the default is 16 on a CPU and 128 on a
    GPU. Larger batches are cut into pieces of this size. ``threads`` is the number of threads that decode images; the
    default is the number of cores that Ray has assigned (``num_cpus``), or all without Ray.

    Raises ``InputError`` for these arguments, ``DeviceError`` for a GPU that Ray has not assigned, ``ClassifierError``,
    ``MissingDependencyError``, and the errors of ``fastres.load``.

    >>> ds.map_batches(
    ...     fastres.ray.Classifier, fn_constructor_kwargs={"model": "resnet50"}, batch_size=64, num_gpus=1,
    ...     compute=ray.data.ActorPoolStrategy(size=2),
    ... )
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model = "resnet50",
        weights: str | os.PathLike[str] | None = "DEFAULT",
        *,
        top_k: int = 5,
        embed: bool = False,
        decoder: str = FAST,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        categories: Any = None,
        image_column: str | None = None,
        drop_images: bool = False,
        batch_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        top_k = whole_number(top_k, "top_k", 0 if embed else 1)
        batch_size = None if batch_size is None else whole_number(batch_size, "batch_size")
        threads = None if threads is None else whole_number(threads, "threads")
        check_decoder(decoder)
        check_decoder_package(decoder, "ray")
        refuse_options_of_loaded(model, weights, dtype, device, categories)
        share = assigned()
        if not isinstance(model, Model):
            device = suitable_device(share, device)
            model = load(model, weights, dtype=dtype, device=device, categories=categories, progress=False)
        if top_k:
            require_classifier(model, "classify")
        self._model, self._decoder = model, decoder
        self._layout = layout_of(model, (), top_k, embed)
        self._layout.check(".parquet")
        self._formed = ArrowRows(self._layout)
        self._image_column, self._drop_images = image_column, drop_images
        self._batch_size = batch_size or (GPU_BATCH if model.device.type == "cuda" else CPU_BATCH)
        self._largest = 0  # piece so far
        self._pool = _decoders(threads or use_threads(share))

    def __call__(self, batch: Any) -> Any:
        """Return ``batch``, a table of N rows, with the columns ``error``, ``label_1``, ``index_1``, ``score_1``, ….

        ``batch`` is a dict of NumPy arrays ``[N, …]``, a pandas DataFrame or an Arrow table. The result has the same
        format and the same rows. The new columns are those of ``fastres.classify``: ``error`` (string) is null, or the
        reason why the image cannot be read, and then the others are null. ``label_k`` is a string, ``index_k`` int32
        and ``score_k`` (softmax) float32, for the k-th best class. ``embedding`` is a list of C float32 values.

        They have these types in Arrow, and in pandas as ``ArrowDtype``. NumPy has no null: ``error`` and ``label_k``
        are object arrays with "" for null, ``index_k`` is int32 with −1, ``score_k`` is float32 and ``embedding``
        float32 ``[N, C]``, both with NaN. Ray stores null for these, but ``embedding`` as a tensor column with NaN.

        Raises ``InputError`` if ``batch`` has another format, no column of images, or a column with one of these names.
        """
        names = column_names(batch)
        twins = [name for name in self._layout.names if name in names]
        if twins:
            raise InputError(
                f"The batch already has columns that the classifier adds ({', '.join(twins)}); rename or drop them "
                "first, with ds.rename_columns or ds.drop_columns"
            )
        if self._image_column is None:
            self._image_column = find_image_column(batch)
        found = images(batch, self._image_column)
        added = pa.Table.from_batches(self._rows(found), self._formed.schema)
        return with_columns(batch, added, self._image_column if self._drop_images else None)

    def _rows(self, found: Sequence[bytes | ImageError]) -> list[pa.RecordBatch]:
        """Return the new columns, piece by piece. The next piece is decoded while the model runs."""
        pieces = [found[start : start + self._batch_size] for start in range(0, len(found), self._batch_size)]
        rows, waiting = [], [self._decoding(piece) for piece in pieces[:1]]
        for following in [*pieces[1:], None]:
            if not waiting:
                break
            pixels, decoded = waiting.pop()
            errors = tuple(future.result() for future in decoded)
            if following is not None:
                waiting.append(self._decoding(following))
            self._largest = max(self._largest, len(errors))
            piece = Batch(0, {}, pixels.to(self._model.device), errors)
            results = classified(self._model, piece, self._largest, self._layout)
            rows.append(self._formed.of(results))
        return rows

    def _decoding(self, piece: Sequence[bytes | ImageError]) -> tuple[Tensor, list[Future[str | None]]]:
        """Begin to decode a piece; return the pixels, and the error message or ``None`` of each image to come."""
        transforms, decode = self._model.transforms, decoder(self._decoder)
        pixels = black(len(piece), transforms.crop)
        return pixels, [
            self._pool.submit(decode_into, target, source, decode, transforms)
            for target, source in zip(pixels, piece, strict=True)
        ]


def _decoders(count: int) -> ThreadPoolExecutor:
    """Return a pool of ``count`` threads. Each decodes images by itself: torch starts no further threads for it."""
    before, started = torch.get_num_threads(), threading.Barrier(count)
    pool = ThreadPoolExecutor(count, "fastres-decoder", lambda: torch.set_num_threads(1))
    list(pool.map(lambda _: started.wait(), range(count)))  # all of them exist now
    torch.set_num_threads(before)  # the number for threads that are yet to come, such as the one of Ray that calls us
    return pool
