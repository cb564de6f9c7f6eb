"""Every primitive computes what its description says, on small numbers that have exact results."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastres.errors import OneDnnError
from fastres.onednn import library, primitives
from fastres.onednn.loop import loop_over
from fastres.onednn.objects import ALIGNMENT, Operation, Packed, aligned, bound, memory, new_stream
from fastres.onednn.primitives import Builder, Levels
from tests.measures import relative_error

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="oneDNN's functions cannot be called here")


def built(kind: str, *arguments: Any, **options: Any) -> Operation:
    """Build an operation by the name of the builder's method, with its weights in place."""
    builder = Builder(library.library())
    operation: Operation = getattr(builder, kind)(*arguments, **options)
    builder.pack()
    return operation


def run(operation: Operation, x: Tensor, y: Tensor) -> None:
    """Run ``operation`` from the memory of ``x`` to that of ``y``."""
    onednn, kept = library.library(), list[object]()
    scratchpad = aligned(operation.scratchpad_bytes)
    source, destination = (
        memory(onednn, layout, tensor.data_ptr())
        for layout, tensor in ((operation.source, x), (operation.destination, y))
    )
    stream = new_stream(onednn)
    execution = bound(onednn, operation, stream, source, destination, scratchpad.data_ptr(), kept)
    assert loop_over(onednn, [execution])() == 0


