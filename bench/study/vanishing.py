"""Study 2: gradients that vanish or explode with depth, and the effect of batch norm and of the activation.

The first experiment uses fully connected networks with 128 units per layer and orthogonal weights, on the images. If
the weights have spectral norm g, backpropagation through one layer multiplies the norm of the gradient

- by at most g/4 for a sigmoid, because σ'(z) ≤ 1/4;
- by g/√2 for ReLU if half of the units are active;
- with batch norm, by √(E[φ'²] / Var[φ]) whatever the scale of the weights (Yang et al., *A mean field theory of batch
  normalization*, ICLR 2019; √(π/(π−1)) = 1.21 for ReLU).

The second experiment uses the CIFAR networks of this project at initialisation. He et al. found no vanishing gradients
in plain networks there (CVPR 2016, §4.1).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet
from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar

from .common import Data, Number, Picture, Record, Settings, Study, number, power, rounded, title
from .data import CLASSES, Dataset
from .figures import DEPTH_COLOURS, INK, MUTED, PLAIN, RESIDUAL, log_labels, new_figure, note
from .running import compare

WIDTH = 128
DEPTHS = (10, 20, 50)
BATCH = 256
POOL = 4  # images are pooled to 8×8 pixels

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
NAMES = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
USUAL_GAIN = {"sigmoid": 1.0, "tanh": 1.0, "relu": math.sqrt(2)}
BOUND = 0.25  # upper bound of the sigmoid's derivative
EPSILON = 1e-5
EXPLODED = 10  # the plain network's gradients explode if their ratio is this many times the residual network's


def gradient_norms(
    images: Tensor, labels: Tensor, depth: int, activation: str, gain: float, norm: bool, seed: int
) -> list[float]:
    """Return ‖∂loss/∂z‖ of each layer's pre-activation z ``[N, 128]``, in order, in float64 at initialisation.

    ``images`` are features ``[N, C]``. Hidden weights are ``gain`` times orthogonal matrices, so their spectral norm is
    exactly ``gain``. With ``norm``, z is normalised over the batch. The loss is cross-entropy, summed over the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    h = images.double()
    kept: list[Tensor] = []
    for _ in range(depth):
        weight = torch.empty(WIDTH, h.shape[1], dtype=torch.float64)
        z = h @ (gain * nn.init.orthogonal_(weight, generator=generator)).T
        if norm:
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + EPSILON).sqrt()
        z.requires_grad_() if not kept else z.retain_grad()
        kept.append(z)
        h = ACTIVATIONS[activation](z)
    readout = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    nn.functional.cross_entropy(h @ readout.T, labels, reduction="sum").backward()
    return [float(z.grad.norm()) for z in kept if z.grad is not None]


def mean_field_factor(activation: str) -> float:
    """Return √(E[φ'(z)²] / Var[φ(z)]), z ~ N(0, 1): the backward factor on gradients of a batch-normalised layer."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)  # an even number, so that no node is at ReLU's kink
    z = torch.tensor(nodes, requires_grad=True)
    density = torch.tensor(weights / weights.sum())
    phi = ACTIVATIONS[activation](z)
    (derivative,) = torch.autograd.grad(phi.sum(), z)
    variance = (density * phi**2).sum() - (density * phi).sum() ** 2
    return float(((density * derivative**2).sum() / variance).sqrt().detach())


def _lab(settings: Settings, dataset: Dataset) -> list[Data]:
    """Return a row per activation, gain, depth and use of batch norm. Norms are relative to that of the last layer."""
    pixels = dataset.normalise(dataset.train_images[:BATCH])
    features = nn.functional.avg_pool2d(pixels, POOL).flatten(1)
    features = features[:, features.std(0) > 0]  # the digits' corners are always paper
    features = (features - features.mean(0)) / features.std(0)
    cases = list(itertools.product(ACTIVATIONS, (1, 2), (False, True), DEPTHS))
    rows: list[Data] = []
    for activation, times, norm, depth in progress_bar(
        cases, desc="Gradients of fully connected networks", unit="case"
    ):
        gain = times * USUAL_GAIN[activation]
        draws = [
            gradient_norms(features, dataset.train_labels[:BATCH], depth, activation, gain, norm, seed)
            for seed in range(settings.draws)
        ]
        logs = torch.tensor(draws, dtype=torch.float64).log()
        logs = logs - logs[:, -1:]  # [draws, depth]
        ratios = torch.exp(logs)
        bound = torch.tensor([(gain * BOUND) ** (depth - layer) for layer in range(1, depth + 1)], dtype=torch.float64)
        rows.append(
            {
                "activation": activation,
                "gain": gain,
                "gain_of_usual": times,
                "batch_norm": norm,
                "depth": depth,
                "relative_norms": ratios.log().mean(0).exp().tolist(),
                "least": ratios.amin(0).tolist(),
                "most": ratios.amax(0).tolist(),
                "factor": math.exp(float(logs[:, 0].mean()) / (depth - 1)),
                "largest_of_bound": float((ratios / bound)[:, :-1].max()),
            }
        )
    return rows


def fresh(model: str, seed: int) -> EagerResNet:
    """Return an untrained network of ten classes in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagerResNet(get_architecture(model).with_classes(CLASSES)).train()


