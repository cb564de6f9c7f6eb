"""Test what the tuner tries, what it drops, and that it continues where it stopped, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastres.bench.tuning import configurations, tables, tuner
from fastres.bench.tuning.progress import Progress
from fastres.bench.tuning.vetting import Vetted
from fastres.kernels import dispatch
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Layer, from_json
from tests.bench.tuning.test_configurations import GEMM, LARGE, LIMITS, tools


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "conv.json"
    tried: list[Layer] = []

    def counted(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        tried.append(layer)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return list(configs)

    def run() -> Progress:
        progress = Progress.resume(path, {"gpu": "H100"})
        tuner.tune([LARGE, GEMM], H100, LIMITS, tools(compiles_well=counted), progress)
        return progress

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [entry.layer for entry in from_json(path.read_text(), "it").layers] == [LARGE]
    done = run().table.layers
    assert tried == [LARGE, GEMM, GEMM]
    assert [entry.layer for entry in done] == [LARGE, GEMM]
    assert from_json(path.read_text(), "it").layers == done
    assert "N256 14×14 1×1/1 256→1024 +res" in tables.table(done)


def test_vetted_candidates_obey_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[ConvConfig] = []

    def noted(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        tried.extend(configs)
        return list(configs)

    small = Layer(ConvShape(1, 14, 14, 256, 256, 1, 1, 1, 0), "float16", False)
    own = configurations.by_rules(small, H100)
    product = ConvConfig("gemm", 128, 64, 64, 4, 4)
    shared, dead = (ConvConfig("conv", 64, 32, 32, 4, stages, split=2) for stages in (3, 4))
    vetted = Vetted({small: [product, shared, dead, ConvConfig("conv_tma", 128, 64, 64, 4, 4)]})

    def run(out: str) -> list[ConvConfig]:
        tried.clear()
        progress = Progress.resume(tmp_path / out / "conv.json", {})
        with contextlib.suppress(OSError), progress.trying(small, dead):
            raise OSError  # as if the process ended
        progress = Progress.resume(tmp_path / out / "conv.json", {})
        tuner.tune([small], H100, LIMITS, tools(compiles_well=noted), progress, vetted)
        return list(tried)

    assert run("all") == [own, product, shared], (
        "a batch of one has no tile for conv_tma; a configuration that killed the process is not tried again"
    )
    monkeypatch.setattr(tuner, "left_out", lambda: {"split"})
    assert run("no split") == [own, product]
    monkeypatch.setattr(dispatch, "left_out", lambda: {"gemm"})
    assert run("neither") == [own]
