"""Study 3: gradients that shatter. Balduzzi et al., *The shattered gradients problem*, ICML 2017, figures 1 and 2.

Networks with 200 units per layer at initialisation:

    x₁ = W₁ relu(z),    xₗ₊₁ = α xₗ + β Wₗ₊₁ relu(BN(xₗ)),    f_L = v·x_L,    W ~ N(0, 2/200)

A plain network has α = 0, β = 1. A residual one has α = 1 and a branch scale β (0.1 in the paper). There are two kinds
of inputs. On the *line*, x runs along a grid in [−2, 2] and z = w (x − t), with the kinks t spread evenly over it. Then
the gradient of the first layer is a random walk: brown noise. *Independent* inputs are the same number of Gaussian
vectors. A unit is active at both of two such inputs with probability 1/4, as the paper's theorems assume.

BN's batch contains all inputs, and its statistics count as constants when f is differentiated. Gradients come from
forward differentiation (along x, or along a fixed direction). Averages over the readout v are exact: the covariance of
two gradients is the product of the two derivatives of x_L.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.terminal import progress_bar

from .common import Data, Number, Record, Settings, Study, mean, percent, rounded, signed, slope, title
from .data import Dataset
from .noise import (
    brown_noise,
    correlation,
    expected_autocorrelation,
    off_diagonal_mean,
    spectral_exponent,
    white_noise,
)
from .running import compare
from .shattering_figures import draw, net_of
from .vanishing import initialised

WIDTH, POINTS, REACH = 200, 256, 2.0
EPSILON = 1e-5
DEPTH = 50
SHOWN = 64  # points of the covariance matrices in the results: every fourth point of the grid
FIT = 6  # layers over which an exponential decay is fitted: 1/2^6 is well above the noise of the average
CENTRED = 1 - 1 / math.pi  # Var[relu(z)] as a fraction of E[relu(z)²], z ~ N(0, 1)
ACF_LAYERS = (1, 2, 4, 10, 24, 50)
LINE_SHIFTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Net:
    """A network: the scales of its shortcut (``alpha``) and of its branch (``beta``), and whether it has BN."""

    name: str
    alpha: float
    beta: float
    norm: bool = True


NETS = (
    Net("plain", 0.0, 1.0),
    Net("residual, β = 1", 1.0, 1.0),
    Net("residual, β = 0.1", 1.0, 0.1),
    Net("plain, no BN", 0.0, 1.0, norm=False),
    Net("residual, β = 1, no BN", 1.0, 1.0, norm=False),
)
# The networks in figure 1 of the paper, with their numbers of layers.
FIGURE = (("plain", 1), ("plain", 24), ("residual, β = 0.1", 50), ("residual, β = 1", 50))


def grid(points: int = POINTS) -> Tensor:
    return torch.linspace(-REACH, REACH, points, dtype=torch.float64)


def on_line(generator: torch.Generator, points: int = POINTS) -> tuple[Tensor, Tensor]:
    """Return z ``[points, 200]`` along the grid, and dz/dx. E[z²] = 1 over units and points."""
    w = torch.randn(WIDTH, generator=generator, dtype=torch.float64) * (2 * REACH**2 / 3) ** -0.5
    kinks = (torch.rand(WIDTH, generator=generator, dtype=torch.float64) * 2 - 1) * REACH
    z = w * (grid(points)[:, None] - kinks)
    return z, w.expand_as(z)


def independent(generator: torch.Generator, points: int = POINTS) -> tuple[Tensor, Tensor]:
    """Return z ``[points, 200]`` of independent Gaussian inputs, and its derivative along one direction."""
    z = torch.randn(points, WIDTH, generator=generator, dtype=torch.float64)
    return z, torch.randn(WIDTH, generator=generator, dtype=torch.float64).expand_as(z)


def derivatives(
    net: Net, z: Tensor, slope_of_z: Tensor, depth: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each of ``depth`` layers, the derivative of x_l and the units its ReLU passed, ``[points, 200]``."""
    stream, slope_of_stream = torch.zeros_like(z), torch.zeros_like(z)
    for layer in range(depth):
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * (2 / WIDTH) ** 0.5
        active = z > 0
        alpha, beta = (net.alpha, net.beta) if layer else (0.0, 1.0)
        stream = alpha * stream + beta * (z * active) @ weight.T
        slope_of_stream = alpha * slope_of_stream + beta * (slope_of_z * active) @ weight.T
        yield slope_of_stream, active
        scale = (stream.var(0, unbiased=False) + EPSILON).rsqrt() if net.norm else torch.ones(WIDTH).double()
        z = (stream - stream.mean(0)) * scale if net.norm else stream
        slope_of_z = slope_of_stream * scale


