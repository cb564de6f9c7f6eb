"""The processes of a server that hold the model, one for each device. LitServe starts, watches and replaces them.

The server sends them whole batches (:class:`Work`): the numbers of the slots that hold the pixels. LitServe's own queue
and batching are not used. Its batches either wait for further requests or spin on the queue, and a message takes
several calls of a further process. Here each process has a socket to the server, which also shows at once that it has
died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import litserve
import numpy as np
import torch
from litserve.loops import LitLoop
from litserve.utils import WorkerSetupStatus, wrap_litserve_start
from torch import Tensor

from fastres.classification.parcels import padded
from fastres.executors.quota import suitable_threads
from fastres.look.cam import class_activation_maps
from fastres.memory import keep_memory_of_program, settle
from fastres.model.loading import load
from fastres.model.model import WARMUP_CALLS
from fastres.network.plan import LOGITS, POOLED

from .arena import Arena
from .batching import Ready, batch_sizes, prepared_size
from .failures import ProcessDiedError
from .messages import Messenger, Patience, receive, send

FAILED = WorkerSetupStatus.ERROR
_PATH = "/internal"  # LitServe names things after it; nothing is served there
_CHECK = 0.2  # seconds between LitServe's looks at the processes
# How often a thread of GNU's OpenMP looks for work before it sleeps. The default is long enough to keep a core from the
# other processes for 15 ms after each batch. This is about 0.5 ms, longer than the gaps between layers.
_SPINNING, _SPINS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), "10000"
_log = logging.getLogger("fastres.serving")


@dataclass(frozen=True)
class Work:
    """A batch: its slots, and for each how many class-activation maps it wants (0: none)."""

    slots: tuple[int, ...]
    maps: tuple[int, ...]


class ModelProcess(litserve.LitAPI):
    """What a model process does. ``path`` is a file that ``model.save`` wrote."""

    def __init__(self, path: Path, dtype: torch.dtype | str, arena: Arena, max_batch: int) -> None:
        self._path, self._dtype, self._arena, self._max_batch = path, dtype, arena, max_batch
        self.address = str(path.with_name("models.socket"))
        super().__init__(api_path=_PATH, loop=_Loop())

    def setup(self, device: str) -> None:
        """Load the model on ``device`` and do the work of the first calls of each batch size."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the server ends this one
        keep_memory_of_program()
        torch.set_num_threads(min(suitable_threads(), torch.get_num_threads()))
        self._model = load(self._path, dtype=self._dtype, device=device, progress=False)
        self._sizes = batch_sizes(self._max_batch)
        crop = self._arena.crop
        self._staging = torch.empty(self._max_batch, crop, crop, 3, dtype=torch.uint8, device="cpu")
        if self._model.device.type == "cuda":
            self._staging = self._staging.pin_memory()  # page-locked, a GPU copies it several times as fast
        for size in self._sizes:
            for _ in range(WARMUP_CALLS):
                x = torch.zeros(size, 3, crop, crop, dtype=torch.uint8, device=device)
                self._values(x)
        if self._arena.classes:
            for _ in range(WARMUP_CALLS):
                class_activation_maps(self._model, x[:1])

    def predict(self, work: Work, **_: Any) -> tuple[list[Any], float]:
        """Compute a batch and write the results into its slots; return its maps, and the seconds that it took."""
        began = time.perf_counter()
        count = len(work.slots)
        pixels = self._staging[:count]
        np.stack([self._arena.pixels(slot) for slot in work.slots], out=pixels.numpy())
        x = pixels.permute(0, 3, 1, 2).to(self._model.device)  # [N, 3, crop, crop], channels-last
        values = self._values(padded(x, prepared_size(count, self._sizes)) if x.is_cuda else x)
        scores, embedding = (value[:count].float().cpu().numpy() for value in values)
        for row, slot in enumerate(work.slots):
            self._arena.scores(slot)[:] = scores[row]
            self._arena.embedding(slot)[:] = embedding[row]
        maps = [_maps(self._model, x[row : row + 1], scores[row], count) for row, count in enumerate(work.maps)]
        return maps, time.perf_counter() - began

    def _values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``[N, classes]`` and embedding ``[N, features]``."""
        wanted = {"embedding": POOLED, **({"logits": LOGITS} if self._arena.classes else {})}
        values = self._model.values(x.contiguous(memory_format=torch.channels_last), wanted)
        embedding = values["embedding"].flatten(1)
        return values["logits"].softmax(1) if self._arena.classes else embedding[:, :0], embedding


def best_classes(scores: np.ndarray[Any, Any], count: int) -> list[int]:
    """Return the indices of the ``count`` highest scores, the highest first."""
    count = min(count, len(scores))
    found = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    return [int(index) for index in found[np.lexsort((found, -scores[found]))]]


def _maps(model: Any, x: Tensor, scores: np.ndarray[Any, Any], count: int) -> list[list[list[float]]] | None:
    """Return the class-activation maps of the ``count`` best classes, each ``[h][w]``."""
    if not count:
        return None
    found = class_activation_maps(model, x, best_classes(scores, count))[0]
    return [[[round(value, 4) for value in row] for row in each] for each in found.tolist()]


class _Loop(LitLoop):
    """What LitServe calls in a model process after its setup: compute the batches that come through the socket."""

    def __call__(self, lit_api: ModelProcess, device: str, worker_id: int, *_: Any) -> NoReturn:
        settle()
        with suppress(ConnectionError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(lit_api.address)
            send(connection, json.dumps(worker_id).encode())
            while (message := receive(connection)) is not None:
                send(connection, json.dumps(_computed(lit_api, Work(**json.loads(bytes(message))))).encode())
        os._exit(0)  # the server has ended


def _computed(process: ModelProcess, work: Work) -> tuple[list[Any], float] | None:
    try:
        return process.predict(work)
    except Exception:
        _log.exception("A batch of %d images failed", len(work.slots))
        return None


class _Link:
    """The server's connection to one model process, and the batches that it computes, oldest first."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.messenger = Messenger(self._arrived, self._lost)
        self.number: int | None = None  # of the process, which says it first of all
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self._patience = Patience(models.patience, lambda: models.end(self.number))

    def send(self, work: Work) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        self.messenger.send(json.dumps({"slots": work.slots, "maps": work.maps}).encode())
        if len(self.waiting) == 1:
            self._patience.begin()
        return future

    def _arrived(self, message: bytes) -> None:
        content = json.loads(message)
        if self.number is None:
            self.number = content
            self._models.add(self)
            return
        future = self.waiting.popleft()
        self._patience.end()
        if self.waiting:
            self._patience.begin()
        if not future.done():
            if content is None:
                future.set_exception(ProcessDiedError("the model failed"))
            else:
                future.set_result(content)

    def _lost(self) -> None:
        self._patience.end()
        self._models.remove(self)
        for future in self.waiting:
            if not future.done():
                future.set_exception(ProcessDiedError("the model's process ended"))


