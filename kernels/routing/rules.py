"""Choose the kernel and its configuration by rules: a pure function of (shape, dtype, GPU).

The executor, the tests, the benchmarks and the ahead-of-time inspection all use these rules, so they inspect and test
the code that runs. The rules are derived from the compiler's resource reports and from occupancy arithmetic (see
``docs/performance.md``). Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from fastres.kernels.launch import cdiv, next_power_of_2

from .cards import INTERPRETER, Gpu
from .without import left_out


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
        """The sizes, except N, as compile-time arguments."""
        names = ("H", "W", "P", "Q", "C", "K", "R", "S")
        return {name: getattr(self, name) for name in names} | {"STRIDE": self.stride, "PADDING": self.padding}


@dataclass(frozen=True)
class ConvConfig:
    """A kernel and its launch parameters. ``note`` says why a slower kernel was chosen, if one was.

    ``split`` programs share the reduction of one tile; only the "conv" kernel can do that.
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
    prepared: bool = False  # reads images that prepare.py's kernel padded

    def __str__(self) -> str:
        padded = ", images padded first" if self.prepared else ""
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


# Channels of a dense group: it fills a tensor-core instruction's reduction (16) and keeps block-diagonal padding cheap.
# ResNeXt's groups of 4 and 8 channels are merged into groups of this size (see grouping.py).
DENSE_GROUP = 32


# In a split reduction (split-K), each program adds up at least this many blocks, so that its pipeline fills. At most
# this many programs share a tile, because the last to arrive adds up the partial sums of all.
LEAST_BLOCKS, MOST_SHARING = 4, 16

# Bytes that must be in flight to a multiprocessor to use its full bandwidth: 0.5 µs from a load to its use, times
# 40 bytes/ns. An estimate, as in fastres/roofline/estimate.py; only its ratio to a tile's bytes matters here.
IN_FLIGHT = 20_000

# Multiply-adds that ordinary units do while one byte arrives: 128 per cycle against some 25 bytes.
MULTIPLY_ADDS_A_BYTE = 5

# The widest tile, for wgmma: for the same sums, it reads three quarters of the bytes that 128×128 reads from L2. On
# sm_90 it takes 179 registers in Triton 3.6.0 and 3.7.1, without spills; with a residual it spills (52, in the
# epilogue). On sm_80 it takes 251, with no estimated gain: products there are no faster than L2 feeds 128×128 tiles.
WIDE_TILE = (128, 256)
# One such program fills a multiprocessor. To keep its pipeline full, its reduction has at least this many blocks.
WIDE_BLOCKS = 8


def without_tensor_cores(dtype: torch.dtype, gpu: Gpu, precision: str = "ieee") -> str:
    """Return why products of ``dtype`` run on the ordinary multiply-add units; empty if they do not."""
    if dtype == torch.float32 and precision == "ieee":
        return "float32 without tf32 does not use the tensor cores"
    if not gpu.has_tensor_cores:
        return f"Triton does not use tensor cores on {gpu.arch}"
    return ""


@functools.lru_cache(maxsize=4096)
def route_conv(
    shape: ConvShape, dtype: torch.dtype, gpu: Gpu, precision: str = "ieee", *, residual: bool = False
) -> ConvConfig:
    """Return the kernel and configuration for one convolution; ``residual`` is True if it adds a residual."""
    if gpu is INTERPRETER:
        block_m, block_n = (max(16, min(256, next_power_of_2(size))) for size in (shape.M, shape.K))
        return ConvConfig("conv", block_m, block_n, max(16, min(512, next_power_of_2(shape.C))), 4, 1)
    if note := without_tensor_cores(dtype, gpu, precision):
        return _plain(shape, dtype, gpu, note)
    if dtype.itemsize == 2 and not residual and (wide := _wide(shape, gpu)):
        return wide
    widest = min(128, max(16, next_power_of_2(shape.K)))
    for block_m, block_n in _distinct([(128, widest), (128, 64), (64, min(64, widest))], widest):
        if _tiles(shape, block_m, block_n) >= gpu.multiprocessors:
            return _tile(shape, dtype, gpu, block_m, block_n)
    # Too few tiles: take smaller ones, several programs per tile, or both. Below 64 rows Hopper has no wgmma.
    sizes = _distinct([(64, min(64, widest)), (64, min(32, widest))], widest)
    return _shortest([_tile(shape, dtype, gpu, *size) for size in sizes], shape, dtype, gpu)


