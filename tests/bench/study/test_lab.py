"""The studies' experiments compared with theory: vanishing and shattering gradients, white and brown noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastres.bench.measure.calibration import smooth_images
from fastres.bench.study import shattering
from fastres.bench.study.noise import (
    brown_noise,
    correlation,
    expected_autocorrelation,
    off_diagonal_mean,
    spectral_exponent,
    white_noise,
)
from fastres.bench.study.shattering import NETS, Net, derivatives, grid, independent, line_similarity, on_line, theory
from fastres.bench.study.vanishing import (
    WIDTH,
    gradient_norms,
    initialised,
    mean_field_factor,
    own_gradient_norms,
)
from fastres.network.architectures import get_architecture

FEATURES = torch.randn(96, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(96) % 10


def norms(activation: str, gain: float, norm: bool, depth: int = 20) -> list[float]:
    return gradient_norms(FEATURES, LABELS, depth, activation, gain, norm, seed=0)


def factors(values: list[float]) -> list[float]:
    """The factor by which each layer changed the norm of the gradient, backwards."""
    return [earlier / later for earlier, later in itertools.pairwise(values)]


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_sigmoid_layer_keeps_at_most_a_quarter_of_the_gradient(gain: float) -> None:
    found = factors(norms("sigmoid", gain, norm=False))
    assert all(factor <= gain / 4 for factor in found)
    assert all(factor > 0.6 * gain / 4 for factor in found)  # the bound is nearly reached: inputs near zero


def test_a_tanh_layer_keeps_at_most_all_of_it() -> None:
    assert all(factor <= 1 for factor in factors(norms("tanh", 1.0, norm=False)))


@pytest.mark.parametrize(("gain", "expected"), [(math.sqrt(2), 1.0), (2 * math.sqrt(2), 2.0)])
def test_a_relu_layer_keeps_the_gain_over_root_two(gain: float, expected: float) -> None:
    found = factors(norms("relu", gain, norm=False))
    assert math.prod(found) ** (1 / len(found)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_batch_norm_makes_the_gain_irrelevant(activation: str) -> None:
    assert norms(activation, 2.0, norm=True) == pytest.approx(norms(activation, 1.0, norm=True), rel=0.02)
    assert norms(activation, 2.0, norm=False)[0] != pytest.approx(norms(activation, 1.0, norm=False)[0], rel=0.5)


def test_gradient_norms_are_those_of_autograd() -> None:
    """One hidden layer, by hand: ∂loss/∂z = σ'(z) · (softmax − one-hot) V."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.init.orthogonal_(torch.empty(WIDTH, 40, dtype=torch.float64), generator=generator)
    readout = torch.randn(10, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    h = torch.sigmoid(FEATURES @ weight.T)
    error = torch.softmax(h @ readout.T, dim=1) - torch.nn.functional.one_hot(LABELS, 10)
    expected = float((h * (1 - h) * (error @ readout)).norm())
    assert norms("sigmoid", 1.0, norm=False, depth=1) == pytest.approx([expected])


def test_mean_field_factors() -> None:
    assert mean_field_factor("relu") == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=2e-3)
    # for a nearly linear activation the factor is close to 1, and it is never below 1 (Poincaré's inequality)
    assert 1 < mean_field_factor("sigmoid") < mean_field_factor("tanh") < mean_field_factor("relu")


def test_own_networks_gradients_are_every_layers() -> None:
    images, labels = smooth_images(4, 32, 32), torch.tensor([0, 1, 2, 3])
    plain, residual = (own_gradient_norms(f"{kind}20", images, labels, 0) for kind in ("plain", "resnet"))
    assert len(plain) == len(residual) == 19
    assert plain[0] / plain[-1] > residual[0] / residual[-1] > 0
    scaled = own_gradient_norms("plain20", torch.cat([images, images]), torch.cat([labels, labels]), 0)
    assert scaled == pytest.approx([value * math.sqrt(2) for value in plain], rel=1e-3)  # the loss is a sum


def test_initialised_networks_have_the_statistics_of_their_images() -> None:
    images = smooth_images(6, 32, 32)
    module = initialised("resnet20", images, seed=2)
    assert not module.training
    with torch.no_grad():
        found, expected = module(images), module.train()(images)
    assert torch.allclose(found, expected, atol=0.02)
    assert module.architecture == get_architecture("resnet20")


@pytest.mark.parametrize(("noise", "exponent"), [(white_noise, 0.0), (brown_noise, -2.0)])
def test_noises_have_their_spectral_slopes(noise: object, exponent: float) -> None:
    assert callable(noise)
    assert spectral_exponent(noise(256)) == pytest.approx(exponent, abs=0.02)


