"""Study 1: the degradation problem. He et al., *Deep residual learning for image recognition*, CVPR 2016.

A deep plain network ends with a higher training error than a shallow one (figures 1 and 6), although an equally good
solution exists: the shallow network with identity layers added. Residual networks of the same depths do not have this
problem. A layer's response is the standard deviation of its output after batch norm, before ReLU and addition; it is
measured for every 3×3 layer (figure 7).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor, nn

from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar

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
NEGLIGIBLE = 0.1  # as a fraction of the plain networks' difference
CLEARLY_LESS = 0.75  # as a fraction of the plain network's response


@torch.inference_mode()
def layer_responses(module: nn.Module, images: Tensor) -> list[float]:
    """Return the standard deviation of each 3×3 layer's output after batch norm, in order, on ``[N, 3, 32, 32]``."""
    found: list[float] = []
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda _, __, output: found.append(float(output.std()))) for norm in norms]
    module(images)
    for hook in hooks:
        hook.remove()
    return found


def constructed(trained: Trained, deep: str, images: Tensor, labels: Tensor) -> Data:
    """Extend a trained shallow network to ``deep`` with identity layers, run both with fastres, and compare them."""
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
    for trained in progress_bar(everything, desc="Evaluating the trained networks", unit="network"):
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
    """Return the networks of each model, one per seed."""
    result: dict[str, list[Data]] = defaultdict(list)
    for network in data["networks"]:
        result[network["model"]].append(network)
    return dict(result)


def gaps(data: Data, kind: str, part: str) -> list[float]:
    """Return the final ``part`` error of the deep network minus that of the shallow one, for each seed."""
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
    for kind, expected in (("plain", "> 0: degradation"), ("resnet", "about 0: no degradation")):
        values = gaps(data, kind, "train")
        result.append(
            Number(
                f"{kind}-{deep} minus {kind}-{SHALLOW}: final training error, for each seed",
                _points(values),
                expected,
            )
        )
    added = 6 * (get_architecture(f"plain{deep}").depths[0] - get_architecture(f"plain{SHALLOW}").depths[0])
    result.append(
        Number(
            f"plain-{SHALLOW} with {added} identity layers: test error",
            spread_of([row["deepened_error"] for row in data["constructed"]]),
            f"{spread_of([row['shallow_error'] for row in data['constructed']])}, the same as plain-{SHALLOW}",
        )
    )
    result.append(
        Number(
            "Largest change of a logit due to those layers",
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
        f"The networks were trained on {data['dataset']}, for {data['steps']} steps in {data['epochs']} epochs, with "
        f"{seeds_text(data['seeds'])}. plain-{deep} ends with a training error of {final('plain', deep, 'train')} and "
        f"a test error of {final('plain', deep, 'test')}; plain-{SHALLOW} ends with "
        f"{final('plain', SHALLOW, 'train')} and {final('plain', SHALLOW, 'test')}. resnet-{deep} ends with "
        f"{final('resnet', deep, 'train')} and {final('resnet', deep, 'test')}; resnet-{SHALLOW} ends with "
        f"{final('resnet', SHALLOW, 'train')} and {final('resnet', SHALLOW, 'test')}. "
    )
    recipe = data["recipe"]
    text += (
        f"(The recipe is SGD with Nesterov momentum {recipe['momentum']}, batches of {recipe['batch_size']}, a "
        f"learning rate that rises to {recipe['learning_rate']} and falls to zero along a cosine, weight decay "
        f"{recipe['weight_decay']:g}, and shifts by up to {recipe['shift']} pixels.) "
    )
    return text + _verdict(data) + _about_construction(data) + _about_responses(data)


def _points(values: list[float]) -> str:
    """Format the differences of errors, one per seed."""
    return ", ".join(signed(100 * value, "+.1f") for value in values) + " points"


def _verdict(data: Data) -> str:
    """Say whether depth harms each kind of network, judged by the difference of training errors."""
    plain, residual = (gaps(data, kind, "train") for kind in KINDS)
    if min(plain) > 0:
        text = (
            f"This is degradation: the deeper plain network fits its own training images worse in every seed "
            f"({_points(plain)}). (How much longer training would help is not measured here; He et al. train for "
            "64,000 steps.) "
        )
    else:
        text = (
            "Degradation does not show at this scale: the deeper plain network's training error is higher in "
            f"{sum(value > 0 for value in plain)} of {len(plain)} seeds ({_points(plain)}). "
        )
    if mean(residual) <= NEGLIGIBLE * abs(mean(plain)):
        return text + f"With shortcuts, depth does no harm ({_points(residual)}). "
    return text + f"With shortcuts, the deeper network is worse too ({_points(residual)}). "


def _about_construction(data: Data) -> str:
    rows, deep = data["constructed"], data["deep"]
    added = deep - SHALLOW
    change = max(row["largest_difference"] for row in rows)
    built = mean([row["deepened_error"] for row in rows])
    learned = mean([network["final_test_error"] for network in by_model(data)[f"plain{deep}"]])
    exact = "no logit changes" if change == 0 else f"no logit changes by more than {number(change)}"
    text = (
        f"Yet a plain-{deep} that is as good as plain-{SHALLOW} exists: when {added} identity layers are added to the "
        f"trained plain-{SHALLOW}, {exact} and the test error stays at {100 * built:.1f} %. "
    )
    if learned > built:
        return (
            text + f"Training plain-{deep} from scratch misses that solution by {100 * (learned - built):.1f} points. "
        )
    return text + f"Training plain-{deep} from scratch is no worse here ({100 * learned:.1f} %). "


def _about_responses(data: Data) -> str:
    """Say whether residual layers respond clearly less than plain ones, and less in deeper networks (figure 7)."""
    deep = data["deep"]
    plain, residual, shallow = (
        mean_response(data, model) for model in (f"plain{deep}", f"resnet{deep}", f"resnet{SHALLOW}")
    )
    text = (
        f"The mean response (standard deviation) of the layers is {residual:.2f} in resnet-{deep}, {plain:.2f} in "
        f"plain-{deep} and {shallow:.2f} in resnet-{SHALLOW}. "
    )
    if residual < CLEARLY_LESS * plain and residual < shallow:
        return text + "As in figure 7, residual layers respond less than plain ones, and less in the deeper network."
    return text + (
        "In figure 7, residual layers respond clearly less than plain ones, and less in deeper networks. This effect "
        "hardly shows here: a response is the scale of its batch norm, which starts at 1 and changes little in "
        f"{data['steps']} steps."
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
        f"Error on {data['dataset']}: mean of {seeds_text(data['seeds'])}. The band is the range of the test error. "
        "The training error is measured on the shifted images, during training."
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
        "Responses of the 3×3 layers of the trained networks, after batch norm and before ReLU and addition, on test "
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
