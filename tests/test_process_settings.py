"""Settings of the process, such as torch's default dtype and device, do not reach fastres's results."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from tests.subjects import EVERY_STEP

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("fastres", "kernels", "export")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
FACTORIES = {"arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn"}
FACTORIES |= {"scalar_tensor", "tensor", "zeros"}
INTEGERS = {"randint", "randperm"}  # whose dtype does not depend on the default


def unspecified(source: str) -> Iterator[str]:
    """Yield each call in ``source`` that makes a tensor and leaves its dtype or device to the process's defaults."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "torch"
        ):
            given = {keyword.arg for keyword in node.keywords}
            needed = {"device"} if node.func.attr in INTEGERS else {"device", "dtype"}
            if node.func.attr in FACTORIES | INTEGERS and not needed <= given:
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_new_tensor_has_a_dtype_and_a_device(path: Path) -> None:
    assert list(unspecified(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_calls() -> None:
    assert list(unspecified("torch.zeros(3, device='cpu')")) == ["line 1: torch.zeros(3, device='cpu')"]
    assert list(unspecified("torch.randperm(3)")) == ["line 1: torch.randperm(3)"]
    assert not list(unspecified("torch.zeros(3, dtype=d, device='cpu'); torch.randperm(3, device=d); x.zeros(1)"))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


IMAGES = smooth_images(2, 64, 64, seed=4)
PIXELS = pixels(IMAGES)
PHOTOGRAPH = PIXELS[0].permute(1, 2, 0).numpy()


def outputs(model: fastres.Model) -> list[Tensor]:
    """Return everything that a model computes, for normalised images, raw pixels and one photograph."""
    predicted = model.predict(PHOTOGRAPH)
    prepared = model.transforms(PHOTOGRAPH)
    return [
        model(IMAGES), model(PIXELS), model.embed(IMAGES), *model.features(IMAGES).values(), model(IMAGES[:0]),
        prepared, model(prepared[None]), model(model.transforms.batch([PHOTOGRAPH])), model(IMAGES.double().float()),
        torch.tensor([row.score for row in predicted], dtype=torch.float64, device="cpu"),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["resnet18", "resnet20", "seresnet-d"])
def model(request: pytest.FixtureRequest) -> fastres.Model:
    torch.manual_seed(0)
    if request.param == "seresnet-d":
        return fastres.from_module(calibrated(EVERY_STEP))
    return fastres.load(request.param, weights=None)


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on(model: fastres.Model, setting: str) -> None:
    expected = outputs(model)
    with SETTINGS[setting]():
        fresh = fastres.Model(model.state_dict(), model.architecture, transforms=model.transforms)
        found = outputs(fresh)
    for value, truth in zip(found, expected, strict=True):
        assert value.dtype == truth.dtype
        assert value.device == truth.device
        assert torch.equal(value, truth)
