"""``fastres.classify`` and ``fastres classify``: a folder, tar shards or Parquet of images → one table of classes.

``sources`` finds the images (``tars``, ``parquet``), ``listing`` keeps their list, ``pixels`` decodes one, ``batches``
forms batches in worker processes, ``run`` puts them through the model, ``tables`` makes rows of the results, ``work``
keeps these safe until all are there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastres.errors import InputError, MissingDependencyError
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.predict import require_classifier

from .report import Report

__all__ = ["Report", "classify"]

CPU_BATCH, GPU_BATCH = 16, 128


def classify(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str | Model = "resnet50",
    weights: str | os.PathLike[str] | None = "DEFAULT",
    top_k: int = 5,
    embed: bool = False,
    decoder: str = "fast",
    batch_size: int | None = None,
    workers: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    image_column: str | None = None,
    columns: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Report:
    """Classify every image of ``source`` and write a table, one row an image, in a fixed order.

    ``source`` is a folder (searched for images, subfolders too), a glob, tar files (WebDataset) or Parquet files with
    image bytes; or several of one kind. ``output`` ends in ``.parquet``, ``.csv`` or ``.jsonl``. Its columns: ``path``;
    ``key`` (tar: WebDataset's ``__key__``) or ``row`` (Parquet, with the ``columns`` carried through); ``error``, null
    where all is well; ``label_1``, ``index_1``, ``score_1`` (softmax) and so on to ``top_k``; with ``embed`` also
    ``embedding``, the pooled features, float32. An image that cannot be read is a row with its error.

    ``model`` is a name for ``fastres.load``, with ``weights`` and ``dtype``, or a loaded model; ``device`` is a GPU
    where there is one. ``decoder="exact"`` sees the pixels that ``model.predict`` sees, ``"fast"`` (see
    :mod:`fastres.classification.pixels`) very nearly. ``workers`` processes decode (default: one a core; 0: none).

    Rows are kept in ``<output>.partial/`` until all are there: after an interruption, ``resume=True`` goes on. An
    existing output is replaced, or an interrupted run dropped, only with ``overwrite=True``.

    Raises ``SourceError``, ``OutputError``, ``ResumeError``, ``WorkerError``, ``InputError``, ``ClassifierError``,
    ``MissingDependencyError`` and what ``fastres.load`` raises.

    >>> fastres.classify("photos", "photos.parquet", embed=True)
    """
    _check_numbers(top_k=(top_k, 0 if embed else 1), batch_size=(batch_size, 1), workers=(workers, 0))
    from .pixels import DECODERS, FAST

    if decoder not in DECODERS:
        raise InputError(f"decoder is {decoder!r}; it is {' or '.join(map(repr, DECODERS))}")
    _check_dependencies(["pyarrow", *(["simplejpeg"] if decoder == FAST else [])])
    model = _model(model, weights, dtype, device)
    if top_k:
        require_classifier(model, "classify")
    from .batches import Reading, default_workers
    from .run import run

    reading = Reading(
        batch_size or (GPU_BATCH if model.device.type == "cuda" else CPU_BATCH),
        default_workers() if workers is None else workers,
        model.transforms,
        decoder,
    )
    return run(
        model,
        source,
        Path(output),
        reading,
        top_k=top_k,
        embed=embed,
        image_column=image_column,
        columns=tuple(columns),
        resume=resume,
        overwrite=overwrite,
        progress=sys.stderr.isatty() if progress is None else progress,
    )


def _model(
    model: str | Model,
    weights: str | os.PathLike[str] | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
) -> Model:
    if isinstance(model, Model):
        if (weights, dtype, device) != ("DEFAULT", "auto", None):
            raise InputError("weights, dtype and device go with a model's name; a loaded model has its own")
        return model
    return load(model, weights, dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    for name, (value, least) in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")


def _check_dependencies(packages: Sequence[str]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"classify needs {' and '.join(missing)}: pip install 'fastres[classify]'")
