"""``fastres serve``: answer images over HTTP.

A request's image gets a place in a bounded queue (:mod:`engine`), is decoded by a process (:mod:`decoders`), joins a
batch (:mod:`batching`) and is computed by a process that holds the model (:mod:`models`, which LitServe runs). The HTTP
interface is :mod:`app`; what a request may be is in :mod:`reading`, its answers in :mod:`answers`, its errors in
:mod:`failures`. ``page`` is the web page. Tables of images are the matter of :mod:`fastres.classification`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastres.classification.processes import devices
from fastres.classification.requests import refuse_options_of_loaded
from fastres.errors import DtypeError
from fastres.extras import check_dependencies
from fastres.images.jpeg import FAST
from fastres.model.loading import load, parse_device
from fastres.model.model import Model

from .settings import Settings

__all__ = ["Settings", "serve"]

_PACKAGES = ("pyarrow", "litserve", "aiohttp", "prometheus_client", "python_multipart", "simplejpeg")


def serve(
    model: str | os.PathLike[str] | Model = "resnet50",
    weights: str | os.PathLike[str] | None = "DEFAULT",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    categories: Any = None,
    workers: int | None = None,
    decoder: str = FAST,
    max_batch: int | None = None,
    max_wait_ms: float = 0.0,
    max_queue: int | None = None,
    max_bytes: int = 20_000_000,
    max_pixels: int = 50_000_000,
    timeout: float = 30.0,
    api_key: str | None = None,
    allow_urls: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    announce: Callable[[str, Any], None] = lambda url, served: None,
) -> None:
    """Answer images over HTTP until SIGTERM or Ctrl-C: ``POST /classify``, ``/embed`` and ``/look``.

    ``model``, ``weights``, ``dtype`` and ``categories`` are those of :func:`fastres.load`; a model in 8 bit is the file
    that ``fastres quantize`` wrote. ``device`` is ``"cpu"``, ``"cuda"`` (all GPUs, each with a process) or
    ``"cuda:1"``; the default is the GPUs if there are any.

    ``workers`` processes decode images (default: one for each core, up to 16), with ``decoder`` ``"fast"`` or
    ``"exact"``, as in ``fastres.classify``. A batch has at most ``max_batch`` images (8 on a CPU, 128 on a GPU). An
    idle model takes all images that are ready; with ``max_wait_ms`` above 0, it waits this long for those that are
    being decoded. At most ``max_queue`` images are in the server at a time (default: 8 full batches for each model);
    further ones are answered with status 429 and ``Retry-After``.

    A request may have ``max_bytes`` bytes, and each image ``max_pixels`` pixels. It gets its answer within ``timeout``
    seconds, or status 504. With ``api_key``, requests must send it. URLs are fetched only from the hosts in
    ``allow_urls``. ``cors_origins`` are the web pages that may use the server, none by default.

    ``announce`` is called with the server's URL, and its model, when it can answer. The function must be called in the
    main thread of a program whose main module can be imported without side effects.

    Raises ``MissingDependencyError``, ``InputError``, ``ServerError``, and the errors of ``fastres.load``.

    >>> fastres.serve("resnet50", port=8000)
    """
    check_dependencies("serve", _PACKAGES, "serve")
    settings = Settings(
        host=host, port=port, workers=workers, decoder=decoder, max_batch=max_batch, max_wait_ms=max_wait_ms,
        max_queue=max_queue, max_bytes=max_bytes, max_pixels=max_pixels, timeout=timeout, api_key=api_key,
        allow_urls=tuple(allow_urls), cors_origins=tuple(cors_origins),
    )  # fmt: skip
    refuse_options_of_loaded(model, weights, dtype, None, categories)
    from .running import run_server

    loaded, dtype = _loaded(model, weights, dtype, categories)
    run_server(loaded, settings, _devices(loaded, device), dtype, announce)


def _loaded(
    model: str | os.PathLike[str] | Model, weights: Any, dtype: torch.dtype | str, categories: Any
) -> tuple[Model, torch.dtype | str]:
    """Return the model on the CPU, and the dtype in which it is to run."""
    if isinstance(model, Model):
        return model, "auto" if model.dtype == torch.int8 else model.dtype
    in_8_bit = str(dtype).removeprefix("torch.") == "int8"
    dtype = "auto" if in_8_bit else dtype
    loaded = load(model, weights, dtype=dtype, device="cpu", categories=categories)
    if in_8_bit and loaded.dtype != torch.int8:
        raise DtypeError(
            f"dtype is int8, but {loaded.architecture.name} is not in 8 bit; convert it with 'fastres quantize', and "
            "serve the file that it writes"
        )
    return loaded, dtype


def _devices(model: Model, device: torch.device | str | None) -> list[str]:
    """Return the device of each model process."""
    if model.dtype == torch.int8 and device is None:
        device = "cpu"
    found = devices(None if device is None else parse_device(device), None)
    first = torch.device(found[0])
    is_there = first.type == "cuda" and (first.index or 0) < torch.cuda.device_count()
    if first.type != "cpu" and not (is_there and model.dtype != torch.int8):
        model.to(first)  # raises DeviceError
    return found