def whole(*shape: int, dtype: torch.dtype = torch.float32, least: int = -3, most: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(least, most, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3), (1, 2, 0)])
def test_convolutions(groups: int, add: bool, kernel: int, stride: int, padding: int) -> None:
    x, weight, bias = whole(2, 13, 10, 16), whole(24, kernel, kernel, 16 // groups), whole(24)
    expected = functional.conv2d(
        x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, stride, padding, groups=groups
    ).permute(0, 2, 3, 1)
    y = whole(*expected.shape)
    expected = (expected + y if add else expected).relu()
    operation = built(
        "convolution",
        tuple(x.shape), tuple(y.shape), weight, bias, known=[], stride=stride, padding=padding, groups=groups,
        relu=True, add=add,
    )  # fmt: skip
    run(operation, x, y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("zero_point", [0, 100])
def test_convolutions_in_8_bit(zero_point: int) -> None:
    x, weight = whole(1, 9, 9, 16, dtype=torch.uint8, least=0, most=20), whole(32, 3, 3, 16, dtype=torch.int8)
    bias, scales = whole(32), torch.linspace(0.5, 1, 32)
    y = whole(1, 9, 9, 32, dtype=torch.uint8, least=0, most=200)
    sums = functional.conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), padding=1)
    exact = sums.permute(0, 2, 3, 1) * 0.25 * scales + bias + 2 * (y.double() - 90)
    expected = (exact / 4 + zero_point).round().clamp(0, 255)
    levels = Levels(0.25, scales, 4.0, zero_point, 2.0, 90)
    operation = built(
        "convolution", (1, 9, 9, 16), (1, 9, 9, 32), weight, bias, known=[], padding=1, add=True, levels=levels
    )
    run(operation, x, y)
    assert int((y.double() - expected).abs().amax()) <= 1
    assert float((y.double() != expected).double().mean()) < 1e-2, "only ties may be rounded the other way"


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 1), (2, 5)])
@pytest.mark.parametrize("mode", ["max", "average"])
def test_pools(size: tuple[int, int], mode: str) -> None:
    x = whole(2, *size, 16)
    planes = x.permute(0, 3, 1, 2)
    if mode == "max":
        expected, kernel, padding = functional.max_pool2d(planes, 3, 2, 1), 3, 1
    else:
        expected = functional.avg_pool2d(planes, 2, 2, ceil_mode=True, count_include_pad=False)
        kernel, padding = 2, 0
    y = torch.empty(expected.permute(0, 2, 3, 1).shape)
    operation = built(
        "pool", tuple(x.shape), tuple(y.shape), mode, torch.float32, kernel=(kernel, kernel), stride=2, padding=padding
    )
    run(operation, x, y)
    assert torch.equal(y, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 19), (16, 16), (33, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("channels", [16, 24, 512])
def test_averages(size: tuple[int, int], dtype: torch.dtype, channels: int) -> None:
    x = whole(3, *size, channels, dtype=dtype, least=0, most=255)
    y = torch.empty(3, channels)
    scale = 0.5 if dtype == torch.uint8 else 1.0
    run(built("averages", (3, *size, channels), dtype, scale), x, y)
    assert relative_error(y, scale * x.double().mean((1, 2))) < 1e-6


@pytest.mark.parametrize("rows", [1, 5])
def test_products(rows: int) -> None:
    x, weight, bias = whole(rows, 48), whole(10, 48), whole(10)
    y = torch.empty(rows, 10)
    run(built("product", rows, weight, bias, []), x, y)
    assert torch.equal(y, x @ weight.T + bias)


def test_products_in_8_bit() -> None:
    x, weight, bias = whole(4, 48, dtype=torch.uint8, least=0), whole(10, 48, dtype=torch.int8), whole(10)
    y, scales = torch.empty(4, 10), torch.full((10,), 0.25)
    run(built("product", 4, weight, bias, [], Levels(0.5, scales)), x, y)
    assert torch.equal(y, x.float() @ weight.float().T * 0.125 + bias)


def test_rows_are_rounded_to_even_levels_and_clipped() -> None:
    x = torch.tensor([[0.0, 0.25, 0.75, 1.25, -3.0, 127.25, 127.75, 1e6, 0.24]] * 3)
    y = torch.empty(x.shape, dtype=torch.uint8)
    run(built("levels", 3, 9, 0.5), x, y)
    assert y.tolist() == [[0, 0, 2, 2, 0, 254, 255, 255, 0]] * 3


def test_pixels_are_rounded_to_even_and_clipped() -> None:
    x = torch.tensor([-5.0, 0.5, 1.5, 2.5, 254.6, 1e9]).view(1, 1, 2, 3)
    scales, shifts = torch.tensor([0.25, 1.0, 2.0]), torch.tensor([0.5, 100.25, -3.0])
    images = (x - shifts.view(1, 3, 1, 1)) / scales.view(1, 3, 1, 1)  # exact, but for the largest number
    levels = torch.empty(1, 3, 2, 3, dtype=torch.uint8)
    run(built("pixels", (1, 2, 3, 3), scales, shifts), images, levels)
    assert levels.flatten().tolist() == [0, 0, 2, 2, 255, 255] * 3


@pytest.mark.parametrize("bases", [(), (4096,)])
def test_an_unknown_argument_of_a_later_version_is_named(
    monkeypatch: pytest.MonkeyPatch, bases: tuple[int, ...]
) -> None:
    monkeypatch.setattr(primitives, "_POST_OPERATIONS", bases)
    scales = torch.ones(3)
    with pytest.raises(OneDnnError, match="has another interface than fastres knows"):
        built("pixels", (1, 2, 3, 3), scales, scales)


def test_levels_are_copied_inside_the_border() -> None:
    x = torch.arange(2 * 3 * 2 * 3, dtype=torch.uint8).view(2, 3, 2, 3)
    picture = torch.full((2, 6, 7, 3), 77, dtype=torch.uint8)
    run(built("bordered", (2, 2, 3, 3), 2), x, picture[:, 2:, 2:])
    assert torch.equal(picture[:, 2:4, 2:5], x.permute(0, 2, 3, 1))
    picture[:, 2:4, 2:5] = 77
    assert bool((picture == 77).all())


def test_equal_layouts_share_weights() -> None:
    builder, weight, bias = Builder(library.library()), whole(16, 3, 3, 16), whole(16)
    known: list[Packed] = []
    for batch in (1, 2, 4):
        builder.convolution((batch, 8, 8, 16), (batch, 8, 8, 16), weight, bias, known=known, padding=1)
    assert not known, "they have no data yet"
    builder.pack()
    assert 1 <= len(known) < 3
    before = list(known)
    builder.convolution((2, 8, 8, 16), (2, 8, 8, 16), weight, bias, known=known, padding=1)
    builder.pack()
    assert known == before


def test_weights_that_are_packed_together_lie_in_one_block() -> None:
    builder = Builder(library.library())
    x, steps = whole(2, 16, 8, 8), []
    for kernel in (1, 3):
        weight, bias = whole(16, kernel, kernel, 16, least=kernel), whole(16)
        shape, padding = (2, 8, 8, 16), kernel // 2
        operation = builder.convolution(shape, shape, weight, bias, known=[], padding=padding)
        steps.append((operation, functional.conv2d(x, weight.permute(0, 3, 1, 2), bias, padding=padding)))
    builder.pack()
    packed = [operation.packed for operation, _ in steps if operation.packed is not None]
    assert len({one.block for one in packed}) == 1
    assert all(one.data.data_ptr() % ALIGNMENT == 0 for one in packed)
    for operation, expected in steps:
        y = torch.empty(2, 8, 8, 16)
        run(operation, x.permute(0, 2, 3, 1).contiguous(), y)
        assert torch.equal(y, expected.permute(0, 2, 3, 1))


def test_weights_that_could_not_be_packed_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, known = Builder(library.library()), list[Packed]()
    builder.convolution((1, 8, 8, 16), (1, 8, 8, 16), whole(16, 1, 1, 16), whole(16), known=known)

    def fail(size: int) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(primitives, "aligned", fail)
    with pytest.raises(MemoryError):
        builder.pack()
    assert not known


def test_objects_die_with_their_last_reference() -> None:
    builder = Builder(library.library())
    operation = builder.convolution((1, 8, 8, 16), (1, 8, 8, 16), whole(16, 1, 1, 16), whole(16), known=[])
    builder.pack()
    alive = [weakref.ref(part) for part in (operation.primitive, operation.source, operation.packed)]
    del operation
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("size", [0, 1, 1000, 2**22 + 5])
def test_memory_is_aligned(size: int) -> None:
    data = aligned(size)
    assert data.nbytes == size
    assert data.data_ptr() % ALIGNMENT == 0
    data.fill_(1)
    assert int(data.sum(dtype=torch.int64)) == size
