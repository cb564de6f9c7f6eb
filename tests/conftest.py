"""Setup for all tests: torchvision with a CPU build of torch, random seeds, and which tests run in which process."""

from __future__ import annotations

import dataclasses
import getpass
import os
import tempfile

import pytest
import torch

# torch.compile's cache ignores ATEN_CPU_CAPABILITY. Code compiled with AVX-512 computes garbage, or crashes, if that
# variable disables AVX-512. A cache for each value keeps such runs apart.
_CACHE = f"torchinductor-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _CACHE))

# huggingface_hub reads this when it is imported. Without it, a name with a slash would be looked up on the real hub.
os.environ["HF_HUB_OFFLINE"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # The interpreter spends half its time on checks for integer overflow, which only matter when debugging kernels.
    _builder = interpreter.interpreter_builder
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _define_torchvision_ops() -> torch.library.Library | None:
    """Declare the compiled ops that importing torchvision looks up. Wheels for CPU builds of torch lack them."""
    if torch.cuda.is_available():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SIGNATURE}")
    return library


_library = _define_torchvision_ops()  # kept for the whole process: deleting it would undo the definitions


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed every test, so that it draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_packaged_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the package's tuned tables. Tests that need a table write one, so a new table never changes a test."""
    from fastres.kernels.routing import tables

    tables.FOLDER = tmp_path_factory.mktemp("tables")
    tables.table.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run interpreter tests and other tests in separate processes, because Triton reads TRITON_INTERPRET only once."""
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