def initialised(model: str, images: Tensor, seed: int) -> EagerResNet:
    """Return an untrained network in eval mode, with the batch-norm statistics of ``images`` ``[N, 3, 32, 32]``."""
    module = fresh(model, seed)
    for norm in _norms(module):
        norm.momentum = None  # one pass sets the running statistics to the batch's
    with torch.no_grad():
        module(images)
    return module.eval()


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def own_gradient_norms(model: str, images: Tensor, labels: Tensor, seed: int) -> list[float]:
    """Return ‖∂loss/∂y‖ of each 3×3 layer's output y after batch norm, in order, at initialisation in training mode.

    ``images`` are normalised, ``[N, 3, 32, 32]``. The loss is cross-entropy, summed over them.
    """
    module = fresh(model, seed)
    found: dict[int, float] = {}

    def watch(index: int, output: Tensor) -> None:
        output.register_hook(lambda gradient: found.update({index: float(gradient.norm())}))

    for index, norm in enumerate(_norms(module)):
        norm.register_forward_hook(lambda _, __, output, index=index: watch(index, output))
    nn.functional.cross_entropy(module(images), labels, reduction="sum").backward()
    return [found[index] for index in sorted(found)]


def _own(settings: Settings, dataset: Dataset) -> tuple[list[Data], list[Data]]:
    """Return the gradient norms of this project's networks, and the comparison of fastres with PyTorch."""
    images = dataset.normalise(dataset.train_images[: settings.images])
    labels = dataset.train_labels[: settings.images]
    rows, runs = [], []
    models = [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in settings.depths]
    for model in progress_bar(models, desc="Gradients of the CIFAR networks", unit="network"):
        draws = [own_gradient_norms(model, images, labels, seed) for seed in range(settings.seeds)]
        state = initialised(model, images, seed=0).state_dict()
        runs.append(compare(f"{model}, untrained, seed 0", model, state, images, labels))
        logs = torch.tensor(draws, dtype=torch.float64).log().mean(0)
        layers = len(logs)
        rows.append(
            {
                "model": model,
                "norms": logs.exp().tolist(),
                "factor": math.exp(float(logs[0] - logs[-1]) / (layers - 1)),
            }
        )
    return rows, runs


def measure(settings: Settings) -> Data:
    dataset = settings.dataset()
    lab = _lab(settings, dataset)
    own, runs = _own(settings, dataset)
    theory = {activation: mean_field_factor(activation) for activation in ACTIVATIONS}
    return rounded(
        {
            "dataset": dataset.describe(),
            "draws": settings.draws,
            "seeds": settings.seeds,
            "images": settings.images,
            "deep": settings.deep,
            "lab": lab,
            "own": own,
            "mean_field_factor": theory,
            "runs": runs,
        }
    )


def row_of(data: Data, activation: str, depth: int, *, norm: bool, times: int = 1) -> Data:
    """Return the row of this case."""
    for row in data["lab"]:
        if (row["activation"], row["depth"], row["batch_norm"], row["gain_of_usual"]) == (
            activation,
            depth,
            norm,
            times,
        ):
            return row
    raise KeyError((activation, depth, norm, times))


def tables(data: Data) -> dict[str, list[Record]]:
    lab = [
        {
            "activation": row["activation"],
            "gain": row["gain"],
            "batch_norm": row["batch_norm"],
            "depth": row["depth"],
            "layer": layer,
            "relative_norm": value,
            "least": row["least"][layer - 1],
            "most": row["most"][layer - 1],
        }
        for row in data["lab"]
        for layer, value in enumerate(row["relative_norms"], start=1)
    ]
    own = [
        {"model": row["model"], "layer": layer, "norm": value}
        for row in data["own"]
        for layer, value in enumerate(row["norms"], start=1)
    ]
    return {"vanishing-lab": lab, "vanishing-networks": own}


