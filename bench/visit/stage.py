"""The process of one piece in a rehearsal: run its command on a pretend GPU, with fast replacements for slow parts.

Only steps that take minutes are replaced. Engines are timed a few times, on small tensors. Kernels are interpreted, so
checks of compiled kernels always pass. ``torch.compile`` returns the module unchanged. Faults are injected where real
ones would happen: in the kernels' host functions and in the process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import rich.table
import torch
from tqdm import tqdm
from triton.runtime import interpreter

from fastres.bench import tune
from fastres.bench.engines import compilers
from fastres.bench.measure import ceilings, checking, layers, timing
from fastres.bench.pretend_gpu.cuda import pretend_gpu
from fastres.bench.report import results, show
from fastres.bench.tuning import configurations, networks
from fastres.commands import cli
from fastres.kernels import conv, conv_tma, fused, gemm
from fastres.kernels.inspection import tuned_tables
from fastres.kernels.routing.cards import H100

from .running import ROOT, label

Faults = Sequence[tuple[str, str]]  # (what happens, the family of kernels or the piece that it happens to)

HOSTS = {
    "conv": (conv, "conv2d_into"), "gemm": (gemm, "gemm_into"), "conv_tma": (conv_tma, "conv_tma_into"),
    "fused": (fused, "fused_into"),
}  # fmt: skip
PRELOADED = (cli, show, rich.table)  # imported here so that processes forked from the fork server have them
FOR_EVER = 3600  # seconds
STALLED = "stalled on purpose"
# The rules choose enough tiles to fill the multiprocessors. With one multiprocessor they choose a few large tiles,
# which the interpreter runs faster.
CARD = replace(H100, multiprocessors=1)


class Inline(Executor):
    """A process pool that runs everything in this process."""

    def __init__(self, *_given: Any, **_named: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*given, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def make_small() -> None:
    """Reduce every measurement to the least work."""
    tqdm.set_lock(threading.RLock())  # the default lock is shared by processes and stays locked if one is killed
    timing.QUICK = timing.Budget(0.0, 2, 2, 1)
    timing.REPLAYS, timing.MOST_LAUNCHES = 2, 1
    ceilings._COPY_BYTES = dict.fromkeys(("cpu", "cuda"), 1 << 20)
    ceilings._MATMUL_SIZE = dict.fromkeys(("cpu", "cuda"), 128)
    ceilings._REPEATS, ceilings._LEAST_SECONDS = dict.fromkeys(("cpu", "cuda"), 2), 0.0
    checking.IMAGES = checking.IMAGES_OF_SMALL_NETWORKS = 4
    checking.HALF_FACTOR = checking.PEER_FACTOR  # the error of so few images varies by chance
    layers.WARMUPS, layers.ROUNDS, layers.FEWEST = 0, 1, 1
    networks.ROUNDS, networks.CHECKS, networks.REPLAYS = 2, 1, 1
    networks.LARGE_BATCH, networks.QUICK_MICRO_BATCHES = 1, (1,)  # no early launches: the interpreter has none
    configurations.FAR_OFF, configurations.TILES_TRIED, configurations.VARIANTS_TRIED = 1.05, 1, 1
    # The interpreter spends half its time on checks for integer overflow, which only matter when debugging kernels.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    tune.ProcessPoolExecutor = Inline  # type: ignore[misc, assignment]
    tuned_tables.compiles_well = lambda entry: True
    compilers.torch_compile = lambda module, x, mode="": module


def spoil(faults: Faults, piece: str) -> None:
    """Inject the faults of kernels, and those of this process if it runs the faulty piece."""
    for what, where in faults:
        if where in HOSTS:
            module, name = HOSTS[where]
            setattr(module, name, _spoiled(what, getattr(module, name)))
        elif label(where) == piece:
            _after_rows(what)


def _spoiled(what: str, host: Callable[..., Any]) -> Callable[..., Any]:
    def spoiled(y: Any, *given: Any, **named: Any) -> None:
        if what == "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if what == "hangs":
            time.sleep(FOR_EVER)
        host(y, *given, **named)
        if what == "wrong":
            y.add_(1)

    return spoiled


def _after_rows(what: str) -> None:
    """Kill or stall the process once it has written two rows."""
    write = results.write

    def ending(found: results.Results, folder: Any) -> Any:
        paths = write(found, folder)
        if len(found.rows) >= 2:
            if what == "stalls":
                print(STALLED, flush=True)
                time.sleep(FOR_EVER)
            os.kill(os.getpid(), signal.SIGKILL)
        return paths

    results.write = ending  # type: ignore[assignment]


def play(
    command: Sequence[str], variables: Mapping[str, str], log: str, faults: Faults, piece: str, largest: int | None
) -> None:
    """Run a command (a module with its arguments) and exit with its status. Runs in a process forked for it."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)  # like every piece
    if largest is not None:
        limit_files(largest)
    torch.set_num_threads(1)
    module, *arguments = command
    sys.argv = [module, *arguments]
    code: Any = 1
    try:
        make_small()
        with pretend_gpu(CARD):
            spoil(faults, piece)
            code = importlib.import_module("fastres.commands.cli" if module == "fastres" else module).main(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def limit_files(largest: int) -> None:
    """Limit every file of this process to ``largest`` bytes, to imitate a full disk."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Limit every file of this process to ``largest`` bytes until the context ends."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(largest)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
