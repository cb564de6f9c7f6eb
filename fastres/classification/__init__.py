"""``fastres.classify`` and ``fastres classify``: classify a folder, tar shards or Parquet files of images into a table.

``sources`` finds the images: in folders and globs (``walking``, ``globs``), in tars (``archives``, ``tars``) and in
Parquet files (``parquet``, ``parquet_rows``, ``contents``); ``remote`` has what differs in object stores. ``listing``
stores their list. ``batches`` forms batches in worker processes, which ``parcels`` carries to the main one. ``run``
does a job for all of them, and ``job`` is the one of ``classify``: it runs the model, and ``tables`` turns the results
into rows. ``work`` keeps finished rows until the run is complete: ``shards`` are their files, ``folder`` is the place.
``formats`` writes the output. The decoders are in ``fastres.images``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastres.arguments import whole_number
from fastres.errors import InputError, MissingDependencyError
from fastres.files import refuse_inputs
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.predict import require_classifier
from fastres.terminal import is_terminal
from fastres.weights.sources import input_files

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
    categories: Any = None,
    image_column: str | None = None,
    columns: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Report:
    """Classify every image of ``source`` and write a table with one row per image, in a fixed order.

    ``source`` is a folder (its subfolders are searched as well), a glob, tar files (WebDataset) or Parquet files with
    image bytes, or a list of several sources of one kind. ``output`` is a file name that ends in ``.parquet``, ``.csv``
    or ``.jsonl``. The table has these columns:

    - ``path``;
    - ``key`` for tar files (WebDataset's ``__key__``), or ``row`` and the copied ``columns`` for Parquet files;
    - ``error``, which is null unless the image could not be read;
    - ``label_1``, ``index_1``, ``score_1`` (softmax), and so on up to ``top_k``;
    - ``embedding`` if ``embed``: the pooled features, float32.

    ``model`` is a loaded model, or a name for ``fastres.load``, which also gets ``weights``, ``dtype`` and
    ``categories``. ``device`` defaults to a GPU if there is one. With ``decoder="exact"`` the model gets exactly the
    pixels that ``model.predict`` uses; with ``"fast"`` they differ slightly (see :mod:`fastres.images.jpeg`).
    ``workers`` is the number of processes that decode images (default: one per core, up to 16; 0: decode in this
    process, which is also the default in a daemonic process, as those of ``multiprocessing.Pool`` are).

    Finished rows are kept in ``<output>.partial/`` until the run is complete. After an interruption, ``resume=True``
    continues the run. It checks the rows, computes damaged ones again, and warns of them (``ResumeWarning``). Only
    ``overwrite=True`` replaces an existing output or discards an interrupted run. An output is never an input.

    Raises ``SourceError``, ``OutputError``, ``ResumeError``, ``WorkerError``, ``InputError``, ``ClassifierError``,
    ``MissingDependencyError``, and the errors of ``fastres.load``.

    >>> fastres.classify("photos", "photos.parquet", embed=True)
    """
    top_k = whole_number(top_k, "top_k", 0 if embed else 1)
    batch_size = None if batch_size is None else whole_number(batch_size, "batch_size")
    workers = None if workers is None else whole_number(workers, "workers", 0)
    from fastres.images.jpeg import DECODERS, FAST

    if decoder not in DECODERS:
        raise InputError(f"decoder is {decoder!r}; use {' or '.join(map(repr, DECODERS))}")
    if isinstance(model, Model) and ((weights, dtype, device) != ("DEFAULT", "auto", None) or categories is not None):
        raise InputError(
            "weights, dtype, device or categories were given with a loaded model, which has its own; leave them out, "
            "or pass a model's name"
        )
    check_dependencies("classify", ["pyarrow", *(["simplejpeg"] if decoder == FAST else [])])
    from .batches import Reading, checked_workers
    from .job import ClassifyJob
    from .run import run
    from .sources import find
    from .work import check_output, work_folder

    workers = checked_workers(workers)
    output = Path(output)
    check_output(output, resume, overwrite)
    found = find(source)
    for place in (output, work_folder(output)):
        refuse_inputs(place, [*found.paths, *input_files(model, weights, categories)])
    if not isinstance(model, Model):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(model, weights, dtype=dtype, device=device, categories=categories)
    if top_k:
        require_classifier(model, "classify")
    reading = Reading(
        batch_size or (GPU_BATCH if model.device.type == "cuda" else CPU_BATCH),
        workers,
        model.transforms,
        decoder,
    )
    job = ClassifyJob(model, reading, top_k=top_k, embed=embed, image_column=image_column, suffix=output.suffix.lower())
    return run(
        job,
        found,
        output,
        image_column=image_column,
        columns=tuple(columns),
        resume=resume,
        overwrite=overwrite,
        progress=is_terminal(sys.stderr) if progress is None else progress,
    )


def check_dependencies(what: str, packages: Sequence[str]) -> None:
    """Raise ``MissingDependencyError`` if one of ``packages`` is not installed; ``what`` needs them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"{what} needs packages that are not installed ({' and '.join(missing)}): pip install 'fastres[classify]'"
        )
