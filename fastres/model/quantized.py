"""A model in 8 bit, which ``fastres.quantize`` makes and ``fastres.load`` reads from the file that it was saved in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, DeviceError, DtypeError
from fastres.images import presets
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture
from fastres.network.plan import Plan
from fastres.quantisation.tensors import plan_of, tensors_of

from .model import Model
from .predict import require_classifier


class QuantizedModel(Model):
    """A ResNet in 8 bit, with the interface of :class:`fastres.Model`. Its ``dtype`` is ``torch.int8``.

    The values between the stem and the pool are 8-bit integers, and so are the weights. Logits, features and embeddings
    are float32. Normalised input is rounded to the pixels that it comes from; values beyond black and white are
    clipped. The tensors are those of :mod:`fastres.quantisation.tensors`. The model runs on the CPU.

    ``record`` says how the model was made: the checkpoint, the images, the choices and the errors that were measured.
    It is plain data, and is stored in the file that :meth:`save` writes. Its ``signal_to_noise``, in dB by the name of
    the step, is shown by :meth:`explain`.
    """

    record: Mapping[str, Any]
    _template: Plan

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        arch: Architecture,
        *,
        transforms: Transforms,
        categories: Sequence[str] | None = None,
        weights: str = "a state dict",
        record: Mapping[str, Any] | None = None,
    ) -> None:
        plan = plan_of(tensors, arch, transforms.mean, transforms.std)  # checks the tensors
        self._set(_template=_without_weights(plan), record=dict(record or {}))
        super().__init__(tensors, arch, transforms=transforms, categories=categories, weights=weights)

    @classmethod
    def of_plan(cls, plan: Plan, **others: Any) -> QuantizedModel:
        """Return the model of a plan in 8 bit. ``others`` are the arguments after ``arch``."""
        return cls(tensors_of(plan), plan.architecture, **others)

    @property
    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight ``[num_classes, C]`` and bias of the classifier as float32, rounded as they are in 8 bit."""
        require_classifier(self, "classifier")
        state = self.state_dict()
        weight, scale = state["head.weight"].float(), state.get("head.scale")
        return (weight if scale is None else weight * scale[:, None]), state["head.bias"]

    def _description(self) -> dict[str, Any]:
        return {**super()._description(), "record": dict(self.record)}

    def _signal_to_noise(self) -> Mapping[str, float]:
        return self.record.get("signal_to_noise", {})

    def plan_in(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Plan:
        """Return the plan in 8 bit, on the CPU. Raise ``DtypeError`` unless ``dtype`` is int8."""
        if dtype != torch.int8:
            _refuse_dtype(self.architecture, dtype)
        state = self.state_dict()
        with torch.no_grad():
            return plan_of(state, self.architecture, self.transforms.mean, self.transforms.std)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        return torch.int8

    def _outline(self, dtype: torch.dtype) -> Plan:
        return self._template

    def _run_plainly(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        raise ArchitectureError(
            f"torch.export, torch.jit.trace and torch.fx cannot record this {self.architecture.name}: it is in 8 bit, "
            "and its integer convolutions are not among the operations that they know. Write an ONNX file with "
            "'fastres export', or export the float model. torch.compile works"
        )

    # -- the interface of nn.Module --------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """Refuse every conversion: the integers have one meaning, and run on the CPU."""
        try:
            moved = [fn(torch.empty(0, dtype=dtype, device="cpu")) for dtype in (torch.float32, torch.float16)]
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"The model cannot be moved: {error}. A model in 8 bit stays on the CPU") from error
        if moved[0].dtype == moved[1].dtype and moved[0].dtype != torch.int8:
            _refuse_dtype(self.architecture, moved[0].dtype)
        if moved[0].device.type != "cpu":
            raise DeviceError(
                f"This {self.architecture.name} is in 8 bit, which fastres runs on the CPU only, not on "
                f"{moved[0].device}. Use the float model there, which computes in float16"
            )
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ArchitectureError(
            "The tensors of a model in 8 bit belong together with its scales and its record, and cannot be loaded "
            "alone. Load the whole file, fastres.load('model.safetensors'), or quantize the other weights"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "record":
            self._set(record=dict(value))
            return
        if name == "fc" and isinstance(value, nn.Module):
            raise ArchitectureError(
                "The classifier of a model in 8 bit cannot be replaced. Replace that of the float model, and quantize "
                "it again; model.embed(x) gives the classifier's input"
            )
        if name == "transforms":
            given = presets.parse(value)
            if (given.mean, given.std) != (self.transforms.mean, self.transforms.std):
                raise ArchitectureError(
                    f"The normalisation is part of the stem's weights in 8 bit: mean {self.transforms.mean} and std "
                    f"{self.transforms.std} cannot become {given.mean} and {given.std}. Set the transforms of the "
                    "float model, and quantize it again"
                )
        super().__setattr__(name, value)


def _without_weights(plan: Plan) -> Plan:
    """Return the plan with tensors on the ``meta`` device."""
    assert plan.quantisation is not None
    steps = tuple(step.with_parameters([(w.to("meta"), b.to("meta")) for w, b in step.parameters]) for step in plan)
    weights = {name: scale.to("meta") for name, scale in plan.quantisation.weights.items()}
    return replace(plan, steps=steps, quantisation=replace(plan.quantisation, weights=weights))


def _refuse_dtype(arch: Architecture, dtype: torch.dtype) -> NoReturn:
    raise DtypeError(
        f"This {arch.name} is in 8 bit and cannot be converted to {dtype}: the float weights are not in it. Load the "
        "float checkpoint again"
    )
