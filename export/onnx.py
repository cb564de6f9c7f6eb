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

from fastres.arguments import image_sides, whole_number
from fastres.errors import DtypeError, InputError
from fastres.executors.int8_steps import limited
from fastres.model.conversion import from_module
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.quantized import QuantizedModel
from fastres.network.plan import LOGITS, Plan, check_image_size
from fastres.network.quantisation import WEIGHT_LIMIT
from fastres.quantisation.rounding import dequantised
from fastres.terminal import progress_bar
from fastres.text import dtype_name, path_text
from fastres.weights.hashing import state_sha256

from . import quantised_verification, verification
from .errors import ExportError, missing
from .files import checked_target, replacing
from .graph import Signature, Writer, build_model, check_outputs
from .metadata import Inspection, Metadata, describe_quantisation, describe_weights, inspect
from .quantised_graph import QuantisedWriter
from .timing import Timing, time_files
from .verification import Check

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error

__all__ = ["Check", "ExportReport", "Inspection", "Metadata", "export", "inspect"]

DEFAULT_OPSET = 18
# Opset 13 turned the axes of ReduceSum into an input and gave quantisation an axis. Older opsets need other graphs.
OLDEST_OPSET = 13
DTYPES = {"float32": torch.float32, "float16": torch.float16}
DYNAMIC = "dynamic"


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


def load_model(model: str | Model | nn.Module, weights: Any = "DEFAULT", progress: bool = True) -> Model:
    """Return ``model`` as a fastres model. Raise ``InputError`` if ``weights`` are given for one that has its own."""
    if isinstance(model, str):
        return load(model, weights, progress=progress)
    if not (isinstance(weights, str) and weights == "DEFAULT"):
        raise InputError(
            f"weights were given for a {type(model).__name__}, which has its own; leave them out, or pass the "
            "model's name"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"model is of type {type(model).__name__}; give it by name or as a module")
    return from_module(model)


def fold(model: Model, dtype: torch.dtype, weight_limit: int | None = None) -> Plan:
    """Return the model's plan in ``dtype``, on the CPU; a quantised model's is in 8 bit, with limited weights.

    Raises ``ExportError`` if a folded weight is not finite, ``DtypeError`` for a quantised model in another dtype than
    float32, and ``InputError`` for a limit that is impossible, or given for another model.
    """
    if isinstance(model, QuantizedModel):
        if dtype != torch.float32:
            raise DtypeError(
                f"dtype is {dtype_name(dtype)}, but the model is in 8 bit: its files take float32 and compute in 8 "
                "bit; leave dtype out, or export the float model"
            )
        limit = WEIGHT_LIMIT if weight_limit is None else whole_number(weight_limit, "weight_limit")
        if limit > WEIGHT_LIMIT:
            raise InputError(f"weight_limit is {limit}; give at most {WEIGHT_LIMIT}, the largest int8")
        return limited(model.plan, limit)
    if weight_limit is not None:
        raise InputError("weight_limit is for models in 8 bit, but this model is in float; leave it out")
    plan = model.plan_in(dtype, "cpu")
    for step in plan:
        if not all(w.isfinite().all() and b.to(dtype).isfinite().all() for w, b in step.parameters):
            name = dtype_name(dtype)
            raise ExportError(
                f"{step.name} has weights that are not finite numbers in {name} once batch norm is folded in. "
                f"{'Export float32' if dtype == torch.float16 else 'Check the checkpoint'}"
            )
    return plan


def make_signature(
    model: Model,
    opset: int,
    dtype: str | torch.dtype,
    image_size: int | Sequence[int] | str | None,
    batch: int | str,
    preprocessing: bool,
    outputs: Sequence[str],
    top_k: int,
) -> Signature:
    """Check the arguments of :func:`export` and return them as a signature."""
    crop = model.transforms.crop
    size = parse_image_size(crop if image_size is None else image_size)
    if preprocessing:
        if size not in (None, (crop, crop)):
            raise InputError(
                f"image_size is {image_size}, but preprocessing takes pictures of any size and crops them to "
                f"{crop}×{crop}, as the weights were trained; leave image_size out"
            )
        size = (crop, crop)
    if size is not None:
        check_image_size(model.architecture, *size)
    fixed = None
    if not (isinstance(batch, str) and batch == DYNAMIC):
        try:
            fixed = whole_number(batch, "batch")
        except InputError as error:
            raise InputError(f"batch is {batch!r}; give 'dynamic' or a whole number of at least 1") from error
    top_k = whole_number(top_k, "top_k")
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    transforms = model.transforms if preprocessing else None
    return Signature(opset, parse_dtype(dtype), size, fixed, names, top_k, transforms)


def parse_image_size(size: int | Sequence[int] | str) -> tuple[int, int] | None:
    """Return (height, width), or ``None`` for ``"dynamic"``. Raise ``InputError`` for anything else."""
    if isinstance(size, str) and size == DYNAMIC:
        return None
    try:
        return image_sides(size)
    except InputError as error:
        raise InputError(f"image_size is {size!r}; give a number of pixels, (height, width) or 'dynamic'") from error


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype. Raise ``DtypeError`` if it is neither float32 nor float16."""
    known = DTYPES.get(dtype_name(dtype))
    if known is None:
        raise DtypeError(f"dtype is {dtype}, but exports are in {' or '.join(DTYPES)}; pass one of these")
    return known


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


def describe(model: Model, signature: Signature, plan: Plan) -> Metadata:
    """Return the metadata of the file to write; ``plan`` is the one in the file."""
    weights, sha256 = describe_weights(model)
    return Metadata(
        model=model.architecture.name,
        weights=weights,
        weights_sha256=sha256,
        state_sha256=state_sha256(model.state_dict()),
        class_names=model.categories,
        transforms=model.transforms,
        preprocessing=signature.preprocessing is not None,
        outputs=signature.names,
        opset=signature.opset,
        dtype=dtype_name(signature.dtype) if plan.quantisation is None else "int8",
        quantisation=describe_quantisation(plan, model.record if isinstance(model, QuantizedModel) else {}),
    )


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