@pytest.mark.parametrize("kind", ["white", "brown"])
def test_expected_autocorrelation_is_that_of_samples(kind: str) -> None:
    count, points = 4000, 64
    samples = torch.randn(count, points, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "brown":
        samples = samples.cumsum(1)
    samples = samples - samples.mean(1, keepdim=True)
    sums = torch.stack([(samples[:, : points - lag] * samples[:, lag:]).sum() for lag in range(points)])
    expected = expected_autocorrelation(white_noise(points) if kind == "white" else brown_noise(points))
    assert torch.allclose(sums / sums[0], expected, atol=0.02)
    # For a random walk of n steps of variance 1, the sum of squares is n²/6. At lag 1 it is smaller by half of the
    # squares of the steps and of the ends: n/2 + n/3. White noise has −1/n, because its mean was subtracted.
    drop = float(expected[0] - expected[1])
    assert drop == pytest.approx(1 + 1 / points if kind == "white" else 5 / points, rel=0.04)


def test_forward_differentiation_is_autograds() -> None:
    """df/dx of a network whose batch-norm statistics are constants, at every point of the line."""
    net, depth = Net("residual", 1.0, 0.5), 3
    *_, (slopes, _) = derivatives(net, *on_line(torch.Generator().manual_seed(4), 40), depth, _after_line(4, 40))
    x = grid(40).requires_grad_()
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(shattering.WIDTH, generator=generator, dtype=torch.float64) * (8 / 3) ** -0.5
    kinks = (torch.rand(shattering.WIDTH, generator=generator, dtype=torch.float64) * 2 - 1) * 2
    z, stream = w * (x[:, None] - kinks), torch.zeros(40, shattering.WIDTH, dtype=torch.float64)
    for layer in range(depth):
        weight = torch.randn(200, 200, generator=generator, dtype=torch.float64) * 0.1
        stream = stream + (0.5 if layer else 1.0) * torch.relu(z) @ weight.T
        z = (stream - stream.mean(0).detach()) / (stream.var(0, unbiased=False).detach() + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(stream[:, 7].sum(), x)
    assert torch.allclose(slopes[:, 7], expected)


def _after_line(seed: int, points: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    on_line(generator, points)
    return generator


def average(net: Net, count: int, layers: int) -> list[Tensor]:
    """Covariances of independent inputs' gradients, by layer."""
    sums = [torch.zeros(256, 256, dtype=torch.float64) for _ in range(layers)]
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        for layer, (slopes, _) in enumerate(derivatives(net, *independent(generator), layers, generator)):
            sums[layer] += slopes @ slopes.T
    return sums


def test_plain_layers_halve_the_correlation_of_gradients() -> None:
    found = [off_diagonal_mean(correlation(matrix)) for matrix in average(NETS[0], 16, 5)]
    assert found == pytest.approx([0.5**layer for layer in range(1, 6)], rel=0.1)


def test_residual_layers_keep_what_the_theory_says() -> None:
    net = next(net for net in NETS if net.name == "residual, β = 1")
    found = [off_diagonal_mean(correlation(matrix)) for matrix in average(net, 4, 12)]
    assert found == pytest.approx(theory(net, 12, centred=True), rel=0.08)
    assert found[-1] > 20 * 0.5**12


def test_theory_is_the_papers() -> None:
    by_name = {net.name: theory(net, 400) for net in NETS}
    assert by_name["plain"][:20] == pytest.approx([0.5**layer for layer in range(1, 21)])
    bare = by_name["residual, β = 1, no BN"]
    assert [b / a for a, b in itertools.pairwise(bare)] == pytest.approx([0.75] * 399)
    scaled = [value * math.sqrt(layer) for layer, value in enumerate(by_name["residual, β = 1"], start=1)]
    assert scaled[399] == pytest.approx(scaled[99], rel=0.01)  # 1/√L


def test_one_layer_on_the_line_is_brown_noise() -> None:
    covariance = torch.zeros(256, 256, dtype=torch.float64)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        ((slopes, _),) = derivatives(NETS[0], *on_line(generator), 1, generator)
        covariance += slopes @ slopes.T
    assert spectral_exponent(covariance) == pytest.approx(-2, abs=0.1)
    distance = (grid()[:, None] - grid()).abs()
    assert float((correlation(covariance) - (1 - distance / 4)).abs().mean()) < 0.08


def test_similarity_along_a_line_of_a_linear_function_is_one() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    images = smooth_images(2, 32, 32)
    found = line_similarity(module, images[0], images[1], points=40, seed=0)
    assert found == pytest.approx([1.0] * 6)
