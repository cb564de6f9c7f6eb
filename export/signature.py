"""The arguments of an export, checked, and the plan and the metadata that follow from them. Nothing here needs onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastres.arguments import image_sides, whole_number
from fastres.errors import DtypeError, InputError, near_matches
from fastres.executors.int8_steps import limited
from fastres.images.transforms import Transforms
from fastres.model.conversion import from_module
from fastres.model.loading import load
from fastres.model.model import Model
from fastres.model.quantized import QuantizedModel
from fastres.network.plan import LOGITS, POOLED, Plan, check_image_size
from fastres.network.quantisation import WEIGHT_LIMIT
from fastres.text import dtype_name
from fastres.weights.hashing import state_sha256

from .errors import ExportError
from .metadata import (
    EMBEDDING,
    SOFTMAX,
    TOP_K,
    TOP_K_INDICES,
    TOP_K_SCORES,
    Metadata,
    describe_quantisation,
    describe_weights,
)

DEFAULT_OPSET = 18
DTYPES = {"float32": torch.float32, "float16": torch.float16}
DYNAMIC = "dynamic"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph.

    ``image_size`` (height, width) and ``batch`` are ``None`` if they are symbolic. With ``preprocessing``, the input is
    uint8 ``[batch, height, width, 3]`` of any height and width. Without it, the input is normalised images
    ``[batch, 3, height, width]`` in ``dtype``. ``outputs`` are ``"logits"``, ``"embedding"``, ``"softmax"``,
    ``"top_k"`` (two outputs: scores and indices) and the plan's features.
    """

    opset: int
    dtype: torch.dtype
    image_size: tuple[int, int] | None
    batch: int | None
    outputs: tuple[str, ...]
    top_k: int
    preprocessing: Transforms | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the graph's outputs, in order; ``"top_k"`` stands for two of them."""
        return tuple(
            name
            for output in self.outputs
            for name in ((TOP_K_SCORES, TOP_K_INDICES) if output == TOP_K else (output,))
        )


def plan_value(plan: Plan, output: str) -> str:
    """Return the name of the plan's value from which ``output`` is computed."""
    if output in (LOGITS, SOFTMAX, TOP_K, TOP_K_SCORES, TOP_K_INDICES):
        return LOGITS
    return POOLED if output == EMBEDDING else plan.features[output]


def check_outputs(outputs: tuple[str, ...], plan: Plan) -> None:
    """Raise ``InputError`` if an output is unknown or given twice, or if none is given."""
    classes = (LOGITS, SOFTMAX, TOP_K) if plan.architecture.num_classes else ()
    known = (*classes, EMBEDDING, *plan.features)
    accepted = f"{plan.architecture.name} has {', '.join(known)}"
    if not outputs:
        raise InputError(f"No outputs were given; {accepted}")
    for output in outputs:
        if output not in known:
            hint = near_matches(str(output), known)
            raise InputError(f"There is no output called {output!r}.{hint} {accepted}")
    if len(set(outputs)) < len(outputs):
        raise InputError(f"Some outputs are given twice: {', '.join(outputs)}; give each once")


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
