"""Study 1: the degradation problem. He et al., *Deep residual learning for image recognition*, CVPR 2016.

A plain network of more layers ends with a higher training error than one of fewer (figures 1 and 6), although a
solution exists that is as good: the shallow network with identity layers added. Residual networks of the same depths do
not. The responses are the standard deviations of every 3×3 layer's output after batch norm, before ReLU and addition
(figure 7).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastres.network.architectures import get_architecture

from .common import (
    SHALLOW,
    Data,
    Number,
    Picture,
    Record,
    Settings,
    Study,
    mean,
    number,
    percent,
    rounded,
    seeds_text,
    signed,
    spread_of,
    title,
)
from .figures import INK, MUTED, PLAIN, RESIDUAL, new_figure
from .running import compare, run
from .surgery import deepen
from .training import Trained, error_of, logits

KINDS = ("plain", "resnet")
NEGLIGIBLE = 0.1  # of the plain networks' difference
CLEARLY_LESS = 0.75  # of the plain network's response


@torch.inference_mode()
def layer_responses(module: nn.Module, images: Tensor) -> list[float]:
    """Standard deviation of every 3×3 layer's output after batch norm, first layer first, on ``[N, 3, 32, 32]``."""
    found: list[float] = []
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda _, __, output: found.append(float(output.std()))) for norm in norms]
    module(images)
    for hook in hooks:
        hook.remove()
    return found


def constructed(trained: Trained, deep: str, images: Tensor, labels: Tensor) -> Data:
    """A trained shallow network with identity layers up to ``deep``, both run by fastres."""
    state = deepen(trained.state, get_architecture(trained.job.model), get_architecture(deep))
    shallow, deepened = run(trained.job.model, trained.state, images), run(deep, state, images)
    return {
        "seed": trained.job.seed,
        "shallow_error": error_of(shallow, labels),
        "deepened_error": error_of(deepened, labels),
        "largest_difference": float((shallow - deepened).abs().max()),
        "largest_logit": float(shallow.abs().max()),
    }


