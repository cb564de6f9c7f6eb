"""Two networks with the same layers and other weights."""

from __future__ import annotations

import pytest
from torch import nn

from .small import resnet


@pytest.fixture(scope="module")
def first() -> nn.Module:
    return resnet(1)


@pytest.fixture(scope="module")
def second() -> nn.Module:
    return resnet(2)
