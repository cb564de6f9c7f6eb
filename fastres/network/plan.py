"""The Plan: a network as a flat tuple of fused steps.

A plan is plain data. Each step names the value that it reads, the value that it writes and, for a convolution with a
residual connection, the value that it adds. A step holds its folded weights and attributes, and nothing about how or
where it will run. Executors, exporters and the roofline model read plans and do not depend on each other.

The value called ``"input"`` is the image batch. The last step writes ``"logits"`` and, on request, ``"pooled"``.
:mod:`fastres.network.steps` defines the steps. Its names can also be imported from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastres import markup
from fastres.errors import InputError
from fastres.text import text_table

from .architectures import Architecture
from .quantisation import Quantisation
from .steps import Conv, Head, Joined, Pool, Shape, SqueezeExcite, Stem, Step, conv_size, describe

__all__ = [
    "INPUT", "LOGITS", "POOLED", "Conv", "Head", "Joined", "Plan", "Pool", "Shape", "SqueezeExcite", "Stem", "Step",
    "StepCost", "check_image_size", "conv_size", "describe", "last_reads", "step_cost",
]  # fmt: skip

INPUT = "input"
POOLED = "pooled"  # an intermediate result of the head: the average-pooled features, [N, C]
LOGITS = "logits"

_NUMBERS = (5, 6)  # columns of the table


@dataclass(frozen=True)
class StepCost:
    """The arithmetic and the unavoidable memory traffic of one step: each input, weight and output moved once."""

    name: str
    kind: str
    input_shape: Shape
    output_shape: Shape
    flops: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A network's steps in order, with its architecture.

    ``features`` maps the names that :meth:`fastres.Model.features` returns to values of the plan. ``quantisation`` is
    ``None`` unless some steps are computed in 8 bit.
    """

    architecture: Architecture
    steps: tuple[Step, ...]
    features: Mapping[str, str]
    quantisation: Quantisation | None = None

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def stem(self) -> Stem:
        stem = self.steps[0]
        assert isinstance(stem, Stem)
        return stem

    @property
    def head(self) -> Head:
        head = self.steps[-1]
        assert isinstance(head, Head)
        return head

    def shapes(self, batch: int, height: int, width: int) -> dict[str, Shape]:
        """Return the shape (NHWC) of every value for a batch of ``height`` × ``width`` images."""
        check_image_size(self.architecture, height, width)
        shapes: dict[str, Shape] = {INPUT: (batch, height, width, 3)}
        for step in self.steps:
            shapes.update(zip(step.writes, step.output_shapes(shapes[step.input]), strict=True))
        return shapes

    def last_reads(self) -> dict[str, int]:
        """Return :func:`last_reads` of all steps."""
        return last_reads(self.steps)

    def steps_for(self, outputs: Sequence[str]) -> tuple[Step, ...]:
        """Return the steps needed to compute ``outputs``: values of the plan, or ``"pooled"``."""
        written = {value: index for index, step in enumerate(self.steps) for value in step.writes}
        written[POOLED] = len(self.steps) - 1
        return self.steps[: 1 + max(written[output] for output in outputs)]

    def costs(
        self, batch: int = 1, height: int = 224, width: int = 224, dtype: torch.dtype | None = None
    ) -> list[StepCost]:
        """Return FLOPs (two per multiply-accumulate) and bytes of each step, with activations and weights in ``dtype``.

        Logits and biases count four bytes an element. The input counts as three channels in ``dtype``.
        """
        shapes = self.shapes(batch, height, width)
        return [step_cost(step, shapes, dtype or self.stem.weight.dtype) for step in self.steps]

    def __repr__(self) -> str:
        return f"Plan({self.architecture.name}, {len(self.steps)} steps, {self.stem.weight.dtype})"

    def __str__(self) -> str:
        size = self._usual_size()
        return self.table(height=size, width=size)

    def table(self, batch: int = 1, height: int = 224, width: int = 224) -> str:
        """Return the plan as text: one row per step, with shapes (NHWC), FLOPs and bytes for a batch."""
        return f"{self._title(batch, height, width)}\n{text_table(self._rows(batch, height, width), right=_NUMBERS)}"

    def _repr_html_(self) -> str:
        size = self._usual_size()
        return markup.table(self._rows(1, size, size), right=_NUMBERS, title=self._title(1, size, size))

    def _title(self, batch: int, height: int, width: int) -> str:
        return f"{self.architecture.name}: {len(self.steps)} steps, batch {batch}, {height}×{width}"

    def _usual_size(self) -> int:
        return max(32 if self.architecture.stem == "cifar" else 224, self.architecture.minimum_size)

    def _rows(self, batch: int, height: int, width: int) -> list[tuple[str, ...]]:
        header = ("step", "op", "reads", "output", "attributes", "MFLOP", "MB")
        rows: list[tuple[str, ...]] = [header]
        costs = self.costs(batch, height, width)
        for step, cost in zip(self.steps, costs, strict=True):
            rows.append(
                (
                    step.name,
                    step.kind,
                    " + ".join(step.reads),
                    "×".join(map(str, cost.output_shape)),
                    describe(step),
                    f"{cost.flops / 1e6:,.1f}",
                    f"{cost.bytes / 1e6:,.2f}",
                )
            )
        flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
        rows.append(("total", "", "", "", "", f"{flops / 1e6:,.1f}", f"{moved / 1e6:,.2f}"))
        return rows


def step_cost(step: Step, shapes: Mapping[str, Shape], dtype: torch.dtype) -> StepCost:
    """Return the cost of one step, as in :meth:`Plan.costs`, from the shapes of the values it reads and writes."""
    size = dtype.itemsize
    moved = sum(math.prod(shapes[value]) for value in step.reads) * size
    moved += sum(weight.numel() * size + bias.numel() * 4 for weight, bias in step.parameters)
    moved += sum(math.prod(shapes[value]) for value in step.writes) * (4 if isinstance(step, Head) else size)
    source = shapes[step.input]
    return StepCost(step.name, step.kind, source, shapes[step.output], 2 * step.macs(source), moved)


def last_reads(steps: Sequence[Step]) -> dict[str, int]:
    """Return the index of the last step that reads each value, or of the step that writes it if no step reads it."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((*step.writes, *step.reads), index))
    return last


def check_image_size(arch: Architecture, height: int, width: int) -> None:
    """Raise ``InputError`` if an image is smaller than the network allows."""
    least = arch.minimum_size
    if height < least or width < least:
        raise InputError(
            f"{arch.name} takes images of at least {least}×{least} pixels but was given {height}×{width}; "
            "resize them first"
        )