def route_conv_plainly(
    shape: ConvShape, dtype: torch.dtype, gpu: Gpu, precision: str = "ieee", *, residual: bool = False
) -> ConvConfig:
    """Route as :func:`route_conv`, without split reductions and wide tiles: the baseline of estimates."""
    if gpu is INTERPRETER or without_tensor_cores(dtype, gpu, precision):
        return replace(route_conv(shape, dtype, gpu, precision, residual=residual), split=1)
    widest = min(128, max(16, next_power_of_2(shape.K)))
    sizes = _distinct([(128, widest), (128, 64), (64, min(64, widest)), (64, min(32, widest))], widest)
    filling = [size for size in sizes if _tiles(shape, *size) >= gpu.multiprocessors]
    return _tile(shape, dtype, gpu, *(filling or sizes[-1:])[0])


def _distinct(sizes: list[tuple[int, int]], widest: int) -> list[tuple[int, int]]:
    return list(dict.fromkeys(size for size in sizes if size[1] <= widest))


def _tiles(shape: ConvShape, block_m: int, block_n: int) -> int:
    return cdiv(shape.M, block_m) * cdiv(shape.K, block_n) * shape.groups


def _tile(shape: ConvShape, dtype: torch.dtype, gpu: Gpu, block_m: int, block_n: int) -> ConvConfig:
    """Return a tensor-core tile with the deepest pipeline that lets two programs fit a multiprocessor."""
    deepest = min(64 // (dtype.itemsize // 2), max(16, next_power_of_2(shape.C)))
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    if gpu.is_amd:
        return ConvConfig("conv", block_m, block_n, min(deepest, 32), num_warps, 2)
    # Each program takes 1 KiB on top of its own; ``gpu.shared_memory`` is 1 KiB less than the multiprocessor has.
    half = (gpu.shared_memory - 1024) // 2
    shallower = max(16, deepest // 2)
    for block_k, stages in ((deepest, 4), (deepest, 3), (shallower, 4), (shallower, 3)):
        config = ConvConfig("conv", block_m, block_n, block_k, num_warps, stages)
        if shared_memory(config, dtype, gpu) <= half:
            return config
    return replace(config, num_stages=2)


def _wide(shape: ConvShape, gpu: Gpu) -> ConvConfig | None:
    """Return the widest tile if it computes, in whole waves, at most an eighth more than tiles half as wide."""
    config = ConvConfig("conv", *WIDE_TILE, 64, 8, 4)
    if gpu.arch != "sm_90" or WIDE_TILE[1] > shape.K or shape.C % config.block_k:
        return None
    if shared_memory(config, torch.float16, gpu) > gpu.shared_memory or reduction_blocks(shape, config) < WIDE_BLOCKS:
        return None
    tiles, halves = _tiles(shape, *WIDE_TILE), _tiles(shape, WIDE_TILE[0], WIDE_TILE[1] // 2)
    waves = [cdiv(count, gpu.multiprocessors) for count in (tiles, halves)]
    return config if tiles >= gpu.multiprocessors and 16 * waves[0] <= 9 * waves[1] else None


def _plain(shape: ConvShape, dtype: torch.dtype, gpu: Gpu, note: str) -> ConvConfig:
    """Return a small tile: the ordinary multiply-add units take operands from registers."""
    block_n = min(64, max(16, next_power_of_2(shape.K)))
    block_k = min(16, max(16, next_power_of_2(shape.C)))
    # With 2 stages, ptxas spills in float32's 1×1 layers at 96 registers; with 3, nothing spills on sm_80 or sm_90.
    # sm_75 has no asynchronous copies to pipeline, and needs 226 registers for 64×64 with 4 warps, 128 with 8.
    stages = 2 if gpu.is_amd or gpu.arch == "sm_75" else 3
    warps = 8 if gpu.arch == "sm_75" and block_n == 64 else 4
    if _tiles(shape, 64, block_n) >= gpu.multiprocessors:
        return ConvConfig("conv", 64, block_n, block_k, warps, stages, note)
    return _shortest([ConvConfig("conv", 32, block_n, block_k, 4, stages, note)], shape, dtype, gpu)


def _shortest(configs: list[ConvConfig], shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> ConvConfig:
    """Return the one of ``configs``, with any split, whose busiest multiprocessor finishes first."""
    choices = [
        replace(config, split=split)
        for config in configs
        for split in splits(reduction_blocks(shape, config), 2 * gpu.multiprocessors // _tiles(shape, *_size(config)))
        if split == 1 or "split" not in left_out()
    ]
    return min(choices, key=lambda config: _bytes_in_turn(shape, config, dtype, gpu))


def splits(blocks: int, most: int) -> list[int]:
    """Return the numbers of parts, at most ``most``, that a reduction of ``blocks`` can be split into.

    Each part has ``LEAST_BLOCKS`` or more. The kernel gives all parts but the last the same number of blocks. The list
    always includes one part.
    """
    found = range(2, min(most, MOST_SHARING, blocks // LEAST_BLOCKS) + 1)
    return [1, *(split for split in found if blocks - cdiv(blocks, split) * (split - 1) >= LEAST_BLOCKS)]


def reduction_blocks(shape: ConvShape, config: ConvConfig) -> int:
    """Return the number of blocks in the reduction of a tile."""
    return shape.R * shape.S * cdiv(shape.C, config.block_k)


def _bytes_in_turn(shape: ConvShape, config: ConvConfig, dtype: torch.dtype, gpu: Gpu) -> int:
    """Estimate how long the busiest multiprocessor works, in bytes that could reach it in that time."""
    size = config.block_m * config.block_n
    programs = cdiv(_tiles(shape, *_size(config)) * config.split, gpu.multiprocessors)
    block = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    if config.note:
        block = max(block, size * config.block_k // MULTIPLY_ADDS_A_BYTE)
    steps = cdiv(reduction_blocks(shape, config), config.split)
    work = IN_FLIGHT + steps * max(programs * block, IN_FLIGHT // max(1, config.num_stages - 1))
    # Partial sums, in float32: each program writes its own, the last to arrive waits, then reads them all.
    return work + (IN_FLIGHT + 4 * size * (programs + config.split) if config.split > 1 else 0)


def _size(config: ConvConfig) -> tuple[int, int]:
    return config.block_m, config.block_n


def shared_memory(config: ConvConfig, dtype: torch.dtype, gpu: Gpu) -> int:
    """Return the bytes of shared memory that a program of the "conv" kernel takes: at least what the compiler reports.

    Each stage in flight has a buffer. The stage being multiplied has one only for wgmma; other instructions read it
    from registers. The finished tile passes through the same memory, so that it is stored in whole rows.
    """
    from_registers = gpu.is_amd or gpu.arch in ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
    buffers = max(1, config.num_stages - from_registers)
    pipeline = buffers * (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    return max(pipeline, config.block_m * config.block_n * dtype.itemsize)


# The stem's images are prepared first if its convolution has at least this many output pixels: 16 images of 224×224.
# The second launch then costs little compared with what it saves: estimated, not measured (docs/performance.md).
PREPARED_PIXELS = 16 * 112 * 112


STRIP = "stem_strip"  # the kernel that loads each row of the prepared images once (stem_strip.py)
STRIP_TAPS = (7, 2, 3)  # filter, stride and padding of the only stem that it computes
STRIP_CHANNELS, STRIP_COLUMNS = 64, 64  # of a program; channels at most


def route_stem(
    channels: int,
    pixels: tuple[int, int, int],
    dtype: torch.dtype,
    gpu: Gpu,
    pool: bool,
    precision: str = "ieee",
    taps: tuple[int, int, int] = STRIP_TAPS,
) -> StemConfig:
    """Return the stem's configuration.

    ``channels`` is the number of output channels, ``pixels`` the convolution's output (N, P, Q), ``taps`` the filter's
    size, its stride and its padding.
    """
    n, p, q = pixels
    kernel = "stem_pool" if pool else "stem"
    block_q = min(128, max(16, next_power_of_2(q + 1 if pool else q)))
    if gpu.arch == "sm_75":  # no tensor cores: 32 columns take 244 registers, 64 spill
        block_q = min(block_q, 32)
    elif dtype == torch.float32:
        block_q = min(block_q, 64)
    elif pool and takes_strips(channels, q, gpu, taps):
        return strip_config(strip_rows(n, cdiv(p, 2), cdiv(q, 2), gpu))
    elif pool and n * p * q >= PREPARED_PIXELS and gpu is not INTERPRETER:
        # 8 warps and 3 stages: 128 registers on sm_90, so that two programs fit a multiprocessor.
        return StemConfig(kernel, block_q, 8, 8 if block_q == 128 else 4, 2 if gpu.is_amd else 3, prepared=True)
    rows = 8 if pool else 1
    if pool:
        # Take smaller pieces until every multiprocessor has one, although neighbours then both compute a row.
        narrow = min(64, block_q)
        sizes = [(block_q, 8), (block_q, 4), (block_q, 2), (narrow, 2), (narrow, 1)]
        filling = [size for size in sizes if stem_programs(n, cdiv(p, 2), cdiv(q, 2), *size) >= gpu.multiprocessors]
        block_q, rows = (filling or sizes[-1:])[0]
    # 128 columns with 4 warps need 254 registers (sm_90) or spill (sm_80, gfx942); with 8 warps 186 to 209.
    # Images whose dtype is not the weights' reach wgmma through registers. In a pipeline, ptxas overwrites these while
    # they are still read (inspection/sass.py).
    multiplies_in_flight = gpu.arch == "sm_90" and (dtype != torch.float32 or precision == "tf32")
    return StemConfig(kernel, block_q, rows, 8 if block_q == 128 else 4, 1 if multiplies_in_flight else 2)


def stem_programs(n: int, p: int, q: int, block_q: int, rows: int) -> int:
    """Return how many programs compute the pooled stem of ``n`` images of ``p`` × ``q`` pooled pixels."""
    return n * cdiv(p, rows) * cdiv(q, block_q // 2 - 1)


def takes_strips(channels: int, columns: int, gpu: Gpu, taps: tuple[int, int, int]) -> bool:
    """Return True if ``stem_strip.py`` computes a pooled stem of ``columns`` convolution columns in half precision.

    On an H100 it takes 0.5 to 0.9 of the other kernel's time. On sm_80, sm_89 and sm_120, its accumulators do not fit
    into the registers. Narrow images would leave most of a tile empty.
    """
    fits = taps == STRIP_TAPS and channels <= STRIP_CHANNELS and 2 * columns >= STRIP_COLUMNS
    return fits and gpu.arch == "sm_90" and STRIP not in left_out()


def strip_config(rows: int) -> StemConfig:
    """Return the configuration of ``stem_strip.py`` for strips of so many pooled rows."""
    return StemConfig(STRIP, STRIP_COLUMNS, rows, 4, 3, prepared=True)


@functools.lru_cache(maxsize=1024)
def strip_rows(n: int, p: int, q: int, gpu: Gpu) -> int:
    """Return how many pooled rows a strip should have, for ``n`` images of ``p`` × ``q`` pooled pixels."""
    heights = {cdiv(p, strips) for strips in range(1, p + 1)}
    return min(heights, key=lambda rows: (strip_steps(n, p, q, rows, gpu), -rows))


def strip_steps(n: int, p: int, q: int, rows: int, gpu: Gpu) -> int:
    """Return how many steps strips of ``rows`` rows take, one after the other.

    Two programs fit a multiprocessor. A strip takes two steps more than it has rows.
    """
    return cdiv(stem_programs(n, p, q, STRIP_COLUMNS, rows), 2 * gpu.multiprocessors) * (rows + 2)


def route_window_pool(channels: int) -> PoolConfig:
    """Return the configuration of window pools and gates: wide rows, 16 bytes each, read and written once."""
    block_c = min(128, next_power_of_2(channels))
    return PoolConfig("window_pool", block_c, 2048 // block_c, 4)


def route_pool(channels: int, pixels: int) -> PoolConfig:
    """Return the average pool's configuration."""
    block_c = min(128, next_power_of_2(channels))
    return PoolConfig("average_pool", block_c, min(16, next_power_of_2(pixels)), 4)
