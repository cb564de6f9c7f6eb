"""Which kernel and which configuration: a pure function of (shape, dtype, GPU).

The executor, the tests, the benchmarks and the ahead-of-time inspection all ask here, so what is inspected and tested
is what runs. The rules below are derived from the compiler's resource reports and from occupancy arithmetic (see
``docs/performance.md``); nothing is tuned while a user waits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .cards import INTERPRETER, Gpu
from .launch import cdiv, next_power_of_2


@dataclass(frozen=True)
class ConvShape:
    """A convolution's sizes: input [N, H, W, groups·C], weight [groups·K, R, S, C] (C and K count one group)."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: int
    padding: int
    groups: int = 1

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding - self.R) // self.stride + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding - self.S) // self.stride + 1

    @property
    def M(self) -> int:
        return self.N * self.P * self.Q

    @property
    def constants(self) -> dict[str, int]:
        """The sizes, but for N, as compile-time arguments."""
        names = ("H", "W", "P", "Q", "C", "K", "R", "S")
        return {name: getattr(self, name) for name in names} | {"STRIDE": self.stride, "PADDING": self.padding}


@dataclass(frozen=True)
class ConvConfig:
    """A kernel and its launch parameters. ``note`` says why a slower kernel was taken, where one was.

    ``split`` programs share the reduction of one tile; the "conv" kernel alone can do that.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    note: str = ""
    split: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        """The tile as compile-time arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def __str__(self) -> str:
        shared = f", reduction split in {self.split}" if self.split > 1 else ""
        tile = f"{self.block_m}×{self.block_n}×{self.block_k}"
        return f"{tile}, {self.num_warps} warps, {self.num_stages} stages{shared}"


@dataclass(frozen=True)
class StemConfig:
    """Launch parameters of the stem: ``block_q`` output columns of ``rows`` output rows per program."""

    kernel: str
    block_q: int
    rows: int
    num_warps: int
    num_stages: int
    prepared: bool = False  # reads images that a kernel before it padded (prepare.py)

    def __str__(self) -> str:
        padded = ", images padded before" if self.prepared else ""
        return f"{self.block_q} columns × {self.rows} rows, {self.num_warps} warps{padded}"


@dataclass(frozen=True)
class PoolConfig:
    """Launch parameters of the average pool: ``block_c`` channels, ``block_hw`` pixels at a time."""

    kernel: str
    block_c: int
    block_hw: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_c} channels × {self.block_hw} pixels, {self.num_warps} warps"


# Smallest group that fills a tensor-core instruction's reduction (16) and keeps block-diagonal padding cheap:
# ResNeXt's groups of 4 and 8 channels are merged into dense groups of this many (see grouping.py).
DENSE_GROUP = 32