def measure(settings: Settings) -> Data:
    dataset = settings.dataset()
    everything = settings.trained()
    images, labels = dataset.normalise(dataset.test_images), dataset.test_labels
    train_images = dataset.normalise(dataset.train_images)
    networks, built, runs = [], [], []
    for trained in tqdm(everything, desc="Looking at the trained networks", unit="network"):
        model, seed = trained.job.model, trained.job.seed
        module = trained.module()
        runs.append(compare(f"{model}, seed {seed}", model, trained.state, images, labels))
        if model == f"plain{SHALLOW}":
            built.append(constructed(trained, f"plain{settings.deep}", images, labels))
        networks.append(
            {
                "model": model,
                "seed": seed,
                "train_losses": [epoch.train_loss for epoch in trained.epochs],
                "train_errors": [epoch.train_error for epoch in trained.epochs],
                "test_errors": [epoch.test_error for epoch in trained.epochs],
                "final_train_error": error_of(logits(module, train_images), dataset.train_labels),
                "final_test_error": error_of(logits(module, images), labels),
                "responses": layer_responses(module, images[: settings.images]),
            }
        )
    return rounded(
        {
            "dataset": dataset.describe(),
            "test_images": len(images),
            "seeds": settings.seeds,
            "epochs": settings.epochs,
            "steps": settings.epochs * -(-len(train_images) // everything[0].job.recipe.batch_size),
            "recipe": dataclasses.asdict(everything[0].job.recipe),
            "deep": settings.deep,
            "networks": networks,
            "constructed": built,
            "runs": runs,
        }
    )


def by_model(data: Data) -> dict[str, list[Data]]:
    """The networks of each model, one a seed."""
    result: dict[str, list[Data]] = defaultdict(list)
    for network in data["networks"]:
        result[network["model"]].append(network)
    return dict(result)


def gaps(data: Data, kind: str, part: str) -> list[float]:
    """Final ``part`` error of the deep network less the shallow one's, seed by seed."""
    models = by_model(data)
    pairs = zip(models[f"{kind}{data['deep']}"], models[f"{kind}{SHALLOW}"], strict=True)
    return [deep[f"final_{part}_error"] - shallow[f"final_{part}_error"] for deep, shallow in pairs]


def tables(data: Data) -> dict[str, list[Record]]:
    curves = [
        {
            "model": network["model"],
            "seed": network["seed"],
            "epoch": epoch,
            "train_loss": loss,
            "train_error": train,
            "test_error": test,
        }
        for network in data["networks"]
        for epoch, (loss, train, test) in enumerate(
            zip(network["train_losses"], network["train_errors"], network["test_errors"], strict=True), start=1
        )
    ]
    final = [
        {key: network[key] for key in ("model", "seed", "final_train_error", "final_test_error")}
        for network in data["networks"]
    ]
    responses = [
        {"model": network["model"], "seed": network["seed"], "layer": layer, "standard_deviation": value}
        for network in data["networks"]
        for layer, value in enumerate(network["responses"], start=1)
    ]
    return {
        "degradation-curves": curves,
        "degradation-final": final,
        "degradation-constructed": list(data["constructed"]),
        "degradation-responses": responses,
    }


def numbers(data: Data) -> list[Number]:
    deep = data["deep"]
    result = []
    for model, networks in by_model(data).items():
        for part, told in (("train", "training"), ("test", "test")):
            errors = [network[f"final_{part}_error"] for network in networks]
            result.append(Number(f"{title(model)}: final {told} error", spread_of(errors)))
    for kind, expected in (("plain", "> 0: degradation"), ("resnet", "about 0: none")):
        values = gaps(data, kind, "train")
        result.append(
            Number(
                f"{kind}-{deep} less {kind}-{SHALLOW}: final training error, seed by seed",
                _points(values),
                expected,
            )
        )
    added = 6 * (get_architecture(f"plain{deep}").depths[0] - get_architecture(f"plain{SHALLOW}").depths[0])
    result.append(
        Number(
            f"plain-{SHALLOW} with {added} identity layers: test error",
            spread_of([row["deepened_error"] for row in data["constructed"]]),
            f"{spread_of([row['shallow_error'] for row in data['constructed']])}, as plain-{SHALLOW}",
        )
    )
    result.append(
        Number(
            "Largest change of a logit by those layers",
            number(max(row["largest_difference"] for row in data["constructed"])),
            "0",
        )
    )
    result += [
        Number(
            f"{title(model)}: mean response of its layers",
            f"{mean_response(data, model):.2f}",
            "" if model.startswith("plain") else "smaller than the plain network's",
        )
        for model in by_model(data)
    ]
    return result


def paragraph(data: Data) -> str:
    deep, models = data["deep"], by_model(data)

    def final(kind: str, depth: int, part: str) -> str:
        return spread_of([network[f"final_{part}_error"] for network in models[f"{kind}{depth}"]])

    text = (
        f"On {data['dataset']}, {data['steps']} steps of training in {data['epochs']} epochs, "
        f"{seeds_text(data['seeds'])}: plain-{deep} ends with a training error of {final('plain', deep, 'train')} and "
        f"a test error of {final('plain', deep, 'test')}, plain-{SHALLOW} with {final('plain', SHALLOW, 'train')} and "
        f"{final('plain', SHALLOW, 'test')}. resnet-{deep} ends with {final('resnet', deep, 'train')} and "
        f"{final('resnet', deep, 'test')}, resnet-{SHALLOW} with {final('resnet', SHALLOW, 'train')} and "
        f"{final('resnet', SHALLOW, 'test')}. "
    )
    recipe = data["recipe"]
    text += (
        f"(SGD with Nesterov momentum {recipe['momentum']}, batches of {recipe['batch_size']}, a learning rate that "
        f"rises to {recipe['learning_rate']} and falls to zero along a cosine, weight decay "
        f"{recipe['weight_decay']:g}, shifts by up to {recipe['shift']} pixels.) "
    )
    return text + _verdict(data) + _about_construction(data) + _about_responses(data)


def _points(values: list[float]) -> str:
    """Differences of errors, seed by seed."""
    return ", ".join(signed(100 * value, "+.1f") for value in values) + " points"


def _verdict(data: Data) -> str:
    """Whether depth harms each kind, by the training errors' difference."""
    plain, residual = (gaps(data, kind, "train") for kind in KINDS)
    if min(plain) > 0:
        text = (
            f"The deeper plain network fits its own training images worse in every seed ({_points(plain)}): "
            "degradation. (How much of that a longer training would make up for is not measured here; He et al. train "
            "for 64,000 steps.) "
        )
    else:
        text = (
            "Degradation does not show at this scale: the deeper plain network's training error is higher in "
            f"{sum(value > 0 for value in plain)} of {len(plain)} seeds ({_points(plain)}). "
        )
    if mean(residual) <= NEGLIGIBLE * abs(mean(plain)):
        return text + f"With shortcuts depth does no such harm ({_points(residual)}). "
    return text + f"With shortcuts the deeper network, too, is behind ({_points(residual)}). "


def _about_construction(data: Data) -> str:
    rows, deep = data["constructed"], data["deep"]
    added = deep - SHALLOW
    change = max(row["largest_difference"] for row in rows)
    built = mean([row["deepened_error"] for row in rows])
    learned = mean([network["final_test_error"] for network in by_model(data)[f"plain{deep}"]])
    exact = "not one logit changes" if change == 0 else f"no logit changes by more than {number(change)}"
    text = (
        f"Yet a plain-{deep} as good as plain-{SHALLOW} exists: with {added} identity layers added to the trained "
        f"plain-{SHALLOW}, {exact} and the test error stays at {100 * built:.1f} %. "
    )
    if learned > built:
        return (
            text + f"Training plain-{deep} from scratch misses that solution by {100 * (learned - built):.1f} points. "
        )
    return text + f"Training plain-{deep} from scratch is no worse here ({100 * learned:.1f} %). "


def _about_responses(data: Data) -> str:
    """Figure 7: whether residual layers respond clearly less than plain ones, and the deeper the less."""
    deep = data["deep"]
    plain, residual, shallow = (
        mean_response(data, model) for model in (f"plain{deep}", f"resnet{deep}", f"resnet{SHALLOW}")
    )
    text = (
        f"The layers of resnet-{deep} respond with a standard deviation of {residual:.2f} on average, those of "
        f"plain-{deep} with {plain:.2f}, those of resnet-{SHALLOW} with {shallow:.2f}"
    )
    if residual < CLEARLY_LESS * plain and residual < shallow:
        return text + ": residual layers respond less, and the deeper the network the less, as in figure 7."
    return text + (
        ". Figure 7's effect, residual layers that respond clearly less, and less the deeper the network, hardly "
        f"shows: a response is its batch norm's scale, which starts at 1 and moves little in {data['steps']} steps."
    )


def mean_response(data: Data, model: str) -> float:
    return mean([mean(network["responses"]) for network in by_model(data)[model]])


def draw(data: Data) -> list[Picture]:
    return [_draw_curves(data), _draw_responses(data)]


def _draw_curves(data: Data) -> Picture:
    figure, axes = new_figure(1, 2, width=12, height=5, sharey=True)
    models = by_model(data)
    for axis, kind, shades in zip(axes[0], KINDS, ((PLAIN[0], PLAIN[2]), (RESIDUAL[0], RESIDUAL[2])), strict=True):
        for depth, colour in zip((SHALLOW, data["deep"]), shades, strict=True):
            networks = models[f"{kind}{depth}"]
            epochs = range(1, data["epochs"] + 1)
            for part, style, width in (("train_errors", "--", 1.2), ("test_errors", "-", 2.4)):
                curves = [[100 * value for value in network[part]] for network in networks]
                middle = [mean(values) for values in zip(*curves, strict=True)]
                label = f"{kind}-{depth}" if part == "test_errors" else None
                axis.plot(epochs, middle, color=colour, linestyle=style, linewidth=width, label=label)
                if part == "test_errors":
                    low, high = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
                    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title("plain networks" if kind == "plain" else "residual networks")
        axis.set(xlabel="epoch", xlim=(1, max(2, data["epochs"])), ylim=(0, 100), xticks=range(1, data["epochs"] + 1))
    built = mean([row["deepened_error"] for row in data["constructed"]])
    label = f"plain-{SHALLOW} and {data['deep'] - SHALLOW} identity layers: {percent(built)}"
    axes[0][0].axhline(100 * built, color=INK, linestyle=":", linewidth=1.8, label=label)
    axes[0][0].set_ylabel("error (%)")
    axes[0][1].plot([], [], color=MUTED, linestyle="--", linewidth=1.2, label="dashed: training error")
    for axis in axes[0]:
        axis.legend(loc="upper right")
    caption = (
        f"Error on {data['dataset']}: mean of {seeds_text(data['seeds'])}, band from least to most (test). Training "
        "error is that of the shifted images, while training."
    )
    return Picture("degradation-curves.png", figure, caption)


def _draw_responses(data: Data) -> Picture:
    figure, axes = new_figure(1, 2, width=12, height=4.4, sharey=True)
    shades = {"plain": (PLAIN[0], PLAIN[2]), "resnet": (RESIDUAL[0], RESIDUAL[2])}
    for kind in KINDS:
        for depth, colour in zip((SHALLOW, data["deep"]), shades[kind], strict=True):
            networks = by_model(data)[f"{kind}{depth}"]
            middle = [mean(values) for values in zip(*(network["responses"] for network in networks), strict=True)]
            layers = range(1, len(middle) + 1)
            axes[0][0].plot(layers, middle, color=colour, linewidth=1.8, label=f"{kind}-{depth}")
            axes[0][1].plot(layers, sorted(middle, reverse=True), color=colour, linewidth=1.8)
    axes[0][0].set(title="in the network's order", xlabel="3×3 layer (the input is at the left)", ylim=(0, None))
    axes[0][1].set(title="sorted", xlabel="3×3 layer, the largest response first")
    axes[0][0].set_ylabel("standard deviation of the response")
    axes[0][0].legend(ncols=2)
    caption = (
        "Responses of the trained networks' 3×3 layers, after batch norm and before ReLU and addition, on test "
        f"images; mean of {seeds_text(data['seeds'])}."
    )
    return Picture("degradation-responses.png", figure, caption)


STUDY = Study(
    "degradation",
    "The degradation problem",
    "He et al., CVPR 2016, figures 1, 6 and 7, §4.2",
    measure,
    tables,
    draw,
    numbers,
    paragraph,
)
