"""``fastres.quantize`` and ``fastres quantize``: a model and images → the model in 8 bit.

``reading`` reads images from anywhere into a bounded sample (``samples``), ``labels`` their classes, and ``record``
describes the result. How the scales are found is in :mod:`fastres.quantisation`, which knows plans but no images.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fastres.arguments import whole_number
from fastres.errors import CalibrationWarning, InputError
from fastres.executors import int8_steps
from fastres.model.conversion import from_module
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.quantized import QuantizedModel
from fastres.network.quantisation import WEIGHT_LIMIT
from fastres.quantisation.search import AUTO, Search, check_keep, check_method, images_to_run
from fastres.terminal import progress_bar, warn

from .labels import Labels
from .reading import read
from .record import judged, make_record, record_text
from .samples import LEAST, Samples

__all__ = ["SAMPLES", "quantize", "record_text"]

SAMPLES = 512
MOST_BYTES = 2**30  # of the sample


def quantize(
    model: str | Model | nn.Module,
    images: Any,
    *,
    weights: str | os.PathLike[str] | None = "DEFAULT",
    categories: Any = None,
    transforms: Any = None,
    method: str = AUTO,
    keep: Collection[str] = (),
    largest_error: float | None = None,
    labels: Any = None,
    labels_order: str = "auto",
    samples: int = SAMPLES,
    weight_limit: int | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> QuantizedModel:
    """Return ``model`` in 8 bit, with scales that fit ``images``: a few hundred pictures like those it will see.

    ``model`` is a model, a module for :func:`fastres.from_module`, or a name for :func:`fastres.load`. ``weights``,
    ``categories`` and ``transforms`` are passed on. The float model does not change. ``images`` is a folder (with its
    subfolders), a glob, tar files or Parquet files, as for :func:`fastres.classify`, or any iterable of single images,
    as for :meth:`Model.predict`, which is read once. An image that cannot be read is left out, and a warning says how
    many were. At most ``samples`` images are kept, chosen at random (always the same ones); of a folder, archive or
    list of more than 10,000 files, 10,000 are read, at even distances.

    Half of the sample, but at most 256 images, measures the values. A quarter, at most 64, decides how the scales are
    found (``method``: ``"auto"``, or one of ``"max"``, ``"percentile"``, ``"percentile-99.9"``, ``"mse"``, ``"nmse"``,
    ``"nrmse"`` and ``"entropy"``), and if equalisation and bias correction help. All others judge the result:
    ``record["agreement"]`` of the returned model.

    ``keep`` names steps to compute in float32. With ``largest_error`` (0.02: 2 %), the most sensitive steps stay in
    float32 as well, until the mean relative error of an image's logits is at most this; ``record["kept"]`` names them.
    ``labels`` are the classes of the images: one for each in their order, a mapping from names, a file with either,
    ``"folders"``, or ``"auto"`` for those in folders, tars and Parquet files. They are used only for
    ``record["accuracy"]``. ``labels_order`` says what labels mean: ``"names"`` of classes, ``"wordnet"`` ids,
    ``"numbers"``, the order of the names as ``"text"``, or ``"auto"``, the one that fits. ``weight_limit`` is the
    largest level of a weight: by default 127, or 64 on a processor without VNNI instructions, which computes wrongly
    with more. ``workers`` processes decode files (default: two).

    Raises ``CalibrationError`` if there are fewer than 8 usable images, if these all have one colour or are the same,
    if the network gives NaN, or if ``largest_error`` cannot be reached; ``InputError`` for arguments, ``SourceError``
    for sources of images, ``MissingDependencyError`` for Parquet files without pyarrow, ``WorkerError``, and the errors
    of :func:`fastres.load`.

    >>> fastres.quantize("resnet50", "photos/").save("resnet50.int8.safetensors")
    """
    check_method(method)
    most = whole_number(samples, "samples", LEAST)
    limit = int8_steps.weight_limit() if weight_limit is None else whole_number(weight_limit, "weight_limit")
    if limit > WEIGHT_LIMIT:
        raise InputError(f"weight_limit is {limit}; give at most {WEIGHT_LIMIT}, the largest int8")
    if largest_error is not None and not largest_error > 0:
        raise InputError(f"largest_error is {largest_error!r}; give a number above 0, such as 0.02 for 2 %")
    loaded = _loaded(model, weights, categories, transforms)
    plan = loaded.plan_in(torch.float32, "cpu")
    check_keep(plan, keep)
    crop = loaded.transforms.crop
    if most * 3 * crop**2 > MOST_BYTES:
        raise InputError(
            f"samples is {most}, which takes more than 1 GiB at {crop}×{crop} pixels; give at most "
            f"{MOST_BYTES // (3 * crop**2)}"
        )
    classes = None if labels is None else Labels(labels, loaded, labels_order)
    hidden = None if progress is None else not progress
    with progress_bar(desc="read", unit="image", disable=hidden) as bar:
        sample = read(images, loaded.transforms, classes, most, workers, bar)
    steps = images_to_run(plan, len(sample.fit), len(sample.choose), crop, method)
    with progress_bar(total=steps, desc="measure", unit="image", disable=hidden) as bar:

        def advance(phase: str, count: int) -> None:
            bar.set_description_str(phase, refresh=False)
            bar.update(count)

        search = Search(plan, sample.fit, sample.choose, limit=limit, advance=advance)
        found = search.calibrate(method, keep, largest_error)
    record = make_record(loaded, sample, found, limit)
    quantized = QuantizedModel.of_plan(
        found.plan,
        transforms=loaded.transforms,
        categories=loaded.categories,
        weights=f"{loaded.weights}, in 8 bit",
        record=record,
    )
    quantized.record = {**record, **judged(quantized, plan, sample)}
    _warn_of_skipped(sample)
    return quantized


def _loaded(model: Any, weights: Any, categories: Any, transforms: Any) -> Model:
    given = {"weights": weights, "categories": categories, "transforms": transforms}
    if isinstance(model, Model):
        _refuse_8_bit(model)
        if list(given.values()) != ["DEFAULT", None, None]:
            raise InputError(
                "weights, categories or transforms were given with a loaded model, which has its own; leave them out, "
                "or pass a model's name"
            )
        return model
    if isinstance(model, nn.Module):
        return from_module(model, **{**given, "weights": None if weights == "DEFAULT" else weights})
    loaded = load(model, progress=True, **given)
    _refuse_8_bit(loaded)
    return loaded


def _refuse_8_bit(model: Model) -> None:
    if isinstance(model, QuantizedModel):
        raise InputError(f"This {model.architecture.name} is in 8 bit already; pass the float model")


def _warn_of_skipped(samples: Samples) -> None:
    if samples.skipped:
        first = "; ".join(reason for _, reason in samples.reasons[:3])
        warn(
            f"{samples.skipped:,} of {samples.read:,} calibration images could not be read, and were left out: "
            f"{first}{'; …' if samples.skipped > 3 else ''}",
            CalibrationWarning,
            stacklevel=3,
        )
