"""What the rules are estimated to give a model on cards that have no tuned table, with them and as they were without.

Without: no split reductions, no wide tiles, no micro-batches (``--plain``). All of it is estimated by
:mod:`fastres.roofline.estimate` from data sheets; nothing was measured on these GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from fastres.errors import FastresError
from fastres.executors.micro_batches import micro_batches
from fastres.kernels.launch import float32_precision
from fastres.kernels.routing.cards import CARDS, Gpu
from fastres.kernels.routing.rules import WIDE_TILE, route_conv, route_conv_plainly
from fastres.network.architectures import get_architecture
from fastres.network.folding import outline
from fastres.network.plan import Conv
from fastres.roofline.bound import roofline
from fastres.roofline.estimate import attainable, network_seconds
from fastres.roofline.gpu_shapes import conv_shape
from fastres.text import text_table


@dataclass(frozen=True)
class CardEstimate:
    """A model at one batch on one card: by the rules or, ``plain``, without them, and the roofline of that card.

    ``split`` and ``wide`` count convolutions, of ``convolutions``. ``through`` and ``images`` are of micro-batches.
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
        """Which rules apply, in words."""
        counts = (("split", self.split), ("wide", self.wide))
        words = [f"{count} of {self.convolutions} {name}" for name, count in counts if count]
        words += [f"{self.images} images at a time through {self.through}"] if self.images else []
        return "; ".join(words)


def named(names: Sequence[str]) -> list[Gpu]:
    """The known cards of these names; all for none. Raises ``FastresError`` for a name that there is not."""
    known = {gpu.name: gpu for gpu in CARDS}
    if unknown := [name for name in names if name not in known]:
        raise FastresError(f"There is no card called {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in names] or list(CARDS)


def estimate_card(gpu: Gpu, model: str, batch: int, size: int, dtype: torch.dtype, plain: bool) -> CardEstimate:
    """The estimate for one card at what it is taken to reach of its data sheet."""
    limits, shape = attainable(gpu, dtype, float32_precision()), (batch, size, size, 3)
    if limits is None:
        raise FastresError(f"No data sheet of {gpu.name} is known; fastres/ceilings.py has them")
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
    """The estimates as text."""
    lines = [("GPU", "batch", "ms", "images/s", "roofline images/s", "rules")]
    for row in rows:
        numbers = (f"{row.ms:.3f}", f"{row.images_per_s:,.0f}", f"{row.roofline_images_per_s:,.0f}")
        lines.append((row.gpu, str(row.batch), *numbers, "left out" if row.plain else row.applied or "-"))
    return text_table(lines, right=range(1, 5))


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """Rows of a file that ``--out`` wrote, before and after, as a table for a page."""
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
    """The estimates as plain dictionaries, for JSON."""
    return [asdict(row) for row in found]
