"""Tune everything that is not in the table yet: single layers, joined runs of convolutions, whole networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastres.errors import DeviceError
from fastres.kernels import dispatch
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import Layer, Network, Tuned, TunedBlock
from fastres.kernels.routing.without import left_out
from fastres.roofline.ceilings import Ceilings

from . import blocks
from .blocks import BlockTools, Case
from .configurations import Tools, by_rules, candidates, promising, tune_layer
from .progress import Progress
from .vetting import Vetted


def tune(
    todo: Sequence[Layer], gpu: Gpu, limits: Ceilings, tools: Tools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the layers that are not in the table yet.

    Try the vetted candidates of a layer if there are any, and otherwise all promising ones. If the choice of the rules
    fails for a layer, record the problem and continue.
    """

    def chosen(layer: Layer) -> list[ConvConfig]:
        known = None if vetted is None else vetted.layers.get(layer)
        configs = promising(layer, candidates(layer, gpu), gpu, limits) if known is None else known
        own = by_rules(layer, gpu)
        return [own, *(c for c in configs if c != own and is_allowed(layer, c))]

    def is_allowed(layer: Layer, config: ConvConfig) -> bool:
        """Return True if ``config`` may run. Vetted candidates were chosen without this GPU and FASTRES_WITHOUT."""
        if (config.split > 1 and "split" in left_out()) or progress.ended_a_process(layer, config):
            return False
        return not dispatch.why_not_layer(config.kernel, layer, gpu)

    known = {entry.layer for entry in progress.table.layers}
    plans = {layer: chosen(layer) for layer in todo if layer not in known}
    tools.announce(plans)

    def run(layer: Layer) -> Tuned | None:
        try:
            return tune_layer(layer, plans[layer], tools)
        except DeviceError as error:
            progress.problems.append(str(error))
            return None

    progress.fill("layers", {layer: layer for layer in plans}, (), run)


def tune_blocks(
    todo: Sequence[Case], gpu: Gpu, tools: BlockTools, progress: Progress, vetted: Vetted | None = None
) -> None:
    """Tune the joined runs that are not in the table yet."""

    def run(case: Case) -> TunedBlock | None:
        known = None if vetted is None else vetted.blocks.get(case.block)
        configs = blocks.candidates(case.block, gpu) if known is None else known
        dtype = getattr(torch, case.block.dtype)
        allowed = [config for config in configs if not dispatch.why_not_block(config.kernel, case.block, dtype, gpu)]
        usable = [config for config in allowed if not progress.ended_a_process(case.block, config)]
        return blocks.tune_block(case, usable, tools)

    known = (entry.layer for entry in progress.table.blocks)
    progress.fill("blocks", {case.block: case for case in todo}, known, run)


def tune_networks(todo: Sequence[Network], run: Callable[[Network], Network], progress: Progress) -> None:
    """Tune the networks that are not in the table yet."""
    known = (entry.case for entry in progress.table.networks)
    progress.fill("networks", {network.case: network for network in todo}, known, run)
