"""The device side of ``conv_specialized.py``: a producer warp and two warp groups of consumers, in Gluon.

Gluon is Triton's lower level. It is experimental, and names move between versions. If an import here fails, routing
does not use this kernel; no error is raised.

The producer and the consumers hand over two kinds of buffers in shared memory by mbarriers. ``full`` mbarriers count
the bytes that arrive; ``empty`` ones count the consumers' signals that they have read:

- STAGES pairs, two or more, of a box of x and a box of w. The consumers release a pair once the next product has been
  issued and the pair's own is done; the compiler puts a barrier of both warp groups before that.
- One tile of y. The producer may load the residual into it once the previous tile has been stored.
"""

from __future__ import annotations

import functools

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@functools.cache
def shared_layout(rank: int) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of boxes with ``rank`` dimensions of 2-byte elements, for TMA and wgmma."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@functools.cache
def accumulator_layout(warps: int, block_n: int) -> gl.NVMMADistributedLayout:
    """Return the layout of an accumulator of BLOCK_N columns in the registers of ``warps`` consumer warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, block_n, 16])


def describe(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    """Describe a contiguous tensor for TMA, which moves it in boxes."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, shared_layout(tensor.dim()))


@gluon.jit
def _tile_at(
    tile, H: gl.constexpr, W: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, K: gl.constexpr, R: gl.constexpr,
    S: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Where a tile starts (image, p, q, channel) and which taps reach the image: rows r0 to r1, columns s0 to s1.

    All channels of a block of pixels come one after the other: they read the same input.
    """
    N_BLOCKS: gl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    P_BLOCKS: gl.constexpr = (P + BOX[1] - 1) // BOX[1]
    Q_BLOCKS: gl.constexpr = (Q + BOX[2] - 1) // BOX[2]
    pixels = tile // N_BLOCKS
    image = pixels // (P_BLOCKS * Q_BLOCKS) * BOX[0]
    p = pixels // Q_BLOCKS % P_BLOCKS * BOX[1]
    q = pixels % Q_BLOCKS * BOX[2]
    r0 = gl.maximum(PADDING - STRIDE * (p + BOX[1] - 1), 0)
    r1 = gl.minimum(H + PADDING - STRIDE * p, R)
    s0 = gl.maximum(PADDING - STRIDE * (q + BOX[2] - 1), 0)
    s1 = gl.minimum(W + PADDING - STRIDE * q, S)
    return image, p, q, tile % N_BLOCKS * BLOCK_N, r0, r1, s0, s1


@gluon.jit
def _produce(
    x_desc, w_desc, residual_desc, x_buffers, w_buffers, y_buffer, full, empty, y_full, y_empty, tiles,
    H: gl.constexpr, W: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, C: gl.constexpr, K: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Fill buffers as they become empty: those of x and w for every step of every tile, that of y with the residual."""
    C_BLOCKS: gl.constexpr = C // BLOCK_K
    step = 0
    parity = 0  # of the number of hand-overs of y's buffer
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        image, p, q, column, r0, r1, s0, s1 = _tile_at(tile, H, W, P, Q, K, R, S, STRIDE, PADDING, BLOCK_N, BOX)
        columns = s1 - s0
        blocks = (r1 - r0) * columns * C_BLOCKS
        for block in range(blocks):
            tap = block // C_BLOCKS
            c = block % C_BLOCKS * BLOCK_K
            r = r0 + tap // columns
            s = s0 + tap % columns
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            if STRIDE == 1:
                corner = [image, p + r - PADDING, q + s - PADDING, c]
            else:
                # Half of a coordinate, rounded down even if it is negative.
                h = r + PADDING
                w = s + PADDING
                corner = [image, p + h // 2 - PADDING, h % 2, q + w // 2 - PADDING, w % 2 * C + c]
            tma.async_copy_global_to_shared(x_desc, corner, full.index(slot), x_buffers.index(slot))
            tma.async_copy_global_to_shared(
                w_desc, [column, (r * S + s) * C + c], full.index(slot), w_buffers.index(slot)
            )
            step += 1
            if HAS_RESIDUAL:  # noqa: SIM102 (one is decided at compile time, the other at run time)
                # After the tile's first loads, so that waiting for the previous tile's store delays nothing.
                if block == gl.minimum(STAGES, blocks) - 1:
                    mbarrier.wait(y_empty, parity)
                    mbarrier.expect(y_full, residual_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(residual_desc, [image, p, q, column], y_full, y_buffer)
        parity ^= 1


@gluon.jit
def _consume(
    y_desc, bias_ptr, x_buffers, w_buffers, y_buffer, full, empty, y_full, y_empty, tiles,
    H: gl.constexpr, W: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, C: gl.constexpr, K: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    RELU: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    BOX: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiply full buffers, hand them back, finish and store each tile."""
    C_BLOCKS: gl.constexpr = C // BLOCK_K
    step = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        image, p, q, column, r0, r1, s0, s1 = _tile_at(tile, H, W, P, Q, K, R, S, STRIDE, PADDING, BLOCK_N, BOX)
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT))
        for block in range((r1 - r0) * (s1 - s0) * C_BLOCKS):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            x = x_buffers.index(slot).reshape([BLOCK_M, BLOCK_K])
            w = w_buffers.index(slot).permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            # This product runs on while the buffers of the previous one, which is then done, are released.
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            if block > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            elif HAS_RESIDUAL:
                tma.store_wait(0)  # the previous tile's
                mbarrier.arrive(y_empty, count=1)
            step += 1
        y = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

        k = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        y += gl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
        if HAS_RESIDUAL:
            mbarrier.wait(y_full, parity)
            y += y_buffer.reshape([BLOCK_M, BLOCK_N]).load(LAYOUT).to(gl.float32)
        else:
            tma.store_wait(0)  # the previous tile's
        if RELU:
            y = gl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y_buffer.reshape([BLOCK_M, BLOCK_N]).store(y.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [image, p, q, column], y_buffer)
        parity ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles"])
def conv_specialized_kernel(
    x_desc,  # [N, H, W, C], boxes [TN, TH, TW, BLOCK_K]; at stride 2 [N, H/2, 2, W/2, 2·C], [TN, TH, 1, TW, BLOCK_K]
    w_desc,  # [K, R·S·C], boxes [BLOCK_N, BLOCK_K]
    bias_ptr,
    residual_desc,  # [N, P, Q, K], boxes [TN, TH, TW, BLOCK_N]
    y_desc,  # like residual_desc
    tiles,
    H: gl.constexpr,
    W: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    C: gl.constexpr,
    K: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    RELU: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    BOX: gl.constexpr,  # (TN, TH, TW)
    LAYOUT: gl.constexpr,  # of the accumulator
):
    x_buffers = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_buffers = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    y_buffer = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    y_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(y_full, count=1)
    mbarrier.init(y_empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    y_desc, bias_ptr, x_buffers, w_buffers, y_buffer, full, empty, y_full, y_empty, tiles,
                    H, W, P, Q, C, K, R, S, STRIDE, PADDING, HAS_RESIDUAL, RELU, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, BOX,
                    LAYOUT,
                ),
            ),
            (
                _produce,
                (
                    x_desc, w_desc, residual_desc, x_buffers, w_buffers, y_buffer, full, empty, y_full, y_empty, tiles,
                    H, W, P, Q, C, K, R, S, STRIDE, PADDING, HAS_RESIDUAL, BLOCK_N, BLOCK_K, STAGES, BOX,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
