"""Identity layers change nothing; a removed block leaves exactly its shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet, PadShortcut
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.bench.study.running import run
from fastres.bench.study.surgery import deepen, without_block
from fastres.bench.study.training import logits, module_of
from fastres.errors import ArchitectureError
from fastres.network.architectures import get_architecture

IMAGES = smooth_images(6, 32, 32, seed=5)


def network(name: str) -> EagerResNet:
    return calibrated(get_architecture(name), seed=1)


@pytest.mark.parametrize(("shallow", "deep"), [("plain20", "plain56"), ("resnet20", "resnet32")])
def test_identity_layers_change_nothing(shallow: str, deep: str) -> None:
    module = network(shallow)
    state = deepen(module.state_dict(), get_architecture(shallow), get_architecture(deep))
    assert torch.equal(logits(module_of(deep, state), IMAGES), logits(module_of(shallow, module.state_dict()), IMAGES))
    assert torch.equal(run(deep, state, IMAGES), run(shallow, module.state_dict(), IMAGES))


@pytest.mark.parametrize(("shallow", "deep"), [("plain20", "resnet56"), ("plain56", "plain20"), ("plain20", "plain34")])
def test_other_networks_are_not_deepened(shallow: str, deep: str) -> None:
    state = network(shallow).state_dict()
    with pytest.raises(ArchitectureError, match=f"{shallow} cannot be deepened to {deep}"):
        deepen(state, get_architecture(shallow), get_architecture(deep))


class ReluOf(nn.Module):
    """The output of a residual block whose branch is zero."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x))


@pytest.mark.parametrize("block", ["layer1.0", "layer2.0", "layer3.0", "layer3.2"])
@pytest.mark.parametrize("name", ["plain20", "resnet20"])
def test_a_removed_block_passes_on_its_input(name: str, block: str) -> None:
    module = network(name)
    state = without_block(module.state_dict(), module.architecture, block)
    whole = logits(module, IMAGES)
    stage, index = block.split(".")
    blocks = getattr(module, stage)
    old = blocks[int(index)]
    if name == "resnet20":
        shortcut = old.downsample
    else:
        changes = old.conv1.stride != (1, 1)
        shortcut = PadShortcut(old.conv1.in_channels, old.conv1.out_channels, 2) if changes else None
    blocks[int(index)] = ReluOf(shortcut)
    expected = logits(module, IMAGES)
    found = run(name, state, IMAGES)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, whole, rtol=1e-2, atol=1e-2)


def test_an_unknown_block_is_named() -> None:
    module = network("plain20")
    with pytest.raises(ArchitectureError, match=r"plain20 has no block 'layer4.0'; it has layer1.0, layer1.1"):
        without_block(module.state_dict(), module.architecture, "layer4.0")
