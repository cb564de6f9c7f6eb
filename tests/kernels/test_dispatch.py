"""Routing through tuned tables, and the call that launches any kernel."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.errors import KernelError
from fastres.kernels import dispatch, reference
from fastres.kernels.launch import INTERPRETED
from fastres.kernels.routing import rules, tables
from fastres.kernels.routing.cards import A100, H100, H200, L40S
from fastres.kernels.routing.rules import ConvConfig, ConvShape, route_conv, shared_memory
from fastres.kernels.routing.tables import (
    Block,
    Index,
    Layer,
    Network,
    Table,
    Tuned,
    TunedBlock,
    from_json,
    slug,
    table,
    table_path,
    to_json,
)
from tests.measures import kernel_tolerance, relative_error

SHAPE = ConvShape(64, 14, 14, 256, 1024, 1, 1, 1, 0)
FAST = ConvConfig("gemm_persistent", 128, 256, 64, 8, 3)
SLOW = ConvConfig("conv", 64, 64, 64, 4, 4)


def tuned(batch: int, config: ConvConfig, shape: ConvShape = SHAPE, residual: bool = True) -> Tuned:
    sized = ConvShape(batch, *(getattr(shape, name) for name in ("H", "W", "C", "K", "R", "S", "stride", "padding")))
    return Tuned(Layer(sized, "float16", residual), config, 10.0, 12.5)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables for the H100, found through the environment variable."""
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    for cached in (table, dispatch.route, dispatch._hint):
        cached.cache_clear()
    yield tmp_path
    for cached in (table, dispatch.route, dispatch._hint):
        cached.cache_clear()


def write(
    folder: Path,
    entries: list[Tuned],
    *,
    gpu: str = H100.name,
    arch: str = H100.arch,
    multiprocessors: int = 0,
    networks: tuple[Network, ...] = (),
) -> None:
    path = table_path(gpu, folder)
    path.parent.mkdir(parents=True)
    facts = {"gpu": gpu, "arch": arch} | ({"multiprocessors": multiprocessors} if multiprocessors else {})
    path.write_text(to_json(Table(tuple(entries), (), networks), facts))


JOINED = Block(ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), "float16", True, 256, 64, 1, 64)
MERGED = Block(ConvShape(256, 14, 14, 256, 1024, 1, 1, 1, 0), "float16", False, 1024, 512, 2)


def test_json_goes_both_ways() -> None:
    entries = Table(
        (tuned(1, SLOW), tuned(256, FAST)),
        (TunedBlock(JOINED, ConvConfig("fused", 128, 64, 64, 8, 3), 50.0, 71.5), TunedBlock(MERGED, FAST, 9.0, 8.0)),
        (Network("resnet50", 256, 224, 224, "float16", True, "layer2", 32, 5000.0, 5500.0),),
    )
    text = to_json(entries, {"gpu": "NVIDIA H100 80GB HBM3"})
    assert from_json(text, "here") == entries
    assert json.loads(text)["gpu"] == "NVIDIA H100 80GB HBM3"


def test_folder_names() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert table_path("NVIDIA H200").parts[-2:] == ("nvidia-h200", "conv.json")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 9, "layers": []}', '{"format": 1, "layers": [{"N": 1}]}'])
def test_broken_tables_are_named(text: str) -> None:
    with pytest.raises(KernelError, match=r"configs/x\.json is not a table of tuned configurations"):
        from_json(text, "configs/x.json")


def test_nearest_batch_by_ratio() -> None:
    index = Index(Table(tuple(tuned(n, SLOW) for n in (1, 8, 64, 512))))

    def order(batch: int) -> list[int]:
        return [entry.layer.shape.N for entry in index.entries(tuned(batch, SLOW).layer)]

    assert order(20) == [8, 64, 1, 512]
    assert order(300)[0] == 512


def test_tuned_configurations_come_before_rules(configs: Path) -> None:
    write(configs, [tuned(1, SLOW), tuned(256, FAST)])
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == FAST
    small = ConvShape(2, 14, 14, 256, 1024, 1, 1, 1, 0)
    assert dispatch.route(small, torch.float16, H100, residual=True) == SLOW
    # bfloat16 uses the float16 entries. Entries for another dtype, residual or layer do not apply.
    assert dispatch.route(SHAPE, torch.bfloat16, H100, residual=True) == FAST
    for shape, dtype, residual in ((SHAPE, torch.float32, True), (SHAPE, torch.float16, False)):
        assert dispatch.route(shape, dtype, H100, residual=residual) == route_conv(shape, dtype, H100)


