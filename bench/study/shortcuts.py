"""Study 4: how much each block of a trained network adds, and how much accuracy is left when a block is removed.

A residual block computes relu(s(x) + F(x)), where s is its shortcut. He et al. expect F to be a small correction (CVPR
2016, §3.1). Removing a residual block sets F to zero; a removed block of a plain network passes on its input (Veit et
al., *Residual networks behave like ensembles of relatively shallow networks*, NIPS 2016). Both only edit the state
dict, so that fastres can run every network of this study.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastres.bench.engines.eager import Block, EagerResNet
from fastres.network.architectures import block_specs, get_architecture
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
    percent,
    rounded,
    seeds_text,
    spread_of,
    title,
)
from .data import CLASSES
from .figures import INK, MUTED, PLAIN, RESIDUAL, new_figure, note
from .running import compare, run
from .surgery import without_block
from .training import error_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("plain", "resnet")
TIMES = 8  # test images per image of ``Settings.images``; every removed block needs a run over all of them
LEARNED = 0.5  # below this accuracy, the comparison of networks is meaningless
SPARED = 0.05  # a block is dispensable if removing it costs less accuracy than this


@torch.inference_mode()
def branch_ratios(module: EagerResNet, images: Tensor) -> dict[str, float]:
    """Return ‖F(x)‖ / ‖s(x)‖ of each residual block by name, averaged over ``images`` ``[N, 3, 32, 32]``."""
    result: dict[str, float] = {}
    x = module.relu(module.bn1(module.conv1(images)))
    for stage in module.stages:
        for index, block in enumerate(getattr(module, stage)):
            result[f"{stage}.{index}"] = _ratio(block, x)
            x = block(x)
    return result


def _ratio(block: Block, x: Tensor) -> float:
    layers: Any = block  # its members are set by name, so mypy does not know them
    shortcut = x if block.downsample is None else block.downsample(x)
    branch = layers.bn2(layers.conv2(torch.relu(layers.bn1(layers.conv1(x)))))
    return float((branch.flatten(1).norm(dim=1) / shortcut.flatten(1).norm(dim=1)).mean())


def measure(settings: Settings) -> Data:
    dataset = settings.dataset()
    everything = settings.trained()
    shown = slice(TIMES * settings.images)
    images, labels = dataset.normalise(dataset.test_images[shown]), dataset.test_labels[shown]
    rows, networks, runs = [], [], []
    total = sum(sum(get_architecture(trained.job.model).depths) for trained in everything)
    with progress_bar(total=total, desc="Removing one block at a time", unit="block") as bar:
        for trained in everything:
            model, seed = trained.job.model, trained.job.seed
            arch = get_architecture(model)
            ratios = branch_ratios(trained.module(), images[: settings.images]) if arch.skip else {}
            runs.append(compare(f"{model}, seed {seed}", model, trained.state, images, labels))
            networks.append({"model": model, "seed": seed, "accuracy": 1 - runs[-1]["fastres_error"]})
            for place, spec in enumerate(block_specs(arch), start=1):
                left = run(model, without_block(trained.state, arch, spec.name), images)
                rows.append(
                    {
                        "model": model,
                        "seed": seed,
                        "block": spec.name,
                        "place": place,
                        "changes_shape": spec.stride != 1,
                        "branch_ratio": ratios.get(spec.name),
                        "accuracy_without": 1 - error_of(left, labels),
                    }
                )
                bar.update()
    return rounded(
        {
            "dataset": dataset.describe(),
            "test_images": len(images),
            "seeds": settings.seeds,
            "epochs": settings.epochs,
            "deep": settings.deep,
            "networks": networks,
            "blocks": rows,
            "runs": runs,
        }
    )


def intact(data: Data, model: str) -> list[float]:
    """Return the accuracies of the complete networks of a model, one per seed."""
    return [network["accuracy"] for network in data["networks"] if network["model"] == model]


def by_place(data: Data, model: str, field: str) -> list[float]:
    """Return ``field`` of each block in order, averaged over the seeds."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in data["blocks"]:
        if row["model"] == model:
            found[row["place"]].append(row[field])
    return [mean(found[place]) for place in sorted(found)]


