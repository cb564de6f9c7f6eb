"""``fastres.ray.classify``: a run whose shards are computed by the actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fastres.arguments import whole_number
from fastres.classification.driving import TRIES, Begun, Failures, drive, every
from fastres.classification.outputs import place_of
from fastres.classification.report import Report
from fastres.classification.requests import Request, Sources
from fastres.classification.shards import decreasing
from fastres.classification.shared import RunFinishedError, Tell
from fastres.errors import InputError, RayError, WorkerError
from fastres.model.model import Model
from fastres.terminal import is_terminal

from .actors import BEGUN, FAILED, FINISHED, Answer, Counter, ShardActor, Task, begin

_NAMED = re.compile(r"[\w.]+(Error|Exception): ")  # the last line of a traceback
_EVERY = 0.5  # seconds between looks at the counter


def classify(
    source: Sources,
    output: str | os.PathLike[str],
    *,
    address: str | None = None,
    actors: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Do what ``fastres.classify`` does, on a Ray cluster. The table is the same, byte for byte.

    ``source`` and ``output`` must be on a file system that all nodes share under the same name, or URLs. ``options``
    are those of ``fastres.classify``: ``model`` (a name), ``weights``, ``top_k``, ``embed``, ``decoder``,
    ``batch_size``, ``workers``, ``device``, ``dtype``, ``categories``, ``image_column`` and ``columns``.

    ``address`` is that of the cluster, as for ``ray.init``; if Ray is connected already, that connection is used. Each
    of the ``actors`` loads the model once, and gets ``num_gpus`` GPUs and ``num_cpus`` cores. The default is one GPU
    with its share of the cores if the cluster has GPUs, otherwise one core, and as many actors as fit. ``workers``
    defaults to the number of cores.

    Actors and nodes that die are replaced. A run that was interrupted continues when it is called again, and several
    drivers may do the same run at the same time. Raises ``ShardError`` if some rows cannot be computed in three tries,
    ``RayError`` if the cluster cannot be used, and the errors of ``fastres.classify``.
    """
    progress = is_terminal(sys.stderr) if progress is None else progress
    place = place_of(output, overwrite)
    request = Request(source, place.suffix, **options)
    if isinstance(request.model, Model):
        raise InputError("a loaded model was given; pass the model's name, because each actor loads its own")
    actors = None if actors is None else whole_number(actors, "actors")
    task = Task(request, place.absolute(), os.getcwd())
    with _connected(address), _quiet():
        crew = _Actors(task, *_resources(actors, num_cpus, num_gpus))
        return drive(crew, request, place, resume=resume, progress=progress)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Within the context, be connected to a cluster."""
    if ray.is_initialized():
        if address is not None and address not in ("auto", ray.get_runtime_context().gcs_address):
            raise RayError(
                f"address is {address!r}, but Ray is already connected to {ray.get_runtime_context().gcs_address!r}; "
                "leave address out, or call ray.shutdown() first"
            )
        yield
        return
    try:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # lines of its C++ code would break up the bar
        with _own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        raise RayError(
            f"There is no Ray cluster at address {address!r} ({_reason(error)}); start one with 'ray start "
            "--head', or leave the address out to use this machine. If it has a token, as with Ray 2.60, set "
            "RAY_AUTH_MODE=token and copy ~/.ray/auth_token from its first machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Give back the signal handlers that the program had before the block: Ray's handler for SIGTERM aborts it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, show none of Ray Data's own progress bars and messages."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


def _resources(actors: int | None, num_cpus: float | None, num_gpus: float | None) -> tuple[int, float, float]:
    """Return the number of actors, and the cores and GPUs of each. Raises ``RayError`` if the cluster lacks them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    totals = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = (1.0 if totals["GPU"] else 0.0) if num_gpus is None else float(num_gpus)
    cpus = 1.0 if num_cpus is None else float(num_cpus)
    if num_cpus is None and gpus:
        cpus = max(1.0, totals["CPU"] * gpus // max(totals["GPU"], 1))
    if cpus < 0 or gpus < 0 or not cpus + gpus:
        raise InputError(f"num_cpus is {num_cpus!r} and num_gpus is {num_gpus!r}; give each actor some of them")
    places = (min(_times(node.get("CPU", 0), cpus), _times(node.get("GPU", 0), gpus)) for node in nodes)
    fitting = int(sum(places))
    if not fitting or (actors or 0) > fitting:
        raise RayError(
            f"The cluster has room for {fitting:,} actors with {cpus:g} cores and {gpus:g} GPUs each "
            f"({len(nodes)} nodes with {totals['CPU']:g} cores and {totals['GPU']:g} GPUs in all), not for "
            f"{actors or 1:,}; ask for less, or add nodes"
        )
    return actors or fitting, cpus, gpus


def _times(there: float, wanted: float) -> float:
    return there // wanted if wanted else float("inf")


class _Actors:
    """A crew of actors on a Ray cluster."""

    def __init__(self, task: Task, size: int, cpus: float, gpus: float) -> None:
        self._size = size
        self._task, self._cpus, self._gpus = task, cpus, gpus

    def begin(self) -> Begun:
        remote = ray.remote(begin).options(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=TRIES)
        return self._value(_got(remote.remote(self._task)))

    def compute(self, begun: Begun, missing: Sequence[range], tell: Tell) -> None:
        shards = decreasing(missing, begun.batch_size, self._size)
        failures = Failures(self._task.place)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        counter = ray.remote(Counter).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        with _counted(counter, tell):
            for row in self._rows(begun.run, shards, counter):
                shard = range(row["start"], row["stop"])
                if row["kind"] == FAILED:
                    error, where = pickle.loads(row["value"])
                    failures.fail(shard, error, where)
                elif row["kind"] == FINISHED:
                    raise RunFinishedError(pickle.loads(row["value"]))
        failures.check()

    def _rows(self, run: str, shards: Sequence[range], counter: Any) -> Iterator[dict[str, Any]]:
        """Yield what the actors answer, as it comes: one row for each shard."""
        table = [{"start": shard.start, "stop": shard.stop} for shard in shards]
        size = min(self._size, len(shards))
        answers = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
            ShardActor,
            fn_constructor_kwargs={"task": self._task, "run": run, "counter": counter},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        try:
            yield from answers.iter_rows()
        except (ray.exceptions.RayError, RuntimeError) as error:
            place = self._task.place
            raise WorkerError(
                f"The actors ended: {_reason(error)}. If a node ran out of memory, use smaller batches, fewer "
                f"workers or fewer actors. Finished rows are kept in {place.folder!r}; {place.again}"
            ) from error

    @staticmethod
    def _value(answer: Answer) -> Any:
        """Return the value of the answer to ``begin``."""
        kind, pickled = answer
        value = pickle.loads(pickled)
        if kind == BEGUN:
            return value
        raise value[0] if kind == FAILED else RunFinishedError(value)


def _got(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"The cluster could not begin the run: {_reason(error)}. fastres must be installed on every node, in "
            "the same version"
        ) from error


@contextmanager
def _counted(counter: Any, tell: Tell) -> Iterator[None]:
    """Within the context, pass on what the actors tell ``counter``."""
    seen = [0, 0]

    def look() -> None:
        with suppress(ray.exceptions.RayError):  # the counter has died: the bar stands still
            totals = ray.get(counter.totals.remote(), timeout=10)
            tell(totals[0] - seen[0], totals[1] - seen[1])
            seen[:] = totals

    try:
        with every(_EVERY, look):
            yield
    finally:
        look()
        ray.kill(counter)


def _reason(error: BaseException) -> str:
    """Return the line of an error of Ray's that says what happened, without the tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if _NAMED.match(line) and "UserCodeException" not in line]
    return (named[-1] if named else lines[0] if lines else type(error).__name__).rstrip(".")
