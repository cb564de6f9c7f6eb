"""An evaluation from its checked arguments to its files: the table, the figures, the report."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from fastres.classification.listing import create_listing
from fastres.classification.report import Report
from fastres.classification.run import run as run_job
from fastres.classification.sources import Found, Images, opened
from fastres.classification.work import work_folder
from fastres.errors import OutputError
from fastres.executors.processor import processor
from fastres.files import written_whole
from fastres.folding.build import outline
from fastres.labels.finding import ImageLabels
from fastres.network.architectures import get_architecture
from fastres.pages.words import listed
from fastres.terminal import is_terminal, progress_bar
from fastres.text import path_text
from fastres.version import __version__

from . import html_report, layers, speed
from .choices import Opened
from .job import EvaluateJob, Readers
from .layers import LayerError
from .pictures import thumbnails
from .place import DOCUMENT, REPORT, TABLE, complete_table, created, remove_earlier
from .result import Evaluation, LabelFacts, ModelResult
from .speed import Speed
from .summary import Summary


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`fastres.evaluate` for the run itself."""

    image_column: str | None
    columns: tuple[str, ...]
    resume: bool
    overwrite: bool
    progress: bool
    command: str | None
    is_temporary: bool  # nothing is written, and the table is deleted at the end


def evaluate_found(
    opened_: Opened,
    found: Found,
    readers: Readers,
    find_labels: Callable[[Images], ImageLabels | None],
    class_names: Callable[[ImageLabels | None], tuple[str, ...]],
    folder: Path,
    scratch: Path,
    settings: Settings,
) -> Evaluation:
    """Evaluate the candidates on the images in ``found``; return the result.

    ``folder`` gets the table, the document and the report. ``scratch`` is a temporary folder.
    """
    began = time.monotonic()
    given = {"image_column": settings.image_column}
    job = EvaluateJob(readers, find_labels, opened_.references, class_names, scratch, given)
    with created(folder):
        report = _finished(job, found, folder / TABLE, scratch, settings)
        if report is None:
            report = _run(job, found, folder, settings)
    with complete_table(report.rows, settings.is_temporary):
        evaluation, pictures = _summarised(opened_, found, readers, job, folder, report, settings, began)
        if settings.is_temporary:
            return evaluation
        return write_files(replace(evaluation, output=folder), pictures, settings.command)


def _run(job: EvaluateJob, found: Found, folder: Path, settings: Settings) -> Report:
    report = run_job(
        job,
        found,
        folder / TABLE,
        image_column=settings.image_column,
        columns=settings.columns,
        resume=settings.resume,
        overwrite=settings.overwrite,
        progress=settings.progress,
        is_temporary=settings.is_temporary,
    )
    remove_earlier(folder)
    return report


def _summarised(
    opened_: Opened,
    found: Found,
    readers: Readers,
    job: EvaluateJob,
    folder: Path,
    report: Report,
    settings: Settings,
    began: float,
) -> tuple[Evaluation, Mapping[int, str]]:
    """Return the result, from the complete table, and thumbnails by row."""
    wanted = [name for name in job.layout.schema.names if name not in settings.columns]
    with pq.ParquetFile(folder / TABLE) as table:  # pq.read_table's threads outlive the call; see parts.read
        summary = Summary(table.read(wanted, use_threads=False), job.layout)
    results = summary.results(_speeds(opened_, readers, job.images, settings.progress))
    results = _with_layers(results, opened_, readers, job.images, settings.progress)
    shown = [mistake.row for result in results for mistake in result.mistakes]
    shown += [disagreement.row for result in results for disagreement in result.disagreements]
    unreadable, errors = summary.unreadable()
    evaluation = Evaluation(
        source=tuple(path_text(name) for name in found.description),
        kind=found.kind,
        images=report.rows - unreadable,
        unreadable=unreadable,
        skipped=report.skipped,
        resumed=report.resumed,
        errors=errors,
        labels=_facts(job.labels, summary),
        class_names=job.layout.class_names,
        models=results,
        left_out=opened_.left_out,
        decoder=readers.decoder,
        batch_size=readers.batch_size,
        seconds=time.monotonic() - began,
        machine=machine(),
        fastres=__version__,
        date=date.today().isoformat(),
    )
    return evaluation, thumbnails(job.images, shown, settings.progress)