def losses(data: Data, model: str, *, changes_shape: bool) -> list[float]:
    """Return the accuracy lost by removing each block, in all seeds, of the blocks that keep or change the shape."""
    whole = {(row["model"], row["seed"]): row["accuracy"] for row in data["networks"]}
    return [
        whole[model, row["seed"]] - row["accuracy_without"]
        for row in data["blocks"]
        if row["model"] == model and row["changes_shape"] is changes_shape
    ]


def _costs(data: Data) -> dict[str, list[float]]:
    """Return, by model, the accuracy lost by removing each block, in order, averaged over the seeds."""
    return {
        model: [mean(intact(data, model)) - left for left in by_place(data, model, "accuracy_without")]
        for model in _models(data)
    }


def tables(data: Data) -> dict[str, list[Record]]:
    return {"shortcuts-blocks": list(data["blocks"]), "shortcuts-networks": list(data["networks"])}


def _models(data: Data) -> list[str]:
    return [f"{kind}{depth}" for kind in KINDS for depth in (SHALLOW, data["deep"])]


def numbers(data: Data) -> list[Number]:
    result = []
    for model in _models(data):
        kept = losses(data, model, changes_shape=False)
        changed = losses(data, model, changes_shape=True)
        result += [
            Number(f"{title(model)}: accuracy", spread_of(intact(data, model))),
            Number(
                f"{title(model)}: accuracy lost without one same-shape block, mean (most)",
                f"{100 * mean(kept):.1f} ({100 * max(kept):.1f}) points",
            ),
            Number(
                f"{title(model)}: accuracy lost without one shape-changing block, mean (most)",
                f"{100 * mean(changed):.1f} ({100 * max(changed):.1f}) points",
            ),
        ]
    for model, costs in _costs(data).items():
        spared = sum(cost < SPARED for cost in costs)
        what = f"{title(model)}: blocks whose removal costs less than {100 * SPARED:.0f} points"
        result.append(Number(what, f"{spared} of {len(costs)}"))
    for depth in (SHALLOW, data["deep"]):
        ratios = by_place(data, f"resnet{depth}", "branch_ratio")
        result.append(
            Number(
                f"resnet-{depth}: ‖F(x)‖/‖x‖, mean over blocks (least–most)",
                f"{mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                "smaller in the deeper network" if depth == data["deep"] else "",
            )
        )
    return result


def paragraph(data: Data) -> str:
    deep = data["deep"]
    lost = {model: losses(data, model, changes_shape=False) for model in _models(data)}
    ratios = {depth: by_place(data, f"resnet{depth}", "branch_ratio") for depth in (SHALLOW, deep)}
    relation = "less" if mean(ratios[deep]) < mean(ratios[SHALLOW]) else "not less"
    residual, plain = lost[f"resnet{deep}"], lost[f"plain{deep}"]
    whole = {kind: mean(intact(data, f"{kind}{deep}")) for kind in KINDS}
    text = (
        f"In the trained networks of {seeds_text(data['seeds'])}, a block of resnet-{deep} changes the value on its "
        f"shortcut by ‖F(x)‖/‖x‖ = {mean(ratios[deep]):.2f} on average ({min(ratios[deep]):.2f} to "
        f"{max(ratios[deep]):.2f}), {relation} than a block of resnet-{SHALLOW} ({mean(ratios[SHALLOW]):.2f}). So each "
        f"block takes a {'smaller' if relation == 'less' else 'larger'} step in the deeper network. Removing one block "
        f"that keeps the shape costs resnet-{deep} {100 * mean(residual):.1f} points of its "
        f"{percent(whole['resnet'])} test accuracy on average (at most {100 * max(residual):.1f}). It costs "
        f"plain-{deep} {100 * mean(plain):.1f} points of its {percent(whole['plain'])} (at most "
        f"{100 * max(plain):.1f}). At depth {SHALLOW} the cost is {100 * mean(lost[f'resnet{SHALLOW}']):.1f} points "
        f"for resnet-{SHALLOW} and {100 * mean(lost[f'plain{SHALLOW}']):.1f} for plain-{SHALLOW}. "
    )
    if min(whole.values()) < LEARNED:
        return text + "These networks are not trained enough: at such low accuracy the comparison says nothing."
    if mean(plain) > 2 * mean(residual):
        spared = {model: sum(cost < SPARED for cost in costs) for model, costs in _costs(data).items()}
        blocks = len(_costs(data)[f"resnet{deep}"])
        return text + (
            f"Each network has {blocks} blocks. Removing a block costs less than {100 * SPARED:.0f} points (mean of "
            f"the seeds) for {spared[f'resnet{deep}']} blocks of resnet-{deep} and for {spared[f'plain{deep}']} blocks "
            f"of plain-{deep}. A plain network depends on every block; a residual network does not."
        )
    return text + "The plain network does not lose twice as much, so the effect does not show clearly at this scale."


