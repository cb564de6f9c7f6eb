"""``model.predict``: classify images of any kind and return named classes."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.arguments import whole_number
from fastres.errors import ClassifierError, ImageError
from fastres.images.transforms import MAX_THREADS, Transforms, batch_sources, is_one_image
from fastres.network.architectures import Architecture
from fastres.terminal import is_terminal, progress_bar

from .predictions import Prediction, Predictions, kept_image


class Classifier(Protocol):
    """The part of :class:`fastres.Model` that :func:`predict` uses."""

    architecture: Architecture
    categories: tuple[str, ...] | None
    transforms: Transforms

    @property
    def num_classes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, x: Tensor) -> Tensor: ...


def predict(
    model: Classifier, images: Any, top_k: int, *, batch_size: int = 32, progress: bool | None = None
) -> Predictions | list[Predictions]:
    """See :meth:`fastres.Model.predict`."""
    top_k, batch_size = whole_number(top_k, "top_k"), whole_number(batch_size, "batch_size")
    require_classifier(model, "predict")
    sources = batch_sources(images)
    if progress is None:
        progress = len(sources) > batch_size and is_terminal(sys.stderr)
    ranked: list[tuple[Prediction, ...]] = []
    with progress_bar(total=len(sources), desc="predict", unit="image", disable=not progress) as bar:
        for start in range(0, len(sources), batch_size):
            chunk = sources[start : start + batch_size]
            pixels = model.transforms.batch(chunk, first_index=start)
            logits = model(pixels.to(model.device))
            ranked += top_predictions(logits, top_k, model.categories)
            bar.update(len(chunk))
    return results_of(images, sources, ranked)


def results_of(images: Any, sources: list[Any], ranked: Iterable[tuple[Prediction, ...]]) -> Any:
    """Return the ``ranked`` classes of ``sources`` as ``predict(images)`` returns them: one result, or a list."""
    alone = is_one_image(images)
    results = [Predictions(row, kept_image(source, alone)) for source, row in zip(sources, ranked, strict=True)]
    return results[0] if alone else results


def predict_each(
    model: Classifier, images: Iterable[tuple[str, Any]], top_k: int, batch_size: int
) -> Iterator[tuple[str, Predictions | ImageError]]:
    """Yield the name and the predictions of each image, or the ``ImageError`` of one that cannot be read, in order.

    ``images`` are names, each with an image, an ``ImageError``, or a function that returns either and is called in a
    thread. At most ``batch_size`` images are in memory.
    """
    require_classifier(model, "predict")

    def pixels(image: Any) -> Tensor | ImageError:
        try:
            image = image() if callable(image) else image
            return image if isinstance(image, ImageError) else model.transforms.pixels(image)
        except ImageError as error:
            return error

    left = iter(images)
    with ThreadPoolExecutor(min(batch_size, MAX_THREADS, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(left, batch_size)):
            read = list(pool.map(pixels, [image for _, image in chunk]))
            good = [image for image in read if isinstance(image, Tensor)]
            predictions: Iterator[tuple[Prediction, ...]] = iter(())
            if good:
                batch = torch.stack(good).to(model.device).contiguous(memory_format=torch.channels_last)
                predictions = iter(top_predictions(model(batch), top_k, model.categories))
            for (name, source), image in zip(chunk, read, strict=True):
                if isinstance(image, ImageError):
                    yield name, image
                else:
                    yield name, Predictions(next(predictions), kept_image(source, False))


def require_classifier(model: Classifier, what: str) -> None:
    """Raise ``ClassifierError`` if ``model`` has no classifier. ``what`` is the caller's name."""
    if not model.num_classes:
        raise ClassifierError(
            f"{what} needs a classifier, but this {model.architecture.name} has none (num_classes=0); "
            "load the model with its classifier, or call model.embed(x) for the pooled features [N, C]"
        )


def top_predictions(logits: Tensor, top_k: int, categories: tuple[str, ...] | None) -> list[tuple[Prediction, ...]]:
    """Return the ``top_k`` classes of each row of ``logits`` ``[N, classes]``, the most probable first."""
    scores, indices = logits.softmax(1).topk(min(top_k, logits.shape[1]), dim=1)
    return [
        tuple(
            Prediction(categories[index] if categories else f"class {index}", index, score)
            for index, score in zip(row_indices, row_scores, strict=True)
        )
        for row_indices, row_scores in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
