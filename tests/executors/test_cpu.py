"""The CPU executor compared with float64, and with eager's error, on networks whose logits depend on the image."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import DtypeError
from fastres.executors import cpu
from fastres.executors.cpu import CpuExecutor
from fastres.folding.build import build_plan, outline
from fastres.network.architectures import ARCHITECTURES, get_architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.text import dtype_name
from tests.measures import Yardstick
from tests.network.test_architectures import TORCHVISION

pytestmark = pytest.mark.usefixtures("way")

SHAPES = ((2, 64, 64), (1, 75, 97), (2, 64, 64))  # batch, height, width
OTHER_SHAPES = ((3, 64, 75), (1, 33, 41), (4, 48, 32))

# Both ways of a network one after the other: its yardstick takes longer than either.
both_ways = pytest.mark.parametrize("way", ["primitives", "operators"], indirect=True)


def torchvision_module(name: str) -> nn.Module:
    """torchvision's own model with calibrated random weights, in eval mode."""
    with torch.device("meta"):
        module = getattr(torchvision.models, name)(weights=None)
    module.load_state_dict(calibrated(get_architecture(name)).state_dict(), assign=True)
    return module.eval()


def executor(module: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> CpuExecutor:
    return CpuExecutor(build_plan(module.state_dict(), get_architecture(name), dtype=dtype))


def images(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[Tensor]:
    return [smooth_images(*shape, seed=seed) for seed, shape in enumerate(shapes, start=1)]


@functools.lru_cache(maxsize=1)  # the tests of one network are consecutive
def torchvision_yardstick(name: str) -> tuple[nn.Module, Yardstick]:
    module = torchvision_module(name)
    return module, Yardstick(module, *images())


@functools.lru_cache(maxsize=1)
def other_yardstick(name: str) -> tuple[nn.Module, Yardstick]:
    module = calibrated(get_architecture(name))
    # The errors of ten logits vary more than those of a thousand, so more samples of eager's error are needed.
    more = smooth_images(16, 33, 41).split(1)
    return module, Yardstick(module, *images(OTHER_SHAPES), *more)


def logits_of(run: CpuExecutor) -> Callable[[Tensor], Tensor]:
    def logits(x: Tensor) -> Tensor:
        (found,) = run.run(x)
        assert found.dtype == torch.float32
        return found

    return logits


@both_ways
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in TORCHVISION
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        # float16 rounds in the same places as bfloat16, so deeper networks test nothing new.
        if dtype != torch.float16 or name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
    ],
    ids=str,
)
def test_logits(name: str, dtype: torch.dtype) -> None:
    if dtype not in cpu.supported_dtypes():
        pytest.skip(f"this CPU does not compute in {dtype_name(dtype)}")
    module, yardstick = torchvision_yardstick(name)
    yardstick.check(logits_of(executor(module, name, dtype)), dtype)


@both_ways
@pytest.mark.parametrize("name", ["plain18", "resnet20", "plain20", "resnet56", "resnet110"])
def test_networks_that_torchvision_lacks(name: str) -> None:
    module, yardstick = other_yardstick(name)
    yardstick.check(logits_of(executor(module, name)), batches=len(OTHER_SHAPES))


VALUES = ("maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")


