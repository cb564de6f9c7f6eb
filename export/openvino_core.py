"""OpenVINO's ``Core``: one for the process.

Each ``Core`` that runs on the CPU sets an alternate signal stack, and puts back the one before when it is deleted. If
the first of two is deleted first, the second puts back the first one's stack, which is gone by then. The next signal
with a handler, such as the end of a child process, ends the process with a segmentation fault (OpenVINO 2026.4).
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def core() -> Any:
    """Return the ``openvino.Core`` of this process, which is never deleted."""
    import openvino

    return openvino.Core()


def compiled(model: Any, precision: str = "f32") -> Any:
    """Return ``model``, a path or a graph, compiled for the CPU: for latency, with as many threads as torch uses.

    ``precision`` is that of the arithmetic in floating point, ``"f32"`` or ``"bf16"``.
    """
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return core().compile_model(model, "CPU", options)
