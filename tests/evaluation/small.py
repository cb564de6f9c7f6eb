"""Small calibrated networks for the tests of candidates, and how far their answers may be off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fastres
from fastres.bench.digits.data import load_digits
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.evaluation.candidates import Answers
from fastres.executors.reference import ReferenceExecutor
from fastres.images.transforms import Transforms, normalised
from fastres.model.quantized import QuantizedModel
from fastres.network.plan import Plan
from tests.measures import Yardstick, kernel_tolerance, relative_error
from tests.subjects import EVERY_STEP

MOST = 5
BATCH = 4
SPLITS = [1, 3, 4]
NAMES = [f"class {letter}" for letter in "abcdefghij"]


@dataclass(frozen=True)
class Small:
    """The network with every kind of step, eight pictures of 64×64 as uint8, and the measure for its logits."""

    model: fastres.Model
    pixels: Tensor
    yardstick: Yardstick

    def check(self, run: Callable[[Tensor], Answers], dtype: torch.dtype = torch.float32) -> None:
        """Fail if the logits of batches of one to four pictures are too far from float64, or the answers from them."""
        found = [run(part) for part in self.pixels.split(SPLITS)]
        logits = iter([check_form(answers, count) for answers, count in zip(found, SPLITS, strict=True)])
        self.yardstick.check(lambda _: next(logits), dtype, batches=len(SPLITS))


@functools.cache
def small() -> Small:
    """Return the network; nothing may change its model."""
    eager = calibrated(EVERY_STEP, seed=3)
    transforms = Transforms(64, 64)
    model = fastres.Model(eager.state_dict(), EVERY_STEP, transforms=transforms, dtype="float32", categories=NAMES)
    given = pixels(smooth_images(8, 64, 64, seed=4))
    # The errors of ten logits vary, so more samples of eager's error are needed.
    images = [images_of(model, part) for part in (*given.split(SPLITS), *pixels(smooth_images(24, 64, 64)).split(1))]
    return Small(model, given, Yardstick(eager, *images))


def fresh(dtype: str = "float32", categories: list[str] | None = None) -> fastres.Model:
    """Return the model of :func:`small` again, in ``dtype`` and with other class names."""
    model = small().model
    return fastres.Model(
        model.state_dict(), EVERY_STEP, transforms=model.transforms, dtype=dtype, categories=categories
    )


def digits() -> Tensor:
    """Return scans of digits that had no part in the scales of the model in 8 bit, uint8 ``[7, 3, 32, 32]``."""
    return torch.as_tensor(load_digits()[0])[100:107]


def images_of(model: fastres.Model, given: Tensor) -> Tensor:
    """Return normalised images, float32."""
    return normalised(given / 255, model.transforms.mean, model.transforms.std)


def check_form(answers: Answers, count: int, classes: int = 10) -> Tensor:
    """Check shapes, dtypes and order of ``answers`` with logits; return the logits."""
    assert answers.logits is not None
    assert (answers.logits.shape, answers.logits.dtype) == ((count, classes), torch.float32)
    assert (answers.indices.dtype, answers.scores.dtype) == (torch.int64, torch.float32)
    expected = answers.logits.softmax(1).topk(MOST, dim=1)
    assert torch.equal(answers.indices, expected.indices)
    assert torch.equal(answers.scores, expected.values)
    return answers.logits


def check_layers(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], plan: Plan, dtype: torch.dtype) -> None:
    """Fail if a value of ``plan`` is farther from ``truth``, computed in float32, than roundings explain.

    Every step before it may round its weights and its result, and adds the error of its sums.
    """
    reduction = max(weight[0].numel() for step in plan for weight, _ in step.parameters)
    limit = len(plan) * (kernel_tolerance(dtype, reduction, roundings=2) + kernel_tolerance(torch.float32, reduction))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert (value.dtype, value.device.type) == (torch.float32, "cpu"), name
        assert value.shape == truth[name].shape, name
        assert relative_error(value, truth[name]) <= limit, name


def shaken_limits(model: QuantizedModel, given: Tensor, values: tuple[str, ...]) -> dict[str, tuple[Tensor, float]]:
    """Return the reference's ``values`` for pixels, and the largest accepted error of each.

    It is twice the error of a reference whose levels are all moved by one, up or down at random, as in the verification
    of exported files.
    """
    truth = dict(zip(values, ReferenceExecutor(model.plan).run(given, values), strict=True))
    limits = dict.fromkeys(values, 0.0)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        shaken = ReferenceExecutor(model.plan, generator).run(given, values)
        for name, value in zip(values, shaken, strict=True):
            limits[name] = max(limits[name], 2 * relative_error(value, truth[name]))
    return {name: (truth[name], limits[name]) for name in values}