def draw(data: Data) -> list[Picture]:
    figure, axes = new_figure(2, 2, width=13, height=7.6)
    for column, depth in enumerate((SHALLOW, data["deep"])):
        ratio_axis, axis = axes[0][column], axes[1][column]
        ratios = by_place(data, f"resnet{depth}", "branch_ratio")
        places = range(1, len(ratios) + 1)
        ratio_axis.bar(places, ratios, color=RESIDUAL[column + 1], width=0.75)
        ratio_axis.axhline(mean(ratios), color=INK, linestyle=":", linewidth=1.2)
        ratio_axis.set_title(f"resnet-{depth}: what a block adds (mean {mean(ratios):.2f})")
        for kind, colour in (("plain", PLAIN[column + 1]), ("resnet", RESIDUAL[column + 1])):
            _draw_removals(axis, data, f"{kind}{depth}", colour)
        axis.axhline(100 / CLASSES, color=MUTED, linestyle=":", linewidth=1)
        note(axis, 1, 100 / CLASSES - 5, "chance", MUTED, ha="left")
        axis.set(title=f"depth {depth}: one block removed", xlabel="block (the input is at the left)", ylim=(0, 104))
    top = max(axes[0][0].get_ylim()[1], axes[0][1].get_ylim()[1])
    for axis in axes[0]:
        axis.set_ylim(0, top)
    axes[0][0].set_ylabel("‖F(x)‖ / ‖x‖")
    axes[1][0].set_ylabel("test accuracy left (%)")
    axes[1][0].legend(loc="lower right", bbox_to_anchor=(1, 0.14))
    axes[1][1].legend(loc="center right")
    caption = (
        f"Mean of {seeds_text(data['seeds'])} on {data['test_images']:,} test images of "
        f"{data['dataset'].split(',')[0]}. Dashed lines: no block removed. Hollow markers: blocks that change the "
        "shape, which are replaced by a strided copy with zero channels."
    )
    return [Picture("shortcuts.png", figure, caption)]


def _draw_removals(axis: Axes, data: Data, model: str, colour: str) -> None:
    accuracies = [100 * value for value in by_place(data, model, "accuracy_without")]
    changes = [spec.stride != 1 for spec in block_specs(get_architecture(model))]
    places = range(1, len(accuracies) + 1)
    axis.plot(places, accuracies, color=colour, linewidth=1.6, label=f"{title(model)}, one block removed")
    for hollow in (False, True):
        chosen = [(x, y) for x, y, change in zip(places, accuracies, changes, strict=True) if change is hollow]
        face = "white" if hollow else colour
        xs, ys = zip(*chosen, strict=True)
        axis.plot(xs, ys, linestyle="", marker="o", markersize=6, markeredgecolor=colour, markerfacecolor=face)
    axis.axhline(100 * mean(intact(data, model)), color=colour, linewidth=1, linestyle="--")


STUDY = Study(
    "shortcuts",
    "What shortcuts carry",
    "He et al., CVPR 2016, §3.1; Veit et al., NIPS 2016",
    measure,
    tables,
    draw,
    numbers,
    paragraph,
)
