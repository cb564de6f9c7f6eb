"""OpenVINO's ``Core``: one for the process.

Each ``Core`` that runs on the CPU sets an alternate signal stack, and puts back the one before when it is deleted. If
the first of two is deleted first, the second puts back the first one's stack, which is gone by then. The next signal
with a handler, such as the end of a child process, ends the process with a segmentation fault (OpenVINO 2026.4).
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def core() -> Any:
    """Return the ``openvino.Core`` of this process, which is never deleted."""
    import openvino

    return openvino.Core()
