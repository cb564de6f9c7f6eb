"""Shared by the four studies: their settings, the parts of a study, and the formatting of numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Dataset, load_dataset
from .training import Job, Recipe, Trained, train_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHALLOW = 20
DEEPER = (32, 44, 56, 110)

Data = dict[str, Any]  # the measurements of a study: plain data, as in its JSON file
Record = dict[str, Any]  # one line of a CSV file


@dataclass(frozen=True)
class Settings:
    """The size of the studies, the output folder, and the training data. The defaults are the full size.

    ``deep`` is the depth compared with 20. ``draws`` is the number of initialisations behind each curve of gradients by
    layer, and ``nets`` the number behind each autocorrelation. ``lines`` is the number of pairs of images; between each
    pair, gradients are taken at ``line_points`` points. ``images`` is the batch size of untrained networks. ``limit``
    is the largest number of training images and of test images.
    """

    folder: Path
    data: Path | None = None
    seeds: int = 3
    epochs: int = 12
    limit: int | None = None
    deep: int = 56
    draws: int = 10
    nets: int = 100
    images: int = 128
    lines: int = 6
    line_points: int = 128
    workers: int = 1
    size: str = "full"

    @property
    def depths(self) -> list[int]:
        """The depths of the untrained CIFAR networks whose gradients are measured."""
        return sorted({SHALLOW, self.deep} | ({DEEPER[-1]} if self.size == "full" else set()))

    @property
    def fingerprint(self) -> str:
        """A hash of all settings that affect a result."""
        settings = dataclasses.asdict(self) | {"data": bool(self.data), "torch": torch.__version__}
        kept = {key: value for key, value in settings.items() if key not in ("folder", "workers")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def dataset(self) -> Dataset:
        return load_dataset(self.data, self.limit)

    def models(self) -> list[str]:
        """Return the names of the four networks: plain and residual, shallow and deep."""
        return [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in (SHALLOW, self.deep)]

    def trained(self) -> list[Trained]:
        """Return the four networks of every seed, trained now or read from ``folder``."""
        recipe = Recipe(self.epochs)
        data = None if self.data is None else str(self.data)
        jobs = [Job(model, seed, recipe, data, self.limit) for seed in range(self.seeds) for model in self.models()]
        return train_all(jobs, self.folder / "networks", self.workers)


QUICK: dict[str, Any] = {
    "seeds": 1,
    "epochs": 5,
    "limit": 320,
    "draws": 2,
    "nets": 4,
    "images": 8,
    "lines": 1,
    "line_points": 64,
    "size": "quick",
}


@dataclass(frozen=True)
class Number:
    """One row of a study's table: the quantity, its measured value, and the value in theory or in the paper."""

    what: str
    value: str
    expected: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, its file name, and its caption."""

    file: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Study:
    """One observation. ``measure`` returns plain data; tables, figures and text are made from that data only."""

    name: str
    title: str
    source: str
    measure: Callable[[Settings], Data]
    tables: Callable[[Data], dict[str, list[Record]]]
    draw: Callable[[Data], list[Picture]]
    numbers: Callable[[Data], list[Number]]
    paragraph: Callable[[Data], str]


def rounded(value: Any, digits: int = 5) -> Any:
    """Return plain data with every float rounded to ``digits`` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction as ``"12.3 %"``."""
    return f"{100 * fraction:.{digits}f} %"


def number(value: float) -> str:
    """Format with three significant digits: ``"24,100"``, ``"0.0123"``, ``"7.5×10⁻¹⁴"``."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return power(value)
    return f"{float(f'{value:.3g}'):,.10g}"


def signed(value: float, form: str = ".2f") -> str:
    """Format as ``"−0.72"``, with a minus sign instead of a hyphen, and no sign before zero."""
    text = format(value, form)
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def power(value: float) -> str:
    """Format as ``"1.7×10⁻³¹"``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def spread_of(values: Sequence[float]) -> str:
    """Format fractions as mean and range, ``"12.3 % (11.9–12.8)"``. A single value has no range."""
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(mean(values))} ({100 * min(values):.1f}–{100 * max(values):.1f})"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the points."""
    x0, y0 = mean(x), mean(y)
    return math.fsum((a - x0) * (b - y0) for a, b in zip(x, y, strict=True)) / math.fsum((a - x0) ** 2 for a in x)


def seeds_text(count: int) -> str:
    return "seed 0" if count == 1 else f"seeds 0–{count - 1}"


def title(model: str) -> str:
    """Return a model's name with a hyphen: ``"plain-20"`` for ``"plain20"``."""
    kind = model.rstrip("0123456789")
    return f"{kind}-{model[len(kind) :]}"
