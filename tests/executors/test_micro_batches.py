"""The rule for micro-batches: only on cards with a large L2 cache and slow memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.executors import gpu as executors
from fastres.executors.arena import plan_arena
from fastres.executors.micro_batches import images_in_cache, micro_batches
from fastres.folding.build import outline
from fastres.kernels import dispatch
from fastres.kernels.routing import cards
from fastres.kernels.routing.cards import A100, CARDS, H100, H200, INTERPRETER, L4, L40S, RTX_4090, Gpu
from fastres.kernels.routing.tables import Index, Network, Table
from fastres.network.architectures import get_architecture
from fastres.roofline.estimate import L2_SHARE, attainable, network_seconds

RESNET50 = get_architecture("resnet50")
PLAN = outline(RESNET50, torch.float16)


def asked(gpu: Gpu, batch: int, size: int = 224, dtype: torch.dtype = torch.float16) -> Network | None:
    return micro_batches(RESNET50, (batch, size, size, 3), dtype, gpu)


@pytest.mark.parametrize("gpu", [A100, H100, H200, INTERPRETER], ids=lambda gpu: gpu.name)
def test_never_where_memory_is_fast(gpu: Gpu) -> None:
    assert all(asked(gpu, batch, size) is None for batch in (1, 64, 256) for size in (64, 224, 512))


@pytest.mark.parametrize("gpu", [L4, L40S, RTX_4090], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("size", [160, 224, 384])
def test_large_batches_on_large_caches(gpu: Gpu, size: int) -> None:
    assert asked(gpu, 1, size) is None
    found = asked(gpu, 256, size)
    assert found
    assert 0 < found.images < 256
    steps = PLAN.steps_for((PLAN.features[found.through],))
    used = plan_arena(steps, PLAN.shapes(found.images, size, size)).size * torch.float16.itemsize
    assert used <= L2_SHARE * gpu.l2_cache
    limits, shape = attainable(gpu, torch.float16), (256, size, size, 3)
    assert limits
    times = [network_seconds(PLAN, shape, torch.float16, gpu, limits, way) for way in (None, found)]
    assert times[0] > times[1]


def test_images_are_equal_parts_of_the_batch() -> None:
    for batch in (40, 63, 256):
        images = images_in_cache(PLAN, "layer1", (batch, 224, 224, 3), torch.float16, L40S)
        parts = -(-batch // images)
        assert parts * images - batch < parts
    tiny = replace(L40S, l2_cache=1 << 20)
    assert images_in_cache(PLAN, "layer1", (64, 224, 224, 3), torch.float16, tiny) == 0


def test_a_card_of_which_too_little_is_known_is_left_alone() -> None:
    for unknown in (replace(L40S, gb_per_s=0.0), replace(L40S, l2_cache=0), replace(L40S, name="NVIDIA Tomorrow")):
        assert asked(unknown, 256) is None
    assert all(attainable(gpu, torch.float16) for gpu in CARDS)


def test_a_table_decides_and_another_cards_is_completed_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "gpu_of", lambda device: L40S)
    device, shape = torch.device("cuda"), (256, 224, 224, 3)

    def with_index(index: Index) -> Network | None:
        monkeypatch.setattr(dispatch, "tuned", lambda gpu: index)
        return executors.tuned_network(PLAN, shape, torch.float16, device)

    ruled = with_index(Index())
    assert ruled == asked(L40S, 256)
    assert ruled
    measured = Network("resnet50", 256, 224, 224, "float16", True, "", 0, False, 9000.0, 9500.0)
    assert with_index(Index(Table((), (), (measured,)))) == measured
    other = replace(measured, joined=False, microseconds=0.0, plain_microseconds=0.0)
    found = with_index(Index(Table((), (), (other,))))
    assert found == replace(other, through=ruled.through, images=ruled.images)
