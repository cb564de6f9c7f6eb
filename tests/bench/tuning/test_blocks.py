"""Test the tuning of joined runs and networks without a GPU: what is tried, what wins, and how errors are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.bench.tuning import blocks, networks, tables, tuner
from fastres.bench.tuning.blocks import BlockTools, Case
from fastres.bench.tuning.progress import Progress
from fastres.executors.gpu import block_of
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing.cards import A100, H100
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Block, Network, from_json
from fastres.network.plan import Conv, Joined
from tests.subjects import HOPPER


def resnet50_cases(batch: int = 256) -> list[Case]:
    return blocks.cases(["resnet50"], [batch], 224, torch.float16, H100)


def tools(**changes: object) -> BlockTools:
    """Return tools for a GPU on which smaller tiles are faster and separate convolutions take 100 µs."""

    def microseconds(case: Case, config: ConvConfig | None) -> float:
        return 100.0 if config is None else config.block_m * config.block_n / 100

    def compiles_well(block: Block, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return list(configs)

    made = BlockTools(compiles_well, lambda case, config: True, microseconds)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_runs_of_a_resnet50_that_kernels_take() -> None:
    found = {case.block: case for case in resnet50_cases()}
    merged = [block for block in found if not block.fused]
    assert sorted((b.shape.P, b.shortcut_channels, b.shortcut_stride) for b in merged) == [
        (7, 1024, 2), (14, 512, 2), (28, 256, 2), (56, 64, 1),
    ]  # fmt: skip
    # The fused kernel holds at most 128 channels: layer1 and layer2 without the projection of 256 channels. Each run
    # ends with the block or continues into the next one, whose first convolution is wider at the end of a stage.
    fused = sorted((b.shape.P, b.shortcut_channels, b.next_channels) for b in found if b.fused)
    assert fused == [(28, 0, 0), (28, 0, 128), (56, 0, 0), (56, 0, 64), (56, 0, 128), (56, 64, 0), (56, 64, 64)]
    for block, case in found.items():
        assert block_of(case.run, case.shapes[case.run.input], torch.float16) == block
    assert not blocks.cases(["resnet50"], [32], 224, torch.float16, A100)


def test_candidates_fit_and_join_what_they_must() -> None:
    for case in resnet50_cases():
        kernels = {config.kernel for config in blocks.candidates(case.block, H100)}
        if case.block.fused:
            assert kernels == {"fused"}
        else:
            strided = case.block.shortcut_stride > 1
            assert kernels == (
                {"conv_tma", "conv_tma_persistent"} | (set() if strided else {"gemm", "gemm_persistent"})
            )


def test_the_fastest_right_one_wins_and_is_compared_with_the_run_apart() -> None:
    case = next(case for case in resnet50_cases() if case.block.fused)
    a, b, c, d = (ConvConfig("fused", m, 64, 64, 8, 3) for m in (256, 128, 64, 32))
    found = blocks.tune_block(
        case,
        [a, b, c, d],
        tools(compiles_well=lambda block, configs: [a, b, c], is_right=lambda case, config: config != c),
    )
    assert found is not None
    assert (found.config, found.microseconds, found.apart_microseconds) == (b, 81.92, 100.0)
    assert found.saves(256) == pytest.approx(18.08)
    assert blocks.tune_block(case, [a], tools(is_right=lambda case, config: False)) is None


def test_the_table_keeps_runs_and_networks_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "conv.json"
    todo = resnet50_cases()[:3]
    tuner.tune_blocks(todo[:1], H100, tools(), Progress.resume(path, {}))
    tried: list[Block] = []

    def counted(block: Block, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        tried.append(block)
        return list(configs)

    progress = Progress.resume(path, {})
    tuner.tune_blocks(todo, H100, tools(compiles_well=counted), progress)
    assert tried == [case.block for case in todo[1:]]
    network = Network("resnet50", 256, 224, 224, "float16")
    asked: list[Network] = []

    def run(network: Network) -> Network:
        asked.append(network)
        return replace(network, through="layer1", images=32, microseconds=4000.0, plain_microseconds=4400.0)

    for _ in range(2):
        tuner.tune_networks([network], run, Progress.resume(path, {}))
    assert asked == [network]
    table = from_json(path.read_text(), "it")
    assert [entry.layer for entry in table.blocks] == [case.block for case in todo]
    assert "up to layer1 in micro-batches of 32 images" in tables.networks_table(table.networks)
    assert "shortcut 64/1" in tables.blocks_table(table.blocks)


def test_whole_networks_run_the_fastest_right_way() -> None:
    plain = Network("resnet50", 64, 224, 224, "float16", joined=False)

    def time_ms(way: Network) -> float:
        if way.images:
            return {16: 0.5, 32: 3.0}[way.images] - 0.5 * way.joined
        return 4.0 - way.joined

    def is_right(way: Network) -> bool:
        return way.images != 16

    def tuned(time_ms: Callable[[Network], float], has_blocks: bool) -> Network:
        others = networks.ways(plain, has_blocks=has_blocks, starts_early=True)
        return networks.tune_network(plain, others, is_right, time_ms)

    found = tuned(time_ms, True)
    assert (found.joined, found.images, found.through) == (True, 32, "layer1")
    assert (found.microseconds, found.plain_microseconds) == (2500.0, 4000.0)
    assert tuned(time_ms, False).joined is False
    slow = tuned(lambda way: 5.0 + way.joined + way.images, True)
    assert slow == replace(plain, microseconds=5000.0, plain_microseconds=5000.0)


def test_small_batches_try_kernels_that_start_early_instead_of_micro_batches() -> None:
    plain = Network("resnet50", 8, 224, 224, "float16", joined=False)
    settings = {"joined": True}, {"early": True}, {"joined": True, "early": True}
    tried = set(networks.ways(plain, has_blocks=True, starts_early=True))
    assert tried == {replace(plain, **setting) for setting in settings}
    assert set(networks.ways(plain, has_blocks=False, starts_early=False)) == set()
    large = networks.ways(replace(plain, batch=64), has_blocks=True, starts_early=True)
    assert not any(way.early for way in large)
    assert replace(plain, early=True).manner == "kernels start early"


def test_every_case_is_tuned_as_a_network() -> None:
    found = networks.todo(["resnet50", "resnet18"], [1, 64], 224, torch.float16)
    assert [(case.model, case.batch) for case in found] == [
        ("resnet50", 1), ("resnet50", 64), ("resnet18", 1), ("resnet18", 64),
    ]  # fmt: skip


def small_case() -> Case:
    """A 3×3 and a 1×1 with a residual, then the next 1×1, for 64 images of 3×2."""

    def conv(name: str, source: str, k: int, r: int, c: int, residual: str | None = None) -> Conv:
        weight = torch.empty(k, r, r, c, device="meta")
        return Conv(name, source, name, weight, torch.empty(k, device="meta"), 1, r // 2, 1, True, residual)

    first, last, following = conv("a", "x", 16, 3, 16), conv("b", "a", 128, 1, 16, "r"), conv("c", "b", 16, 1, 128)
    run = Joined("a … c", "x", "b", last.weight, last.bias, last, first, None, following)
    shapes = {"x": (64, 3, 2, 16), "a": (64, 3, 2, 16), "b": (64, 3, 2, 128), "c": (64, 3, 2, 16), "r": (64, 3, 2, 128)}
    block = Block(ConvShape(64, 3, 2, 16, 16, 3, 3, 1, 1), "float16", True, 128, 0, 1, 16)
    return Case(block, run, shapes)


@pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
@pytest.mark.skipif(not (INTERPRETED or HOPPER), reason="the kernels for joined steps are written for sm_90")
def test_results_are_compared_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu" if INTERPRETED else "cuda")
    case, config = small_case(), ConvConfig("fused", 64, 64, 64, 4, 2)
    assert blocks.errors(case, config, device) < torch.finfo(torch.float16).eps
    launched = blocks.run_joined

    def spoiled(run: Joined, values: dict[str, torch.Tensor], config: ConvConfig) -> None:
        launched(run, values, config)
        values["c"][5] += 1

    monkeypatch.setattr(blocks, "run_joined", spoiled)
    assert blocks.errors(case, config, device) > 2 * torch.finfo(torch.float16).eps
