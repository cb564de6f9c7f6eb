"""Test that the check before timing detects every kind of wrong engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, PEERS
from fastres.bench.measure import checking
from fastres.bench.measure.calibration import calibrated
from fastres.bench.measure.checking import Checks, Error, error_limit, make_checks, relative_error
from fastres.bench.measure.comparison import in_8_bit
from fastres.errors import FastresError
from fastres.network.architectures import get_architecture

CPU = torch.device("cpu")
FLOAT = torch.float32
UNKNOWN = Error(float("inf"), float("inf"))


@functools.cache
def network() -> EagerResNet:
    return calibrated(get_architecture("resnet20"))


@functools.cache
def checks(batch: int) -> Checks:
    return make_checks(network(), batch, 32, CPU, FLOAT)


@functools.cache
def eager_error(batch: int) -> Error:
    return relative_error(network(), EAGER, checks(batch))


@functools.cache
def int8_model(folder: Path) -> fastres.Model:
    return fastres.load(in_8_bit(network(), 32, folder))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> fastres.Model:
    return int8_model(tmp_path_factory.mktemp("int8"))


def test_8_bit_is_judged_by_exact_arithmetic(quantized: fastres.Model) -> None:
    for batch in (2, 64):
        found = make_checks(network(), batch, 32, CPU, torch.int8, quantized.plan)
        assert found.batches[0].dtype == FLOAT
        with torch.inference_mode():
            limit = error_limit(FASTRES, torch.int8, UNKNOWN, found)
            assert 0 < limit.typical < 0.1
            assert relative_error(quantized, FASTRES, found).within(limit)
            assert relative_error(network(), EAGER, found).within(error_limit(EAGER, torch.int8, UNKNOWN, found))
            for name, wrong in WRONG.items():
                if name not in ("scaled", "one image"):  # they are nearer than 8 bit is to float64
                    assert not relative_error(wrong, FASTRES, found).within(limit), name
            one = relative_error(lambda x: quantized(x).roll(1, 1), FASTRES, found)
            assert not one.within(limit)


@pytest.mark.parametrize(("batch", "batches"), [(1, 64), (2, 32), (3, 21), (8, 8), (64, 2), (70, 2)])
def test_batches_are_several_and_of_the_asked_size(batch: int, batches: int) -> None:
    found = checks(batch)
    assert [tuple(x.shape) for x in found.batches] == [(batch, 3, 32, 32)] * batches
    assert [tuple(logits.shape) for logits in found.logits] == [(batch, 10)] * batches
    assert all(logits.dtype == torch.float64 for logits in found.logits)
    assert not torch.equal(found.batches[0], found.batches[1])
    assert 0.1 <= found.spread <= 1


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_references_belong_to_their_images(batch: int) -> None:
    with torch.inference_mode():
        reference = copy.deepcopy(network()).double()
        for x, logits in zip(checks(batch).batches, checks(batch).logits, strict=True):
            assert torch.allclose(reference(x.double()), logits, rtol=1e-10, atol=1e-12)


def test_the_right_engine_is_within_its_limit() -> None:
    found = eager_error(2)
    assert 1e-9 < found.typical < found.worst < 1e-5
    assert found.within(error_limit(EAGER, FLOAT, UNKNOWN, checks(2)))


def off_by(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: network()(x) * factor


def one_image_wrong(x: Tensor) -> Tensor:
    logits = network()(x)
    logits[-1] = logits[-1].roll(1)
    return logits


def last_batch_kept() -> Callable[[Tensor], Tensor]:
    """An engine that always returns the same logits, like a graph whose input is never copied in."""
    kept: list[Tensor] = []

    def engine(x: Tensor) -> Tensor:
        kept[:] = kept or [network()(x)]
        return kept[0]

    return engine


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": off_by(1 + 1e-4),
    "one image": one_image_wrong,
    "images in another order": lambda x: network()(x).flip(0),
    "transposed image": lambda x: network()(x.transpose(2, 3)),
    "colours swapped": lambda x: network()(x.flip(1)),
    "stale": last_batch_kept(),
    "NaN": lambda x: network()(x) * float("nan"),
    "one NaN": lambda x: network()(x).index_fill(1, torch.tensor([3]), float("nan")),
    "too few classes": lambda x: network()(x)[:, :9],
    "too few images": lambda x: network()(x)[:1],
    "constant": lambda x: torch.zeros(len(x), 10),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("peer", [FASTRES, PEERS[3]], ids=lambda peer: peer.name)
def test_wrong_engines_are_seen(kind: str, peer: checking.Peer) -> None:
    with torch.inference_mode():
        error = relative_error(WRONG[kind], peer, checks(2))
    assert not error.within(error_limit(peer, FLOAT, eager_error(2), checks(2)))


def test_an_engine_may_give_the_same_memory_each_time() -> None:
    """The engine returns the same memory each time, as a CUDA graph does."""
    output = torch.empty(2, 10)
    error = relative_error(lambda x: output.copy_(network()(x)), FASTRES, checks(2))
    assert error == eager_error(2)


def test_a_stale_engine_is_seen_at_every_batch_size() -> None:
    for batch in (1, 8, 64):
        error = relative_error(last_batch_kept(), FASTRES, checks(batch))
        assert error.typical > 0.05


def test_one_wrong_image_of_many_is_seen_in_half_precision() -> None:
    """One wrong image hardly changes the mean error, so the largest error has its own limit."""
    found = make_checks(network(), 64, 32, CPU, torch.float16)
    eager = Error(typical=2e-3, worst=5e-3)
    errors = torch.full((128,), 1e-3).index_fill(0, torch.tensor([77]), 0.02)
    logits = torch.cat(found.logits) * (1 + errors[:, None])
    error = Error.of(logits, torch.cat(found.logits))
    limit = error_limit(FASTRES, torch.float16, eager, found)
    assert error.typical < limit.typical
    assert not error.within(limit)


def test_limits_are_multiples_of_eagers_error() -> None:
    found = checks(2)
    eager = Error(0.01, 0.03)
    limits = {
        (peer.name, dtype): error_limit(peer, dtype, eager, found)
        for peer in (FASTRES, PEERS[1])
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert limits["fastres", torch.float32] == Error(0.02, 0.12)
    assert limits["fastres", torch.float16] == limits["fastres", torch.bfloat16] == Error(0.0125, 0.075)
    assert {limits["eager_channels_last", dtype] for dtype in (torch.float32, torch.float16)} == {Error(0.04, 0.24)}
    quarter = Error(found.spread / 4, found.spread / 4)
    assert error_limit(EAGER, torch.float16, UNKNOWN, found) == quarter


def test_where_eager_is_exact_float32_engines_may_sum_as_they_like() -> None:
    """The bound depends on the network only: it exceeds every kernel's error and is far below that of wrong results."""
    exact, found = Error(0.0, 0.0), checks(2)
    assert error_limit(FASTRES, FLOAT, exact, found) == Error(found.sums.typical, 2 * found.sums.worst)
    assert 0.5 * eager_error(2).typical < found.sums.typical < 1e-5
    halves = make_checks(network(), 2, 32, CPU, torch.bfloat16)
    assert halves.sums == exact
    assert error_limit(FASTRES, torch.bfloat16, exact, halves) == exact


