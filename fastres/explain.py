"""What ``model.explain()`` returns: how each step of a plan runs on a device, and at what cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import cpu
from .plan import Plan, describe
from .text import text_table


@dataclass(frozen=True)
class ExplainedStep:
    """One step: what computes it, with which configuration, on what shapes (NHWC), with how many FLOPs and bytes.

    ``note`` says why a slower path was taken, where one was.
    """

    step: str
    op: str
    kernel: str
    config: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    flops: int
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The rows of ``model.explain()``; prints as a table, iterates over rows."""

    model: str
    device: str
    dtype: str
    rows: tuple[ExplainedStep, ...]

    @classmethod
    def of(
        cls, plan: Plan, device: torch.device, dtype: torch.dtype, batch: int, height: int, width: int
    ) -> Explanation:
        """Explain ``plan`` for a batch of ``height`` × ``width`` images. Weight data is not needed."""
        costs = plan.costs(batch, height, width, dtype)
        if device.type == "cpu":
            choices = [(cpu.describe(step), f"{torch.get_num_threads()} threads", "") for step in plan]
        else:
            from . import gpu

            choices = [
                gpu.describe(step, cost.input_shape, dtype, device) for step, cost in zip(plan, costs, strict=True)
            ]
        rows = tuple(
            ExplainedStep(
                step.name,
                describe(step),
                kernel,
                config,
                cost.input_shape,
                cost.output_shape,
                cost.flops,
                cost.bytes,
                note,
            )
            for step, cost, (kernel, config, note) in zip(plan, costs, choices, strict=True)
        )
        return cls(plan.architecture.name, str(device), str(dtype).removeprefix("torch."), rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, for JSON."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("step", "op", "kernel", "config", "input", "output", "MFLOP", "MB", "note"),
        ]
        for row in self.rows:
            shapes = ["×".join(map(str, shape)) for shape in (row.input_shape, row.output_shape)]
            numbers = [f"{row.flops / 1e6:,.1f}", f"{row.bytes / 1e6:,.2f}"]
            table.append((row.step, row.op, row.kernel, row.config, *shapes, *numbers, row.note))
        return f"{self.model}, {self.dtype} on {self.device}\n{text_table(table)}"

    __repr__ = __str__
