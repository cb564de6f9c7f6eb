"""Quantise a model on the user's images with :func:`fastres.quantize`, and export it as an ONNX file in 8 bit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastres.calibration import quantize
from fastres.errors import CalibrationError, InputError
from fastres.model.model import Model
from fastres.model.quantized import QuantizedModel

from .files import checked_target
from .onnx import ExportReport, check_opset, check_runtime, export
from .signature import DEFAULT_OPSET, load_model

# An export fails below this share of images with the same best class.
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True)
class QuantisationReport:
    """The file written, and the differences of 8 bit from float32 on ``judged`` images that had no part in it.

    ``calibrated`` images gave the scales. ``agreement`` is the share of the judged images with the same best class
    (``None`` for networks without a classifier), ``logit_error`` the mean relative L2 error of an image's logits.
    ``kept`` are the steps in float32.
    """

    export: ExportReport
    calibrated: int
    judged: int
    agreement: float | None
    logit_error: float
    kept: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.export.path

    def __str__(self) -> str:
        same = "" if self.agreement is None else f"same best class {self.agreement:.1%}, "
        return (
            f"{self.export}\ncalibrated on {self.calibrated} images; against float32, on {self.judged} others: {same}"
            f"logits differ by {self.logit_error:.1%}"
        )


def export_int8(
    model: str | Model | nn.Module,
    path: str | os.PathLike[str],
    calibration: Any,
    *,
    weights: Any = "DEFAULT",
    opset: int = DEFAULT_OPSET,
    least_agreement: float = LEAST_AGREEMENT,
    weight_limit: int | None = None,
    verify: bool = True,
    progress: bool = True,
    **options: Any,
) -> QuantisationReport:
    """Write ``model`` to ``path`` as one ONNX file that computes in 8 bit.

    ``calibration`` is a folder, a list or any other source of images for :func:`fastres.quantize`, which chooses the
    scales: a few hundred images like those that the model will see. ``weight_limit``, the largest level of a weight, is
    127, or 64 if this processor has no VNNI instructions; give 64 if the file's processor has none. ``options`` are
    those of :func:`fastres.export.onnx.export`, except ``dtype``. The file takes normalised float32 images, or pictures
    with ``preprocessing=True``, and returns float32, like a float32 export. To choose how a model is quantised, or to
    keep it, call :func:`fastres.quantize` and export its result.

    Raises the errors of both functions, and ``CalibrationError`` if the best class is the same as in float32 for less
    than ``least_agreement`` of the images that are kept apart. Nothing is written then.
    """
    check_opset(opset)
    if not 0 <= least_agreement <= 1:
        raise InputError(f"least_agreement is {least_agreement!r}; give a share from 0 to 1")
    if "dtype" in options:
        raise InputError("dtype was given, but files in 8 bit take float32; leave it out")
    target = checked_target(path, model, weights)
    if verify or options.get("time"):
        check_runtime()
    loaded = load_model(model, weights, progress)
    if isinstance(loaded, QuantizedModel):
        raise InputError("The model is in 8 bit already; export it without calibration images, or pass the float model")
    quantized = quantize(loaded, calibration, weight_limit=weight_limit, progress=progress)
    images, found = quantized.record["images"], quantized.record["agreement"]
    agreement = found["agreement"]
    if agreement is not None and not agreement >= least_agreement:
        raise CalibrationError(
            f"The int8 {loaded.architecture.name} names the same best class as float32 for {agreement:.1%} of "
            f"{found['images']} images; at least {least_agreement:.1%} is required. Nothing was written. Calibrate on "
            "more images like those that the model will see, or lower least_agreement"
        )
    report = export(quantized, target, opset=opset, verify=verify, progress=progress, **options)
    calibrated = images["measured"] + images["chosen_on"]
    kept = tuple(quantized.record["kept"])
    return QuantisationReport(report, calibrated, found["images"], agreement, found["logit_error"], kept)