def intermediate_values(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of torchvision's layers by name, and the logits."""
    found: dict[str, Tensor] = {}
    layers = {key: module.get_submodule(key) for key in VALUES}
    hooks = [m.register_forward_hook(lambda _, __, y, key=key: found.update({key: y})) for key, m in layers.items()]
    logits = module(x)
    for hook in hooks:
        hook.remove()
    return found | {"avgpool": found["avgpool"].flatten(1), "logits": logits}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_intermediate_values_are_torchvisions(name: str) -> None:
    module = torchvision_module(name)
    run = executor(module, name)
    outputs = (*run._plan.features.values(), "pooled", "logits")

    def values(x: Tensor) -> dict[str, Tensor]:
        found = run.run(x, outputs)
        # Asking for intermediate values does not change them: requested residuals are not overwritten.
        assert torch.equal(found[-1], run.run(x)[0])
        return dict(zip((*VALUES, "logits"), found, strict=True))

    Yardstick(module, *images([(2, 65, 97), (3, 48, 64)]), forward=intermediate_values).check(values)


def test_stops_where_nothing_more_is_asked_for() -> None:
    run = executor(calibrated(get_architecture("resnet18")), "resnet18")
    x = smooth_images(1, 64, 64)
    (stem,) = run.run(x, ("stem",))
    assert stem.shape == (1, 64, 16, 16)
    assert stem.is_contiguous(memory_format=torch.channels_last)


def normalised(module: nn.Module, pixels: Tensor) -> Tensor:
    """Return ``module``'s logits of uint8 pixels, normalised in its own dtype."""
    dtype = next(module.parameters()).dtype
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return module(((pixels.double() / 255 - mean) / std).to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pixels_are_normalised(layout: torch.memory_format) -> None:
    module = calibrated(get_architecture("resnet18"))
    given = [pixels(x).to(memory_format=layout) for x in images([(3, 65, 81), (4, 64, 64)])]
    Yardstick(module, *given, forward=normalised).check(logits_of(executor(module, "resnet18")))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_are_equal_parts_below_the_limit(name: str, dtype: torch.dtype) -> None:
    plan = outline(get_architecture(name), dtype)
    for size in (64, 224, 256, 800):
        shapes = plan.shapes(1, size, size).values()
        image = dtype.itemsize * max(64 * (size // 2) ** 2, *map(math.prod, shapes))  # the stem before its pool
        for n in (1, 2, 7, 8, 11, 32, 64):
            images = cpu.micro_batch(plan, (n, size, size, 3), dtype)
            parts = -(-n // images)
            assert images == 1 or images * image < cpu.MAPPED_BYTES
            assert images == -(-n // parts), "equal parts"
            assert parts == 1 or images == 1 or -(-n // (parts - 1)) * image >= cpu.MAPPED_BYTES, "as few as possible"


def test_the_limit_is_that_of_the_largest_activation() -> None:
    plan = outline(get_architecture("resnet50"), torch.float32)
    images = {n: cpu.micro_batch(plan, (n, 224, 224, 3), torch.float32) for n in (1, 8, 10, 11, 32)}
    assert images == {1: 1, 8: 8, 10: 10, 11: 6, 32: 8}  # 64 × 112 × 112 floats per image: 10.4 images in 32 MiB
    assert cpu.micro_batch(plan, (11, 256, 256, 3), torch.float32) == 6  # of 4 MiB each: 8 of them are at the limit


def images_run(run: CpuExecutor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of images of each part of a batch from now on."""
    images: list[int] = []
    run_part = run._run

    def counted(x: Tensor, outputs: Sequence[str]) -> list[Tensor]:
        images.append(len(x))
        return run_part(x, outputs)

    monkeypatch.setattr(run, "_run", counted)
    return images


def test_a_batch_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torchvision_module("resnet18")
    run = executor(module, "resnet18")
    yardstick = Yardstick(module, smooth_images(5, 64, 75, seed=6))
    x = yardstick.inputs[0]
    (stem,) = run.run(x, ("stem",))
    monkeypatch.setattr(cpu, "MAPPED_BYTES", 3 * 64 * 32 * 38 * 4)  # the stem of three images
    images = images_run(run, monkeypatch)
    yardstick.check(logits_of(run))
    assert images == [2, 2, 1]
    pooled, logits = run.run(x, ("pooled", "logits"))
    assert (pooled.shape, logits.shape) == ((5, 512), (5, 1000))
    # Outputs that would have to be joined are computed in one part.
    images.clear()
    assert torch.equal(run.run(x, ("stem", "logits"))[0], stem)
    assert images == [5]
    # A pixel that is not finite affects only its own image, whichever part the image is in.
    broken = x.clone()
    broken[3, 0, 5, 5] = torch.nan
    (found,) = run.run(broken)
    assert found.isnan().any(1).tolist() == [False, False, False, True, False]


LAST = torch.channels_last
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: x[:, :, 8:72, 16:64],
    "crop of channels-last images": lambda x: x.contiguous(memory_format=LAST)[:, :, 8:72, 16:64],
    "every second pixel": lambda x: x[:, :, ::2, ::2],
    "every second channels-last pixel": lambda x: x.contiguous(memory_format=LAST)[:, :, ::2, ::2],
    "every second image": lambda x: x.repeat_interleave(2, 0).contiguous(memory_format=LAST)[::2],
    "three of five channels": lambda x: torch.cat([x, x[:, :2]], 1)[:, 1:4],
    "three of five channels-last channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, 1:4],
    "transposed": lambda x: x.transpose(2, 3),
    "width before height": lambda x: x.transpose(2, 3).contiguous(memory_format=LAST).transpose(2, 3),
    "channels before images": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one image again and again": lambda x: x[:1].expand(3, -1, -1, -1),
    "grey": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "negated": lambda x: torch._neg_view(x.contiguous(memory_format=LAST)) if x.is_floating_point() else x,
    "one colour": lambda x: x[:, :, :1, :1].expand(-1, -1, 64, 64),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "pixels"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_images_with_any_strides(view: str, batch: int, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    if dtype not in cpu.supported_dtypes():
        pytest.skip("this CPU does not compute in it")
    run = executor(calibrated(get_architecture("resnet18")), "resnet18", dtype)
    x = smooth_images(batch, 80, 80)
    viewed = VIEWS[view](pixels(x) if kind == "pixels" else x.to(dtype))
    dense = viewed.clone(memory_format=torch.contiguous_format)
    assert torch.equal(run.run(viewed)[0], run.run(dense)[0])


def test_input_is_left_as_it_is() -> None:
    run = executor(calibrated(get_architecture("resnet18")), "resnet18")
    x = smooth_images(1, 64, 64).to(memory_format=torch.channels_last)
    before = x.clone()
    run.run(x)
    assert torch.equal(x, before)


def test_dtypes_that_the_cpu_lacks_are_named() -> None:
    lacking = {torch.bfloat16, torch.float16, torch.float64} - set(cpu.supported_dtypes())
    for dtype in lacking:
        with pytest.raises(DtypeError, match=f"does not compute in {dtype_name(dtype)}; it supports float32"):
            cpu.check_dtype(dtype)


def test_every_architecture_has_an_executor() -> None:
    for arch in ARCHITECTURES.values():
        if arch.features <= 512:
            size = 40
            state = EagerResNet(arch).state_dict()
            assert CpuExecutor(build_plan(state, arch)).run(torch.randn(1, 3, size, size))[0].shape == (
                1,
                arch.num_classes,
            )