def test_a_tuned_kernel_that_cannot_take_the_batch_is_passed_over(configs: Path) -> None:
    layer = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
    images = ConvConfig("conv_tma", 128, 128, 64, 8, 4)
    write(configs, [tuned(256, images, layer, residual=False), tuned(1, SLOW, layer, residual=False)])
    assert dispatch.route(layer, torch.float16, H100) == images
    few = ConvShape(32, 14, 14, 256, 256, 3, 3, 1, 1)
    assert dispatch.why_not("conv_tma", few, torch.float16, H100)
    assert dispatch.route(few, torch.float16, H100) == SLOW


def test_joined_runs_are_looked_up_by_the_nearest_batch_that_a_kernel_takes(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = ConvConfig("fused", 128, 64, 64, 8, 3)
    images = ConvConfig("conv_tma", 128, 256, 64, 8, 3)
    known = Table((), (TunedBlock(JOINED, fused, 50.0, 71.5), TunedBlock(MERGED, images, 9.0, 8.0)))
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: Index(known))
    found = dispatch.route_block(sized(JOINED, 128), torch.bfloat16, H100)
    assert found
    assert found.config == fused
    assert found.saves(128) == pytest.approx(21.5 / 2)
    assert dispatch.route_block(sized(JOINED, 32), torch.float16, H100) is None, "its tiles are 64 images"
    merged = dispatch.route_block(MERGED, torch.float16, H100)
    assert merged
    assert merged.saves(256) == -1.0
    assert dispatch.route_block(replace(MERGED, next_channels=64), torch.float16, H100) is None


def sized(block: Block, batch: int) -> Block:
    return replace(block, shape=replace(block.shape, N=batch))


def test_what_joins_what() -> None:
    assert "shortcut of stride 1" in dispatch.why_not_block("gemm", MERGED, torch.float16, H100)
    assert not dispatch.why_not_block("gemm", replace(MERGED, shortcut_stride=1), torch.float16, H100)
    assert "does not join a shortcut" in dispatch.why_not_block("fused", MERGED, torch.float16, H100)
    assert "does not join a 3×3" in dispatch.why_not_block("conv_tma", JOINED, torch.float16, H100)
    assert "sm_80" in dispatch.why_not_block("fused", JOINED, torch.float16, A100)


