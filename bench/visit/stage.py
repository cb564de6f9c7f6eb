"""A piece's process in a rehearsal: its command on a pretended GPU, with stand-ins for what takes minutes.

The stand-ins are the least that lets a visit be played through: engines are timed a few times, on small tensors; what
would be compiled is taken for good, since kernels are interpreted; ``torch.compile`` returns the module that it was
given. Faults are put where a real one would be: into the kernels' host functions and into the process.
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

from .running import label

Faults = Sequence[tuple[str, str]]  # what happens, to which family of kernels or to which piece

HOSTS = {
    "conv": (conv, "conv2d_into"), "gemm": (gemm, "gemm_into"), "conv_tma": (conv_tma, "conv_tma_into"),
    "fused": (fused, "fused_into"),
}  # fmt: skip
PRELOADED = (cli, show, rich.table)  # for the processes that are forked from one that has imported this module
FOR_EVER = 3600
STALLED = "goes no further"
# Rules fill multiprocessors; with one of them they choose few and large tiles, which an interpreter is quicker with.
CARD = replace(H100, multiprocessors=1)


class Inline(Executor):
    """A pool without processes."""

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
    """Have everything measured as briefly as it can be."""
    tqdm.set_lock(threading.RLock())  # its own is made for several processes, and outlives one that is killed
    timing.QUICK = timing.Budget(0.0, 2, 2, 1)
    timing.REPLAYS, timing.MOST_LAUNCHES = 2, 1
    ceilings._COPY_BYTES = dict.fromkeys(("cpu", "cuda"), 1 << 20)
    ceilings._MATMUL_SIZE = dict.fromkeys(("cpu", "cuda"), 128)
    ceilings._REPEATS = dict.fromkeys(("cpu", "cuda"), 2)
    checking.IMAGES = checking.IMAGES_OF_SMALL_NETWORKS = 4
    checking.HALF_FACTOR = checking.PEER_FACTOR  # so few images are more or less off by luck
    layers.WARMUPS, layers.ROUNDS, layers.FEWEST = 0, 1, 1
    networks.ROUNDS, networks.CHECKS, networks.REPLAYS = 2, 1, 1
    networks.LARGE_BATCH, networks.QUICK_MICRO_BATCHES = 1, (1,)  # no early launches: none are interpreted
    configurations.FAR_OFF, configurations.TILES_TRIED, configurations.VARIANTS_TRIED = 1.05, 1, 1
    # Half of an interpreter's time goes into checks of integers that do nothing unless kernels are debugged.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    tune.ProcessPoolExecutor = Inline  # type: ignore[misc, assignment]
    tuned_tables.compiles_well = lambda entry: True
    compilers.torch_compile = lambda module, x, mode="": module


def spoil(faults: Faults, piece: str) -> None:
    """Put faults into kernels, or into this process where it runs ``piece``."""
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
    """Once some row has been written, the process is killed, or goes no further."""
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
    """Run a command, which is a module with its arguments, to its end, in a process that has been forked for it."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.clear()
    os.environ.update(variables)
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
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def limit_files(largest: int) -> None:
    """Let no file of this process grow beyond so many bytes: what a full disk does to it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """While it lasts, no file of this process grows beyond so many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(largest)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
