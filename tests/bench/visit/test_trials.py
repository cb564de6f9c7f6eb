"""Test which families of kernels a visit tries, and what it says of those that it does not try."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.bench.visit import running, smoke, trials
from fastres.bench.visit.running import NOT_TRIED
from fastres.kernels import conv_specialized, dispatch
from fastres.kernels.routing.cards import A100, H100
from fastres.kernels.routing.tables import Layer
from tests.bench.visit.test_visit import piece, visit
from tests.kernels.gluon_simulator import Simulator


@pytest.mark.parametrize("family", trials.FAMILIES)
def test_an_h100_tries_every_layer_of_every_family(family: str) -> None:
    assert trials.why_not(family, H100) == ""
    for layer, config in trials.FAMILIES[family].layers(H100, False):
        if isinstance(layer, Layer):
            assert dispatch.why_not_layer(config.kernel, layer, H100) == "", layer
            assert dispatch.fits(config, layer, H100), layer


def test_the_trials_of_every_family_are_compiled_ahead() -> None:
    compiled = {item.kernel for item in smoke.compilations(H100)}
    assert compiled == {"conv", "gemm", "conv_tma", "conv_specialized", "fused"}


def test_a_family_is_judged_by_the_layers_that_it_tries() -> None:
    """Layers that are small enough for an interpreter have too few channels for a warp that only loads."""
    for family in conv_specialized.KERNELS:
        assert "multiples of 64 input channels" in trials.why_not(family, H100, small=True)
        assert "sm_90" in trials.why_not(family, A100)


@pytest.mark.parametrize("family", conv_specialized.KERNELS)
def test_trials_of_a_producer_warp_are_right_in_the_simulation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastres.kernels import conv_specialized_gluon as device

    simulator = Simulator(device, monkeypatch)
    monkeypatch.setattr(device, "conv_specialized_kernel", simulator.launch(device.conv_specialized_kernel))
    monkeypatch.setattr(conv_specialized, "gpu_of", lambda _device: H100)
    monkeypatch.setattr(trials, "device_of_trials", lambda: torch.device("cpu"))
    narrow = trials.FAMILIES[family].layers(H100, False)[1:]  # the other has 16 times as many products
    (trial,) = trials._conv_trials(narrow)
    assert smoke.judged(trial, repeats=1).problem == ""


def test_a_family_that_is_not_tried_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(smoke, "device_of_trials", lambda: torch.device("cpu"))
    monkeypatch.setattr(smoke, "gpu_of", lambda device: A100)
    assert smoke.main(["gemm", "--out", str(tmp_path)]) == NOT_TRIED
    said = capsys.readouterr().out
    assert "gemm: not tested: the TMA kernels need sm_90" in said
    assert "sm_90" in json.loads((tmp_path / "gemm.json").read_text())["not_tried"]

    reason = "gemm: not tested: the TMA kernels need sm_90"
    tried = piece("smoke gemm", f"import sys; print({reason!r}); sys.exit({NOT_TRIED})", family="gemm")
    made = visit(tmp_path, replace(tried, tries=2))
    assert made.run() == 0
    assert made.state["smoke gemm"].status == running.ABSENT
    said = capsys.readouterr().out
    assert f"smoke gemm: absent in {made.state['smoke gemm'].seconds} s: {reason}" in said
    assert "passed" not in said