def theory(net: Net, layers: int, centred: bool = False) -> list[float]:
    """Return the correlation of two gradients by layer, for co-activation 1/4, by the paper's theorems 1 to 3.

    A plain layer halves the correlation. A residual branch adds β² times the variance of BN's input gradient to the
    variance, and half of that to the covariance. Without BN both grow by the same factors in each layer: (3/4)^L at
    β = 1. With BN the share of the branch falls as the variance of the stream grows: 1/√L at β = 1 if that variance is
    taken about zero. BN takes it about the mean, which is (1 − 1/π) times as large (``centred``).
    """
    values, correlation = 1.0, 0.5
    result = [correlation]
    for _ in range(layers - 1):
        share = net.beta**2
        if net.norm and net.alpha:
            share /= values * (CENTRED if centred else 1)
        correlation *= (net.alpha**2 + share / 2) / (net.alpha**2 + share)
        values += net.beta**2
        result.append(correlation)
    return result


Inputs = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def _average(net: Net, inputs: Inputs, count: int, depth: int, label: str) -> tuple[Tensor, Tensor]:
    """Return, over ``count`` networks, the covariance of the gradients by layer ``[depth, P, P]``, and the fraction of
    units that are active at both of two different inputs, by layer ``[depth]``.
    """
    covariance = torch.zeros(depth, POINTS, POINTS, dtype=torch.float64)
    coactive = torch.zeros(depth, dtype=torch.float64)
    for seed in progress_bar(range(count), desc=f"1-D networks, {net.name}, {label}", unit="network"):
        generator = torch.Generator().manual_seed(seed)
        for layer, (slopes, active) in enumerate(derivatives(net, *inputs(generator), depth, generator)):
            covariance[layer] += slopes @ slopes.T / (WIDTH * count)
            both = active.sum(1, dtype=torch.float64).sum() / (WIDTH * POINTS)
            pairs = active.sum(0, dtype=torch.float64).square().mean() / POINTS**2
            coactive[layer] += (pairs - both / POINTS) * POINTS / (POINTS - 1) / count
    return covariance, coactive


def _sample(net: Net, layers: int) -> list[float]:
    """Return one network's gradient along the grid, scaled to unit variance, for the figure."""
    generator = torch.Generator().manual_seed(0)
    slopes = [slopes for slopes, _ in derivatives(net, *on_line(generator), layers, generator)][-1]
    gradient = slopes @ torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return (gradient / gradient.std()).tolist()


def _on_line(net: Net, count: int) -> Data:
    covariances, _ = _average(net, on_line, count, DEPTH, "on a line")
    shown = [layers for name, layers in FIGURE if name == net.name]
    step = POINTS // SHOWN
    return {
        "exponents": [spectral_exponent(covariance) for covariance in covariances],
        "autocorrelations": {
            str(layers): expected_autocorrelation(covariances[layers - 1]).tolist() for layers in ACF_LAYERS
        },
        "matrices": {str(layers): correlation(covariances[layers - 1])[::step, ::step].tolist() for layers in shown},
        "samples": {str(layers): _sample(net, layers) for layers in shown},
    }


def _independent(net: Net, count: int) -> Data:
    covariances, coactive = _average(net, independent, count, DEPTH, "independent inputs")
    return {
        "correlations": [off_diagonal_mean(correlation(covariance)) for covariance in covariances],
        "paper": theory(net, DEPTH),
        "centred": theory(net, DEPTH, centred=True),
        "coactive": coactive.tolist(),
    }


def _noises() -> list[Data]:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(POINTS, generator=generator, dtype=torch.float64)
    rows = []
    for name, covariance, sample in (
        ("brown noise", brown_noise(POINTS), steps.cumsum(0)),
        ("white noise", white_noise(POINTS), steps),
    ):
        rows.append(
            {
                "net": name,
                "autocorrelation": expected_autocorrelation(covariance).tolist(),
                "exponent": spectral_exponent(covariance),
                "sample": (sample / sample.std()).tolist(),
            }
        )
    return rows


def line_similarity(module: torch.nn.Module, start: Tensor, end: Tensor, points: int, seed: int) -> list[float]:
    """Return the mean cosine between input gradients at points of a straight line between images ``[3, 32, 32]``.

    The gradients are those of one random projection of the logits. There is a value for each of ``LINE_SHIFTS``, the
    distance of the compared points in steps.
    """
    part = torch.linspace(0, 1, points)[:, None, None, None]
    images = (start + part * (end - start)).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    scores = module(images)
    projection = torch.randn(scores.shape[1], generator=generator)
    (gradients,) = torch.autograd.grad((scores @ projection).sum(), images)
    units = torch.nn.functional.normalize(gradients.flatten(1), dim=1)
    return [float((units[:-shift] * units[shift:]).sum(1).mean()) for shift in LINE_SHIFTS]


