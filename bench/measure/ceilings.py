"""The ceilings of this machine, measured in the run that uses them: the rates of a matrix product and of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastres.executors.int8_steps import pack_product
from fastres.network.quantisation import Scale
from fastres.roofline.ceilings import Ceilings

from .timing import elapsed_ms

# Bytes of the copied tensor. 512 MiB on a GPU and 256 MiB on a CPU are several times the size of the last-level cache.
_COPY_BYTES = {"cuda": 512 << 20, "cpu": 256 << 20}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_REPEATS = {"cuda": 20, "cpu": 5}
_LEAST_SECONDS = 0.5  # of all repetitions on a CPU, where a disturbance can be longer than a few products in 8 bit


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings on ``device``: the matmul in ``dtype``, with the current float32 precision setting."""
    kind = device.type
    size, repeats = _MATMUL_SIZE[kind], _REPEATS[kind]
    with torch.inference_mode():
        flops = 2 * size**3 / _best_seconds(_product(size, device, dtype), device, repeats)
        source = torch.ones(_COPY_BYTES[kind] // 4, device=device)
        target = torch.zeros_like(source)
        moved = 2 * _COPY_BYTES[kind] / _best_seconds(lambda: target.copy_(source), device, repeats)
    return Ceilings(flops / 1e12, moved / 1e9)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that multiplies two square matrices in ``dtype``; in int8, with oneDNN and a float32 result."""
    if dtype != torch.int8:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=product)
    levels, scale = torch.ones(size, size, dtype=torch.int8, device=device), torch.ones(size, device=device)
    packed = pack_product(levels, scale, scale, Scale(1.0), None, None, "none", size)
    rows = levels.to(torch.uint8)
    return lambda: packed.of_rows(rows)


def _best_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the shortest of several times, because disturbances only slow calls down. The first call is a warm-up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + (_LEAST_SECONDS if device.type == "cpu" else 0)
    while len(times) < repeats or time.perf_counter() < end:
        times.append(elapsed_ms(call, device))
    return min(times) / 1e3
