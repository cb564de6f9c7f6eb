"""Batches of pixels, read and decoded in the worker processes of torch's DataLoader and copied to a GPU in advance."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastres.errors import FastresError, ImageError, WorkerError
from fastres.images.jpeg import Decoder, decoder
from fastres.images.transforms import Transforms

from .sources import Images

PREFETCH = 2  # batches that each worker keeps ready
MAX_WORKERS = 16


@dataclass(frozen=True)
class Batch:
    """The images from ``start`` on: their identity, pixels and errors.

    ``pixels`` are raw RGB, uint8 ``[N, 3, crop, crop]``, channels-last. ``errors`` has a message or ``None`` for each
    image. An image with an error is black.
    """

    start: int
    identity: pa.RecordBatch
    pixels: Tensor
    errors: tuple[str | None, ...]

    def pin_memory(self) -> Batch:
        """Return the batch with pixels in page-locked memory, for asynchronous copies; the DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """The data set that a worker process reads: item i is the i-th batch of ``size`` images from ``start`` on."""

    images: Images
    start: int
    size: int
    transforms: Transforms
    decoder: str

    def __len__(self) -> int:
        return -(-(len(self.images) - self.start) // self.size)

    def __getitem__(self, index: int) -> Batch | FastresError:
        start = self.start + index * self.size
        try:
            return self._batch(start, min(start + self.size, len(self.images)))
        except FastresError as error:  # the main process raises it; the DataLoader would add its traceback to it
            return error

    def _batch(self, start: int, stop: int) -> Batch:
        crop, decode = self.transforms.crop, decoder(self.decoder)
        pixels = torch.zeros(stop - start, crop, crop, 3, dtype=torch.uint8, device="cpu").permute(0, 3, 1, 2)
        errors: list[str | None] = [None] * (stop - start)
        identity, sources = self.images.read(start, stop)
        for index, source in enumerate(sources):
            errors[index] = self._decode_into(pixels[index], source, decode)
        return Batch(start, identity, pixels, tuple(errors))

    def _decode_into(self, pixels: Tensor, source: str | bytes | ImageError, decode: Decoder) -> str | None:
        """Fill ``pixels`` and return ``None``, or return the error message."""
        if isinstance(source, ImageError):
            return str(source)
        try:
            pixels.copy_(decode(source, self.transforms))
        except ImageError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Reading:
    """Settings for reading images: ``batch_size``, number of ``workers`` (0: this process), and ``decoder`` name."""

    batch_size: int
    workers: int
    transforms: Transforms
    decoder: str

    def batches(self, images: Images, start: int, device: torch.device) -> Generator[Batch, None, None]:
        """Yield batches of ``images`` from ``start`` on, in order, with pixels on ``device``.

        Close the generator to stop the workers. Raises ``SourceError`` if a tar or Parquet file can no longer be read.
        If a worker dies, the main process gets a ``WorkerError``, or at any point a ``RuntimeError`` from torch's
        signal handler; :func:`worker_died` recognises both.
        """
        dataset = _Batches(images, start, self.batch_size, self.transforms, self.decoder)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(len(dataset)),
            num_workers=self.workers,
            collate_fn=_unchanged,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        return _copied_ahead(_sound(loader), device) if device.type == "cuda" else _sound(loader)


def default_workers() -> int:
    """Return the default number of workers: one per core that this process may run on, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def worker_died(error: BaseException) -> bool:
    """Return True if ``error``, from the DataLoader or from fastres, means that a worker exited or was killed."""
    return isinstance(error, WorkerError) or (
        isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one stops the others
    # Pillow warns about odd metadata and very large images; these warnings would break up the progress bar.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _sound(loader: DataLoader[Any]) -> Generator[Batch, None, None]:
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, FastresError):
                raise batch
            yield batch
    except (OSError, EOFError) as error:  # the other end of a pipe was closed
        raise WorkerError(f"The processes that read images stopped: {error or type(error).__name__}") from error
    finally:
        # Without this call, the processes would live as long as the traceback of an error that ended the loop.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _copied_ahead(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batches with pixels on the GPU; each is copied on a separate stream while the one before it runs."""
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                copied = replace(batch, pixels=batch.pixels.to(device, non_blocking=True))
                done = stream.record_event()
            if waiting is not None:
                yield _ready(*waiting)
            waiting = copied, done
        if waiting is not None:
            yield _ready(*waiting)


def _ready(batch: Batch, done: torch.cuda.Event) -> Batch:
    current = torch.cuda.current_stream(batch.pixels.device)
    current.wait_event(done)
    batch.pixels.record_stream(current)  # otherwise its memory could be reused for a copy while it is read
    return batch
