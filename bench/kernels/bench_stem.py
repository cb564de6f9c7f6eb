"""Time the stem kernel of ResNet-50 on uint8 pixels and on floats: ``pytest bench/kernels/bench_stem.py`` on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.bench.measure.kernel_timing import (
    Layer,
    assert_right,
    conv_reduction,
    draw_parameters,
    layers,
    time_kernel,
)
from fastres.kernels import reference, stem
from fastres.kernels.routing import cards, rules
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.network.plan import Stem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a CUDA GPU")

DTYPE = torch.float16
LAYERS = [layer for batch in (1, 32, 256) for layer in layers("stem", batch, DTYPE)]


def prepare(
    layer: Layer, raw: bool, dtype: torch.dtype, device: torch.device, config: rules.StemConfig | None = None
) -> tuple[Any, Tensor, Tensor]:
    """Return the launch, the tensor that it writes, and the expected values (float64); ``raw`` means uint8 pixels."""
    step = layer.step
    assert isinstance(step, Stem)
    n, h, w, _ = layer.shape
    images = smooth_images(n, h, w)
    x = pixels(images).to(device) if raw else images.to(device, dtype)
    weight, bias = draw_parameters(step, dtype, device)
    values = x.double()
    if raw:
        mean, std = (torch.tensor(list(v), device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        # The kernel rounds normalised pixels to the dtype of its multiplication.
        values = ((values / 255 - mean) / std).to(dtype).double()
    expected = reference.stem(
        values,
        weight.double(),
        bias,
        IMAGENET_MEAN,
        IMAGENET_STD,
        stride=step.stride,
        padding=step.padding,
        pool=step.pool,
    )
    packed = stem.pack_stem_weight(weight)
    scale, shift = stem.pack_normalisation(IMAGENET_MEAN, IMAGENET_STD, packed.shape[2], device)
    y = torch.full(step.output_shape(layer.shape), float("nan"), dtype=dtype, device=device)

    def run() -> None:
        stem.stem_into(
            y, x, packed, bias, scale, shift,
            stride=step.stride, padding=step.padding, pool=step.pool, config=config,
        )  # fmt: skip

    return run, y, expected


@pytest.mark.parametrize("prepared", [False, True], ids=["as given", "prepared"])
@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float16"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_stem(benchmark: Any, layer: Layer, raw: bool, prepared: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    step = layer.step
    assert isinstance(step, Stem)
    gpu, size = cards.gpu_of(device), step.conv_shape(layer.shape)[:3]
    # Time both variants at every batch, to check the rule that chooses between them (rules.PREPARED_PIXELS).
    sizes = (rules.PREPARED_PIXELS if prepared else 1, 1, size[2])
    config = rules.route_stem(step.weight.shape[0], sizes, DTYPE, gpu, step.pool)
    assert config.prepared == prepared
    run, y, expected = prepare(layer, raw, DTYPE, device, config)
    run()
    assert_right(y, expected, DTYPE, conv_reduction(layer.step))
    del expected
    time_kernel(benchmark, run, layer, DTYPE, config)
