"""The machine, versions and settings of a run. They are needed to interpret its results later."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastres.bench.report.results import significant
from fastres.commands.environment import installed_version
from fastres.executors.direct import description
from fastres.executors.processor import processor
from fastres.memory import has_huge_pages, is_kept
from fastres.roofline.ceilings import Ceilings
from fastres.version import __version__

from .timing import memory_method


def describe(
    device: torch.device,
    command: str,
    weights: str,
    tf32: bool,
    cold: bool,
    ceilings: Mapping[str, Ceilings],
) -> dict[str, Any]:
    """Return the ``environment`` of a run's results. ``ceilings`` are by dtype."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gb": significant(gpu.total_memory / 1e9) if gpu else None,
        **processor(),
        "cpu_count": os.cpu_count(),
        "load_average": _load_average(),
        "threads": torch.get_num_threads(),
        "memory_kept": is_kept(),
        "huge_pages": has_huge_pages(),
        "onednn": None if gpu else description(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "triton": installed_version("triton"),
        "fastres": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "without": os.environ.get("FASTRES_WITHOUT", ""),
        "weights": weights,
        "tf32": tf32,
        "ceilings": {
            dtype: {name: significant(value) for name, value in asdict(measured).items()}
            for dtype, measured in ceilings.items()
        },
        "first_call": f"{'empty compilation caches' if cold else 'compilation caches as found'} on disk",
        "timing": "CUDA events" if gpu else "time.perf_counter",
        "peak_memory": memory_method(device),
    }


def commit() -> str:
    """Return the commit of the code, from FASTRES_COMMIT or from git. Without either, return a digest of the code."""
    if given := os.environ.get("FASTRES_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        digest = hashlib.sha256()
        for folder in ("fastres", "kernels", "bench"):
            for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return f"code {digest.hexdigest()[:12]}"


def _load_average() -> float | None:
    """Return the average number of running processes over the last minute. Other processes disturb timings."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


@contextmanager
def compilation_caches(empty: bool) -> Iterator[None]:
    """With ``empty``, hide earlier compilation results from Triton and Inductor, on disk and (Inductor) in memory."""
    if not empty:
        yield
        return
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


@contextmanager
def settings(tf32: bool) -> Iterator[None]:
    """Set the same rules for every engine: IEEE float32 unless ``tf32``, and cuDNN chooses its fastest algorithm.

    By default PyTorch lets cuDNN's float32 convolutions use TF32, which is less precise.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32, cudnn.benchmark = tf32, True
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]
