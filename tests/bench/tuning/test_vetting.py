"""Test the candidates of a quick tuning, chosen without a GPU."""

from __future__ import annotations

import pytest
import torch

from fastres.bench.tuning import configurations, vetting
from fastres.bench.tuning.vetting import Vetted
from fastres.errors import FastresError
from fastres.kernels import dispatch
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvConfig
from tests.bench.tuning.test_configurations import LARGE


def test_quick_candidates_are_there_for_what_a_visit_tunes() -> None:
    vetted = vetting.read("sm_90")
    for batch in (256, 64, 8, 1):
        for layer in configurations.layers_of(["resnet50"], [batch], 224, torch.float16):
            configs = vetted.layers[layer]
            assert 1 <= len(configs) <= vetting.A_LAYER
            assert not [c for c in configs if dispatch.why_not_layer(c.kernel, layer, H100)], layer
    assert all(len(configs) <= vetting.A_BLOCK for configs in vetted.blocks.values())
    assert vetting.read("sm_80") == Vetted()


def test_vetting_takes_the_next_best_for_what_is_bad() -> None:
    configs = [ConvConfig("conv", 64, 64, 64, 4, stages) for stages in range(1, 30)]
    found = vetting.vet({LARGE: configs}, {}, lambda todo: [config.num_stages % 3 > 0 for _, config in todo])
    assert [config.num_stages for config in found.layers[LARGE]] == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]
    text = vetting.to_json(found, {"arch": "sm_90"})
    assert vetting.from_json(text, "it") == found
    with pytest.raises(FastresError, match="it does not hold candidates"):
        vetting.from_json("{}", "it")
