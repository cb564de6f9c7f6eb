"""Estimates for a model on cards without a tuned table, with the rules and without them (``--plain``).

Without the rules there are no split reductions, no wide tiles and no micro-batches. :mod:`fastres.roofline.estimate`
computes all estimates from data sheets. Nothing was measured on these GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from fastres.errors import FastresError
from fastres.executors.micro_batches import micro_batches
from fastres.folding.build import outline
from fastres.kernels.launch import float32_precision
from fastres.kernels.routing.cards import CARDS, Gpu
from fastres.kernels.routing.rules import WIDE_TILE, route_conv, route_conv_plainly
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv
from fastres.roofline.bound import roofline
from fastres.roofline.estimate import attainable, network_seconds
from fastres.roofline.gpu_shapes import conv_shape
from fastres.text import text_table


@dataclass(frozen=True)
class CardEstimate:
    """The estimate for a model at one batch size on one card, with the card's roofline.

    ``plain`` means without the rules. ``split`` and ``wide`` are numbers of convolutions, out of ``convolutions``.
    ``through`` and ``images`` are the last stage and the size of micro-batches.
    """

    gpu: str
    arch: str
    model: str
    batch: int
    size: int
    dtype: str
    plain: bool
    ms: float
    images_per_s: float
    roofline_images_per_s: float
    convolutions: int
    split: int = 0
    wide: int = 0
    through: str = ""
    images: int = 0

    @property
    def applied(self) -> str:
        """The rules that apply, in words."""
        counts = (("split", self.split), ("wide", self.wide))
        words = [f"{count} of {self.convolutions} {name}" for name, count in counts if count]
        words += [f"{self.images} images at a time through {self.through}"] if self.images else []
        return "; ".join(words)


def named(names: Sequence[str]) -> list[Gpu]:
    """Return the cards with these names, or all if ``names`` is empty. Raise ``FastresError`` for an unknown name."""
    known = {gpu.name: gpu for gpu in CARDS}
    if unknown := [name for name in names if name not in known]:
        raise FastresError(f"There is no card called {unknown[0]!r}; give one of {', '.join(known)}")
    return [known[name] for name in names] or list(CARDS)


def estimate_card(gpu: Gpu, model: str, batch: int, size: int, dtype: torch.dtype, plain: bool) -> CardEstimate:
    """Return the estimate for one card, at the fraction of its data-sheet rates that it is assumed to reach."""
    limits, shape = attainable(gpu, dtype, float32_precision()), (batch, size, size, 3)
    if limits is None:
        raise FastresError(f"The data-sheet rates of {gpu.name} are unknown; add them to fastres/roofline/ceilings.py")
    plan = outline(get_architecture(model), dtype)
    shapes = plan.shapes(batch, size, size)
    route = route_conv_plainly if plain else route_conv
    how = None if plain else micro_batches(plan.architecture, shape, dtype, gpu, float32_precision())
    first = len(plan.steps_for((plan.features[how.through],))) if how else 0
    configs = []
    for index, step in enumerate(plan):
        if isinstance(step, Conv):
            images = how.images if how and index < first else batch
            sizes = conv_shape(step, (images, *shapes[step.input][1:]))
            configs.append(route(sizes, dtype, gpu, float32_precision(), residual=step.residual is not None))
    seconds = network_seconds(plan, shape, dtype, gpu, limits, how, route)
    bound = roofline(plan.costs(batch, size, size, dtype), limits).seconds
    return CardEstimate(
        gpu.name,
        gpu.arch,
        model,
        batch,
        size,
        str(dtype).removeprefix("torch."),
        plain,
        round(1e3 * seconds, 4),
        round(batch / seconds, 1),
        round(batch / bound, 1),
        len(configs),
        sum(config.split > 1 for config in configs),
        sum((config.block_m, config.block_n) == WIDE_TILE for config in configs),
        how.through if how else "",
        how.images if how else 0,
    )


def table(rows: Sequence[CardEstimate]) -> str:
    """Return the estimates as text."""
    lines = [("GPU", "batch", "ms", "images/s", "roofline images/s", "rules")]
    for row in rows:
        numbers = (f"{row.ms:.3f}", f"{row.images_per_s:,.0f}", f"{row.roofline_images_per_s:,.0f}")
        lines.append((row.gpu, str(row.batch), *numbers, "left out" if row.plain else row.applied or "-"))
    return text_table(lines, right=range(1, 5))


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """Return the rows of a file that ``--out`` wrote as a Markdown table, with and without the rules."""
    found = [CardEstimate(**row) for row in rows]  # type: ignore[arg-type]
    plain = {(row.gpu, row.batch): row for row in found if row.plain}
    lines = ["| GPU | batch | ms before | ms | images/s before | images/s | rules |", "|---|---|---|---|---|---|---|"]
    for row in found:
        if not row.plain and (before := plain.get((row.gpu, row.batch))):
            ms = f"{before.ms:.3g} | {row.ms:.3g}"
            rates = f"{before.images_per_s:,.0f} | {row.images_per_s:,.0f}"
            lines.append(f"| {row.gpu} | {row.batch} | {ms} | {rates} | {row.applied or '–'} |")
    return "\n".join(lines)


def as_rows(found: Sequence[CardEstimate]) -> list[dict[str, object]]:
    """Return the estimates as plain dictionaries, for JSON."""
    return [asdict(row) for row in found]
