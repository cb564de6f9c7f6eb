"""Change trained networks by editing their state dicts, so that fastres runs them like any other network.

An identity layer is a convolution that copies its input, with a batch norm that does nothing. The ReLU after it changes
nothing, because its input comes from a ReLU. A residual block is removed by setting its last batch norm to zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastres.errors import ArchitectureError
from fastres.folding.build import BATCH_NORM_EPSILON
from fastres.network.architectures import Architecture, BlockSpec, ConvSpec, block_specs, state_dict_shapes

State = dict[str, Tensor]


def deepen(state: Mapping[str, Tensor], shallow: Architecture, deep: Architecture) -> State:
    """Return weights of ``deep`` that compute the same as ``shallow`` with ``state``: He et al.'s constructed solution.

    Each stage keeps its blocks and gets identity blocks at its end. Raise ``ArchitectureError`` if the two networks
    differ in more than the number of blocks, or if ``deep`` has fewer.
    """
    both = [(arch.block, arch.widths, arch.stem, arch.shortcut, arch.num_classes) for arch in (shallow, deep)]
    if both[0] != both[1] or any(a > b for a, b in zip(shallow.depths, deep.depths, strict=True)):
        raise ArchitectureError(
            f"{shallow.name} cannot be deepened to {deep.name}: give networks of one family, the deeper one second"
        )
    result: State = {}
    for spec in block_specs(deep):
        if f"{spec.name}.conv1.weight" not in state:
            result.update(removed_block(spec, residual=deep.skip))
    result.update(state)
    return {name: result[name] for name in (*state_dict_shapes(deep), *_counters(deep))}


def without_block(state: Mapping[str, Tensor], arch: Architecture, block: str) -> State:
    """Return the weights with one block (``"layer2.1"``) changed to pass on its input.

    A residual block keeps its shortcut. A plain block that changes shape passes on every second pixel, with zero
    channels around the input's channels, as the option-A shortcut of the residual network does in the same place.
    """
    specs = {spec.name: spec for spec in block_specs(arch)}
    if block not in specs:
        raise ArchitectureError(f"{arch.name} has no block {block!r}; it has {', '.join(specs)}")
    return {**state, **removed_block(specs[block], residual=arch.skip)}


def removed_block(spec: BlockSpec, *, residual: bool) -> State:
    """Return the tensors of a block that adds nothing to its shortcut (``residual``) or passes on its input."""
    result: State = {}
    for conv in spec.convs:
        weight = torch.zeros(conv.weight_shape) if residual else _copying(conv)
        result |= {f"{conv.conv}.weight": weight, **_identity_norm(conv)}
    if residual:
        result[f"{spec.convs[-1].norm}.weight"].zero_()
    return result


def _copying(conv: ConvSpec) -> Tensor:
    """Return a filter ``[K, C, R, S]`` that copies the input channels to the middle output channels."""
    weight = torch.zeros(conv.weight_shape)
    before = (conv.out_channels - conv.in_channels) // 2
    for channel in range(conv.in_channels):
        weight[before + channel, channel, conv.kernel // 2, conv.kernel // 2] = 1
    return weight


def _identity_norm(conv: ConvSpec) -> State:
    """Return a batch norm that is the identity in eval mode: its variance and its epsilon add up to one."""
    ones, zeros = torch.ones(conv.out_channels), torch.zeros(conv.out_channels)
    return {
        f"{conv.norm}.weight": ones,
        f"{conv.norm}.bias": zeros.clone(),
        f"{conv.norm}.running_mean": zeros.clone(),
        f"{conv.norm}.running_var": ones - BATCH_NORM_EPSILON,
        f"{conv.norm}.num_batches_tracked": torch.tensor(0),
    }


def _counters(arch: Architecture) -> list[str]:
    return [
        name.replace("running_var", "num_batches_tracked")
        for name in state_dict_shapes(arch)
        if name.endswith("running_var")
    ]
