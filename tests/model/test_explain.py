"""The roofline columns of ``model.explain()``, compared with numbers calculated by hand, and their source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fastres
from fastres.errors import InputError
from fastres.folding.build import outline
from fastres.kernels import dispatch
from fastres.kernels.routing import cards, rules, tables
from fastres.kernels.routing.cards import A100, Gpu
from fastres.kernels.routing.rules import ConvShape
from fastres.kernels.routing.tables import Layer, Tuned
from fastres.model.explain import Explanation
from fastres.network.architectures import get_architecture
from fastres.network.plan import StepCost
from fastres.roofline.ceilings import PEAKS, Ceilings, bound_by, stated
from fastres.roofline.estimate import LOAD, STRIP_STEP, conv_seconds

CUDA = torch.device("cuda")
H200 = Gpu("NVIDIA H200", "sm_90", 132, 232_448)
UNKNOWN = Gpu("NVIDIA Tomorrow", "sm_90", 132, 232_448)


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The only tuned configurations are those that a test writes to ``FASTRES_CONFIGS``."""
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    _forget()
    yield
    _forget()


def _forget() -> None:
    tables.table.cache_clear()
    dispatch.route.cache_clear()


def explained(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, batch: int, **given: Ceilings) -> Explanation:
    monkeypatch.setattr(cards, "gpu_of", lambda device: gpu)
    plan = outline(get_architecture("resnet50"), torch.float16)
    return Explanation.of(plan, CUDA, torch.float16, batch, 224, 224, **given)


def test_a_step_is_bound_by_the_ceiling_that_it_meets_first() -> None:
    machine = Ceilings(tflops=2.0, gb_per_s=100.0)
    assert bound_by(StepCost("a", "conv", (), (), 4_000_000_000, 100_000_000), machine) == ("compute", 2e-3)
    assert bound_by(StepCost("b", "head", (), (), 1_000_000, 50_000_000), machine) == ("memory", 0.5e-3)


