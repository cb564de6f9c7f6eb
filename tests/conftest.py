"""Shared by all tests: torchvision next to a CPU build of torch, and which tests run in which process."""

from __future__ import annotations

import dataclasses
import getpass
import os
import tempfile

import pytest
import torch

# torch.compile's cache does not know ATEN_CPU_CAPABILITY: what it compiled with AVX-512 computes garbage, or crashes,
# where that variable takes AVX-512 away. A cache for each keeps runs with and without it apart.
_CACHE = f"torchinductor-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _CACHE))

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # Half of its time goes into checks of integers that do nothing unless kernels are debugged.
    _builder = interpreter.interpreter_builder
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _define_torchvision_ops() -> torch.library.Library | None:
    """Declare the compiled ops that torchvision's import looks up; wheels for CPU builds of torch lack them."""
    if torch.cuda.is_available():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SIGNATURE}")
    return library


_library = _define_torchvision_ops()  # lives as long as the process: its end would undo the definitions


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers each time, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep interpreter tests and the others in processes of their own: Triton reads TRITON_INTERPRET once."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    keep, drop = [], []
    for item in items:
        (keep if ("interpreter" in item.keywords) == interpreting else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
