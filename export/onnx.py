"""Export a model as one ONNX file with ``fastres.export.onnx.export``, and compare the file with the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastres.errors import InputError
from fastres.model.model import Model
from fastres.network.plan import LOGITS, Plan
from fastres.quantisation.rounding import dequantised
from fastres.terminal import progress_bar
from fastres.text import dtype_name, path_text

from . import quantised_verification, verification
from .errors import ExportError, missing
from .files import checked_target, replacing
from .graph import Writer, build_model
from .metadata import Inspection, Metadata, inspect
from .quantised_graph import QuantisedWriter
from .signature import DEFAULT_OPSET, DYNAMIC, Signature, check_outputs, describe, fold, load_model, make_signature
from .timing import Timing, time_files
from .verification import Check

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error

__all__ = ["Check", "ExportReport", "Inspection", "Metadata", "export", "inspect"]

# Opset 13 turned the axes of ReduceSum into an input and gave quantisation an axis. Older opsets need other graphs.
OLDEST_OPSET = 13


@dataclass(frozen=True)
class ExportReport:
    """The file written, its differences from the model, and its times.

    ``checks`` is empty if verification was turned off, ``times`` if they were not requested.
    """

    path: Path
    bytes: int
    opset: int
    dtype: str
    input: tuple[int | str, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]
    times: tuple[Timing, ...] = ()

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.input))
        lines = [
            f"{path_text(self.path)}: {self.bytes / 1e6:,.1f} MB, opset {self.opset}, {self.dtype}, input [{shape}], "
            f"outputs {', '.join(self.outputs)}"
        ]
        lines += [f"verified against fastres, {check}" for check in self.checks] or ["not verified"]
        lines += map(str, self.times)
        return "\n".join(lines)


def export(
    model: str | Model | nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: Any = "DEFAULT",
    opset: int = DEFAULT_OPSET,
    dtype: str | torch.dtype = "float32",
    image_size: int | Sequence[int] | str | None = None,
    batch: int | str = DYNAMIC,
    preprocessing: bool = False,
    outputs: Sequence[str] = (LOGITS,),
    top_k: int = 5,
    verify: bool = True,
    time: bool = False,
    weight_limit: int | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write ``model`` to ``path`` as one ONNX file: folded convolutions, weights inside, metadata.

    ``model`` is a name (loaded with ``weights``, as :func:`fastres.load` takes them), a fastres model or a torchvision
    ResNet. The graph's ``input`` is normalised images ``[batch, 3, height, width]`` in ``dtype`` (``"float32"`` or
    ``"float16"``); its ``logits`` are float32 ``[batch, classes]``. ``batch`` is ``"dynamic"`` or a number.
    ``image_size`` is a number, (height, width), ``"dynamic"``, or ``None`` for the size that the weights' transforms
    crop to (224 for ImageNet's).

    ``preprocessing=True`` puts the weights' resize, crop and normalisation into the graph: ``input`` is then uint8 RGB
    ``[batch, height, width, 3]``, of any height and width. ``outputs`` may also name ``"embedding"`` ``[batch, C]``,
    ``"softmax"``, ``"top_k"`` (``top_k_scores`` and ``top_k_indices``, ``[batch, top_k]``), ``"stem"`` and
    ``"layer1"`` …, ``[batch, C, h, w]`` in ``dtype``.

    The file of a quantised model takes and returns float32 and computes in 8 bit. ``time=True`` times it beside the
    float32 export, in ONNX Runtime and, if it is installed, OpenVINO. ``weight_limit=64`` rounds its weights to levels
    of at most 64: on processors without VNNI instructions, runtimes add two products in 16 bits, which overflows with
    larger weights.

    ``onnx.checker`` checks the file. With ``verify``, ONNX Runtime also runs it at batch 1, 2 and 5, and the results
    are compared with fastres. Only then does the file replace an existing one.

    Raises ``InputError`` for an impossible opset, size, batch or output, ``DtypeError`` for another dtype, the errors
    of :func:`fastres.load`, ``ExportFileError`` if the file cannot be written, ``VerificationError`` if its
    results differ from the model's, and ``MissingDependencyError`` without onnx or (with ``verify``) onnxruntime.
    """
    check_opset(opset)
    target = checked_target(path, model, weights)
    if verify or time:
        check_runtime()
    with _bar(progress, steps=4 + (3 if verify else 0) + (4 if time else 0)) as advance:
        advance("load")
        loaded = load_model(model, weights, progress)
        signature = make_signature(loaded, opset, dtype, image_size, batch, preprocessing, outputs, top_k)
        advance("fold")
        plan = fold(loaded, signature.dtype, weight_limit)
        check_outputs(signature.outputs, plan)
        if time and plan.quantisation is None:
            raise InputError(
                f"time compares files in 8 bit with float32, but this file is in {dtype_name(signature.dtype)}; export "
                "a quantised model, or leave time out"
            )
        metadata = describe(loaded, signature, plan)
        with replacing(target) as temporary:
            advance("write")
            shape = write(plan, signature, metadata, temporary)
            advance("check")
            check_file(temporary, signature)
            checks = verify_file(temporary, plan, signature, advance) if verify else ()
            times = time_file(temporary, loaded, plan, signature, metadata, advance) if time else ()
            size = temporary.stat().st_size
    return ExportReport(target, size, opset, metadata.dtype, shape, signature.names, checks, times)