def test_the_reference_sees_the_rounded_images() -> None:
    found = make_checks(network(), 2, 32, CPU, torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in found.batches)
    with torch.inference_mode():
        exact = copy.deepcopy(network()).double()(found.batches[0].double())
    assert torch.allclose(exact, found.logits[0], rtol=1e-10, atol=1e-12)


def test_networks_that_hardly_look_at_the_image_are_refused() -> None:
    blind = copy.deepcopy(network())
    with torch.no_grad():
        blind.fc.weight.mul_(1e-3)
    with pytest.raises(FastresError, match=r"resnet20 at 32×32 differ between images by 0\.0"):
        make_checks(blind, 2, 32, CPU, FLOAT)


def test_networks_with_nan_are_refused() -> None:
    broken = copy.deepcopy(network())
    with torch.no_grad():
        broken.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FastresError, match="differ between images by nan"):
        make_checks(broken, 2, 32, CPU, FLOAT)


@pytest.mark.parametrize("name", ["resnet101", "resnet152", "resnet110"])
def test_deep_networks_show_one_wrong_branch_in_bfloat16(name: str) -> None:
    """Rounding must not hide a mistake in a single block, however many blocks there are."""
    arch = get_architecture(name)
    network = calibrated(arch)
    found = make_checks(network, 2, 32 if arch.stem == "cifar" else 64, CPU, torch.bfloat16)
    with torch.inference_mode():
        rounded = copy.deepcopy(network).to(torch.bfloat16)
        eager = relative_error(rounded, EAGER, found)
        assert eager.within(error_limit(EAGER, torch.bfloat16, UNKNOWN, found))
        block = list(rounded.layer3)[-1]
        getattr(block, f"bn{block.depth}").weight.neg_()
        assert not relative_error(rounded, FASTRES, found).within(error_limit(FASTRES, torch.bfloat16, eager, found))