def test_without_a_table_the_rules_decide_and_say_so_once(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(dispatch.UntunedGpuWarning, match=r"no table .* for H100 \(sm_90\) and uses rules instead"):
        assert dispatch.route(SHAPE, torch.float16, H100) == route_conv(SHAPE, torch.float16, H100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.route(SHAPE, torch.bfloat16, H100)


def test_a_table_of_the_same_architecture_serves_a_card_without_one(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    other = ConvConfig("conv", 128, 64, 64, 4, 3)
    network = Network("resnet50", 64, 224, 224, "float16", False, "layer1", 16, True, 900.0, 1000.0)
    write(configs, [tuned(256, FAST)], gpu="NVIDIA GH200", multiprocessors=132, networks=(network,))
    write(configs, [tuned(256, other)], gpu="Small", multiprocessors=16)
    write(configs, [tuned(256, SLOW)], gpu="Unsaid")
    write(configs, [tuned(256, SLOW)], gpu="NVIDIA A100-SXM4-80GB", arch="sm_80", multiprocessors=132)
    said = (
        r"NVIDIA H200 \(sm_90\) and uses the table of NVIDIA GH200 \(same architecture\) instead.*fastres\.bench\.tune"
    )
    with pytest.warns(dispatch.UntunedGpuWarning, match=said):
        assert dispatch.route(SHAPE, torch.float16, H200, residual=True) == FAST
    index = dispatch.tuned(H200)
    assert index.others == ("NVIDIA GH200", "Small", "Unsaid")
    assert not index.is_own
    (first, *_) = index.entries(tuned(256, FAST).layer)
    assert not index.measured(first)
    # Joined runs and early starts carry over to another card. Micro-batches (L2 cache sizes) and times do not.
    found = index.network("resnet50", 64, 224, 224, "bfloat16")
    assert found == replace(network, through="", images=0, microseconds=0.0, plain_microseconds=0.0)
    assert dispatch.tuned(L40S).entries(tuned(256, FAST).layer) == []


def test_a_cards_own_entries_come_before_others_layer_by_layer(configs: Path) -> None:
    write(configs, [tuned(1, SLOW)], gpu=H200.name)
    deep = ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1)
    write(configs, [tuned(256, FAST), tuned(1, FAST, deep, residual=False)], gpu="NVIDIA GH200")
    assert dispatch.route(SHAPE, torch.float16, H200, residual=True) == SLOW, "for another batch, but for this card"
    # FAST is a matrix product. A configuration that its kernel cannot run is skipped, from any table.
    assert dispatch.route(deep, torch.float16, H200) == route_conv(deep, torch.float16, H200)


def test_a_partial_table_does_not_hide_the_packaged_one(
    configs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path_factory.mktemp("package")
    monkeypatch.setattr(tables, "FOLDER", package)
    networks = tuple(
        Network("resnet50", batch, 224, 224, "float16", joined) for batch, joined in ((8, True), (64, True))
    )
    write(package, [tuned(1, SLOW), tuned(256, SLOW)], networks=networks)
    write(configs, [tuned(256, FAST)], networks=(replace(networks[0], joined=False),))
    table.cache_clear()
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == FAST
    few = replace(SHAPE, N=2)
    assert dispatch.route(few, torch.float16, H100, residual=True) == SLOW
    found = [dispatch.tuned(H100).network("resnet50", batch, 224, 224, "float16") for batch in (8, 64)]
    assert [network and network.joined for network in found] == [False, True]


def test_what_does_not_fit_the_card_is_passed_over(configs: Path) -> None:
    deep = ConvConfig("conv", 256, 128, 128, 8, 5)
    write(configs, [tuned(256, deep)], gpu="NVIDIA GH200")
    assert shared_memory(deep, torch.float16, H200) > H200.shared_memory
    assert dispatch.route(SHAPE, torch.float16, H200, residual=True) == route_conv(
        SHAPE, torch.float16, H200, residual=True
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multiprocessors": "many"}, "multiprocessors is 'many'"),
        ({"layers": [{"N": 1}]}, "not a table"),
        ({"networks": [{"model": "m", "batch": 1, "height": 2, "width": 2, "dtype": "d", "images": 4}]}, "through ''"),
    ],
)
def test_a_bad_table_is_named(configs: Path, change: dict[str, object], said: str) -> None:
    write(configs, [tuned(256, FAST)], gpu="NVIDIA GH200")
    path = table_path("NVIDIA GH200", configs)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(KernelError, match=said) as error:
        dispatch.route(SHAPE, torch.float16, H200)
    assert str(path) in str(error.value)


def test_configurations_are_of_whole_positive_numbers() -> None:
    text = to_json(Table((tuned(1, SLOW),)), {})
    for value in ('"64"', "0", "64.0"):
        with pytest.raises(KernelError, match="a configuration has a block_m of"):
            from_json(text.replace('"block_m": 64', f'"block_m": {value}'), "x.json")


def test_the_classifier_is_a_layer_of_its_own(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ConvShape(256, 1, 1, 2048, 1000, 1, 1, 1, 0)
    layer = Layer(shape, "float16", False, classifier=True)
    product = ConvConfig("gemm", 128, 64, 64, 4, 4)
    write(configs, [Tuned(layer, product, 5.0, 9.0)])
    assert dispatch.route(shape, torch.float16, H100, classifier=True) == product
    assert dispatch.route(shape, torch.float16, H100) == route_conv(shape, torch.float16, H100)
    assert (layer.relu, layer.out_dtype) == (False, torch.float32)
    plain = replace(layer, classifier=False)
    assert (plain.relu, plain.out_dtype) == (True, torch.float16)
    # A tuned row of a kernel that cannot write float32 is passed over.
    specialised = ConvConfig("conv_specialized", 128, 64, 64, 8, 4)
    assert "not float32" in dispatch.why_not_layer("conv_specialized", layer, H100)
    assert dispatch.why_not_layer("conv_specialized", plain, H100) == ""
    assert dispatch.why_not_layer("gemm", layer, H100) == ""
    write(configs / "other", [Tuned(entry, specialised, 5.0, 9.0) for entry in (layer, plain)])
    monkeypatch.setenv(tables.VARIABLE, str(configs / "other"))
    table.cache_clear()
    assert dispatch.tuned_for(plain, H100).config == specialised
    assert dispatch.tuned_for(layer, H100) is None
    for entry in (layer, plain):  # rows written before classifiers were tuned lack this key
        text = to_json(Table((Tuned(entry, product, 5.0, 9.0),)), {})
        assert from_json(text, "here").layers[0].layer == entry
        assert ("classifier" in text) == entry.classifier


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def leave_out(names: str) -> None:
        monkeypatch.setenv(dispatch.WITHOUT, names)
        rules.route_conv.cache_clear()
        dispatch.left_out.cache_clear()
        dispatch.route.cache_clear()

    yield leave_out
    monkeypatch.delenv(dispatch.WITHOUT, raising=False)
    rules.route_conv.cache_clear()
    dispatch.left_out.cache_clear()
    dispatch.route.cache_clear()


def test_ways_can_be_left_out(configs: Path, without: Callable[[str], None]) -> None:
    small = ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1)
    by_rules = route_conv(small, torch.float16, H100)
    assert by_rules.split > 1
    shared = ConvConfig("conv", 64, 64, 64, 4, 4, split=2)
    layer = Layer.of(small, torch.float16, False)
    write(configs, [tuned(256, FAST), Tuned(layer, shared, 5.0, 9.0)])
    assert dispatch.route(small, torch.float16, H100) == shared
    without("split")
    found = dispatch.route(small, torch.float16, H100)
    assert found.split == 1
    assert found == route_conv(small, torch.float16, H100)
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == FAST
    without("tables")
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == route_conv(SHAPE, torch.float16, H100)
    assert dispatch.route(small, torch.float16, H100) == by_rules
    block = Block(ConvShape(64, 28, 28, 64, 256, 1, 1, 1, 0), "float16", False, 256, 64)
    assert not dispatch.why_not_block("gemm", block, torch.float16, H100)
    without("merged")
    assert "leaves it out" in dispatch.why_not_block("gemm", block, torch.float16, H100)
    without("conv_specialized_compact")
    assert "leaves it out" in dispatch.why_not("conv_specialized_compact", SHAPE, torch.float16, H100)
    assert "leaves it out" not in dispatch.why_not("conv_specialized", SHAPE, torch.float16, H100)


def test_families_of_kernels_can_be_left_out(configs: Path, without: Callable[[str], None]) -> None:
    write(configs, [tuned(256, FAST)])
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == FAST
    without("conv_tma, gemm")
    assert dispatch.route(SHAPE, torch.float16, H100, residual=True) == route_conv(SHAPE, torch.float16, H100)
    assert "leaves it out" in dispatch.why_not("gemm_persistent", SHAPE, torch.float16, H100)
    assert "leaves it out" in dispatch.why_not_block("conv_tma", MERGED, torch.float16, H100)
    assert dispatch.why_not_block("fused", JOINED, torch.float16, H100) == ""


def test_a_family_that_there_is_not_is_an_error(without: Callable[[str], None]) -> None:
    without("conv3x3")
    with pytest.raises(KernelError, match="'conv3x3'; it can leave out gemm, conv_tma, conv_specialized, fused"):
        dispatch.why_not("gemm", SHAPE, torch.float16, H100)


def test_unknown_kernels_are_refused() -> None:
    assert "no kernel called 'magic'" in dispatch.why_not("magic", SHAPE, torch.float16, H100)


KERNEL_CASES = [
    (ConvConfig("conv", 64, 64, 32, 4, 2), 3, 5, 6, 32, 40, 3, 2, 1),
    (ConvConfig("gemm", 64, 64, 32, 4, 2), 3, 5, 6, 32, 40, 1, 1, 0),
    (ConvConfig("gemm_persistent", 64, 128, 32, 4, 2), 3, 5, 6, 32, 136, 1, 1, 0),
    (ConvConfig("conv_tma", 64, 64, 32, 4, 2), 65, 4, 5, 32, 40, 3, 2, 1),
    (ConvConfig("conv_tma_persistent", 64, 64, 32, 4, 2), 64, 3, 4, 32, 40, 3, 1, 1),
]


@pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case[0].kernel)
def test_every_kernel_behind_one_call(case: tuple[ConvConfig, int, int, int, int, int, int, int, int]) -> None:
    config, n, h, w, c, k, r, stride, padding = case
    device = "cpu" if INTERPRETED else "cuda"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, w, c, generator=generator).to(device, torch.float16)
    weight = (torch.randn(k, r, r, c, generator=generator) / (r * r * c) ** 0.5).to(device, torch.float16)
    bias = torch.randn(k, generator=generator).to(device)
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - r) // stride + 1
    residual = torch.randn(n, p, q, k, generator=generator).to(device, torch.float16)
    y = torch.full_like(residual, float("nan"))
    dispatch.convolve_into(y, x, weight, bias, residual, stride=stride, padding=padding, relu=True, config=config)
    expected = reference.conv2d(
        x.double(), weight.double(), bias, residual.double(), stride=stride, padding=padding, relu=True
    )
    assert relative_error(y, expected) < kernel_tolerance(torch.float16, weight[0].numel())
