"""Tuned configurations as data: ``configs/<gpu>/conv.json``, one file a GPU.

``python -m fastres.bench.tune`` writes a table. It says, for a layer and a batch size, which kernel with which
configuration was fastest on that GPU. A batch size between tuned ones takes the nearest (by ratio) whose kernel accepts
it. A GPU without a table is routed by rules. More tables are found in the folder that the environment variable
``FASTRES_CONFIGS`` names; they come first.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastres.errors import KernelError

from .routing import ConvConfig, ConvShape

FOLDER = Path(__file__).parent / "configs"
VARIABLE = "FASTRES_CONFIGS"
FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """What a configuration is tuned for: a convolution's sizes, its dtype, and whether it adds a residual."""

    shape: ConvShape
    dtype: str  # "float16"
    residual: bool

    @classmethod
    def of(cls, shape: ConvShape, dtype: torch.dtype, residual: bool) -> Layer:
        return cls(shape, str(dtype).removeprefix("torch."), residual)

    @property
    def without_batch(self) -> Layer:
        return replace(self, shape=replace(self.shape, N=0))


@dataclass(frozen=True)
class Tuned:
    """A layer's fastest configuration, with its median time and what the rules' own choice took."""

    layer: Layer
    config: ConvConfig
    microseconds: float
    rules_microseconds: float


@dataclass(frozen=True)
class Block:
    """What a kernel for joined convolutions is tuned for.

    ``shape`` is that of the run's first convolution. With ``fused`` it is the 3×3 before a block's last convolution,
    which then has ``channels`` output channels; else it is the last convolution itself, with a merged shortcut.
    """

    shape: ConvShape
    dtype: str
    fused: bool
    channels: int
    shortcut_channels: int = 0  # 0: a residual instead of a shortcut
    shortcut_stride: int = 1
    next_channels: int = 0  # 0: the next block's first convolution is not part of it

    @property
    def without_batch(self) -> Block:
        return replace(self, shape=replace(self.shape, N=0))


@dataclass(frozen=True)
class TunedBlock:
    """A joined run's fastest configuration, its median time, and what its convolutions took one by one."""

    layer: Block
    config: ConvConfig
    microseconds: float
    apart_microseconds: float

    def saves(self, batch: int) -> float:
        """Microseconds that joining saves at a batch size, by proportion; negative where it loses."""
        return (self.apart_microseconds - self.microseconds) * batch / self.layer.shape.N


@dataclass(frozen=True)
class MicroBatches:
    """How a network's first stages run fastest: up to a feature, so many images at a time.

    Their activations then stay in the L2 cache. ``images`` is 0 where the whole batch at once was faster.
    """

    model: str
    batch: int
    height: int
    width: int
    dtype: str
    through: str  # "layer1"
    images: int


@dataclass(frozen=True)
class Table:
    """All that was tuned on a GPU: layers, joined runs and micro-batches."""

    layers: tuple[Tuned, ...] = ()
    blocks: tuple[TunedBlock, ...] = ()
    micro_batches: tuple[MicroBatches, ...] = ()


def slug(gpu_name: str) -> str:
    """A GPU's name as a folder name: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def to_json(entries: list[Tuned], facts: Mapping[str, Any]) -> str:
    """The table as JSON; ``facts`` say on what and with which versions it was measured."""
    rows = [
        {
            **asdict(entry.layer.shape),
            "dtype": entry.layer.dtype,
            "residual": entry.layer.residual,
            "config": {key: value for key, value in asdict(entry.config).items() if key != "note"},
            "us": entry.microseconds,
            "rules_us": entry.rules_microseconds,
        }
        for entry in entries
    ]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"format": FORMAT, **facts})[:-1]
    return f'{head},\n "layers": [\n  {lines}\n ]}}\n'


def from_json(text: str, source: str) -> list[Tuned]:
    """Read a table; raises ``KernelError`` naming ``source`` where it is none."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, this version reads {FORMAT}")
        return [_entry(row) for row in document["layers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"{source} is not a table of tuned configurations ({error}); write it anew with fastres.bench.tune"
        ) from error


def _entry(row: Mapping[str, Any]) -> Tuned:
    sizes = {name: int(row[name]) for name in ("N", "H", "W", "C", "K", "R", "S", "stride", "padding", "groups")}
    layer = Layer(ConvShape(**sizes), str(row["dtype"]), bool(row["residual"]))
    return Tuned(layer, ConvConfig(**row["config"]), float(row["us"]), float(row["rules_us"]))


def table_path(gpu_name: str, folder: Path = FOLDER) -> Path:
    """Where the table of a GPU lies."""
    return folder / slug(gpu_name) / "conv.json"


@functools.cache
def table(gpu_name: str) -> Mapping[Layer, list[Tuned]]:
    """The tuned configurations of a GPU by layer without batch; empty where it has no table."""
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    found: dict[Layer, list[Tuned]] = {}
    for folder in [*folders, FOLDER]:
        path = table_path(gpu_name, folder)
        if path.is_file():
            for entry in from_json(path.read_text(), str(path)):
                found.setdefault(entry.layer.without_batch, []).append(entry)
            break
    return found


def nearest(entries: list[Tuned], batch: int) -> list[Tuned]:
    """``entries`` of one layer, those tuned for a batch of nearly ``batch`` first."""
    return sorted(entries, key=lambda entry: abs(math.log(entry.layer.shape.N / batch)))