def test_data_sheets_are_matched_by_the_whole_name() -> None:
    assert stated("NVIDIA H200", torch.float16) == Ceilings(989.4, 4800.0)
    assert stated("NVIDIA H100 80GB HBM3", torch.bfloat16) == Ceilings(989.4, 3350.0)
    assert stated("NVIDIA H100 80GB HBM3", torch.float32) == Ceilings(66.9, 3350.0)
    assert stated("NVIDIA H100 80GB HBM3", torch.float32, "tf32") == Ceilings(494.7, 3350.0)
    assert stated("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.float16) is None
    for peak in PEAKS.values():
        assert peak.half > peak.tf32 >= peak.float32
    for card in cards.CARDS:  # what routing knows of their memory is what the ceilings say
        assert PEAKS[card.name].gb_per_s == card.gb_per_s


@pytest.mark.usefixtures("no_tables")
def test_a_gpu_has_its_data_sheets_ceilings_and_estimated_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(monkeypatch, H200, 256)
    assert (found.ceilings, found.ceilings_source) == (Ceilings(989.4, 4800.0), "data sheet")
    for row in found:
        assert row.source == "estimated"
        assert row.roofline_us == pytest.approx(max(row.flops / 989.4e6, row.bytes / 4800e3))
        assert row.microseconds >= row.roofline_us
        assert 0 < row.share == pytest.approx(row.roofline_us / row.microseconds)
    bounds = {row.step: row.bound for row in found}
    assert bounds["layer1.0.conv3"] == bounds["head"] == "memory"
    assert bounds["layer4.1.conv2"] == bounds["stem"] == "compute"
    assert "989.4 TFLOP/s and 4800 GB/s, from its data sheet" in str(found)
    assert "% estimated" in str(found)


@pytest.mark.usefixtures("no_tables")
def test_idle_multiprocessors_lower_the_estimated_share(monkeypatch: pytest.MonkeyPatch) -> None:
    # For 15 images the stem has 15·14 programs, each with four pooled rows: nine rows of the convolution, each with
    # seven rows of the filter, whose loads are waited for. Two programs run at once on each of 108 multiprocessors.
    row = explained(monkeypatch, A100, 15).rows[0]
    chain = 2 * LOAD + 9 * 7 * LOAD
    assert row.microseconds == pytest.approx(1e6 * chain)
    assert chain * 1e6 > row.roofline_us * 9 / 8 * 216 / 210, "two waves of arithmetic"
    # For one image it has 112 programs, each with half of one pooled row: three rows of the convolution, each with
    # seven rows of the filter, whose loads are waited for.
    row = explained(monkeypatch, A100, 1).rows[0]
    assert row.microseconds == pytest.approx(1e6 * (2 * LOAD + 3 * 7 * LOAD))
    assert row.share < 0.1
    # From 16 images on they are prepared first: four channels per pixel, two bytes each, are also written and read.
    row = explained(monkeypatch, A100, 256).rows[0]
    preparing = 2 * 8 * 256 * 224 * 224 / (A100.gb_per_s * 1e9)
    rounds = -(-256 * 7 // 216)  # two programs of 8 warps run at once on a multiprocessor
    chain = rounds * (2 * LOAD + 17 * 7 * LOAD / 2)
    assert row.microseconds == pytest.approx(1e6 * (chain + preparing))
    assert chain * 1e6 > row.roofline_us * 17 / 16 * 14 * 108 / (256 * 7)


def test_strips_of_the_stem_are_estimated_by_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch, steps in ((1, 3), (8, 6), (64, 30), (256, 2 * 58)):
        row = explained(monkeypatch, H200, batch).rows[0]
        preparing = 2 * 8 * batch * 224 * 224 / 4800e9
        assert row.microseconds == pytest.approx(1e6 * (LOAD + steps * STRIP_STEP + preparing)), batch


def test_what_was_tuned_is_measured_for_that_batch_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_tables: None
) -> None:
    layer = Layer(ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1), "float16", False)
    config = rules.route_conv(layer.shape, torch.float16, H200)
    path = tables.table_path(H200.name, tmp_path)
    path.parent.mkdir()
    path.write_text(tables.to_json(tables.Table((Tuned(layer, config, 120.0, 130.0),)), {}))
    for batch, source in ((256, "measured"), (64, "estimated")):
        rows = {row.step: row for row in explained(monkeypatch, H200, batch)}
        row = rows["layer3.1.conv2"]
        assert row.source == source
        assert rows["layer3.1.conv1"].source == "estimated"
        if source == "measured":
            assert row.microseconds == pytest.approx(120.0)
            assert row.share == pytest.approx(row.flops / 989.4e12 / 120e-6)
        else:
            shape = layer.without_batch.shape
            small = Layer(ConvShape(**{**vars(shape), "N": 64}), "float16", False)
            expected = conv_seconds(small, config, H200, Ceilings(989.4, 4800.0)) * 1e6
            assert row.microseconds == pytest.approx(expected)


@pytest.mark.usefixtures("no_tables")
def test_an_unknown_gpu_has_a_share_only_under_given_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(monkeypatch, UNKNOWN, 8)
    assert found.ceilings is None
    assert {(row.bound, row.share, row.source) for row in found} == {("", None, "")}
    assert "of roofline" not in str(found)
    given = explained(monkeypatch, UNKNOWN, 8, ceilings=Ceilings(500, 2000))
    assert given.ceilings_source == "given"
    assert all(row.share and row.bound for row in given)


def test_a_cpus_share_needs_ceilings_and_times() -> None:
    model = fastres.load("resnet20", None)
    assert {(row.bound, row.roofline_us, row.share) for row in model.explain(image_size=32)} == {("", None, None)}
    found = model.explain(2, 32, ceilings=Ceilings(0.1, 20), microseconds={"stem": 100.0})
    stem, other = found.rows[:2]
    assert stem.flops == 2 * 2 * 32 * 32 * 16 * 27
    assert stem.roofline_us == pytest.approx(max(stem.flops / 1e5, stem.bytes / 2e4))
    assert (stem.share, stem.source) == (pytest.approx(stem.roofline_us / 100), "measured")
    assert other.bound
    assert other.share is None
    assert other.source == ""
    assert f"{stem.share:.0%} measured" in str(found)
    untimed = str(model.explain(2, 32, ceilings=Ceilings(0.1, 20)))
    assert "roofline µs" in untimed
    assert "of roofline" not in untimed
    assert found.as_dicts()[0]["bound"] == stem.bound


