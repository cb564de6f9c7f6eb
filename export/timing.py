"""Time a file in 8 bit beside the float32 export of the same network, in ONNX Runtime and in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastres.network.plan import INPUT

from .errors import ExportError
from .verification import open_session

BATCHES = (1, 8)
WARM_UP, LEAST_TURNS, SECONDS = 3, 9, 3.0

Run = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Timing:
    """The median times of one batch in one runtime; ``speedup`` is float32's time in multiples of the file's."""

    runtime: str
    batch: int
    milliseconds: float
    float32_milliseconds: float
    speedup: float

    def __str__(self) -> str:
        verdict = f"{self.speedup:.2f} times as fast"
        if self.speedup < 1:
            verdict = f"SLOWER, {self.speedup:.2f} times as fast"
        return (
            f"{self.runtime}, batch {self.batch}: {self.milliseconds:.1f} ms, float32 {self.float32_milliseconds:.1f} "
            f"ms: {verdict}"
        )


def time_files(
    file: Path,
    float32: Path,
    inputs: Callable[[int], np.ndarray],
    fixed_batch: int | None,
    progress: Callable[[str], object] = lambda what: None,
) -> tuple[Timing, ...]:
    """Time ``file`` and ``float32``, in turns, on ``inputs(batch)``, with as many threads as torch uses.

    The batches are 1 and 8, or ``fixed_batch`` if the files take no other. OpenVINO is timed if it is installed.
    """
    found = []
    for runtime, opened in _runtimes():
        runs = [opened(path) for path in (file, float32)]
        for batch in BATCHES if fixed_batch is None else (fixed_batch,):
            progress(f"time, batch {batch}")
            own, other = _medians(runs, inputs(batch))
            found.append(Timing(runtime, batch, 1e3 * own, 1e3 * other, other / own))
    return tuple(found)


def _medians(runs: list[Run], x: np.ndarray) -> list[float]:
    """Return the median seconds of each of ``runs``, which take turns."""
    for run in runs:
        for _ in range(WARM_UP):
            run(x)
    taken: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    while len(taken[0]) < LEAST_TURNS or time.perf_counter() - begun < SECONDS:
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def _runtimes() -> Iterator[tuple[str, Callable[[Path], Run]]]:
    """Yield the name of each runtime that is installed, and the function that opens a file in it."""
    import onnxruntime

    yield f"ONNX Runtime {onnxruntime.__version__}", _in_onnxruntime
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        yield f"OpenVINO {openvino.__version__.split('-')[0]}", _in_openvino


def _in_onnxruntime(path: Path) -> Run:
    session = open_session(path, threads=torch.get_num_threads())
    return lambda x: session.run(None, {INPUT: x})


def _in_openvino(path: Path) -> Run:
    import openvino

    from .openvino_core import compiled

    try:
        request = compiled(path).create_infer_request()
    except Exception as error:  # openvino raises RuntimeError, and others from its plugins
        raise ExportError(
            f"OpenVINO {openvino.__version__} cannot compile the exported file ({error}); nothing was written. Leave "
            "time out, or uninstall OpenVINO"
        ) from error
    return lambda x: request.infer([x], share_inputs=True)