def _own(settings: Settings, dataset: Dataset) -> tuple[list[Data], list[Data]]:
    """Measure the gradients of this project's networks, along lines from one image to another."""
    images, labels = dataset.normalise(dataset.train_images), dataset.train_labels
    rows, runs = [], []
    cases = list(itertools.product(settings.models(), range(settings.seeds)))
    found: dict[str, list[list[float]]] = {}
    for model, seed in progress_bar(cases, desc="Gradients along lines between images", unit="network"):
        module = initialised(model, images[: settings.images], seed)
        pairs = [(2 * index, 2 * index + 1) for index in range(settings.lines)]
        for start, end in pairs:
            similarity = line_similarity(module, images[start], images[end], settings.line_points, seed)
            found.setdefault(model, []).append(similarity)
        if seed == 0:
            shown = images[: settings.images], labels[: settings.images]
            runs.append(compare(f"{model}, untrained, seed 0", model, module.state_dict(), *shown))
    for model, lines in found.items():
        rows.append({"model": model, "cosines": [mean(values) for values in zip(*lines, strict=True)]})
    return rows, runs


def measure(settings: Settings) -> Data:
    dataset = settings.dataset()
    nets = [{"net": net.name, **_on_line(net, settings.nets), **_independent(net, settings.nets)} for net in NETS]
    own, runs = _own(settings, dataset)
    return rounded(
        {
            "dataset": dataset.describe(),
            "networks": settings.nets,
            "seeds": settings.seeds,
            "lines": settings.lines,
            "line_points": settings.line_points,
            "deep": settings.deep,
            "grid": grid().tolist(),
            "shown": FIGURE,
            "line_shifts": LINE_SHIFTS,
            "nets": nets,
            "noises": _noises(),
            "own": own,
            "runs": runs,
        }
    )


def decay(data: Data, name: str) -> float:
    """Return the factor on the correlation of independent inputs' gradients per layer, over the first layers."""
    values = net_of(data, name)["correlations"][:FIT]
    return math.exp(slope(list(range(FIT)), [math.log(max(value, 1e-6)) for value in values]))


def power_law(values: list[float]) -> float:
    """Return the exponent p of a correlation that falls as L^p, fitted from 10 layers to the last."""
    layers = range(10, len(values) + 1)
    logs = [math.log(max(values[layer - 1], 1e-6)) for layer in layers]
    return slope([math.log(layer) for layer in layers], logs)


def tables(data: Data) -> dict[str, list[Record]]:
    decays = [
        {
            "net": row["net"],
            "layers": layer,
            "correlation": value,
            "paper": row["paper"][layer - 1],
            "paper_with_centred_variance": row["centred"][layer - 1],
            "coactive": row["coactive"][layer - 1],
            "spectral_exponent_on_line": row["exponents"][layer - 1],
        }
        for row in data["nets"]
        for layer, value in enumerate(row["correlations"], start=1)
    ]
    autocorrelations = [
        {"net": row["net"], "layers": layers, "lag": lag, "autocorrelation": value}
        for row in data["nets"]
        for layers, values in row["autocorrelations"].items()
        for lag, value in enumerate(values)
    ]
    autocorrelations += [
        {"net": row["net"], "layers": "", "lag": lag, "autocorrelation": value}
        for row in data["noises"]
        for lag, value in enumerate(row["autocorrelation"])
    ]
    own = [
        {"model": row["model"], "shift": shift, "cosine": value}
        for row in data["own"]
        for shift, value in zip(LINE_SHIFTS, row["cosines"], strict=True)
    ]
    return {
        "shattering-decay": decays,
        "shattering-autocorrelation": autocorrelations,
        "shattering-networks": own,
    }


