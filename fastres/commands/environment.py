"""Describe the machine and the installed versions, for bug reports and benchmark results."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from fastres.executors import cpu
from fastres.executors.direct import description
from fastres.executors.processor import processor
from fastres.executors.quota import cores_allowed
from fastres.kernels.inspection.ptx import RECOMMENDED, leaves_out_fence
from fastres.memory import has_huge_pages, is_kept
from fastres.text import dtype_name
from fastres.version import __version__


def environment() -> dict[str, str | int | float | None]:
    """Return versions, processor, GPU and settings as plain data; ``None`` for each that is absent."""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    triton = installed_version("triton")
    is_hopper = properties is not None and not torch.version.hip and (properties.major, properties.minor) == (9, 0)
    return {
        "fastres": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "triton_note": triton_note(triton) if is_hopper else None,
        "torchvision": installed_version("torchvision"),
        "cuda": torch.version.cuda,
        "gpu": properties.name if properties else None,
        "gpu_memory_mb": properties.total_memory // 2**20 if properties else None,
        **processor(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores_allowed": cores_allowed(),
        "memory_kept": is_kept(),
        "huge_pages": has_huge_pages(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": description(),
        "cpu_dtypes": ", ".join(map(dtype_name, cpu.supported_dtypes())),
        "weights_folder": str(Path(torch.hub.get_dir()) / "checkpoints"),
        "platform": platform.platform(),
    }


def triton_note(version: str | None) -> str | None:
    """Return a warning about this version of Triton on a Hopper GPU (sm_90), or ``None``."""
    if version is None or not leaves_out_fence(version):
        return None
    return (
        f"triton {version} leaves out a fence between the copies and the products of the general convolution on this "
        f"GPU; {RECOMMENDED} or newer is recommended"
    )


def installed_version(package: str) -> str | None:
    """Return the installed version of ``package``, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
