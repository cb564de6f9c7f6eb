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
WIDTH, MARGIN = 440, 10  # pixels: as wide as a phone shows, so that the words keep their size
ROW, GAP = 30, 10
MONO = "ui-monospace, Menlo, Consolas, monospace"
COLOURS = {  # on light and on dark pages
    "ink": ("#263238", "#eceff1"),
    "pale": ("#90a4ae", "#607d8b"),
    "paper": ("#ffffff", "#1b1e26"),
    "plan": ("#fafafa", "#262a34"),
    "grey": ("#eceff1", "#37474f"),
    "blue": ("#bbdefb", "#15487a"),
    "green": ("#c8e6c9", "#1f5a2c"),
    "orange": ("#ffe0b2", "#74481a"),
    "purple": ("#e1bee7", "#5b2a73"),
    "own": ("#f57c00", "#ffa726"),
    "other": ("#90a4ae", "#607d8b"),
}
PARTS = ("blue", "green", "orange", "purple")


@dataclass
class Drawing:
    """A list of shapes on a page of ``WIDTH`` × ``height`` in the colours of the page around it."""

    height: int
    shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, colour: str = "paper") -> None:
        size = f'width="{width:g}" height="{height:g}"'
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" {size} rx="4" class="{colour} edge"/>')

    def text(self, x: float, y: float, words: str, *, size: int = 13, bold: bool = False, mono: bool = False) -> None:
        style = f' font-family="{MONO}"' if mono else ""
        style += ' font-weight="bold"' if bold else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}"{style}>{escape(words)}</text>')

    def labelled(self, x: float, y: float, width: float, title: str, *lines: str) -> None:
        self.box(x, y, width, 30 + 17 * len(lines))
        self.text(x + 10, y + 18, title, bold=True)
        for index, line in enumerate(lines):
            self.text(x + 10, y + 36 + 17 * index, line, size=12)

    def arrow(self, points: Sequence[tuple[float, float]]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polyline points="{path}" class="line" marker-end="url(#head)"/>')

    def svg(self, title: str) -> str:
        size = f'width="{WIDTH}" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}"'
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" class="ink"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" class="ink">',
                f"<title>{escape(title)}</title>",
                f"<style>{_rules(0)} @media (prefers-color-scheme: dark) {{ {_rules(1)} }}</style>",
                f"<defs>{head}</defs>",
                f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="paper"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def _rules(dark: int) -> str:
    """Return the rules of CSS for all classes, for light (0) or dark (1) pages."""
    fills = [f".{name} {{ fill: {colours[dark]} }}" for name, colours in COLOURS.items()]
    edge, line = f".edge {{ stroke: {COLOURS['pale'][dark]} }}", f"stroke: {COLOURS['ink'][dark]}; stroke-width: 1.3"
    return " ".join([*fills, edge, f".line {{ fill: none; {line} }}"])


def plan_and_readers() -> str:
    """Draw how a checkpoint becomes a Plan, and the readers of the Plan."""
    plan = outline(get_architecture(MODEL), torch.float32)
    shown = (*plan.steps[:6], None, *plan.steps[-2:])
    drawing = Drawing(796)
    inner, middle = WIDTH - 2 * MARGIN, WIDTH / 2
    sources = (
        ("checkpoint", ".pth, .pt, .safetensors, a folder, a live module"),
        ("state dict", "torchvision's names, float32, on the CPU, tensors checked"),
        ("folding", "batch norm into convolutions, in float64, rounded once"),
    )
    for index, (name, line) in enumerate(sources):
        y = MARGIN + 67 * index
        drawing.labelled(MARGIN, y, inner, name, line)
        drawing.arrow([(middle, y + 47), (middle, y + 67)])
    drawing.box(MARGIN, 211, inner, 324, "plan")
    drawing.text(MARGIN + 14, 233, f"Plan of {MODEL}: {len(plan.steps)} fused steps", size=14, bold=True)
    for index, step in enumerate(shown):
        y = 246 + 32 * index
        if step is None:
            drawing.text(middle, y + 18, "⋮", size=16)
            continue
        colour = "grey" if not isinstance(step, Conv) else "orange" if step.residual else "blue"
        drawing.box(MARGIN + 14, y, inner - 28, 26, colour)
        drawing.text(MARGIN + 24, y + 17, step.name, size=12, mono=True)
        drawing.text(middle - 22, y + 17, describe(step), size=12)
    readers = (
        ("executors/cpu.py", "oneDNN's convolutions,", "weights in its layouts"),
        ("executors/gpu.py", "passes join convolutions;", "Triton kernels, CUDA graphs"),
        ("export/", "ONNX, INT8, torch.export,", "Triton model repository"),
        ("roofline/", "the shortest time that the", "machine's ceilings allow"),
        ("model.explain()", "kernel, cost and limit", "of each step"),
    )
    width = 194
    for index, (name, *lines) in enumerate(readers):
        left, y = index % 2 == 0, 557 + 82 * (index // 2)
        drawing.labelled(MARGIN if left else WIDTH - MARGIN - width, y, width, name, *lines)
        end = MARGIN + width if left else WIDTH - MARGIN - width
        drawing.arrow([(middle, 535), (middle, y + 32), (end, y + 32)])
    return drawing.svg(f"A checkpoint becomes a Plan; executors, exporters and the roofline read it ({MODEL})")


def block_fused() -> str:
    """Draw the first block: the modules that PyTorch runs, and the steps of the Plan that replace them."""
    arch = get_architecture(MODEL)
    plan = outline(arch, torch.float32)
    block = next(block_specs(arch))
    steps = [step for step in plan.steps if step.name.startswith(f"{block.name}.")]
    modules = _modules(block)
    drawing = Drawing(94 + (ROW + GAP) * len(modules))
    left, right = 160, 215  # the end of the modules, the start of the steps
    drawing.text(MARGIN, 30, f"PyTorch runs {len(modules)} modules", bold=True)
    drawing.text(right, 30, f"the Plan has {len(steps)} steps", bold=True)
    for index, (name, part) in enumerate(modules):
        y = 50 + (ROW + GAP) * index
        drawing.box(MARGIN, y, left - MARGIN, ROW, PARTS[part])
        drawing.text(MARGIN + 6, y + 19, name, size=11, mono=True)
    for part, step in enumerate(steps):
        rows = [index for index, (_, found) in enumerate(modules) if found == part]
        top = 50 + (ROW + GAP) * rows[0]
        height = (ROW + GAP) * (rows[-1] - rows[0]) + ROW
        drawing.box(right, top, WIDTH - MARGIN - right, height, PARTS[part])
        drawing.text(right + 10, top + 19, step.name, size=12, mono=True)
        drawing.text(right + 10, top + 38, describe(step), size=12)
        for index, value in enumerate(step.reads):
            drawing.text(right + 10, top + 57 + 19 * index, f"{'+' if index else 'reads'} {value}", size=12)
        for row in rows:
            y = 50 + (ROW + GAP) * row + ROW / 2
            drawing.arrow([(left, y), (right, y)])
    for index, line in enumerate(_megabytes(plan, block)):
        drawing.text(MARGIN, drawing.height - 27 + 17 * index, line, size=12)
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


def _megabytes(plan: Plan, block: BlockSpec) -> tuple[str, str]:
    """Return a sentence, in two lines, with the bytes that both ways move for one image.

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
        f"One image of 224×224 in float32: {unfused / 1e6:.1f} MB read and written",
        f"module by module, {fused / 1e6:.1f} MB step by step.",
    )


DRAWINGS = {"plan-and-readers.svg": plan_and_readers, "block-fused.svg": block_fused}