@functools.lru_cache(maxsize=4096)
def route_conv(shape: ConvShape, dtype: torch.dtype, gpu: Gpu, precision: str = "ieee") -> ConvConfig:
    """The kernel and configuration for one convolution."""
    if gpu is INTERPRETER:
        block_m, block_n = (max(16, min(256, next_power_of_2(size))) for size in (shape.M, shape.K))
        return ConvConfig("conv", block_m, block_n, max(16, min(512, next_power_of_2(shape.C))), 4, 1)
    if dtype == torch.float32 and precision == "ieee":
        return _conv_float32(shape, gpu)
    block_k = min(64 // (dtype.itemsize // 2), max(16, next_power_of_2(shape.C)))
    block_n = min(128, max(16, next_power_of_2(shape.K)))
    # Smaller tiles until every multiprocessor has one; below 64 rows Hopper has no wgmma.
    candidates = _tile_sizes(block_n)
    filling = [(m, n) for m, n in candidates if _tiles(shape, m, n) >= gpu.multiprocessors]
    block_m, block_n = (filling or candidates[-1:])[0]
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    if gpu.is_amd:
        return ConvConfig("conv", block_m, block_n, min(block_k, 32), num_warps, 2)
    # 3 stages of 128×128×64 leave shared memory for two programs on a multiprocessor.
    return ConvConfig("conv", block_m, block_n, block_k, num_warps, 3 if block_m * block_n >= 128 * 128 else 4)


def _tile_sizes(widest: int) -> list[tuple[int, int]]:
    """Tiles (rows, columns) to try, largest first, none wider than ``widest``."""
    sizes = [(128, widest), (128, 64), (64, 64), (64, 32), (64, min(32, widest))]
    return [size for index, size in enumerate(sizes) if size[1] <= widest and size not in sizes[:index]]


def _tiles(shape: ConvShape, block_m: int, block_n: int) -> int:
    return cdiv(shape.M, block_m) * cdiv(shape.K, block_n) * shape.groups


def _conv_float32(shape: ConvShape, gpu: Gpu) -> ConvConfig:
    """IEEE float32 runs on the ordinary multiply-add units; its tiles live in registers, so they are small."""
    block_n = min(64, max(16, next_power_of_2(shape.K)))
    block_k = min(16, max(16, next_power_of_2(shape.C)))
    block_m = 64 if _tiles(shape, 64, block_n) >= gpu.multiprocessors else 32
    note = "float32 without tf32 does not use the tensor cores"
    # With 2 stages ptxas spills 1×1 layers at 96 registers; with 3 there is no spill on sm_80 or sm_90.
    return ConvConfig("conv", block_m, block_n, block_k, 4, 2 if gpu.is_amd else 3, note)


# Output pixels of the stem's convolution from which its images are prepared first: 16 images of 224×224. The second
# launch is then small beside what it saves: predicted, not measured (docs/performance.md).
PREPARED_PIXELS = 16 * 112 * 112


def route_stem(
    channels: int, pixels: tuple[int, int, int], dtype: torch.dtype, gpu: Gpu, pool: bool, precision: str = "ieee"
) -> StemConfig:
    """The stem's configuration for ``channels`` output channels and convolution output ``pixels`` (N, P, Q)."""
    n, p, q = pixels
    kernel = "stem_pool" if pool else "stem"
    block_q = min(128, max(16, next_power_of_2(q + 1 if pool else q)))
    if dtype == torch.float32:
        block_q = min(block_q, 64)
    elif pool and n * p * q >= PREPARED_PIXELS and gpu is not INTERPRETER:
        # 8 warps and 3 stages: 128 registers on sm_90, so that two programs fit a multiprocessor.
        return StemConfig(kernel, block_q, 8, 8 if block_q == 128 else 4, 2 if gpu.is_amd else 3, prepared=True)
    rows = 8 if pool else 1
    if pool:
        # Smaller pieces, although neighbours compute a row in common, until every multiprocessor has one.
        narrow = min(64, block_q)
        sizes = [(block_q, 8), (block_q, 4), (block_q, 2), (narrow, 2), (narrow, 1)]
        filling = [size for size in sizes if stem_programs(n, cdiv(p, 2), cdiv(q, 2), *size) >= gpu.multiprocessors]
        block_q, rows = (filling or sizes[-1:])[0]
    # 128 columns with 4 warps need 254 registers (sm_90) or spill (sm_80, gfx942); with 8 warps 186 to 209.
    # Images of another dtype than the weights reach wgmma through registers, and in a pipeline ptxas writes those anew
    # while they are still read (sass.py).
    multiplies_in_flight = gpu.arch == "sm_90" and (dtype != torch.float32 or precision == "tf32")
    return StemConfig(kernel, block_q, rows, 8 if block_q == 128 else 4, 1 if multiplies_in_flight else 2)


def stem_programs(n: int, p: int, q: int, block_q: int, rows: int) -> int:
    """How many programs compute the pooled stem of ``n`` images of ``p`` × ``q`` pooled pixels."""
    return n * cdiv(p, rows) * cdiv(q, block_q // 2 - 1)


def route_window_pool(channels: int) -> PoolConfig:
    """The configuration of window pools and gates, which read and write each element once: wide rows, 16 bytes each."""
    block_c = min(128, next_power_of_2(channels))
    return PoolConfig("window_pool", block_c, 2048 // block_c, 4)


def route_pool(channels: int, pixels: int) -> PoolConfig:
    """The average pool's configuration."""
    block_c = min(128, next_power_of_2(channels))
    return PoolConfig("average_pool", block_c, min(16, next_power_of_2(pixels)), 4)
