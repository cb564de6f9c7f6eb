"""``fastres.classify`` and ``fastres classify``: classify a folder, tar shards or Parquet files of images into a table.

``sources`` finds the images: in folders and globs (``walking``, ``globs``), in tars (``archives``, ``tars``) and in
Parquet files (``parquet``, ``parquet_rows``, ``contents``); ``remote`` has what differs in object stores. ``listing``
stores their list, and ``columns`` says what identifies a row. ``batches`` forms batches in worker processes, which
``parcels`` carries to the main one. ``run`` does a job for all of them, and ``job`` is the one of ``classify``: it runs
the model. ``tables`` has the columns of the output. Rows are ``lines`` of CSV and JSON Lines, or ``arrow_rows`` for
Parquet. ``work`` keeps finished rows until the run is complete: ``parts`` are their files (``arrow_parts`` those of
Parquet), ``folder`` is the place. ``formats`` writes the output. The decoders are in ``fastres.images``.

pyarrow is imported only by the modules of Parquet files: ``arrow_rows``, ``arrow_parts``, ``parquet``,
``parquet_rows``, ``contents``, and ``copied``, which turns their columns into text.

A run of several processes has no lock but a meeting place, the work folder (``places``, ``store_place``, ``outputs``),
and a manifest (``manifests``) that they agree on. Each is a ``shared`` run and computes ``shards`` of it. ``joining``
writes the output. ``driving`` gives out the shards: to ``processes`` of this machine, or to the actors of
``fastres.ray``. ``planning`` is the dry run. ``requests`` has the arguments, which all of them need. ``browsing`` makes
a page of a complete table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastres.arguments import whole_number
from fastres.errors import InputError, OutputError
from fastres.extras import check_dependencies
from fastres.files import refuse_inputs
from fastres.model.model import Model
from fastres.storage.urls import is_url
from fastres.terminal import is_terminal

from .formats import PARQUET
from .report import Report
from .requests import CPU_BATCH, GPU_BATCH, HTML_PICTURES, Request, Sources
from .shards import Shard

if TYPE_CHECKING:
    from .planning import Plan

__all__ = [
    "CPU_BATCH",
    "GPU_BATCH",
    "HTML_PICTURES",
    "Report",
    "classify",
    "join_shards",
    "plan_shards",
]


def classify(
    source: Sources,
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
    shard: str | tuple[int, int] | None = None,
    processes: int | None = None,
    html: str | os.PathLike[str] | None = None,
    html_pictures: int = HTML_PICTURES,
    progress: bool | None = None,
) -> Report:
    """Classify every image of ``source`` and write a table with one row per image, in a fixed order.

    ``source`` is a folder (its subfolders are searched as well), a glob, tar files (WebDataset) or Parquet files with
    image bytes, or a list of several sources of one kind. ``output`` is a file name that ends in ``.parquet``, ``.csv``
    or ``.jsonl``. All can be paths, or URLs of object stores (``s3://``, ``gs://``). The table has these columns:

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

    ``processes`` of this machine share out the images. The default is one for each GPU if ``device`` is ``"cuda"``, or
    ``None`` and there are several, and otherwise one. An interrupted run of several processes continues when it is
    called again. ``workers`` then counts for each of them.

    ``shard="3/16"`` computes only the rows of the third of 16 shards. Any number of processes can do that at any time,
    on all machines that see ``source`` and ``output`` under the same names. :func:`fastres.join_shards` then writes the
    table. It is the same, byte for byte, as that of one process. A shard continues where an earlier run of it ended.

    ``html`` is the path of a page to look through the results, which is written when the table is complete: one file
    with at most ``html_pictures`` thumbnails. See :func:`fastres.classification.browsing.browse`, which makes the page
    of a table that exists. A shard has no table, so it cannot have a page.

    Raises ``SourceError``, ``OutputError``, ``ResumeError``, ``WorkerError``, ``InputError``, ``ClassifierError``,
    ``MissingDependencyError``, ``ShardError``, and the errors of ``fastres.load``.

    >>> fastres.classify("photos", "photos.parquet", embed=True)
    """
    progress = is_terminal(sys.stderr) if progress is None else progress
    request = Request(
        source,
        _suffix(output),
        model=model,
        weights=weights,
        top_k=top_k,
        embed=embed,
        decoder=decoder,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        categories=categories,
        image_column=image_column,
        columns=columns,
    )
    if processes is not None:
        processes = whole_number(processes, "processes")
    if shard is not None:
        if html is not None:
            raise InputError(
                "html was given with a shard, which has no table; write the page when the shards are joined"
            )
        if processes is not None:
            raise InputError("shard and processes were both given; start a process for each shard instead")
        return _shard(request, output, Shard.of(shard), overwrite, progress)
    if html is None:
        return _whole(request, output, processes, resume, overwrite, progress)
    from .browsing import browse_report, check_page

    if not request.top_k:
        raise InputError("html was given with top_k=0, but the page shows classes; give a top_k of at least 1")
    page = check_page(html, [os.fspath(output), *request.sources, *request.input_files], overwrite, html_pictures)
    report = _whole(request, output, processes, resume, overwrite, progress)
    browse_report(report, page, html_pictures, request, progress)
    return replace(report, html=page)


def _whole(
    request: Request,
    output: str | os.PathLike[str],
    processes: int | None,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> Report:
    """Write the table of all images, in this process or in several."""
    from .processes import devices
    from .run import run
    from .sources import find
    from .work import check_output, work_folder

    is_loaded = isinstance(request.model, Model)
    places = [] if is_loaded and processes in (None, 1) else devices(request.device, processes)
    if len(places) > 1 or is_url(output):
        return _driven(request, output, places, resume, overwrite, progress)
    output = Path(output)
    check_output(output, resume, overwrite)
    found = find(request.source)
    for place in (output, work_folder(output)):
        refuse_inputs(place, [*found.paths, *request.input_files])
    return run(
        request.job(request.opened_model()),
        found,
        output,
        image_column=request.image_column,
        columns=tuple(request.columns),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def _shard(request: Request, output: str | os.PathLike[str], shard: Shard, overwrite: bool, progress: bool) -> Report:
    from .outputs import place_of
    from .shared import classify_shard

    return classify_shard(request, place_of(output, overwrite), shard, progress=progress)


def _driven(
    request: Request, output: str | os.PathLike[str], devices: list[str], resume: bool, overwrite: bool, progress: bool
) -> Report:
    """Classify in several processes, or to an object store."""
    from .driving import ThisProcess, drive
    from .outputs import place_of
    from .processes import Processes

    place = place_of(output, overwrite)
    several = len(devices) > 1
    with Processes(request, place, devices) if several else ThisProcess(request, place) as crew:
        return drive(crew, request, place, resume=resume, progress=progress)


def plan_shards(
    source: Sources,
    output: str | os.PathLike[str],
    *,
    shards: int = 1,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Plan:
    """Return what ``classify`` would do with these arguments in ``shards`` shards, and how long. Nothing is written.

    The images are listed, unless the run has begun, and some of them are classified to measure the speed of this
    machine. ``options`` are those of :func:`classify`. Raises its errors, as far as they show before the first row.

    >>> print(fastres.plan_shards("photos", "photos.parquet", shards=16))
    """
    request = Request(source, _suffix(output), **options)
    from .outputs import place_of
    from .planning import plan
    from .shared import RunFinishedError, refuse_finished

    place = place_of(output)
    count = whole_number(shards, "shards")
    if not overwrite:
        try:
            refuse_finished(request, place)
        except RunFinishedError as end:
            raise OutputError(
                f"{place.output!r} is complete since {end.manifest['finished']}; use --overwrite"
            ) from None
    return plan(request, place, count, is_terminal(sys.stderr) if progress is None else progress)


def _suffix(output: str | os.PathLike[str]) -> str:
    return os.path.splitext(output)[1].lower()


def join_shards(output: str | os.PathLike[str], *, overwrite: bool = False, progress: bool | None = None) -> Report:
    """Join the shards of ``output``, which ``classify(…, shard=…)`` has computed, into the table.

    Also writes ``<output>.manifest.json``: the sha256 of the table, its settings and its numbers of images and errors.
    It comes last, so where it is, the table is complete. The work folder is deleted.

    Raises ``ResumeError`` if rows are missing (it says which, and which shards to run again), and ``OutputError`` if
    there are no shards, if the table exists (unless ``overwrite``) or if it cannot be written.

    >>> fastres.classify("photos", "photos.parquet", shard="1/2")
    >>> fastres.classify("photos", "photos.parquet", shard="2/2")
    >>> fastres.join_shards("photos.parquet")
    """
    if _suffix(output) == PARQUET:
        check_dependencies("Parquet output", ["pyarrow"])
    from .joining import join
    from .outputs import place_of

    progress = is_terminal(sys.stderr) if progress is None else progress
    place = place_of(output)
    if overwrite and place.manifest():  # otherwise the output is that of the run
        place.replace_output()
    return join(place, progress=progress)