def numbers(data: Data) -> list[Number]:
    deep = DEPTHS[-1]
    bounds = [row for row in data["lab"] if row["activation"] == "sigmoid" and not row["batch_norm"]]
    result = [
        Number(
            f"{NAMES[name]}, {deep} layers, no normalisation: factor per layer, backwards",
            f"{row_of(data, name, deep, norm=False)['factor']:.3f}",
            expected,
        )
        for name, expected in (("sigmoid", "≤ 0.25"), ("tanh", "≤ 1"), ("relu", "1 (half the units pass, gain √2)"))
    ]
    result.append(
        Number(
            f"ReLU at twice that gain, {deep} layers, no normalisation: factor",
            f"{row_of(data, 'relu', deep, norm=False, times=2)['factor']:.3f}",
            "2: explodes",
        )
    )
    result += [
        Number(
            f"{NAMES[name]}, {deep} layers, batch norm: factor (at twice the gain)",
            f"{row_of(data, name, deep, norm=True)['factor']:.3f} "
            f"({row_of(data, name, deep, norm=True, times=2)['factor']:.3f})",
            f"{data['mean_field_factor'][name]:.3f} (mean field), for any gain",
        )
        for name in ACTIVATIONS
    ]
    largest = max(row["largest_of_bound"] for row in bounds)
    result.append(Number("Largest sigmoid gradient, relative to the bound (g/4)^layers", f"{largest:.3f}", "≤ 1"))
    result += [
        Number(
            f"{title(row['model'])}, untrained: gradient of the first layer / of the last",
            f"{number(row['norms'][0] / row['norms'][-1])} ({row['factor']:.3f} per layer)",
            f"{data['mean_field_factor']['relu']:.3f} per layer (mean field)"
            if row["model"].startswith("plain")
            else "",
        )
        for row in data["own"]
    ]
    return result


def paragraph(data: Data) -> str:
    deep = DEPTHS[-1]
    sigmoid, tanh, relu = (row_of(data, name, deep, norm=False) for name in ACTIVATIONS)
    exploding = row_of(data, "relu", deep, norm=False, times=2)
    normed = row_of(data, "relu", deep, norm=True)
    double = row_of(data, "relu", deep, norm=True, times=2)
    theory = data["mean_field_factor"]["relu"]
    text = (
        f"In a network of {deep} fully connected layers at initialisation, the gradient of the first layer, relative "
        f"to that of the last, is {power(sigmoid['relative_norms'][0])} for sigmoid (a factor of "
        f"{sigmoid['factor']:.3f} per layer; the bound is 0.25), {tanh['relative_norms'][0]:.2g} for tanh, and "
        f"{relu['relative_norms'][0]:.2g} for ReLU with He's gain √2. At twice that gain, the gradient of ReLU grows "
        f"by a factor of {power(exploding['relative_norms'][0])}. With batch norm, the gain no longer matters "
        f"({normed['factor']:.3f} per layer at √2, {double['factor']:.3f} at 2√2) and the gradient of sigmoid no "
        f"longer vanishes ({row_of(data, 'sigmoid', deep, norm=True)['relative_norms'][0]:.2g}). But batch norm itself "
        f"makes the gradient of ReLU grow backwards, by {normed['factor']:.2f} per layer; mean-field theory gives "
        f"{theory:.2f}. "
    )
    return text + _own_sentence(data, theory)


def _own_sentence(data: Data, theory: float) -> str:
    """Say whether the gradients of the CIFAR networks vanish, explode or neither, plain compared with residual."""
    rows = {row["model"]: row for row in data["own"]}
    plain, residual = (rows[f"{kind}{data['deep']}"] for kind in ("plain", "resnet"))
    ratios = [row["norms"][0] / row["norms"][-1] for row in (plain, residual)]
    names = [f"{kind}-{data['deep']}" for kind in ("plain", "resnet")]
    text = (
        f"In this project's own untrained networks, the gradient of the first layer is {number(ratios[0])} times that "
        f"of the last in {names[0]} ({plain['factor']:.2f} per layer) and {number(ratios[1])} times in {names[1]} "
        f"({residual['factor']:.2f} per layer). "
    )
    if min(ratios) < 0.1:
        return (
            text + f"The gradients of {' and '.join(n for n, r in zip(names, ratios, strict=True) if r < 0.1)} vanish."
        )
    if ratios[0] > EXPLODED * ratios[1]:
        return text + (
            f"So vanishing gradients are not the reason that {names[0]} is hard to train. At initialisation its "
            f"gradients explode, at about the mean-field rate of {theory:.2f} per layer, and shortcuts slow this down. "
            "(He et al. report healthy norms in their plain networks, without numbers.)"
        )
    return text + (f"Neither vanishes, and the ratio of {names[0]} is at most {EXPLODED} times that of {names[1]}.")


