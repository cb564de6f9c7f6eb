"""Write the cards of ``docs/models.md`` from the tables that fastres loads."""

from __future__ import annotations

import json
import math
from importlib import resources

import torch

from fastres.bench.report.words import todays_command
from fastres.folding.build import outline
from fastres.network.architectures import ARCHITECTURES, Architecture, state_dict_shapes
from fastres.weights.download import PYTORCH_URL
from fastres.weights.published import BUNDLED_MODEL, WeightsEntry, entries

REFERENCE_RECIPE = "https://github.com/pytorch/vision/tree/main/references/classification#resnet"
NEW_RECIPE = "https://github.com/pytorch/vision/issues/3995#new-recipe"
WIDE_RECIPE = "https://github.com/pytorch/vision/pull/912"


def cards() -> str:
    """Return one section for each model with published weights, in the order of ``fastres list``."""
    published = [arch for name, arch in ARCHITECTURES.items() if entries(name) and name != BUNDLED_MODEL]
    return "\n".join([*map(_card, published), _digits_card(ARCHITECTURES[BUNDLED_MODEL])])


def without_weights() -> str:
    """Return the table of the networks without published weights."""
    rows = ["| model | what it is | parameters | GMACs | image |", "|---|---|---|---|---|"]
    for name, arch in ARCHITECTURES.items():
        if not entries(name):
            size = _image_size(arch)
            rows.append(
                f"| `{name}` | {_structure(arch)}; {_source(arch)} | {_millions(arch)} | {_gmacs(arch):.2f} | {size} |"
            )
    return "\n".join(rows) + "\n"


def _card(arch: Architecture) -> str:
    known = sorted(entries(arch.name).values(), key=lambda entry: not entry.default)
    header = " | ".join(f"`{entry.name}`{' (default)' if entry.default else ''}" for entry in known)
    rows = {
        "accuracy, top-1": [f"{entry.acc1:.3f} %" for entry in known],
        "accuracy, top-5": [f"{entry.acc5:.3f} %" for entry in known],
        "preprocessing": [f"resize {entry.resize}, crop {entry.crop}" for entry in known],
        "trained by": [_recipe(entry) for entry in known],
        "file": [f"[{entry.file}]({PYTORCH_URL}{entry.file}), {entry.file_mb:.1f} MiB" for entry in known],
        "SHA-256 begins with": [f"`{entry.sha256}`" for entry in known],
    }
    table = [f"| | {header} |", "|---" * (len(known) + 1) + "|"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    about = f"{_structure(arch)}; {_source(arch)}. {_millions(arch)} parameters, {known[0].gmacs:.2f} GMACs an image."
    return "\n".join([f"### {arch.name}", "", about, "", *table, ""])


def _digits_card(arch: Architecture) -> str:
    record = json.loads((resources.files("fastres") / "data" / f"{arch.name}.json").read_text(encoding="utf-8"))
    (entry,) = entries(arch.name).values()
    held_out, right = record["held_out_images"], record["held_out_correct"]
    command = todays_command(record["command"])
    return "\n".join(
        [
            f"### {arch.name}",
            "",
            f"{_structure(arch)}; {_source(arch)}. {_millions(arch)} parameters, {entry.gmacs:.3f} GMACs an image. "
            "Trained for this project. It comes with the package, so that you can run a model without a download.",
            "",
            f"| | `{entry.name}` |",
            "|---|---|",
            f"| accuracy | {right} of {held_out} held-out scans, {100 * right / held_out:.2f} % |",
            f"| data | {record['data']} |",
            f"| split | {record['split']} |",
            f"| preprocessing | resize {entry.resize}, crop {entry.crop}; mean {entry.mean[0]}, std {entry.std[0]} |",
            f"| trained by | `{command}`, torch {record['torch']}, {record['threads']} CPU threads, "
            f"{record['seconds']:.0f} s, {record['date']}: {record['epochs']} epochs, {record['optimizer']} |",
            f"| file | `{entry.file}` in the package, {entry.file_mb:.1f} MiB, SHA-256 `{entry.sha256}` |",
            "| licence | the package's, Apache 2.0; UCI distributes the scans under CC BY 4.0 |",
            "",
            "It reads digits that are centred and scaled as in this data set, with bright ink on a dark background. It "
            "has ten classes and always returns one of them, whatever the picture shows.",
            "",
        ]
    )


def _recipe(entry: WeightsEntry) -> str:
    """Return who trained the weights, with a link.

    By torchvision's own metadata, the weights of its new recipe are those that resize to 232.
    """
    if entry.resize == 232:
        return f"torchvision, [new recipe]({NEW_RECIPE})"
    if entry.model.startswith("wide"):
        return f"the paper's authors, [converted]({WIDE_RECIPE}); stored in float16"
    return f"torchvision, [reference recipe]({REFERENCE_RECIPE})"


def _structure(arch: Architecture) -> str:
    blocks = f"{'basic' if arch.block == 'basic' else 'bottleneck'} blocks {', '.join(map(str, arch.depths))}"
    extras = [
        f"{arch.groups} groups of {arch.width_per_group} channels" if arch.groups > 1 else "",
        "twice as wide inside" if arch.groups == 1 and arch.width_per_group == 128 else "",
        "deep stem, pooled shortcuts" if arch.stem == "deep" else "",
        "squeeze-and-excitation" if arch.squeeze_excitation else "",
        "padded shortcuts (option A)" if arch.shortcut == "pad" else "",
        "no shortcuts" if not arch.skip else "",
    ]
    return ", ".join([blocks.capitalize(), *filter(None, extras)])


def _source(arch: Architecture) -> str:
    if arch.groups > 1:
        source = "Xie et al., CVPR 2017"
    elif arch.width_per_group == 128:
        source = "Zagoruyko & Komodakis, BMVC 2016"
    else:
        source = "He et al., CVPR 2016"
    if arch.squeeze_excitation:
        source += "; Hu et al., CVPR 2018"
    if arch.stem == "deep":
        source += "; He et al., CVPR 2019"
    return source


def _image_size(arch: Architecture) -> int:
    return 32 if arch.stem == "cifar" else 224


def _millions(arch: Architecture) -> str:
    shapes = state_dict_shapes(arch).items()
    return f"{sum(math.prod(shape) for key, shape in shapes if 'running' not in key) / 1e6:.2f} M"


def _gmacs(arch: Architecture) -> float:
    size = _image_size(arch)
    return sum(cost.flops for cost in outline(arch, torch.float32).costs(1, size, size)) / 2e9
