"""Export to int8: quantise a float32 export on the user's images and compare it with the original before writing it.

This is static quantisation with QuantizeLinear/DequantizeLinear pairs (QDQ), which TensorRT, OpenVINO and ONNX Runtime
read. Weights are int8, symmetric, with one scale per output channel. Activations are int8, symmetric, with one scale
per tensor, as TensorRT requires. There are pairs before every convolution and the classifier, and on both inputs of
every residual addition. There is none between a convolution or an addition and its ReLU, because half of the levels
would go to values that ReLU removes. On resnet20_digits the logits' error is 6.5 % this way, and 25 % with pairs there
as well.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastres.errors import FastresError, InputError
from fastres.model.model import Model
from fastres.network.plan import INPUT, LOGITS
from fastres.terminal import progress_bar
from fastres.text import path_text

from . import verification
from .errors import CalibrationError, ExportFileError, missing
from .files import checked_target, replacing
from .graph import Signature
from .onnx import DEFAULT_OPSET, DYNAMIC, check_file, check_opset, describe, fold, load_model, make_signature, write

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error

# An export fails below this share of images with the same best class.
LEAST_AGREEMENT = 0.95
# With at least this many images, a quarter is not used for calibration but for the report.
ENOUGH_TO_SPLIT = 8
OPERATORS = ["Conv", "Gemm", "Add", "MaxPool"]
WITHOUT_OUTPUT_PAIRS = ["Conv", "Gemm", "Add"]


@dataclass(frozen=True)
class QuantisationReport:
    """The file written, and its differences from float32 on ``judged`` images.

    ``agreement`` is the share of these images with the same best class, ``logit_error`` the relative L2 error of their
    logits. ``held_out`` is True if these images were not used for calibration.
    """

    path: Path
    bytes: int
    calibrated: int
    judged: int
    held_out: bool
    agreement: float
    logit_error: float

    def __str__(self) -> str:
        which = (
            "not used for calibration" if self.held_out else "also used for calibration (too few to keep some apart)"
        )
        return (
            f"{path_text(self.path)}: {self.bytes / 1e6:,.1f} MB, int8, calibrated on {self.calibrated} images\n"
            f"against float32, on {self.judged} images {which}: same best class {self.agreement:.1%}, "
            f"logits differ by {self.logit_error:.1%}"
        )


def export_int8(
    model: str | Model | nn.Module,
    path: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | Sequence[Any],
    *,
    weights: Any = "DEFAULT",
    opset: int = DEFAULT_OPSET,
    image_size: int | Sequence[int] | str | None = None,
    batch: int | str = DYNAMIC,
    least_agreement: float = LEAST_AGREEMENT,
    progress: bool = True,
) -> QuantisationReport:
    """Write ``model`` to ``path`` as one ONNX file quantised to int8.

    ``calibration`` is a folder of images (with its subfolders) or a list of images like those that the model will see.
    A few hundred are enough. The other arguments are those of :func:`fastres.export.onnx.export`. The file takes
    normalised float32 images and returns float32 logits, like a float32 export.

    Raises the errors of :func:`fastres.export.onnx.export`, ``ImageError`` for a damaged image, and
    ``CalibrationError`` if a folder has no images or if the best class is the same as in float32 for less than
    ``least_agreement`` of the images.
    """
    check_opset(opset)
    if not 0 <= least_agreement <= 1:
        raise InputError(f"least_agreement is {least_agreement!r}; give a share from 0 to 1")
    target = checked_target(path, model, weights)
    _quantiser()
    images = find_images(calibration)
    loaded = load_model(model, weights, progress)
    signature = make_signature(loaded, opset, "float32", image_size, batch, False, (LOGITS,), 5)
    if signature.image_size not in (None, (loaded.transforms.crop,) * 2):
        raise InputError(
            f"image_size is {image_size}, but calibration images are cropped to {loaded.transforms.crop} pixels by "
            "the weights' transforms; leave image_size out or give 'dynamic'"
        )
    held_out = len(images) >= ENOUGH_TO_SPLIT
    fitted = [image for i, image in enumerate(images) if i % 4 != 3] if held_out else images
    judges = images[3::4] if held_out else images
    with progress_bar(total=len(fitted) + 2 * len(judges), desc="int8", unit="image", disable=not progress) as bar:
        inputs = _Inputs(loaded, signature, bar)
        plan = fold(loaded, torch.float32)
        with replacing(target) as temporary, tempfile.TemporaryDirectory() as scratch:
            original = Path(scratch) / "float32.onnx"
            metadata = describe(loaded, signature)
            write(plan, signature, metadata, original)
            verification.verify(original, plan, signature)
            _quantise(original, temporary, inputs.reader(fitted))
            _finish(temporary, metadata.as_strings(), signature)
            expected, found = (_logits(file, inputs, judges) for file in (original, temporary))
            agreement = float((found.argmax(1) == expected.argmax(1)).mean())
            error = verification.relative_error(torch.from_numpy(found), torch.from_numpy(expected))
            if not agreement >= least_agreement:
                raise CalibrationError(
                    f"The int8 {loaded.architecture.name} names the same best class as float32 for {agreement:.1%} of "
                    f"{len(judges)} images; at least {least_agreement:.1%} is required. Nothing was written. Calibrate "
                    "on more images like those that the model will see, or lower least_agreement"
                )
            size = temporary.stat().st_size
    return QuantisationReport(target, size, len(fitted), len(judges), held_out, agreement, error)


def find_images(calibration: str | os.PathLike[str] | Sequence[Any]) -> list[Any]:
    """Return the paths of a folder's images in order, or the list itself. Raise ``CalibrationError`` if empty."""
    if not isinstance(calibration, (str, os.PathLike)):
        images = list(calibration)
        if not images:
            raise CalibrationError("No calibration images were given; pass a folder or a list of images")
        return images
    folder = Path(calibration).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CalibrationError(f"The calibration folder {folder} {what}; give a folder of images")
    suffixes = Image.registered_extensions()
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise ExportFileError(
            f"The calibration folder {folder} cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    images = [path for path in files if path.suffix.lower() in suffixes]
    if not images:
        found = f"{len(files)} files, none of them an image" if files else "no files"
        raise CalibrationError(
            f"The calibration folder {folder} has {found}; give a folder with images, such as .jpg or .png"
        )
    return images


class _Inputs:
    """Images in the form that the file takes, one batch at a time."""

    def __init__(self, model: Model, signature: Signature, bar: Any) -> None:
        self.transforms = model.transforms
        self.step = signature.batch or 1
        self.bar = bar

    def batches(self, images: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of images in a batch and the batch, normalised; images are repeated to fill the last one."""
        for start in range(0, len(images), self.step):
            chunk = images[start : start + self.step]
            values = torch.stack([self.transforms(image) for image in chunk]).numpy()
            repeated = np.resize(values, (self.step, *values.shape[1:]))
            yield len(chunk), repeated
            self.bar.update(len(chunk))

    def reader(self, images: Sequence[Any]) -> Any:
        """Return the batches in the form that onnxruntime's calibration reads."""
        batches = self.batches(images)

        class Reader(_quantiser().CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, np.ndarray] | None:
                batch = next(batches, None)
                return None if batch is None else {INPUT: batch[1]}

        return Reader()


def _quantiser() -> Any:
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise missing("onnxruntime") from error
    return quantization


def _quantise(source: Path, target: Path, reader: Any) -> None:
    quantization = _quantiser()
    root = logging.getLogger()
    root.addFilter(_is_no_advice)
    try:
        quantization.quantize_static(
            str(source),
            str(target),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": WITHOUT_OUTPUT_PAIRS,
            },
        )
    except (FastresError, OSError):
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise CalibrationError(f"ONNX Runtime cannot quantise the model ({error}); nothing was written") from error
    finally:
        root.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Drop the quantiser's advice to fold batch norm first: it is folded, and the advice is repeated on every call."""
    return "pre-processing before quantization" not in record.getMessage()


def _finish(path: Path, metadata: dict[str, str], signature: Signature) -> None:
    """Restore the metadata, which the quantiser drops, and check the file."""
    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**metadata, "quantisation": "int8"})
    # The quantiser imports domains of operators that it did not use.
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    path.write_bytes(model.SerializeToString())
    check_file(path, signature)


def _logits(path: Path, inputs: _Inputs, images: Sequence[Any]) -> np.ndarray:
    session = verification.open_session(path)
    return np.concatenate([session.run([LOGITS], {INPUT: x})[0][:count] for count, x in inputs.batches(images)])