def numbers(data: Data) -> list[Number]:
    plain, full, scaled = (net_of(data, name) for name in ("plain", "residual, β = 1", "residual, β = 0.1"))
    bare = net_of(data, "plain, no BN")
    noises = {row["net"]: f"{signed(row['exponent'])} ({row['net']})" for row in data["noises"]}
    result = [
        Number("Plain: factor on the correlation per layer", f"{decay(data, 'plain'):.3f}", "1/2 (theorem 1)"),
        Number("Plain: units active at both inputs, layer 10", f"{plain['coactive'][9]:.3f}", "1/4 (assumed)"),
        Number(
            "Residual, β = 1: exponent p of the correlation, L^p",
            f"{signed(power_law(full['correlations']))}",
            f"−1/2 (theorem 3); {signed(power_law(full['centred']))} with the variance about the mean",
        ),
    ]
    result += [
        Number(
            f"Residual, β = {beta}: correlation after {DEPTH} layers / after 1",
            f"{row['correlations'][-1] / row['correlations'][0]:.3f}",
            f"{row['paper'][-1] / row['paper'][0]:.3f}; {row['centred'][-1] / row['centred'][0]:.3f} about the mean",
        )
        for beta, row in (("1", full), ("0.1", scaled))
    ]
    result += [
        Number(
            "Residual, β = 1, no BN: factor per layer",
            f"{decay(data, 'residual, β = 1, no BN'):.3f}",
            "3/4 (theorem 2)",
        ),
        Number("Plain, no BN: factor per layer", f"{decay(data, 'plain, no BN'):.3f}", "1/2 (theorem 1)"),
        Number("Plain, no BN: units active at both inputs, layer 10", f"{bare['coactive'][9]:.3f}", "1/4 (assumed)"),
        Number("On the line, 1 layer: spectral exponent", f"{signed(plain['exponents'][0])}", noises["brown noise"]),
        Number(
            "On the line, plain, 24 layers: spectral exponent",
            f"{signed(plain['exponents'][23])}",
            noises["white noise"],
        ),
        Number("On the line, residual, β = 1, 50 layers: spectral exponent", f"{signed(full['exponents'][-1])}"),
        Number("On the line, residual, β = 0.1, 50 layers: spectral exponent", f"{signed(scaled['exponents'][-1])}"),
    ]
    step = f"1/{data['line_points'] - 1} of the way between two images"
    result += [
        Number(f"{title(row['model'])}, untrained: cosine of input gradients, {step}", f"{row['cosines'][0]:.3f}")
        for row in data["own"]
    ]
    return result


def paragraph(data: Data) -> str:
    plain, scaled, full = (net_of(data, name) for name in ("plain", "residual, β = 0.1", "residual, β = 1"))
    cosines = {row["model"]: row["cosines"][0] for row in data["own"]}
    models = [f"{kind}{data['deep']}" for kind in ("plain", "resnet")]
    white, kept = plain["exponents"][23] > -0.5, scaled["exponents"][-1] < -1.0
    left = {beta: row["correlations"][-1] / row["correlations"][0] for beta, row in ((1, full), (0.1, scaled))}
    text = (
        f"Averaged over {data['networks']} networks with 200 units per layer, the gradient of a one-layer network "
        f"along a line is brown noise (spectral exponent {signed(plain['exponents'][0])}; a random walk has −2). After "
        f"24 plain layers with batch norm the exponent is {signed(plain['exponents'][23])} (white noise has 0), so "
        f"gradients at neighbouring points {'no longer' if white else 'still'} resemble each other. After 50 residual "
        f"layers it is {signed(scaled['exponents'][-1])} with β = 0.1, "
        f"{'closer to brown than to white noise' if kept else 'closer to white noise'}, and "
        f"{signed(full['exponents'][-1])} with β = 1. For independent inputs, as the theorems assume, a plain layer "
        f"multiplies the correlation of two gradients by {decay(data, 'plain'):.2f} (the paper: 0.50). After 50 "
        f"residual layers, {percent(left[1], 0)} of the correlation is left with β = 1 and {percent(left[0.1], 0)} "
        f"with β = 0.1. At β = 1 it falls as L^{signed(power_law(full['correlations']))}, not as L^−0.50, because "
        "batch norm divides by the variance about the mean, and the theorem by the variance about zero. With the "
        f"variance about the mean, the theorem gives the exponent {signed(power_law(full['centred']))}. Without batch "
        "norm the assumption of the theorems fails, because inputs become more alike with depth. At layer 10, "
        f"{percent(net_of(data, 'plain, no BN')['coactive'][9], 0)} of the units are active at both of two inputs, not "
        f"25 %. A plain layer then keeps {decay(data, 'plain, no BN'):.2f} of the correlation, not 0.50, and a "
        f"residual one {decay(data, 'residual, β = 1, no BN'):.2f}, not 0.75. "
    )
    apart = cosines[models[1]] - cosines[models[0]]
    where = (
        "In this project's own untrained networks, two input gradients on a line between two images, "
        f"1/{data['line_points'] - 1} of the way apart, have a cosine of {cosines[models[0]]:.2f} in "
        f"{title(models[0])} and {cosines[models[1]]:.2f} in {title(models[1])}"
    )
    return text + where + (": the same effect." if apart > 0.1 else ": the effect does not show here.")


STUDY = Study(
    "shattering",
    "Gradients that shatter",
    "Balduzzi et al., ICML 2017, figures 1 and 2, theorems 1–3",
    measure,
    tables,
    draw,
    numbers,
    paragraph,
)
