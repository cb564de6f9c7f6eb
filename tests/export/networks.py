"""Calibrated networks for the export tests, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import fastres
from fastres.bench.measure.calibration import calibrated, smooth_images
from fastres.images.transforms import Transforms
from fastres.network.architectures import get_architecture
from tests.measures import Yardstick
from tests.subjects import EVERY_STEP, shallow

BATCHES = [1, 2, 5]


@dataclass(frozen=True)
class Network:
    """A calibrated model, images ``[8, 3, 48, 71]``, and the measure for logits of ``BATCHES`` of them."""

    model: fastres.Model
    images: Tensor
    yardstick: Yardstick

    def check(self, logits: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Fail if ``logits`` of a batch of the images are too far from float64."""
        self.yardstick.check(logits, dtype, batches=len(BATCHES))


SHALLOW = ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "seresnet50")


@functools.lru_cache(maxsize=1)
def network(name: str) -> Network:
    """Return the network called ``name``, a shallow one if it is in ``SHALLOW``. Only the last one is cached."""
    arch = shallow(name) if name in SHALLOW else get_architecture(name)
    eager = calibrated(arch, seed=3)
    transforms = Transforms(32, 32) if arch.stem == "cifar" else Transforms(256, 224)
    model = fastres.Model(eager.state_dict(), arch, transforms=transforms, dtype="float32")
    images = smooth_images(8, 48, 71, seed=4)
    # The errors of ten logits vary more than those of a thousand, so more samples of eager's error are needed.
    more = smooth_images(24, 48, 71, seed=5).split(1) if arch.num_classes == 10 else ()
    return Network(model, images, Yardstick(eager, *images.split(BATCHES), *more))


def every_step_model() -> fastres.Model:
    """A small calibrated network with every kind of step: deep stem, window pools, squeeze-and-excitation."""
    return fastres.Model(
        calibrated(EVERY_STEP).state_dict(), EVERY_STEP, transforms=Transforms(64, 64), dtype="float32"
    )


def digits_model() -> fastres.Model:
    """The bundled model."""
    return fastres.load("resnet20_digits", dtype="float32")


def session(path: object) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: object, x: Tensor | np.ndarray, *outputs: str) -> list[np.ndarray]:
    """Return the outputs of the file at ``path``: those named, or all."""
    return session(path).run(list(outputs) or None, {"input": np.asarray(x)})