def draw(data: Data) -> list[Picture]:
    return [_draw_lab(data), _draw_own(data)]


def _draw_lab(data: Data) -> Picture:
    figure, axes = new_figure(2, 3, width=12, height=7, sharex=True)
    for column, activation in enumerate(ACTIVATIONS):
        for line, norm in enumerate((False, True)):
            axis = axes[line][column]
            for depth, colour in zip(DEPTHS, DEPTH_COLOURS, strict=True):
                layers = range(1, depth + 1)
                usual = row_of(data, activation, depth, norm=norm)
                double = row_of(data, activation, depth, norm=norm, times=2)
                axis.plot(layers, usual["relative_norms"], color=colour, linewidth=2, label=f"{depth} layers")
                axis.plot(layers, double["relative_norms"], color=colour, linewidth=1.2, linestyle="--")
                axis.fill_between(layers, usual["least"], usual["most"], color=colour, alpha=0.15, linewidth=0)
            if activation == "sigmoid" and not norm:
                depth = DEPTHS[-1]
                bound = [BOUND ** (depth - layer) for layer in range(1, depth + 1)]
                axis.plot(range(1, depth + 1), bound, color=INK, linestyle=":", linewidth=1.6)
                note(axis, 29, 1e-20, "bound $0.25^{\\,50-l}$", INK, ha="left")
            axis.axhline(1, color=MUTED, linewidth=0.8, zorder=0)
            axis.set_yscale("log")
            if norm:
                axis.set_ylim(0.5, 2e4)  # the same limits for all three
            log_labels(axis)
            axis.set_title(f"{NAMES[activation]}, {'batch norm' if norm else 'no normalisation'}")
    for axis in axes[1]:
        axis.set_xlabel("layer $l$ (the input is at the left)")
    for row in axes:
        row[0].set_ylabel("gradient norm ‖∂loss/∂z‖,\nrelative to the last layer's")
    axes[0][2].legend(title="solid: usual gain\ndashed: twice the gain", loc="upper right")
    caption = (
        f"Gradient norm by layer at initialisation: 128 units per layer, orthogonal weights, {BATCH} images, geometric "
        f"mean of {data['draws']} initialisations (the band is their range)."
    )
    return Picture("vanishing-lab.png", figure, caption)


def _draw_own(data: Data) -> Picture:
    figure, axes = new_figure(1, 2, width=12, height=4.2, sharey=True)
    for axis, kind, shades in zip(axes[0], ("plain", "resnet"), (PLAIN, RESIDUAL), strict=True):
        rows = [row for row in data["own"] if row["model"].startswith(kind)]
        for row, shade in zip(rows, shades, strict=False):
            norms = row["norms"]
            axis.plot(range(1, len(norms) + 1), norms, color=shade, linewidth=1.8)
            note(axis, len(norms), norms[-1], f" {title(row['model'])}", shade, ha="left")
        axis.set_yscale("log")
        axis.set_xlim(0, 128)
        axis.set_title("plain networks" if kind == "plain" else "residual networks")
        axis.set_xlabel("3×3 layer (the input is at the left)")
    axes[0][0].set_ylabel("gradient norm ‖∂loss/∂y‖ after batch norm")
    caption = (
        f"Gradient norm by layer in this project's CIFAR networks (ReLU, batch norm, He's initialisation) on "
        f"{data['images']} images, geometric mean of {data['seeds']} "
        f"initialisation{'s' if data['seeds'] > 1 else ''}."
    )
    return Picture("vanishing-networks.png", figure, caption)


STUDY = Study(
    "vanishing",
    "Gradients that vanish and explode",
    "He et al., CVPR 2016, §1 and §4.1; Yang et al., ICLR 2019",
    measure,
    tables,
    draw,
    numbers,
    paragraph,
)
