"""Run the model on all images in batches, and write the rows."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import OutputError, WorkerError
from fastres.model.model import Model
from fastres.network.plan import LOGITS, POOLED
from fastres.terminal import is_terminal, progress_bar
from fastres.text import dtype_name, path_text
from fastres.version import __version__

from .batches import Reading, worker_died
from .listing import write_listing
from .parcels import Batch
from .report import Report
from .sources import Found, Images, opened
from .tables import Layout
from .work import Work, open_work


def run(
    model: Model,
    found: Found,
    output: Path,
    reading: Reading,
    *,
    top_k: int,
    embed: bool,
    image_column: str | None,
    columns: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> Report:
    """Do the work of :func:`fastres.classify`, which has checked the arguments."""
    began = time.monotonic()
    with open_work(output, resume, overwrite) as work:
        with work.writing(work.new_listing) as file:
            fingerprint = write_listing(found.entries(), found.kind, file, progress)
        images = opened(found, work.new_listing, image_column, columns)
        layout = Layout(
            images.identity, min(top_k, model.num_classes), _labels(model), model.architecture.features if embed else 0
        )
        layout.check(output.suffix.lower())
        settings = _settings(model, reading.decoder, layout, image_column)
        count = len(images)
        errors = work.begin(settings, fingerprint, count, progress)
        resumed, recomputed = work.done, work.recomputed
        if work.complete:
            work.discard()
        else:
            images = opened(found, work.listing, image_column, columns)  # the list has its final name now
            description = [path_text(name) for name in found.description]
            metadata = {"version": __version__, **settings, "source": description, "images": count}
            errors += _classify(model, images, reading, layout, work, errors, progress)
            with _kept_on_failure(work, count):
                work.finish(layout, metadata, errors, progress)
    seconds, skipped = time.monotonic() - began, sum(found.skipped.values())
    return Report(output, count, errors, resumed, seconds, recomputed, skipped)


def _classify(
    model: Model, images: Images, reading: Reading, layout: Layout, work: Work, errors: int, progress: bool
) -> int:
    """Classify the images that are not done yet; return how many of them have an error."""
    failed = 0
    bar = progress_bar(
        total=len(images), initial=work.done, desc="classify", unit="image", disable=not progress, smoothing=0.05,
        mininterval=0.2 if is_terminal(sys.stderr) else 30,
    )  # fmt: skip
    # The rows are written before the workers are stopped, which can take seconds: a second interrupt may follow.
    with bar, closing(reading.batches(images, work.gaps, model.device)) as batches, _kept_on_failure(work, len(images)):
        bar.set_postfix(errors=errors)
        for batch in batches:
            indices, scores, embedding = _outputs(model, batch, reading.batch_size, layout)
            work.add(batch.start, layout.rows(batch.identity, batch.errors, indices, scores, embedding))
            failed += sum(error is not None for error in batch.errors)
            bar.set_postfix(errors=errors + failed, refresh=False)
            bar.update(len(batch.errors))
    return failed


def _outputs(model: Model, batch: Batch, batch_size: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return indices and scores ``[N, top_k]``, highest score first, and the embedding ``[N, C]`` or ``None``.

    All are on the CPU.
    """
    count, pixels = len(batch.errors), batch.pixels
    if pixels.is_cuda:  # pad a smaller last batch: kernels and graphs already exist for the full size
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
    wanted = ({"logits": LOGITS} if layout.top_k else {}) | ({"embedding": POOLED} if layout.embedding else {})
    values = model.values(pixels, wanted)
    logits = values["logits"][:count] if layout.top_k else torch.empty(count, 0, dtype=torch.float32, device="cpu")
    scores, indices = logits.softmax(1).topk(layout.top_k, dim=1)
    embedding = values["embedding"][:count].flatten(1).float().cpu() if layout.embedding else None
    return indices.cpu(), scores.cpu(), embedding


@contextmanager
def _kept_on_failure(work: Work, count: int) -> Iterator[None]:
    """If the block raises, write the finished rows, and say in the error how many were kept."""
    try:
        yield
    except OutputError:
        raise
    except BaseException as error:
        work.flush()
        kept = f"{work.done:,} of {count:,} rows are kept in {str(work.folder)!r}; continue with --resume"
        if not work.done:
            kept = "no row was finished; run it again"
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"interrupted: {kept}",)
        if worker_died(error):
            raise WorkerError(
                f"A process that reads images died ({error}). {kept}. If it ran out of memory, use fewer workers or "
                "smaller batches. If it dies on the same images again, try --decoder exact"
            ) from error
        raise


def _labels(model: Model) -> tuple[str, ...]:
    return model.categories or tuple(f"class {index}" for index in range(model.num_classes))


def _settings(model: Model, decoder: str, layout: Layout, image_column: str | None) -> dict[str, Any]:
    """Return the settings that determine the rows, as JSON values; two runs with the same settings write the same."""
    transforms = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(model.transforms).items()
    }
    return {
        "model": model.architecture.name,
        "weights": path_text(model.weights) if model.weights else None,
        "weights_sha256": _weights_sha256(model),
        "dtype": dtype_name(model.dtype),
        "transforms": transforms,
        "class_names_sha256": _sha256(json.dumps(_labels(model)).encode()) if layout.top_k else None,
        "decoder": decoder,
        "image_column": image_column,
        "columns": layout.schema.names,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weights_sha256(model: Model) -> str:
    """Return the sha256 of the parameters' names and values. It also identifies random and edited weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
