"""The reference executor of plans in 8 bit, compared with arithmetic written out and with the float plan."""

from __future__ import annotations

import torch

from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.executors.cpu import CpuExecutor
from fastres.executors.reference import ReferenceExecutor
from fastres.folding.build import build_plan
from fastres.kernels import reference
from fastres.network.architectures import get_architecture
from fastres.quantisation.rounding import quantise_plan
from tests.measures import relative_error
from tests.quantisation.simple import scales_of


def test_a_convolution_is_integer_arithmetic() -> None:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.int32, device="cpu", generator=generator)

    x, residual = (draw(0, 256, 1, 4, 5, c).to(torch.uint8) for c in (6, 2))
    weight = draw(-127, 128, 2, 1, 1, 6).to(torch.int8)
    scale = torch.tensor([0.5, 0.25], dtype=torch.float32, device="cpu")
    bias = torch.tensor([3.0, -40.0], dtype=torch.float32, device="cpu")
    found = reference.quantised_conv2d(
        x, 0.125, weight, scale, bias, residual, 2.0, 7, relu=True, output_scale=16.0, output_zero_point=5
    )
    for h in range(4):
        for w in range(5):
            for k in range(2):
                total = sum(int(x[0, h, w, c]) * int(weight[k, 0, 0, c]) for c in range(6))
                real = total * 0.125 * float(scale[k]) + float(bias[k]) + 2.0 * (int(residual[0, h, w, k]) - 7)
                assert int(found[0, h, w, k]) == min(255, max(0, round(max(real, 0.0) / 16.0) + 5))


def test_a_picture_in_the_mean_colour_gives_the_stems_bias() -> None:
    network = calibrated(get_architecture("resnet18"))
    mean = (51 / 255, 102 / 255, 153 / 255)
    plan = build_plan(network.state_dict(), network.architecture, mean=mean, std=(0.2, 0.3, 0.4))
    colour = torch.tensor([51, 102, 153], dtype=torch.uint8, device="cpu")
    picture = colour.view(1, 3, 1, 1).expand(1, 3, 40, 40)
    quantised = quantise_plan(plan, scales_of(plan, picture))
    assert quantised.quantisation is not None
    levels = reference.quantised(plan.stem.bias.relu(), quantised.quantisation.values["stem"].scale)
    found = ReferenceExecutor(quantised).values(picture, ("stem",))["stem"]
    assert levels.amax() > 100
    assert (found == levels).all()


def test_normalised_pixels_are_recovered() -> None:
    x = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    centre, width = (torch.tensor(v, dtype=torch.float32, device="cpu").view(1, 3, 1, 1) for v in (mean, std))
    assert torch.equal(reference.pixels((x / 255 - centre) / width, mean, std), x)


def test_8_bit_is_close_to_float() -> None:
    for name, limit in (("resnet20", 0.06), ("seresnext50_32x4d", 0.6), ("resnet26d", 0.3)):
        network = calibrated(get_architecture(name))
        plan = build_plan(network.state_dict(), network.architecture)
        x = pixels(smooth_images(4, 64, 64, seed=5))
        expected = CpuExecutor(plan).run(x)[0]
        found = ReferenceExecutor(quantise_plan(plan, scales_of(plan, x))).run(x)[0]
        assert 1e-4 < relative_error(found, expected) < limit, name


def test_a_shaken_reference_moves_every_level_by_one() -> None:
    network = calibrated(get_architecture("resnet20"))
    plan = build_plan(network.state_dict(), network.architecture)
    x = pixels(smooth_images(2, 32, 32))
    quantised = quantise_plan(plan, scales_of(plan, x))
    stem = ReferenceExecutor(quantised).values(x, ("stem",))["stem"].int()
    generator = torch.Generator(device="cpu").manual_seed(1)
    shaken = ReferenceExecutor(quantised, generator).values(x, ("stem",))["stem"].int()
    inside = (stem > 0) & (stem < 255)
    assert set((shaken - stem)[inside].unique().tolist()) == {-1, 1}
    assert set((shaken - stem)[stem == 0].unique().tolist()) == {0, 1}
