"""An evaluation from its checked arguments to its files: the table, the figures, the report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from fastres.classification.listing import write_listing
from fastres.classification.report import Report
from fastres.classification.run import run as run_job
from fastres.classification.sources import Found, Images, opened
from fastres.classification.work import check_output, work_folder
from fastres.errors import OutputError
from fastres.executors.processor import processor
from fastres.files import other_kind, written_whole
from fastres.folding.build import outline
from fastres.labels.finding import ImageLabels
from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar
from fastres.text import path_text
from fastres.version import __version__

from . import html_report, layers, speed
from .choices import Opened
from .job import EvaluateJob, Readers
from .layers import LayerError
from .pictures import thumbnails
from .result import Evaluation, LabelFacts, ModelResult
from .speed import Speed
from .summary import Summary

TABLE, DOCUMENT, REPORT = "images.parquet", "evaluation.json", "report.html"


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`fastres.evaluate` for the run itself."""

    image_column: str | None
    columns: tuple[str, ...]
    resume: bool
    overwrite: bool
    progress: bool


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise ``OutputError`` if ``folder`` cannot take the files of an evaluation, or has some already."""
    try:
        kind = other_kind(folder.stat().st_mode)
    except FileNotFoundError:
        if not folder.parent.is_dir():
            raise OutputError(
                f"The output's folder {str(folder.parent)!r} does not exist; create it, or use another output"
            ) from None
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The output {str(folder)!r} cannot be written ({reason}); use another path") from error
    if kind != "a folder":
        raise OutputError(f"The output {str(folder)!r} is {kind or 'a file'}; pass the name of a folder")
    there = [name for name in (TABLE, DOCUMENT, REPORT) if (folder / name).exists()]
    if there and not (resume or overwrite):
        raise OutputError(
            f"{str(folder)!r} already has {' and '.join(there)}; use another output, --resume to go on with the same "
            "evaluation, or --overwrite to replace it"
        )
    if not (folder / TABLE).exists():
        check_output(folder / TABLE, resume, overwrite)  # an interrupted run


def evaluate_found(
    opened_: Opened,
    found: Found,
    readers: Readers,
    find_labels: Callable[[Images], ImageLabels | None],
    class_names: Callable[[ImageLabels | None], tuple[str, ...]],
    folder: Path,
    scratch: Path,
    settings: Settings,
) -> tuple[Evaluation, Mapping[int, str]]:
    """Evaluate the candidates on the images in ``found``; return the result, and thumbnails by row.

    ``folder`` gets the table. ``scratch`` is a temporary folder.
    """
    began = time.monotonic()
    given = {"image_column": settings.image_column}
    job = EvaluateJob(readers, find_labels, opened_.references, class_names, scratch, given)
    folder.mkdir(exist_ok=True)
    report = _finished(job, found, folder / TABLE, scratch, settings) or run_job(
        job,
        found,
        folder / TABLE,
        image_column=settings.image_column,
        columns=settings.columns,
        resume=settings.resume,
        overwrite=settings.overwrite,
        progress=settings.progress,
    )
    wanted = [name for name in job.layout.schema.names if name not in settings.columns]
    summary = Summary(pq.read_table(folder / TABLE, columns=wanted), job.layout)
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
        labels=_facts(job.labels),
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
    document = finite({**evaluation.document(), "command": command})
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
    listing = scratch / "finished.arrow"
    with listing.open("wb+") as file:
        fingerprint = write_listing(found.entries(), found.kind, file, settings.progress)
    images = opened(found, listing, settings.image_column, settings.columns)
    _, now = job.begin(images)
    now = json.loads(json.dumps({**now, "version": __version__, "listing": fingerprint}))
    before = _metadata(table)
    changes = [name for name in now if before.get(name) != now[name]]
    if changes:
        raise OutputError(
            f"{str(table)!r} is the table of another evaluation: {', '.join(changes)} differ. Use --overwrite to "
            "replace it, or another output"
        )
    rows = pq.read_metadata(table).num_rows
    return Report(table, rows, 0, rows, math.inf, 0, sum(found.skipped.values()))


def _metadata(table: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((pq.read_schema(table).metadata or {})[b"fastres"]))
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors derive from these
        return {}


def _facts(labels: ImageLabels | None) -> LabelFacts | None:
    return None if labels is None else LabelFacts(labels.source, labels.order, labels.text, labels.missing)


def _speeds(opened_: Opened, readers: Readers, images: Images, progress: bool) -> list[Speed] | None:
    sample = readers.sample(images, readers.batch_size)
    if sample is None:
        return None
    candidates = opened_.candidates
    with progress_bar(desc="time", unit="turn", disable=not progress) as bar:
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


def finite(value: Any) -> Any:
    """Return JSON values with ``None`` in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
