"""The 8-bit stem compared with exact integers and with float64: images of every dtype and layout, odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastres.errors import DtypeError, KernelError
from fastres.kernels import reference, stem_8bit
from fastres.kernels.conv_8bit import E4M3, LEVELS, compensation
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import A100, H100, INTERPRETER, MI300X
from fastres.kernels.routing.rules import StemConfig
from fastres.kernels.stem_8bit import image_lanes, pack_stem_weight_8bit, stem_8bit_into, stem_config
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.kernels.test_conv_8bit import assert_levels, needs_e4m3
from tests.kernels.test_stem import CASES, make_input
from tests.measures import kernel_tolerance, relative_error

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"

SIZES = [*CASES, (1, 11, 13, 20, 5, 2, True), (1, 9, 21, 16, 3, 2, False)]


def make_weights(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    k, r = case[3:5]
    generator = torch.Generator().manual_seed(seed + 1)
    if dtype == torch.int8:
        weight = torch.randint(-127, 128, (k, r, r, 3), dtype=dtype, generator=generator)
        spread = 128 * 73 * weight[0].numel() ** 0.5
    else:
        weight = torch.randn(k, r, r, 3, generator=generator).mul(20).to(dtype)
        spread = 20 * weight[0].numel() ** 0.5
    weight_scale = (0.5 + torch.rand(k, generator=generator)) * 2 / spread
    return weight.to(DEVICE), weight_scale.to(DEVICE), torch.randn(k, generator=generator).to(DEVICE)


def run(case: tuple[int, ...], x: Tensor, weights: tuple[Tensor, ...], output_scale: float | None) -> Tensor:
    weight, weight_scale, bias = weights
    *_, r, stride, pool = case
    lanes = image_lanes(IMAGENET_MEAN, IMAGENET_STD, weight.dtype, x.device)
    packed = pack_stem_weight_8bit(weight)
    return torch.ops.fastres.stem_8bit(
        x, packed, weight_scale, bias, lanes, r, stride, r // 2, bool(pool), output_scale=output_scale
    )


def exact(case: tuple[int, ...], x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    *_, r, stride, pool = case
    shape = {"stride": stride, "padding": r // 2, "pool": bool(pool), "output_scale": 0.02}
    return reference.quantised_stem(x, *weights, IMAGENET_MEAN, IMAGENET_STD, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case: tuple[int, ...]) -> None:
    x, weights = make_input(case, torch.uint8, "contiguous", seed=2), make_weights(case, torch.int8, seed=2)
    assert_levels(run(case, x, weights, 0.02), exact(case, x, weights))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_input_dtypes_and_layouts(source: torch.dtype, layout: str) -> None:
    case = (1, 17, 22, 16, 3, 1, False)
    x, weights = make_input(case, source, layout), make_weights(case, torch.int8)
    y, expected = run(case, x, weights, 0.02), exact(case, x, weights)
    if x.is_floating_point():  # a pixel half-way between two may be rounded either way, and is worth more than a level
        assert expected.unique().numel() > 60
        difference = (y.int() - expected.int()).abs()
        assert float((difference == 0).double().mean()) > 0.999
        assert int(difference.max()) <= 4
    else:
        assert_levels(y, expected)


def test_the_border_is_the_mean() -> None:
    """Weights that pick a pixel outside the image give 0 with the bias that the normalisation adds."""
    case = (1, 8, 9, 16, 3, 1, False)
    weight = torch.zeros(16, 3, 3, 3, dtype=torch.int8, device=DEVICE)
    for channel in range(3):
        weight[channel, 0, 0, channel] = 1
    ones, zeros = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    x = make_input(case, torch.uint8, "contiguous")
    y = run(case, x, (weight, ones, zeros), None)
    border = torch.tensor([round(255 * m) for m in IMAGENET_MEAN], dtype=torch.float32, device=DEVICE)
    assert torch.equal(y[0, 0, :, :3], border.expand(9, 3))
    assert torch.equal(y[0, 1:, 1:, :3], x[0, :, :-1, :-1].permute(1, 2, 0).float())


CONFIGS = [StemConfig("stem_8bit", q, rows, 4, 1, prepared=True) for q, rows in ((16, 1), (32, 3), (64, 8))]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_block_size(config: StemConfig, pool: bool) -> None:
    """Starts from a wrong output, and takes the sums of the weights as given."""
    case = (2, 21, 43, 24, 7, 2, pool)
    x, weights = make_input(case, torch.uint8, "contiguous", seed=4), make_weights(case, torch.int8, seed=4)
    expected = exact(case, x, weights)
    y, packed = 255 - expected, pack_stem_weight_8bit(weights[0])
    lanes = image_lanes(IMAGENET_MEAN, IMAGENET_STD, torch.int8, x.device)
    stem_8bit_into(
        y, x, packed, *weights[1:], lanes, filter_size=7, stride=2, padding=3, pool=pool, output_scale=0.02,
        config=config, added=compensation(packed),
    )  # fmt: skip
    assert_levels(y, expected)


@needs_e4m3
@pytest.mark.parametrize("case", [SIZES[i] for i in (0, 4, 6)], ids=str)
def test_e4m3(case: tuple[int, ...]) -> None:
    """Compares results in float32, of images that e4m3 can express."""
    x = make_input(case, torch.float32, "contiguous", seed=5).to(E4M3).float()
    weights = weight, weight_scale, bias = make_weights(case, E4M3, seed=5)
    *_, r, stride, pool = case
    y = run(case, x, weights, None)
    real = weight.double() * weight_scale.double()[:, None, None, None]
    expected = reference.stem(
        x.double(), real, bias, IMAGENET_MEAN, IMAGENET_STD, stride=stride, padding=r // 2, pool=bool(pool)
    )
    limit = kernel_tolerance(torch.float32, weight[0].numel()) if INTERPRETED else 2**-10
    assert relative_error(y, expected) < limit


@needs_e4m3
def test_what_preparing_for_e4m3_writes() -> None:
    x = make_input(CASES[0], torch.uint8, "slice", seed=8)
    n, _, h, w = x.shape
    lanes = image_lanes(IMAGENET_MEAN, IMAGENET_STD, E4M3, x.device, x_scale=0.01)
    y = stem_8bit.prepare_8bit(x, E4M3, lanes, padding=3, rows=h + 7, columns=56).double().cpu()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.zeros(n, h + 7, 56, 4, dtype=torch.float64)
    expected[:, 3 : 3 + h, 3 : 3 + w, :3] = (((x.cpu() / 255 - mean) / std) / 0.01).permute(0, 2, 3, 1)
    assert torch.equal(y == 0, expected == 0)
    size = expected.abs()
    assert 200 < float(size.max()) < 448
    # The interpreter's conversion halves numbers whose rounding carries into the exponent.
    kept = (size > 2**-6) & ((size / 2 ** size.log2().floor() < 1.9) | (not INTERPRETED))
    assert float(((y - expected) / expected)[kept].abs().max()) < 2**-4 * 1.001


def test_configurations_fill_the_gpu() -> None:
    assert stem_config(56, 56, 256, H100) == StemConfig("stem_8bit", 64, 8, 8, 2, prepared=True)
    assert stem_config(56, 56, 1, H100).rows == 1
    assert stem_config(56, 56, 8, H100).rows == 2
    assert stem_config(16, 16, 1, A100).block_q == 16
    assert stem_config(56, 56, 256, MI300X).num_warps == 4
    assert stem_config(9, 9, 1, INTERPRETER).num_stages == 1


def test_e4m3_on_a_gpu_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_8bit, "gpu_of", lambda device: A100)
    x, weights = make_input(CASES[4], torch.uint8, "contiguous"), make_weights(CASES[4], E4M3)
    with pytest.raises(KernelError, match=r"e4m3 needs sm_89 or later.*A100 is sm_80"):
        run(CASES[4], x, weights, 1.0)


def test_bad_input_is_named() -> None:
    case = CASES[4]
    x, (weight, weight_scale, bias) = make_input(case, torch.uint8, "contiguous"), make_weights(case, torch.int8)
    with pytest.raises(DtypeError, match="x is int64 and must be uint8, float32"):
        run(case, x.long(), (weight, weight_scale, bias), 1.0)
    lanes = image_lanes(IMAGENET_MEAN, IMAGENET_STD, torch.int8, x.device)
    with pytest.raises(DtypeError, match="weight is float32 and must be int8, float8_e4m3fn"):
        torch.ops.fastres.stem_8bit(x, weight.float(), weight_scale, bias, lanes, 3, 1, 1, False)
    with pytest.raises(KernelError, match="must have 3 channels"):
        run(case, x[:, :1], (weight, weight_scale, bias), 1.0)
    with pytest.raises(KernelError, match=r"bias is \[8\] and must be \[16\]"):
        run(case, x, (weight, weight_scale, bias[:8].contiguous()), 1.0)
    assert run(case, x[:0], (weight, weight_scale, bias), 1.0).dtype == LEVELS
