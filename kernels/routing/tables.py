"""Tuned configurations as data: ``configs/<gpu>/conv.json``, one file per GPU.

``python -m fastres.bench.tune`` writes a table. For each layer and batch size, it records the fastest kernel and
configuration on that GPU. It also records which runs of layers are faster in one joined kernel, and how many images at
a time are fastest in a network's first stages. A batch size between tuned ones takes the nearest (by ratio) whose
kernel accepts it.

If a GPU's own table has no entry, the tables of other GPUs of its architecture come next, nearest in number of
multiprocessors first. If no table has one, rules route the layer. The environment variable ``FASTRES_CONFIGS`` names a
folder with more tables; an entry there replaces the package's for the same layer and batch.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastres.errors import KernelError
from fastres.files import read_regular
from fastres.text import dtype_name

from .cards import Gpu
from .rules import ConvConfig, ConvShape

FOLDER = Path(__file__).parents[1] / "configs"
VARIABLE = "FASTRES_CONFIGS"
FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """The key of a tuned configuration: a convolution's sizes, its dtype, and whether it adds a residual.

    The ``classifier`` is the 1×1 convolution over one pixel that writes logits: float32, without ReLU.
    """

    shape: ConvShape
    dtype: str  # "float16"
    residual: bool
    classifier: bool = False

    @classmethod
    def of(cls, shape: ConvShape, dtype: torch.dtype, residual: bool, classifier: bool = False) -> Layer:
        return cls(shape, dtype_name(dtype), residual, classifier)

    @property
    def relu(self) -> bool:
        """True if a ReLU follows, as after nearly every convolution."""
        return not self.classifier

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype that the layer writes."""
        found: torch.dtype = torch.float32 if self.classifier else getattr(torch, self.dtype)
        return found

    @property
    def without_batch(self) -> Layer:
        return replace(self, shape=replace(self.shape, N=0))


@dataclass(frozen=True)
class Tuned:
    """A layer's fastest configuration, its median time, and the time of the rules' choice."""

    layer: Layer
    config: ConvConfig
    microseconds: float
    rules_microseconds: float


@dataclass(frozen=True)
class Block:
    """The key of a tuned kernel for joined convolutions.

    ``shape`` is that of the run's first convolution. With ``fused`` it is the 3×3 before a block's last convolution,
    which then has ``channels`` output channels; otherwise it is the last convolution itself, with a merged shortcut.
    """

    shape: ConvShape
    dtype: str
    fused: bool
    channels: int
    shortcut_channels: int = 0  # 0: a residual instead of a shortcut
    shortcut_stride: int = 1
    next_channels: int = 0  # 0: without the next block's first convolution

    @property
    def without_batch(self) -> Block:
        return replace(self, shape=replace(self.shape, N=0))


@dataclass(frozen=True)
class TunedBlock:
    """A joined run's fastest configuration, its median time, and the time of its convolutions one by one."""

    layer: Block
    config: ConvConfig
    microseconds: float
    apart_microseconds: float

    def saves(self, batch: int) -> float:
        """Return the microseconds that joining saves, scaled to the batch size; negative if it loses."""
        return (self.apart_microseconds - self.microseconds) * batch / self.layer.shape.N