def check_opset(opset: int) -> None:
    """Raise ``InputError`` for an opset that fastres cannot write or that onnx does not know."""
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"opset is {opset!r}; onnx {onnx.__version__} and fastres write opsets {OLDEST_OPSET} to {newest} "
            f"({DEFAULT_OPSET} suits most runtimes)"
        )


def check_runtime() -> None:
    """Raise ``MissingDependencyError`` without onnxruntime, before any work is done."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise missing("onnxruntime") from error


def write(plan: Plan, signature: Signature, metadata: Metadata, path: Path) -> tuple[int | str, ...]:
    """Write the model of ``plan`` to ``path``; return the shape of its input."""
    writer = Writer if plan.quantisation is None else QuantisedWriter
    model = build_model(plan, signature, metadata.as_strings(), writer)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    path.write_bytes(model.SerializeToString())
    return tuple(dim.dim_param or dim.dim_value for dim in dims)


def verify_file(
    path: Path, plan: Plan, signature: Signature, progress: Callable[[str], object] = lambda what: None
) -> tuple[Check, ...]:
    """Compare the file with the model, on the CPU: see ``verify`` of the modules for float and for 8 bit."""
    verify = verification.verify if plan.quantisation is None else quantised_verification.verify
    return verify(path, plan, signature, progress)


def time_file(
    path: Path, model: Model, plan: Plan, signature: Signature, metadata: Metadata, progress: Callable[[str], object]
) -> tuple[Timing, ...]:
    """Time a file in 8 bit beside the float32 export of the same network, on noise."""
    crop = model.transforms.crop
    height, width = signature.image_size or (crop, crop)

    generator = np.random.default_rng(0)

    def inputs(batch: int) -> np.ndarray:
        if signature.preprocessing is not None:
            side = model.transforms.resize
            return generator.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        return generator.standard_normal((batch, 3, height, width), np.float32)

    with tempfile.TemporaryDirectory() as folder:
        float32 = Path(folder) / "float32.onnx"
        write(dequantised(plan), signature, metadata, float32)
        return time_files(path, float32, inputs, signature.batch, progress)


def check_file(path: Path, signature: Signature) -> None:
    """Raise ``ExportError`` if the file fails onnx's full check (with shape inference) or has another opset."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(
            f"onnx {onnx.__version__} rejects the exported file ({error}); nothing was written"
        ) from error
    written = _read_opsets(path)
    if written != {"": signature.opset}:
        raise ExportError(f"The file has opsets {written}, not {signature.opset} as requested; nothing was written")


def _read_opsets(path: Path) -> dict[str, int]:
    model = onnx.load(str(path), load_external_data=False)
    return {opset.domain: opset.version for opset in model.opset_import}


@contextmanager
def _bar(progress: bool, steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr with the name of the current step; yield the function that begins the next step."""
    with progress_bar(total=steps, disable=not progress, bar_format="{desc:<18} {bar} {elapsed}") as bar:
        begun = 0

        def advance(what: str) -> None:
            nonlocal begun
            bar.update(min(begun, 1))
            begun += 1
            bar.set_description_str(what)

        yield advance
        bar.update(bar.total - bar.n)
        bar.set_description_str("exported")
