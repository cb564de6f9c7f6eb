"""``fastres.evaluate`` and ``fastres evaluate``: how accurate and how fast models are on labelled images.

``given`` checks what the user names, and ``choices`` turns it into ``candidates``: models (``engines``) and exported
files (``exported``). ``place`` checks the folder for the output. ``labels`` finds the class of each image. The images
come from the readers of :mod:`fastres.classification`. ``job`` asks every candidate for its answers, and ``tables``
turns them into rows. From the finished table, ``summary`` makes the ``result``: accuracy (``metrics``), ``agreement``
with a reference, ``layers`` and ``speed``. ``run`` does all this in order, and ``html_report`` writes it down, with
``pictures``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastres.arguments import whole_number
from fastres.classification.requests import check_decoder_package
from fastres.errors import InputError
from fastres.extras import check_dependencies
from fastres.files import refuse_inputs
from fastres.images.categories import placeholders
from fastres.terminal import is_terminal
from fastres.weights.sources import input_files

from .result import Evaluation, ModelResult

__all__ = ["Evaluation", "ModelResult", "evaluate"]

AUTO = "auto"


def evaluate(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    models: Any = "resnet50",
    output: str | os.PathLike[str] | None = None,
    *,
    labels: Any = AUTO,
    class_order: str = AUTO,
    label_column: str | None = None,
    allow_empty: bool = False,
    against: Any = None,
    dtypes: Any = AUTO,
    engines: Any = None,
    weights: Any = "DEFAULT",
    categories: Any = None,
    device: torch.device | str | None = None,
    calibrate_on: Any = None,
    decoder: str = "exact",
    batch_size: int | None = None,
    workers: int | None = None,
    image_column: str | None = None,
    columns: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    command: str | None = None,
) -> Evaluation:
    """Measure how accurate and how fast ``models`` are on the images of ``source``.

    ``source`` is a folder, a glob, tar files or Parquet files, as for :func:`fastres.classify`. A model is a name for
    :func:`fastres.load` (with ``weights`` and ``categories``), a loaded one, a module for :func:`fastres.from_module`,
    or a file that ``model.save``, ``fastres.quantize`` or ``fastres export`` wrote (``.onnx``, ``.pt2``). ``models`` is
    one, a list, or a mapping from names of your own. All must have the same classes.

    Each model is measured in each of ``dtypes`` (``"float32"``, ``"bfloat16"``, ``"float16"``; ``"int8"`` with scales
    from the images ``calibrate_on``) and by each of ``engines``: ``"fastres"``, ``"eager"`` (PyTorch's own operations),
    ``"onnxruntime"`` and ``"openvino"``. Exported files have their own dtype, and run in ONNX Runtime or in those of
    ``engines`` that can open them.

    ``labels`` are the classes of the images: ``"folders"`` (the first folder below ``source``), one for each image in
    order, a mapping from names, a file with either, or ``"auto"``: the folders of a folder, the ``label_column`` of
    Parquet files, the ``.cls`` members of tars. ``class_order`` says what the labels mean (``"names"``, ``"wordnet"``,
    ``"numbers"``, ``"text"``; see :func:`fastres.images.classes.match_classes`). A class folder without images is an
    error unless ``allow_empty``.

    With ``against``, each model is also compared with a reference: the same model in a dtype (``"float32"``), or any
    model. Labels are then used only if they are given (``labels="folders"``).

    ``output`` is a folder for ``report.html``, ``evaluation.json`` and ``images.parquet``, a table with one row per
    image. Finished rows are kept in ``images.parquet.partial/`` until the run is complete; after an interruption,
    ``resume=True`` continues it. Without ``output``, nothing is written. ``decoder="exact"`` gives the pixels of
    :meth:`Model.predict`, ``"fast"`` those of ``fastres classify``. ``batch_size``, ``workers``, ``image_column``,
    ``columns``, ``overwrite`` and ``progress`` are as for :func:`fastres.classify`. The report shows ``command``.

    Raises ``LabelError`` if the labels do not fit the images or the classes, ``InputError`` for other arguments,
    ``SourceError``, ``OutputError``, ``ResumeError``, ``WorkerError``, ``ClassifierError``, ``MissingDependencyError``,
    and the errors of :func:`fastres.load`. Among several combinations, one that cannot run is left out:
    ``Evaluation.left_out`` says why.

    >>> fastres.evaluate("photos/", ["resnet18", "resnet50"], "evaluation")["resnet50 float32"].accuracy.top1
    """
    from fastres.images.jpeg import check_decoder

    check_decoder(decoder)
    batch_size = None if batch_size is None else whole_number(batch_size, "batch_size")
    workers = None if workers is None else whole_number(workers, "workers", 0)
    if labels is None and against is None:
        raise InputError("labels is None and so is against, so there is nothing to measure; give one of them")
    if isinstance(labels, str) and labels == AUTO and against is not None and label_column is None:
        labels = None
    check_dependencies("evaluate", ["pyarrow"])
    check_decoder_package(decoder)
    from fastres.classification.batches import checked_workers
    from fastres.classification.sources import find
    from fastres.labels.finding import FOLDERS, find_labels

    from .choices import Choices, named
    from .job import Readers
    from .place import DOCUMENT, REPORT, TABLE, check_folder, parse_folder, refuse_class_folders
    from .run import Settings, evaluate_found

    workers = checked_workers(workers)
    show = is_terminal(sys.stderr) if progress is None else progress
    folder = parse_folder(output)
    found = find(source)
    if folder is not None:
        check_folder(folder, resume, overwrite)
        if isinstance(labels, str) and labels in (AUTO, FOLDERS):
            refuse_class_folders(folder, found)
        files = input_files(*(given for _, given in named(models)), weights, categories, against, labels)
        for name in (TABLE, f"{TABLE}.partial", DOCUMENT, REPORT):
            refuse_inputs(folder / name, [*found.paths, *files])
    choices = Choices(
        weights=weights,
        categories=categories,
        device=device,
        dtypes=dtypes,
        engines=engines,
        calibrate_on=calibrate_on,
        batch_size=batch_size,
        progress=show,
    )
    opened = choices.open(models, against)
    candidates = opened.candidates
    known = next((each.categories for each in candidates if each.categories is not None), None)

    def labels_of(images: Any) -> Any:
        if labels is None:
            return None
        return find_labels(
            labels,
            found,
            images,
            candidates[0].num_classes,
            known,
            order=class_order,
            label_column=label_column,
            allow_empty=allow_empty,
            setting="class_order",
        )

    def class_names(found_labels: Any) -> tuple[str, ...]:
        own = known or (found_labels.names if found_labels is not None else None)
        return own or placeholders(candidates[0].num_classes)

    readers = Readers(candidates, choices.batch_size, workers, decoder)
    settings = Settings(image_column, tuple(columns), resume, overwrite, show, command, folder is None)
    with tempfile.TemporaryDirectory(prefix="fastres-") as scratch:
        place = folder or Path(scratch) / "evaluation"
        return evaluate_found(opened, found, readers, labels_of, class_names, place, Path(scratch), settings)