@dataclass(frozen=True)
class Network:
    """The fastest way to run a whole network at one batch and image size, with its median time and that of a plain run.

    ``joined`` says whether the joined runs in the table are used at all. With ``images``, the steps up to the feature
    ``through`` run on that many images at a time, so that their activations stay in the L2 cache. With ``early``,
    kernels start while the previous one still runs (``launch.early_launches``).
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
        """The key: model, batch, height, width and dtype."""
        return (self.model, self.batch, self.height, self.width, self.dtype)

    @property
    def manner(self) -> str:
        """A description of how the network runs, without joined runs; empty for a plain run."""
        micro = f"up to {self.through} in micro-batches of {self.images} images" if self.images else ""
        return "; ".join(filter(None, (micro, "kernels start early" if self.early else "")))


@dataclass(frozen=True)
class Table:
    """Everything tuned on a GPU: layers, joined runs and whole networks."""

    layers: tuple[Tuned, ...] = ()
    blocks: tuple[TunedBlock, ...] = ()
    networks: tuple[Network, ...] = ()


def slug(gpu_name: str) -> str:
    """Return a GPU's name as a folder name: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def to_json(tuned: Table, facts: Mapping[str, Any]) -> str:
    """Return the table as JSON, one line per entry; ``facts`` name the GPU and the versions it was measured with."""
    layers = [
        {
            **asdict(entry.layer.shape),
            "dtype": entry.layer.dtype,
            "residual": entry.layer.residual,
            **({"classifier": True} if entry.layer.classifier else {}),
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
    """Read a table. Raise ``KernelError`` that names ``source`` if the text is not one."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, this version reads {FORMAT}")
        return Table(
            tuple(_layer(row) for row in document["layers"]),
            tuple(_block(row) for row in document["blocks"]),
            tuple(_network(row) for row in document["networks"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KernelError(
            f"{source} is not a table of tuned configurations ({error}); write it again with fastres.bench.tune"
        ) from error


def _shape(row: Mapping[str, Any]) -> ConvShape:
    names = ("N", "H", "W", "C", "K", "R", "S", "stride", "padding", "groups")
    return ConvShape(**{name: int(row[name]) for name in names})


def _layer(row: Mapping[str, Any]) -> Tuned:
    layer = Layer(_shape(row), str(row["dtype"]), bool(row["residual"]), bool(row.get("classifier", False)))
    return Tuned(layer, _read_config(row["config"]), float(row["us"]), float(row["rules_us"]))


def _block(row: Mapping[str, Any]) -> TunedBlock:
    counts = ("channels", "shortcut_channels", "shortcut_stride", "next_channels")
    block = Block(_shape(row), str(row["dtype"]), bool(row["fused"]), *(int(row[name]) for name in counts))
    return TunedBlock(block, _read_config(row["config"]), float(row["us"]), float(row["apart_us"]))


def _read_config(row: Mapping[str, Any]) -> ConvConfig:
    config = ConvConfig(**row)
    for name, value in asdict(config).items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (isinstance(value, str) if name in ("kernel", "note") else whole):
            raise ValueError(f"a configuration has a {name} of {value!r}")
    return config


def _network(row: Mapping[str, Any]) -> Network:
    network = Network(**row)
    if network.images and network.through not in ("layer1", "layer2", "layer3", "layer4"):
        raise ValueError(f"a network runs in micro-batches through {network.through!r}, not through layer1 to layer4")
    return network


def table_path(gpu_name: str, folder: Path = FOLDER) -> Path:
    """Return the path of a GPU's table."""
    return folder / slug(gpu_name) / "conv.json"


@dataclass(frozen=True)
class Found:
    """A table and the facts about its GPU from its head. If ``multiprocessors`` is 0, their number is unknown."""

    table: Table
    gpu: str
    arch: str
    multiprocessors: int


class Index:
    """An index of the entries in a GPU's own tables, in order, and then in those of ``others`` of its architecture.

    Entries of one 16-bit dtype also serve the other: both run equally fast.
    """

    def __init__(self, *own: Table, others: Sequence[Found] = ()) -> None:
        self._own = _Entries(own)
        self._others = [_Entries([other.table]) for other in others]
        self.others = tuple(other.gpu for other in others)

    def __bool__(self) -> bool:
        return bool(self._own) or any(map(bool, self._others))

    @property
    def is_own(self) -> bool:
        """True if the GPU itself has entries."""
        return bool(self._own)

    @property
    def has_blocks(self) -> bool:
        """True if any joined run was tuned."""
        return any(entries.has_blocks for entries in (self._own, *self._others))

    def entries(self, layer: Layer | Block) -> list[Any]:
        """Return the entries for ``layer`` at any batch size, nearest (by ratio) first, other GPUs' last."""
        return [entry for entries in (self._own, *self._others) for entry in entries.near(layer)]

    def measured(self, entry: Tuned | TunedBlock) -> bool:
        """Return True if ``entry`` was measured on this GPU."""
        return any(entry is own for own in self._own.near(entry.layer))

    def network(self, model: str, batch: int, height: int, width: int, dtype: str) -> Network | None:
        """Return the entry for exactly this case, or None.

        From another GPU's table, only two settings are used: whether to join runs and whether kernels start early. The
        number of images that fit the L2 cache and all measured times are valid for one GPU only.
        """
        case = (model, batch, height, width, dtype)
        if found := self._own.network(case):
            return found
        for other in self._others:
            if found := other.network(case):
                return replace(found, through="", images=0, microseconds=0.0, plain_microseconds=0.0)
        return None


class _Entries:
    """The entries of one GPU's tables. If two tables have an entry for the same case, the first one counts."""

    def __init__(self, tables: Sequence[Table]) -> None:
        entries: dict[Layer | Block, Tuned | TunedBlock] = {}
        self._networks: dict[tuple[str, int, int, int, str], Network] = {}
        for tuned in reversed(tables):
            entries |= {layer.layer: layer for layer in tuned.layers} | {block.layer: block for block in tuned.blocks}
            self._networks |= {entry.case: entry for entry in tuned.networks}
        self._by_layer: dict[Layer | Block, list[Any]] = {}
        for layer, entry in entries.items():
            self._by_layer.setdefault(layer.without_batch, []).append(entry)

    def __bool__(self) -> bool:
        return bool(self._by_layer)

    @property
    def has_blocks(self) -> bool:
        return any(isinstance(key, Block) for key in self._by_layer)

    def near(self, layer: Layer | Block) -> list[Any]:
        key = layer.without_batch
        sibling = replace(key, dtype=SIBLING.get(key.dtype, key.dtype))
        found = self._by_layer.get(key) or self._by_layer.get(sibling, [])
        return sorted(found, key=lambda entry: abs(math.log(entry.layer.shape.N / layer.shape.N)))

    def network(self, case: tuple[str, int, int, int, str]) -> Network | None:
        *rest, dtype = case
        sibling: Any = (*rest, SIBLING.get(dtype, dtype))
        return self._networks.get(case) or self._networks.get(sibling)


SIBLING = {"float16": "bfloat16", "bfloat16": "float16"}


@functools.cache
def table(gpu: Gpu) -> Index:
    """Return the tuned configurations for a GPU: its own, then those of other cards of its architecture."""
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    own: list[Table] = []
    others: dict[str, Found] = {}
    for folder in [*folders, FOLDER]:
        for path in sorted(folder.glob("*/conv.json")):
            if path == table_path(gpu.name, folder):
                own.append(read_table(path).table)
            elif (found := read_table(path)).arch == gpu.arch and path.parent.name not in others:
                others[path.parent.name] = found
    return Index(*own, others=sorted(others.values(), key=lambda found: _distance(found, gpu)))


def _distance(found: Found, gpu: Gpu) -> float:
    """Return how far apart two GPUs are in size; infinite if the table does not give its GPU's size."""
    return abs(math.log(found.multiprocessors / gpu.multiprocessors)) if found.multiprocessors else math.inf


def read_table(path: Path) -> Found:
    """Read a table with its head. Raise ``KernelError`` if ``path`` is not one."""
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise KernelError(f"{path} cannot be read as a table of tuned configurations ({error})") from error
    tuned, head = from_json(text, str(path)), json.loads(text)
    multiprocessors = head.get("multiprocessors", 0)
    if type(multiprocessors) is not int or multiprocessors < 0:
        raise KernelError(f"{path}: multiprocessors is {multiprocessors!r} and must be a whole number, 0 or more")
    return Found(tuned, str(head.get("gpu", path.parent.name)), str(head.get("arch", "")), multiprocessors)