class Models:
    """The model processes, as the server sees them. :func:`started` makes it.

    One that takes longer than ``patience`` seconds for a batch is ended.
    """

    def __init__(self, server: litserve.LitServer, address: str, patience: float) -> None:
        self._server, self._address, self.patience = server, address, patience
        self._links: list[_Link] = []
        self._arrived = asyncio.Event()
        self._listening: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Let the processes connect."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_unix_server(lambda: _Link(self).messenger, self._address)

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.close()
        for link in list(self._links):
            link.messenger.close()

    def add(self, link: _Link) -> None:
        """Note a process that is ready."""
        self._links.append(link)
        self._arrived.set()

    def remove(self, link: _Link) -> None:
        """Note a process that has ended."""
        if link in self._links:
            self._links.remove(link)
        if not self._links:
            self._arrived.clear()

    def end(self, number: int | None) -> None:
        """End a process, so that LitServe starts another one."""
        if number is not None:
            self._server.inference_workers[number].kill()

    async def compute(self, batch: Sequence[Ready]) -> tuple[Sequence[Any], float]:
        """Have a process compute a batch; see :data:`fastres.serving.batching.Compute`."""
        work = Work(tuple(image.slot for image in batch), tuple(image.wants for image in batch))
        await self._arrived.wait()  # all processes may have died; LitServe starts others
        maps, seconds = await min(self._links, key=lambda link: len(link.waiting)).send(work)
        return maps, seconds

    @property
    def ready(self) -> bool:
        """True if at least one process can compute."""
        return bool(self._links)

    def states(self) -> list[str]:
        """Return the state of each process, such as ``FAILED``. Raises ``OSError`` and ``EOFError``."""
        return list(self._server.workers_setup_status.values())


@contextmanager
def started(process: ModelProcess, devices: Sequence[str], patience: float) -> Iterator[Models]:
    """Start one process on each of ``devices`` and end them with the context.

    A process that takes longer than ``patience`` seconds for a batch is replaced.
    """
    accelerator = "cpu" if devices[0] == "cpu" else "cuda"
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    server = litserve.LitServer(
        process, accelerator=accelerator, devices=1 if accelerator == "cpu" else numbers, timeout=False,
        restart_workers=True, disable_openapi_url=True,
    )  # fmt: skip
    server.monitor_internal = _CHECK
    if not any(name in os.environ for name in _SPINNING):
        os.environ[_SPINNING[0]] = _SPINS  # read by processes that start from now on
    # Ctrl-C in a terminal reaches all processes. Those that start now ignore it from the beginning.
    is_main = threading.current_thread() is threading.main_thread()
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    with wrap_litserve_start(server, worker_monitor=True) as running:
        if is_main:
            signal.signal(signal.SIGINT, usual)
        try:
            yield Models(running, process.address, patience)
        finally:
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # its thread complains that the queues end
