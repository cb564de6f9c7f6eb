"""Batches of pixels, read and decoded in the worker processes of torch's DataLoader and copied to a GPU in advance."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastres.errors import FastresError, ImageError, InputError, WorkerError
from fastres.executors.quota import suitable_threads
from fastres.images.jpeg import Decoder, decoder
from fastres.images.transforms import Transforms
from fastres.memory import keep_little

from .columns import Columns
from .parcels import Batch, Parcel, black, can_share
from .sources import Images

PREFETCH = 2  # batches that each worker keeps ready
MAX_WORKERS = 16


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """The data set that a worker process reads: item i is the i-th batch of at most ``size`` images in ``ranges``."""

    images: Images
    ranges: Sequence[range]
    size: int
    transforms: Transforms
    decoder: str

    def __len__(self) -> int:
        return sum(self._counts())

    def _counts(self) -> Iterator[int]:
        """Yield the number of batches in each range."""
        return (-(-len(part) // self.size) for part in self.ranges)

    def __getitem__(self, index: int) -> Batch | Parcel | FastresError:
        for part, count in zip(self.ranges, self._counts(), strict=True):
            if index < count:
                start = part.start + index * self.size
                return self._batch(start, min(start + self.size, part.stop))
            index -= count
        raise IndexError(index)

    def _batch(self, start: int, stop: int) -> Batch | Parcel | FastresError:
        crop, fill = self.transforms.crop, partial(self._fill, start, stop)
        try:
            if get_worker_info() is not None and can_share():
                return Parcel(start, stop - start, crop, fill)
            pixels = black(stop - start, crop)
            identity, errors = fill(pixels)
            return Batch(start, identity, pixels, errors)
        except FastresError as error:  # the main process raises it; the DataLoader would add its traceback to it
            return error

    def _fill(self, start: int, stop: int, pixels: Tensor) -> tuple[Columns, tuple[str | None, ...]]:
        """Decode images ``start`` to ``stop`` into ``pixels``; return their identity and errors."""
        decode = decoder(self.decoder)
        identity, sources = self.images.read(start, stop)
        errors = tuple(
            decode_into(target, source, decode, self.transforms) for target, source in zip(pixels, sources, strict=True)
        )
        return identity, errors


def decode_into(
    pixels: Tensor, source: str | bytes | ImageError, decode: Decoder, transforms: Transforms
) -> str | None:
    """Fill ``pixels``, uint8 ``[3, crop, crop]``, and return ``None``, or return the error message."""
    if isinstance(source, ImageError):
        return str(source)
    try:
        pixels.copy_(decode(source, transforms))
    except ImageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the image
            raise WorkerError(f"no file can be opened: {cause.strerror}; raise the limit (ulimit -n)") from error
        return str(error)
    return None


@dataclass(frozen=True)
class Reading:
    """Settings for reading images: ``batch_size``, number of ``workers`` (0: this process), and ``decoder`` name."""

    batch_size: int
    workers: int
    transforms: Transforms
    decoder: str

    def batches(self, images: Images, ranges: Sequence[range], device: torch.device) -> Generator[Batch, None, None]:
        """Yield batches of the ``images`` whose numbers are in ``ranges``, in order, with pixels on ``device``.

        Close the generator to stop the workers. Raises ``SourceError`` if a tar or Parquet file can no longer be read.
        If a worker dies, the main process gets a ``WorkerError``, or at any point a ``RuntimeError`` from torch's
        signal handler; :func:`worker_died` recognises both.
        """
        dataset = _Batches(images, ranges, self.batch_size, self.transforms, self.decoder)
        lifeline = multiprocessing.Pipe(duplex=False)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(len(dataset)),
            num_workers=self.workers,
            collate_fn=_unchanged,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=partial(_start_worker, os.getpid(), lifeline),
        )
        batches = _sound(loader, lifeline)
        return _copied_ahead(batches, device) if device.type == "cuda" else batches


def checked_workers(given: int | None) -> int:
    """Return the number of workers. Raises ``InputError`` if this process may have none."""
    daemon = multiprocessing.current_process().daemon
    if given and daemon:
        raise InputError(
            f"workers is {given}, but this process is daemonic, as those of multiprocessing.Pool are, and may not "
            "start processes; pass workers=0, or use concurrent.futures.ProcessPoolExecutor"
        )
    return given if given is not None else 0 if daemon else default_workers()


def default_workers() -> int:
    """Return the number of workers for all cores that this process may use, up to 16."""
    return min(suitable_threads(), MAX_WORKERS)


def worker_died(error: BaseException) -> bool:
    """Return True if ``error``, from the DataLoader or from fastres, means that a worker ended or cannot be reached."""
    texts = ("DataLoader worker", "Too many open files")
    return isinstance(error, WorkerError) or (isinstance(error, RuntimeError) and str(error).startswith(texts))


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(main: int, lifeline: tuple[Connection, Connection], worker: int) -> None:
    # Signals from a terminal or a supervisor reach all processes. The main one keeps its rows and stops the others, so
    # these leave without an error that it would notice first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))
    keep_little()
    lifeline[1].close()  # only the main process holds it
    threading.Thread(target=_leave_with, args=(main, lifeline[0]), daemon=True).start()
    # Pillow warns about odd metadata and very large images; these warnings would break up the progress bar.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _leave_with(main: int, lifeline: Connection) -> None:
    """End this process when the run has ended or the main process has died, whatever other threads are waiting for."""
    parent = os.getppid() if multiprocessing.get_start_method() == "forkserver" else main
    # Other children of the main process may hold the other end of the lifeline as well.
    while not lifeline.poll(1):
        if os.getppid() != parent:
            break
    os._exit(1)


def _sound(loader: DataLoader[Any], lifeline: tuple[Connection, Connection]) -> Generator[Batch, None, None]:
    iterator = None
    try:
        iterator = iter(loader)
        for batch in iterator:
            if isinstance(batch, FastresError):
                raise batch
            yield batch
    except FastresError:
        raise
    except (OSError, EOFError) as error:  # the other end of a pipe was closed
        raise WorkerError(f"The processes that read images stopped: {error or type(error).__name__}") from error
    finally:
        # Without this call, the processes would live as long as the traceback of an error that ended the loop.
        getattr(iterator, "_shutdown_workers", lambda: None)()
        for end in lifeline:
            end.close()


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