def test_joined_runs_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
    block = tables.Block(shape, "float16", True, 256, 0, 1, 64)
    known = tables.TunedBlock(block, rules.ConvConfig("fused", 128, 64, 64, 8, 3), 400.0, 500.0)
    network = tables.Network("resnet50", 256, 224, 224, "float16", True, "layer1", 32)
    index = tables.Index(tables.Table((), (known,), (network,)))
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: index)
    found = explained(monkeypatch, H200, 256)
    (row,) = [row for row in found if row.kernel == "fused"]
    assert row.step == "layer1.1.conv2 … layer1.2.conv1"
    assert (row.microseconds, row.source) == (pytest.approx(400.0), "measured")
    assert row.note == "3 convolutions in one kernel"
    assert len(found) == 54 - 2
    assert "up to layer1 in micro-batches of 32 images" in str(found)
    rows = {row.step: row for row in explained(monkeypatch, H200, 128)}
    assert (rows[row.step].microseconds, rows[row.step].source) == (pytest.approx(200.0), "estimated")


def test_a_cpu_names_its_micro_batches() -> None:
    plan = outline(get_architecture("resnet50"), torch.float32)
    titles = [
        str(Explanation.of(plan, torch.device("cpu"), torch.float32, n, 224, 224)).split("\n")[0] for n in (8, 32)
    ]
    assert titles == ["resnet50, float32 on cpu", "resnet50, float32 on cpu; in micro-batches of 8 images"]


def test_another_cards_table_is_not_a_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_tables: None
) -> None:
    layer = Layer(ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1), "float16", False)
    config = rules.ConvConfig("conv", 128, 64, 64, 4, 4)
    path = tables.table_path("NVIDIA H100 80GB HBM3", tmp_path)
    path.parent.mkdir()
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "multiprocessors": 132}
    path.write_text(tables.to_json(tables.Table((Tuned(layer, config, 120.0, 130.0),)), facts))
    rows = {row.step: row for row in explained(monkeypatch, H200, 256)}
    assert rows["layer3.1.conv2"].config == str(config)
    assert rows["layer3.1.conv2"].source == "estimated"


def test_the_tuned_classifier_is_a_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_tables: None
) -> None:
    layer = Layer(ConvShape(256, 1, 1, 2048, 1000, 1, 1, 1, 0), "float16", False, classifier=True)
    path = tables.table_path(H200.name, tmp_path)
    path.parent.mkdir()
    config = rules.ConvConfig("gemm", 128, 64, 64, 4, 4)
    path.write_text(tables.to_json(tables.Table((Tuned(layer, config, 5.0, 9.0),)), {}))
    head = explained(monkeypatch, H200, 256).rows[-1]
    assert head.kernel == "average_pool, gemm"
    assert str(config) in head.config


def test_numbers_are_checked() -> None:
    model = fastres.load("resnet20_digits")
    assert str(model.explain(np.int64(2), (np.int32(32), 40))) == str(model.explain(2, (32, 40)))  # type: ignore
    for batch in (0, -1, 2.0, True, "2", None):
        with pytest.raises(InputError, match=r"batch is .*; give a whole number of at least 1"):
            model.explain(batch)  # type: ignore[arg-type]
    for size in (0, -32, 32.0, True, (32,), (32, 32, 3), (32, 32.5), "32", None):
        with pytest.raises(InputError, match=r"image_size is .*; give a number of pixels, or a pair"):
            model.explain(1, size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 8×8 pixels but was given 4×4"):
        model.explain(1, 4)
