"""Calibrated networks for the export tests, made once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import fastres
from fastres.architectures import get_architecture
from fastres.bench.calibration import calibrated, smooth_images
from fastres.images import Transforms

from ..measures import relative_error
from ..subjects import EVERY_STEP


@dataclass(frozen=True)
class Network:
    """A calibrated model, images ``[8, 3, 48, 71]``, their float64 logits and eager PyTorch's own errors."""

    model: fastres.Model
    images: Tensor
    truth: Tensor
    eager_error: dict[str, float]


@functools.lru_cache(maxsize=1)
def network(name: str, half: bool = True) -> Network:
    """The network called ``name``; only the last one is kept, for the big ones take half a gigabyte.

    Without ``half``, eager's error in float16 is not measured: a CPU takes long over that.
    """
    eager = calibrated(get_architecture(name), seed=3)
    model = fastres.load(name, weights=eager.state_dict(), dtype="float32")
    images = smooth_images(8, 48, 71, seed=4)
    with torch.no_grad():
        single = eager(images)
        truth = eager.double()(images.double())
        errors = {"float32": relative_error(single, truth)}
        if half:
            errors["float16"] = relative_error(eager.half()(images.half()), truth)
    return Network(model, images, truth, errors)


def every_step_model() -> fastres.Model:
    """A small calibrated network with every kind of step: deep stem, window pools, squeeze-and-excitation."""
    return fastres.Model(
        calibrated(EVERY_STEP).state_dict(), EVERY_STEP, transforms=Transforms(64, 64), dtype="float32"
    )


def digits_model() -> fastres.Model:
    """The model in the box."""
    return fastres.load("resnet20_digits", dtype="float32")


def session(path: object) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: object, x: Tensor | np.ndarray, *outputs: str) -> list[np.ndarray]:
    """The outputs of the file at ``path``, all of them unless named."""
    return session(path).run(list(outputs) or None, {"input": np.asarray(x)})
