"""The kernels in 8 bit as compilations, with which they are inspected without a GPU."""

from __future__ import annotations

import torch

from fastres.kernels.conv_8bit import LEVELS, WEIGHT_DTYPES, conv_8bit_constants
from fastres.kernels.prepare import BLOCK_W
from fastres.kernels.routing.rules import ConvConfig, ConvShape, StemConfig
from fastres.kernels.stem_8bit import pack_stem_weight_8bit, stem_8bit_constants

from .ahead_of_time import TYPE_NAMES, Compilation
from .pointer_kernels import compilation


def compile_conv_8bit(
    shape: ConvShape,
    dtype: torch.dtype,
    config: ConvConfig,
    *,
    residual: bool,
    relu: bool,
    out: torch.dtype | None = None,
    label: str = "conv",
) -> Compilation:
    """Return the compilation that a launch of the convolution of uint8 or e4m3 (``dtype``) needs."""
    constants = conv_8bit_constants(shape, config, residual=residual, relu=relu)
    constants |= {} if residual else {"residual_ptr": None}
    constants |= {} if dtype == LEVELS else {"compensation_ptr": None}
    types = {
        "x_ptr": f"*{TYPE_NAMES[dtype]}",
        "w_ptr": f"*{TYPE_NAMES[WEIGHT_DTYPES[dtype]]}",
        "weight_scale_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "compensation_ptr": "*i32",
        "residual_ptr": f"*{TYPE_NAMES[dtype]}",
        "y_ptr": f"*{TYPE_NAMES[out or dtype]}",
    }
    types |= dict.fromkeys(("x_scale", "residual_scale", "inverse"), "fp32")
    types |= dict.fromkeys(("residual_zero_point", "output_zero_point", "M", "H", "W", "P", "Q"), "i32")
    return compilation(
        f"{label} {TYPE_NAMES[dtype]}", "conv_8bit", types, constants, config.num_warps, config.num_stages
    )


def compile_stem_8bit(
    weight_shape: tuple[int, ...], dtype: torch.dtype, config: StemConfig, *, stride: int, pool: bool
) -> Compilation:
    """Return the compilation that a launch of the stem with an unpacked weight of ``weight_shape`` needs.

    ``dtype`` is that of the output, uint8 or e4m3.
    """
    weight = pack_stem_weight_8bit(torch.zeros(weight_shape, dtype=WEIGHT_DTYPES[dtype], device="cpu"))
    constants = stem_8bit_constants(weight, config, stride=stride, pool=pool)
    constants |= {} if dtype == LEVELS else {"compensation_ptr": None}
    operand = f"*{TYPE_NAMES[weight.dtype]}"
    types = {"x_ptr": operand, "w_ptr": operand, "compensation_ptr": "*i32", "y_ptr": f"*{TYPE_NAMES[dtype]}"}
    types |= dict.fromkeys(("weight_scale_ptr", "bias_ptr"), "*fp32") | dict.fromkeys(("x_scale", "inverse"), "fp32")
    sizes = ("P", "Q", "POOL_P", "POOL_Q", "row_blocks", "column_blocks", "stride_n", "stride_h")
    types |= dict.fromkeys(sizes, "i32")
    label = f"stem {TYPE_NAMES[dtype]}"
    return compilation(label, "stem_8bit", types, constants, config.num_warps, config.num_stages)


def compile_prepare_8bit(dtype: torch.dtype, source: torch.dtype, *, padding: int) -> Compilation:
    """Return the compilation that preparing contiguous images of ``source`` needs; ``dtype`` is the stem's output."""
    constants = {"stride_w": 1, "PADDING": padding, "BLOCK_W": BLOCK_W}
    types = {"x_ptr": f"*{TYPE_NAMES[source]}", "lanes_ptr": "*fp32", "y_ptr": f"*{TYPE_NAMES[WEIGHT_DTYPES[dtype]]}"}
    types |= dict.fromkeys(("H", "W", "HP", "WP", "stride_n", "stride_c", "stride_h"), "i32")
    label = f"prepare {TYPE_NAMES[source]} images for {TYPE_NAMES[dtype]}"
    return compilation(label, "prepare_8bit", types, constants, 4, None, False)
