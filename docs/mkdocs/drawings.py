"""Draw the figures of :doc:`how-it-works` as SVG, from the Plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import torch

from fastres.folding.build import outline
from fastres.network.architectures import BlockSpec, block_specs, get_architecture
from fastres.network.plan import Conv, Plan, describe

MODEL = "resnet50"
ROW, GAP = 30, 10
INK, PALE, PAPER = "#263238", "#90a4ae", "#ffffff"
COLOURS = ("#bbdefb", "#c8e6c9", "#ffe0b2", "#e1bee7", "#ffcdd2", "#eceff1")
MONO = "ui-monospace, Menlo, Consolas, monospace"


@dataclass
class Drawing:
    """A list of shapes on a white page of ``width`` × ``height``."""

    width: int
    height: int
    shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str = PAPER) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{PALE}"/>'
        )

    def text(self, x: float, y: float, words: str, *, size: int = 13, bold: bool = False, mono: bool = False) -> None:
        style = f' font-family="{MONO}"' if mono else ""
        style += ' font-weight="bold"' if bold else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}"{style}>{escape(words)}</text>')

    def labelled(self, x: float, y: float, width: float, title: str, *lines: str, fill: str = PAPER) -> None:
        self.box(x, y, width, 30 + 17 * len(lines), fill)
        self.text(x + 10, y + 18, title, bold=True)
        for index, line in enumerate(lines):
            self.text(x + 10, y + 36 + 17 * index, line, size=12)

    def arrow(self, points: Sequence[tuple[float, float]]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.3" marker-end="url(#head)"/>'
        )

    def svg(self, title: str) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" fill="{INK}">',
                f"<title>{escape(title)}</title><defs>{head}</defs>",
                f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def plan_and_readers() -> str:
    """Draw how a checkpoint becomes a Plan, and the readers of the Plan."""
    plan = outline(get_architecture(MODEL), torch.float32)
    shown = (*plan.steps[:7], None, *plan.steps[-2:])
    drawing = Drawing(1000, 442)
    drawing.labelled(20, 40, 200, "checkpoint", ".pth, .pt, .safetensors,", "a folder, a live module")
    drawing.labelled(20, 150, 200, "state dict", "torchvision's names,", "float32, on the CPU,", "every tensor checked")
    drawing.labelled(
        20, 277, 200, "folding", "batch norm is folded into", "convolutions in float64", "and rounded once"
    )
    drawing.arrow([(120, 104), (120, 150)])
    drawing.arrow([(120, 231), (120, 277)])
    drawing.arrow([(220, 315), (270, 315)])
    drawing.box(270, 40, 380, 382, "#fafafa")
    drawing.text(284, 62, f"Plan of {MODEL}: {len(plan.steps)} fused steps", size=14, bold=True)
    for index, step in enumerate(shown):
        y = 78 + 34 * index
        if step is None:
            drawing.text(444, y + 18, "⋮", size=16)
            continue
        colour = COLOURS[-1] if not isinstance(step, Conv) else COLOURS[2] if step.residual else COLOURS[0]
        drawing.box(284, y, 352, 26, colour)
        drawing.text(294, y + 17, step.name, size=12, mono=True)
        drawing.text(452, y + 17, describe(step), size=12)
    readers = (
        ("executors/cpu.py", "oneDNN's fused convolutions,", "weights packed for the shape"),
        ("executors/gpu.py", "passes join convolutions;", "Triton kernels, CUDA graphs"),
        ("export/", "ONNX, INT8, torch.export,", "Triton model repository"),
        ("roofline/", "the shortest time that the", "machine's ceilings allow"),
        ("model.explain()", "kernel, cost and limit", "of each step"),
    )
    for index, (name, *lines) in enumerate(readers):
        y = 40 + 77 * index
        drawing.labelled(720, y, 260, name, *lines)
        drawing.arrow([(650, 231), (685, 231), (685, y + 30), (720, y + 30)])
    return drawing.svg(f"A checkpoint becomes a Plan; executors, exporters and the roofline read it ({MODEL})")


def block_fused() -> str:
    """Draw the first block: the modules that PyTorch runs, and the steps of the Plan that replace them."""
    arch = get_architecture(MODEL)
    plan = outline(arch, torch.float32)
    block = next(block_specs(arch))
    steps = [step for step in plan.steps if step.name.startswith(f"{block.name}.")]
    modules = _modules(block)
    drawing = Drawing(860, 76 + (ROW + GAP) * len(modules))
    drawing.text(20, 30, f"PyTorch runs {len(modules)} modules", size=14, bold=True)
    drawing.text(430, 30, f"the Plan has {len(steps)} steps", size=14, bold=True)
    for index, (name, part) in enumerate(modules):
        y = 50 + (ROW + GAP) * index
        drawing.box(20, y, 250, ROW, COLOURS[part])
        drawing.text(32, y + 20, name, mono=True)
    for part, step in enumerate(steps):
        rows = [index for index, (_, found) in enumerate(modules) if found == part]
        top = 50 + (ROW + GAP) * rows[0]
        height = (ROW + GAP) * (rows[-1] - rows[0]) + ROW
        drawing.box(430, top, 410, height, COLOURS[part])
        drawing.text(444, top + 20, step.name, mono=True)
        drawing.text(604, top + 20, describe(step))
        if len(rows) > 1:
            drawing.text(444, top + 40, f"reads {' + '.join(step.reads)}", size=12)
        for row in rows:
            y = 50 + (ROW + GAP) * row + ROW / 2
            drawing.arrow([(270, y), (430, y)])
    moved = _megabytes(plan, block)
    drawing.text(20, drawing.height - 8, moved, size=12)
    return drawing.svg(f"{MODEL}'s first block: {len(modules)} modules become {len(steps)} fused steps")


def _modules(block: BlockSpec) -> list[tuple[str, int]]:
    """Return the modules of PyTorch's block in the order of the steps that replace them, with the steps' numbers."""
    rows: list[tuple[str, int]] = []
    *inner, last = block.convs
    for part, spec in enumerate(inner):
        rows += [(spec.conv, part), (spec.norm, part), (f"{block.name}.relu", part)]
    part = len(inner)
    if block.projection is not None:
        rows += [(block.projection.conv, part), (block.projection.norm, part)]
        part += 1
    return [*rows, (last.conv, part), (last.norm, part), ("+= identity", part), (f"{block.name}.relu", part)]


def _megabytes(plan: Plan, block: BlockSpec) -> str:
    """Return a sentence with the bytes that both ways move for one image.

    Every module reads its inputs and writes its output.
    """
    shapes = plan.shapes(1, 224, 224)
    costs = {cost.name: cost for cost in plan.costs(1, 224, 224)}
    steps = [step for step in plan.steps if step.name.startswith(f"{block.name}.")]
    fused = sum(costs[step.name].bytes for step in steps)
    unfused = 0
    for step in steps:
        size = 4 * torch.Size(shapes[step.output]).numel()
        unfused += costs[step.name].bytes + 2 * size  # the convolution, then batch norm
        if isinstance(step, Conv) and step.relu:
            unfused += 2 * size
        if isinstance(step, Conv) and step.residual:
            unfused += 2 * size  # the sum's second operand and its result; the first is in the step's own cost
    return (
        f"One image of 224×224 in float32: {unfused / 1e6:.1f} MB read and written module by module, "
        f"{fused / 1e6:.1f} MB step by step."
    )


DRAWINGS = {"plan-and-readers.svg": plan_and_readers, "block-fused.svg": block_fused}
