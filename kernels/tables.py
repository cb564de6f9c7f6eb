"""Tuned configurations as data: ``configs/<gpu>/conv.json``, one file a GPU.

``python -m fastres.bench.tune`` writes a table. It says, for a layer and a batch size, which kernel with which
configuration was fastest on that GPU, for which runs of layers a joined kernel beats one kernel each, and in how many
images at a time a network's first stages run fastest. A batch size between tuned ones takes the nearest (by ratio)
whose kernel accepts it. A GPU without a table is routed by rules. More tables are found in the folder that the
environment variable ``FASTRES_CONFIGS`` names; they come first.
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
from fastres.text import dtype_name

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
        return cls(shape, dtype_name(dtype), residual)

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
class Network:
    """How a whole network runs fastest at one batch and image size, and its median time so and plainly.

    ``joined`` says whether the joined runs that the table lists are taken at all. With ``images``, its steps up to the
    feature ``through`` run on so many images at a time, whose activations then stay in the L2 cache. With ``early``,
    kernels start while the one before them still runs (``launch.early_launches``).
    """

    model: str
    batch: int
    height: int
    width: int
    dtype: str
    joined: bool = True
    through: str = ""  # "layer1"
    images: int = 0  # 0: the whole batch at once
    early: bool = False
    microseconds: float = 0.0
    plain_microseconds: float = 0.0

    @property
    def case(self) -> tuple[str, int, int, int, str]:
        """What was tuned for."""
        return (self.model, self.batch, self.height, self.width, self.dtype)

    @property
    def manner(self) -> str:
        """In words, what is done besides joining; empty where nothing is."""
        micro = f"up to {self.through} in micro-batches of {self.images} images" if self.images else ""
        return "; ".join(filter(None, (micro, "kernels start early" if self.early else "")))


@dataclass(frozen=True)
class Table:
    """All that was tuned on a GPU: layers, joined runs and whole networks."""

    layers: tuple[Tuned, ...] = ()
    blocks: tuple[TunedBlock, ...] = ()
    networks: tuple[Network, ...] = ()


def slug(gpu_name: str) -> str:
    """A GPU's name as a folder name: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def to_json(tuned: Table, facts: Mapping[str, Any]) -> str:
    """The table as JSON, a line an entry; ``facts`` say on what and with which versions it was measured."""
    layers = [
        {
            **asdict(entry.layer.shape),
            "dtype": entry.layer.dtype,
            "residual": entry.layer.residual,
            "config": _config(entry.config),
            "us": entry.microseconds,
            "rules_us": entry.rules_microseconds,
        }
        for entry in tuned.layers
    ]
    blocks = [
        {
            **asdict(entry.layer.shape),
            **{key: value for key, value in asdict(entry.layer).items() if key != "shape"},
            "config": _config(entry.config),
            "us": entry.microseconds,
            "apart_us": entry.apart_microseconds,
        }
        for entry in tuned.blocks
    ]
    parts = {"layers": layers, "blocks": blocks, "networks": [asdict(entry) for entry in tuned.networks]}
    head = json.dumps({"format": FORMAT, **facts})[:-1]
    lists = [f'"{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in parts.items()]
    return ",\n ".join([head, *lists]) + "}\n"


def _config(config: ConvConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key != "note"}


def from_json(text: str, source: str) -> Table:
    """Read a table; raises ``KernelError`` naming ``source`` where it is none."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, this version reads {FORMAT}")
        return Table(
            tuple(_layer(row) for row in document["layers"]),
            tuple(_block(row) for row in document["blocks"]),
            tuple(Network(**row) for row in document["networks"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"{source} is not a table of tuned configurations ({error}); write it anew with fastres.bench.tune"
        ) from error


def _shape(row: Mapping[str, Any]) -> ConvShape:
    names = ("N", "H", "W", "C", "K", "R", "S", "stride", "padding", "groups")
    return ConvShape(**{name: int(row[name]) for name in names})


def _layer(row: Mapping[str, Any]) -> Tuned:
    layer = Layer(_shape(row), str(row["dtype"]), bool(row["residual"]))
    return Tuned(layer, ConvConfig(**row["config"]), float(row["us"]), float(row["rules_us"]))


def _block(row: Mapping[str, Any]) -> TunedBlock:
    counts = ("channels", "shortcut_channels", "shortcut_stride", "next_channels")
    block = Block(_shape(row), str(row["dtype"]), bool(row["fused"]), *(int(row[name]) for name in counts))
    return TunedBlock(block, ConvConfig(**row["config"]), float(row["us"]), float(row["apart_us"]))


def table_path(gpu_name: str, folder: Path = FOLDER) -> Path:
    """Where the table of a GPU lies."""
    return folder / slug(gpu_name) / "conv.json"


class Index:
    """A table for looking things up. What was tuned in one 16-bit dtype serves the other: they run equally fast."""

    def __init__(self, tuned: Table) -> None:
        self._entries: dict[Layer | Block, list[Any]] = {}
        entries: list[Tuned | TunedBlock] = [*tuned.layers, *tuned.blocks]
        for entry in entries:
            self._entries.setdefault(entry.layer.without_batch, []).append(entry)
        self._networks = {entry.case: entry for entry in tuned.networks}

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def has_blocks(self) -> bool:
        """Whether some joined run was tuned."""
        return any(isinstance(key, Block) for key in self._entries)

    def entries(self, layer: Layer | Block) -> list[Any]:
        """What was tuned for ``layer`` at any batch size, the nearest (by ratio) first."""
        key = layer.without_batch
        found = self._entries.get(key) or self._entries.get(replace(key, dtype=SIBLING.get(key.dtype, key.dtype)), [])
        return sorted(found, key=lambda entry: abs(math.log(entry.layer.shape.N / layer.shape.N)))

    def network(self, model: str, batch: int, height: int, width: int, dtype: str) -> Network | None:
        """The entry of just this case, where there is one."""
        for name in (dtype, SIBLING.get(dtype, dtype)):
            if found := self._networks.get((model, batch, height, width, name)):
                return found
        return None


SIBLING = {"float16": "bfloat16", "bfloat16": "float16"}


@functools.cache
def table(gpu_name: str) -> Index:
    """The tuned configurations of a GPU; empty where it has no table."""
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    for folder in [*folders, FOLDER]:
        path = table_path(gpu_name, folder)
        if path.is_file():
            return Index(from_json(path.read_text(), str(path)))
    return Index(Table())
