"""The facts in ``fastres/data/models.json``, computed from the architectures and the table of published weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastres.folding.build import outline
from fastres.network.architectures import ARCHITECTURES, Architecture, state_dict_shapes
from fastres.weights.published import entries


def text() -> str:
    """Return the content of the file: a JSON list with one line for each model."""
    lines = (json.dumps(facts(architecture)) for architecture in ARCHITECTURES.values())
    return "[\n" + ",\n".join(lines) + "\n]\n"


def facts(architecture: Architecture) -> dict[str, Any]:
    """Return the facts of one model; see :func:`fastres.network.catalogue.models`."""
    size = 32 if architecture.stem == "cifar" else 224
    shapes = state_dict_shapes(architecture)
    costs = outline(architecture, torch.float32).costs(1, size, size)
    return {
        "model": architecture.name,
        "parameters": sum(torch.Size(shape).numel() for key, shape in shapes.items() if "running" not in key),
        "gflop": round(sum(cost.flops for cost in costs) / 1e9, 3),
        "image_size": size,
        "weights": {
            entry.name: {"acc1": entry.acc1, "default": entry.default, "megabytes": entry.file_mb}
            for entry in entries(architecture.name).values()
        },
    }
