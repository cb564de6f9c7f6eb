"""A small torchvision ResNet and the fastres model of a state dict of it, for the tests of changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torchvision
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.network.architectures import get_architecture

X = smooth_images(2, 64, 72, seed=3)
SMALL = replace(get_architecture("resnet18"), name="small", depths=(1, 1, 1, 1)).with_classes(10)


def resnet(seed: int) -> nn.Module:
    module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    module.load_state_dict(calibrated(SMALL, seed=seed).state_dict())
    return module.eval().requires_grad_(False)


def loaded(state: Mapping[str, Tensor]) -> fastres.Model:
    own = {key: value.clone() for key, value in state.items() if key != "n_averaged"}
    return fastres.Model(own, SMALL.with_classes(len(own["fc.bias"])), transforms=fastres.Transforms(64, 64))
