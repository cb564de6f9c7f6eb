"""Start a server, keep it running, and end it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn

from fastres.classification.batches import checked_workers
from fastres.classification.job import weights_sha256
from fastres.errors import ServerError
from fastres.images.categories import placeholders
from fastres.memory import keep_little, settle
from fastres.model.model import Model, parse_dtype
from fastres.model.outputs import strides_and_channels
from fastres.terminal import OutputStreamError
from fastres.text import dtype_name, path_text
from fastres.version import __version__

from .app import Served, Service, application
from .arena import Arena
from .batching import Batcher, batch_sizes
from .connections import Connection
from .decoders import Decoders
from .decoding import Decoding
from .engine import Engine
from .metrics import Metrics
from .models import FAILED, ModelProcess, Models, started
from .settings import Settings

_TICK = 0.2  # seconds between looks at the connections to the processes
_ASK = 2.0  # seconds between questions to LitServe, once the server is ready; each wakes a further process
_MOST_IN_REQUEST = 64  # images
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RESERVED = 200  # open files that are not connections
_DESCRIPTORS = 16384  # open files that the server asks for: one for each connection
_LONGEST_FOLDER = 60  # characters; the names of sockets have 107 at most
_BACKLOG = 2048  # connections that wait to be accepted
_UNREAD = 30_000  # milliseconds after which a connection ends whose client reads none of its answer
_KEEP_ALIVE = 20  # seconds that an idle connection stays open
_DRAIN = 30  # seconds that requests have after the server was told to stop


class _Server(uvicorn.Server):
    """A server that ends in order on SIGTERM, SIGHUP and Ctrl-C, without passing the signal on."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)


def run_server(
    model: Model,
    settings: Settings,
    devices: Sequence[str],
    dtype: torch.dtype | str,
    announce: Callable[[str, Served], None],
) -> None:
    """Serve ``model`` until SIGTERM or Ctrl-C. ``announce`` is called with the URL when the server can answer.

    ``model`` is on the CPU; the processes on ``devices`` get a copy. Raises ``ServerError``.
    """
    keep_little()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs what clients send
    with ExitStack() as stack:
        listening = stack.enter_context(_listening(settings))
        folder = Path(stack.enter_context(_short_folder()))
        served = described(model, dtype, devices[0])
        path = model.save(folder / "model.safetensors")
        batch = settings.batch_for(devices[0])
        places = settings.queue_for(devices[0], len(devices))
        arena = Arena(places, model.transforms.crop, len(served.labels), model.architecture.features)
        del model
        process = ModelProcess(path, dtype, arena, batch)
        patience = 2 * settings.timeout + 30
        models = stack.enter_context(started(process, devices, patience))
        service = _service(served, settings, models, arena, batch, devices)
        announced = partial(announce, _url(listening), served)
        connection: Any = partial(Connection, note=service.metrics.connection)
        config = uvicorn.Config(
            app=application(service, lambda: _watch(server, service, announced)),
            log_level="error", access_log=False, http=connection, ws="none", lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=_DRAIN, server_header=False, date_header=True,
            limit_concurrency=_most_connections(),
        )  # fmt: skip
        server = _Server(config, service)
        server.run(sockets=[listening])
        if service.failure:
            raise ServerError(service.failure)


def _service(
    served: Served, settings: Settings, models: Models, arena: Arena, batch: int, devices: Sequence[str]
) -> Service:
    metrics = Metrics()
    decoding = Decoding(served.transforms, settings.decoder, settings.max_pixels)
    decoders = Decoders(checked_workers(settings.workers) or 1, arena, decoding, settings.timeout)
    batcher = Batcher(
        models.compute, batch_sizes(batch), models=len(devices), pads=devices[0] != "cpu",
        max_wait=settings.max_wait_ms / 1000, upcoming=lambda: decoders.unfinished, observe=metrics.batch,
    )  # fmt: skip
    engine = Engine(arena, decoders, batcher, metrics)
    return Service(served, settings, engine, models, metrics, min(arena.slots, _MOST_IN_REQUEST))


async def _watch(server: _Server, service: Service, announce: Callable[[], None]) -> None:
    """Keep ``service.ready`` up to date, and end the server if it cannot work."""
    loop = asyncio.get_running_loop()
    announced, next_question = False, 0.0
    while True:
        if not announced or loop.time() >= next_question:
            next_question = loop.time() + _ASK
            try:
                states = await loop.run_in_executor(None, service.models.states)
            except (OSError, EOFError):
                service.failure = "The process that LitServe keeps its queues in has died; start the server again"
                break
            if FAILED in states and not announced:
                service.failure = "A model process could not start; the messages above say why"
                break
        service.ready = service.models.ready and service.engine.decoders.ready
        if service.ready and not announced:
            announced = service.started = True
            settle()
            with suppress(OSError, OutputStreamError):  # standard output is closed or full
                announce()
        await asyncio.sleep(_TICK)
    server.should_exit = True


def described(model: Model, dtype: torch.dtype | str, device: str) -> Served:
    """Return what the server says about ``model`` when it runs in ``dtype`` on ``device``."""
    if dtype == "auto":
        is_half = device != "cpu" and model.dtype != torch.int8
        dtype = torch.float16 if is_half else model.dtype
    identity = {
        "name": model.architecture.name,
        "weights": _weights_text(model),
        "sha256": weights_sha256(model),
        "dtype": dtype_name(parse_dtype(dtype) if isinstance(dtype, str) else dtype),
        "device": device,
        "fastres": __version__,
    }
    labels = (model.categories or placeholders(model.num_classes)) if model.num_classes else ()
    stage = f"layer{len(model.architecture.depths)}"
    stride, _ = strides_and_channels(model.outline, model.outline.features[stage])
    return Served(identity, tuple(labels), model.transforms, stride)


def _weights_text(model: Model) -> str:
    """Return where the weights come from, without the model's name and the folders of a path."""
    text = model.weights.removeprefix(f"{model.architecture.name} ")
    return path_text(Path(text).name if "/" in text else text)


@contextmanager
def _short_folder() -> Iterator[str]:
    """Yield a new folder that only this user can read, whose name is short enough for that of a socket."""
    is_long = len(tempfile.gettempdir()) > _LONGEST_FOLDER
    with tempfile.TemporaryDirectory(prefix="fastres-serve-", dir="/tmp" if is_long else None) as folder:
        yield folder


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket that listens at the host and port, so that no other program can. Raises ``ServerError``."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(f"host is {settings.host!r}, which is no address of this machine: {error}") from error
    with bound:
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD)  # connections inherit it
            bound.bind(address)
            bound.listen(_BACKLOG)
        except OSError as error:
            advice = {
                errno.EADDRINUSE: "another program uses it; give another --port",
                errno.EACCES: "ports below 1024 need rights; give another --port",
                errno.EADDRNOTAVAIL: "this machine has no such address; give another --host",
            }.get(error.errno or 0, os.strerror(error.errno or 0))
            raise ServerError(f"{settings.host}:{settings.port} cannot be used: {advice}") from error
        bound.set_inheritable(False)
        yield bound


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _most_connections() -> int:
    """Let this process open as many files as it may; return how many of them can be connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _DESCRIPTORS
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(max(soft, wanted) - _RESERVED, max(soft, wanted) // 2)
