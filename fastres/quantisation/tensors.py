"""A plan in 8 bit as named tensors, as a model holds them and a file stores them.

Each step has ``weight`` and ``bias``. A step in 8 bit has an int8 weight and its ``scale`` ``[K]``. A step that writes
a value in 8 bit has ``output_scale`` and ``output_zero_point``, both of shape ``[]``. Weights of convolutions are
``[K, C / groups, R, S]``, as in a checkpoint. The classifier has ``input_scale`` for the pooled features. A convolution
in 8 bit with a residual may have ``branch_scale`` and ``branch_zero_point`` (:mod:`fastres.quantisation.branches`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastres.errors import ArchitectureError
from fastres.folding.build import outline
from fastres.network.architectures import Architecture
from fastres.network.normalisation import Triple
from fastres.network.plan import INPUT, POOLED, Head, Plan, SqueezeExcite, Step
from fastres.network.quantisation import LARGEST, Quantisation, Scale

from .branches import residual_convolutions
from .rounding import PIXELS, quantisable, values_in_8_bit


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of ``plan``, in 8 bit, by name."""
    quantisation = plan.quantisation
    assert quantisation is not None
    found: dict[str, Tensor] = {}
    for step in plan:
        names = ("", "expand_") if isinstance(step, SqueezeExcite) else ("",)
        for name, (weight, bias) in zip(names, step.parameters, strict=False):  # a pool has none
            found[f"{step.name}.{name}weight"] = _channels_first(weight)
            found[f"{step.name}.{name}bias"] = bias
        if step.name in quantisation.weights:
            found[f"{step.name}.scale"] = quantisation.weights[step.name]
        for kind, name, scales in (
            ("output", step.output, quantisation.values),
            ("branch", step.name, quantisation.branches),
        ):
            if name in scales:
                scale, zero_point = scales[name].scale, scales[name].zero_point
                found[f"{step.name}.{kind}_scale"] = torch.tensor(scale, dtype=torch.float32, device="cpu")
                found[f"{step.name}.{kind}_zero_point"] = torch.tensor(zero_point, dtype=torch.int32, device="cpu")
    if POOLED in quantisation.values:
        pooled = quantisation.values[POOLED].scale
        found[f"{plan.head.name}.input_scale"] = torch.tensor(pooled, dtype=torch.float32, device="cpu")
    return found


def plan_of(tensors: Mapping[str, Tensor], arch: Architecture, mean: Triple, std: Triple) -> Plan:
    """Return the plan in 8 bit of ``arch`` with ``tensors``, the result of :func:`tensors_of`.

    Raises ``ArchitectureError`` for missing, additional or wrongly shaped tensors, other dtypes, and scales that do not
    fit the steps.
    """
    template = outline(arch, torch.float32, mean, std)
    names = [name for name in quantisable(template) if f"{name}.scale" in tensors]
    in_8_bit = values_in_8_bit(template, names)
    adding = [step.name for step in residual_convolutions(template) if step.name in names]
    branches = [name for name in adding if f"{name}.branch_scale" in tensors]
    _check(tensors, _shapes(template, names, in_8_bit, branches), arch)
    weights = {name: tensors[f"{name}.scale"] for name in names}
    values: dict[str, Scale] = {INPUT: PIXELS} if INPUT in in_8_bit else {}
    for step in template:
        if step.output in in_8_bit:
            zero_point = tensors[f"{step.name}.output_zero_point"]
            values[step.output] = _scale(step.name, tensors[f"{step.name}.output_scale"], zero_point)
    if POOLED in in_8_bit:
        head = template.head.name
        values[POOLED] = _scale(head, tensors[f"{head}.input_scale"], None)
    steps = tuple(_with_tensors(step, tensors) for step in template)
    scales = {
        name: _scale(name, tensors[f"{name}.branch_scale"], tensors[f"{name}.branch_zero_point"]) for name in branches
    }
    return replace(template, steps=steps, quantisation=Quantisation(values, weights, scales))


def _with_tensors(step: Step, tensors: Mapping[str, Tensor]) -> Step:
    names = ("", "expand_") if isinstance(step, SqueezeExcite) else ("",)
    pairs = [
        (_channels_last(tensors[f"{step.name}.{name}weight"]), tensors[f"{step.name}.{name}bias"])
        for name, _ in zip(names, step.parameters, strict=False)
    ]
    return step.with_parameters(pairs)


def _shapes(
    plan: Plan, names: list[str], in_8_bit: tuple[str, ...], branches: list[str]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that a plan like ``plan`` has, if the steps ``names`` are in 8 bit.

    The steps ``branches`` have scales of their branches.
    """
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for step in plan:
        kinds = ("", "expand_") if isinstance(step, SqueezeExcite) else ("",)
        for kind, (weight, bias) in zip(kinds, step.parameters, strict=False):
            dtype = torch.int8 if step.name in names else torch.float32
            found[f"{step.name}.{kind}weight"] = (dtype, tuple(_channels_first(weight).shape))
            found[f"{step.name}.{kind}bias"] = (torch.float32, tuple(bias.shape))
        if step.name in names:
            found[f"{step.name}.scale"] = (torch.float32, (step.weight.shape[0],))
        for kind, has_scale in (("output", step.output in in_8_bit), ("branch", step.name in branches)):
            if has_scale:
                found[f"{step.name}.{kind}_scale"] = (torch.float32, ())
                found[f"{step.name}.{kind}_zero_point"] = (torch.int32, ())
        if isinstance(step, Head) and POOLED in in_8_bit:
            found[f"{step.name}.input_scale"] = (torch.float32, ())
    return found


def _check(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], arch: Architecture
) -> None:
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is additional" for name in tensors if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in tensors and (tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape):
            found = f"{str(tensors[name].dtype).removeprefix('torch.')} {list(tensors[name].shape)}"
            wrong.append(f"{name} is {found}, not {str(dtype).removeprefix('torch.')} {list(shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArchitectureError(
            f"These are not the tensors of {arch.name} in 8 bit: {'; '.join(wrong[:3])}{more}. "
            "Make the model again with fastres.quantize"
        )


def _scale(step: str, scale: Tensor, zero_point: Tensor | None) -> Scale:
    number, zero = float(scale), 0 if zero_point is None else int(zero_point)
    if not 0 < number < float("inf") or not 0 <= zero <= LARGEST:
        raise ArchitectureError(
            f"{step} has a scale of {number} and a zero point of {zero}, but a scale is positive and a zero point is "
            f"from 0 to {LARGEST}. Make the model again with fastres.quantize"
        )
    return Scale(number, zero)


def _channels_first(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 1, 2).contiguous() if weight.dim() == 4 else weight


def _channels_last(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).contiguous() if weight.dim() == 4 else weight