def write_files(evaluation: Evaluation, pictures: Mapping[int, str], command: str | None) -> Evaluation:
    """Write the document and the report beside the table. Raises ``OutputError`` if that fails."""
    assert evaluation.output is not None
    document = {**evaluation.document(), "command": command}
    texts = {
        DOCUMENT: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        REPORT: html_report.render(document, pictures),
    }
    for name, text in texts.items():
        path = evaluation.output / name
        try:
            with written_whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"{str(path)!r} cannot be written: {error.strerror}. The table is complete; run the command again with "
                "--resume"
            ) from error
    return evaluation


def machine() -> dict[str, Any]:
    """Return the processor, the GPU, the number of threads, and torch's version."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**processor(), "gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _finished(job: EvaluateJob, found: Found, table: Path, scratch: Path, settings: Settings) -> Report | None:
    """Return the report of a table that an earlier run has completed, or ``None`` if there is none to go on with.

    Raises ``OutputError`` if that run was another one.
    """
    if not settings.resume or settings.overwrite or not table.exists() or work_folder(table).exists():
        return None
    listing = scratch / "finished.jsonl"
    fingerprint = create_listing(listing, found.entries(), found.kind, settings.progress)
    images = opened(found, listing, settings.image_column, settings.columns)
    _, now = job.begin(images)
    now = json.loads(json.dumps({**now, "version": __version__, "images": fingerprint}))
    before = _metadata(table)
    before["images"] = before.get("listing")  # the checksum of their list, not their number
    changes = [name.replace("_", " ") for name in now if before.get(name) != now[name]]
    if changes:
        raise OutputError(
            f"{str(table)!r} is the table of another evaluation, with other {listed(changes, len(changes))}. Use "
            "--overwrite to replace it, or another output"
        )
    rows = pq.read_metadata(table).num_rows
    return Report(table, rows, 0, rows, math.inf, 0, sum(found.skipped.values()))


def _metadata(table: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((pq.read_schema(table).metadata or {})[b"fastres"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors derive from these
        raise OutputError(
            f"{str(table)!r} is damaged, or no table of an evaluation; use --overwrite to replace it, or another output"
        ) from error


def _facts(labels: ImageLabels | None, summary: Summary) -> LabelFacts | None:
    """Return where the labels came from. A class whose images cannot be read is missing, too."""
    return None if labels is None else LabelFacts(labels.source, labels.order, labels.text, summary.missing())


def _speeds(opened_: Opened, readers: Readers, images: Images, progress: bool) -> list[Speed] | None:
    sample = readers.sample(images, readers.batch_size)
    if sample is None:
        return None
    candidates = opened_.candidates
    often = 0.2 if is_terminal(sys.stderr) else 30  # seconds
    with progress_bar(desc="time", unit="turn", disable=not progress, mininterval=often) as bar:
        return speed.measure(candidates, [sample.pixels(each) for each in candidates], opened_.first, bar.update)


def _with_layers(
    results: Sequence[ModelResult], opened_: Opened, readers: Readers, images: Images, progress: bool
) -> tuple[ModelResult, ...]:
    """Return the results with the error of every layer, where it can be measured."""
    found = list(results)
    sample = readers.sample(images, layers.IMAGES) if opened_.references else None
    if sample is None:
        return tuple(found)
    count = len(sample.errors)
    total = count * len(opened_.references)
    with progress_bar(total=total, desc="layers", unit="image", disable=not progress, delay=1.0) as bar:
        for place, reference in opened_.references.items():
            own, other, agreement = opened_.candidates[place], opened_.candidates[reference], found[place].agreement
            if agreement is None:
                continue
            reason, errors = layers.reason_without(own, other), None
            if reason is None:
                plan = outline(get_architecture(own.model), torch.float32)
                values = layers.compared_values([step.output for step in plan])
                errors = _layer_errors(sample, own, other, values, bar)
            agreement = replace(agreement, layers=errors, layers_images=count if errors else 0, layers_reason=reason)
            found[place] = replace(found[place], agreement=agreement)
    return tuple(found)


def _layer_errors(sample: Any, own: Any, other: Any, values: Sequence[str], bar: Any) -> tuple[LayerError, ...]:
    return layers.layer_errors(own, other, sample.pixels(own), sample.pixels(other), values, bar.update)
