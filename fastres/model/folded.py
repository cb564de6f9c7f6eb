"""A network that runs from a folded copy of its tensors, and follows every change of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, DeviceError, DtypeError, GradientError
from fastres.folding.build import build_plan, outline
from fastres.forks import Guard
from fastres.images import presets
from fastres.images.categories import parse as parse_names
from fastres.images.transforms import Transforms, normalised
from fastres.network.architectures import Architecture
from fastres.network.plan import LOGITS, POOLED, Plan, Shape
from fastres.text import dtype_name
from fastres.weights.transformers_config import of_processor

from . import compiled, plain
from .changes import Changes
from .derived import Derived, Executor, check_can_fold, check_device, check_tensors, make_executor
from .inputs import check_input, check_traced
from .parameters import Parameters, plain_tables, tree

_Folded = TypeVar("_Folded", bound="Folded")

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Folded(nn.Module):
    """The part of :class:`fastres.Model` that holds the tensors, folds them and runs the network.

    The parameters and buffers are those of the checkpoint, in float32 and under torchvision's names. The network runs
    from a folded copy of them, which computes in ``dtype``. After a change (:mod:`fastres.model.changes`), the next
    call folds them again: a call always uses the weights that ``state_dict()`` shows. Training and gradients raise
    ``GradientError``.
    """

    architecture: Architecture
    transforms: Transforms
    categories: tuple[str, ...] | None
    _changes: Changes
    _derived: Derived
    _guard: Guard
    _key: str

    def __init__(
        self,
        state: Mapping[str, Tensor],
        arch: Architecture,
        *,
        transforms: Transforms,
        categories: Sequence[str] | None = None,
        dtype: torch.dtype | str = "auto",
        weights: str = "a state dict",
    ) -> None:
        super().__init__()
        self.training = False
        self._set(architecture=arch, transforms=transforms)
        self.categories = categories if arch.num_classes else ()  # type: ignore[assignment]
        self._source = weights
        self._requested_dtype = parse_dtype(dtype)
        for name, child in tree(state).items():
            self.add_module(name, child)
        self._begin()

    # -- properties ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return self._current().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation: the one requested, or else float16 on CUDA and float32 on the CPU."""
        return self._current().dtype

    @property
    def weights(self) -> str:
        """Where the weights come from, and whether they have changed since."""
        return f"{self._source}, changed since" if self._changes.values_changed else self._source

    @property
    def num_classes(self) -> int:
        return self.architecture.num_classes

    @property
    def outline(self) -> Plan:
        """The plan without weight data (tensors on the ``meta`` device): shapes, costs and structure only."""
        return self._current().outline

    @property
    def plan(self) -> Plan:
        """The network as fused steps, with folded weights in the model's dtype and on its device.

        Each access builds a new plan. Raises ``ArchitectureError`` if the tensors are no longer those of the
        architecture, and ``DeviceError`` if they are on several devices.
        """
        return self.plan_in(self.dtype)

    def plan_in(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Plan:
        """Return :attr:`plan` with weights in ``dtype`` and on ``device`` (the model's by default)."""
        state = self.state_dict()
        check_tensors(self, state, self.architecture, self.device)
        mean, std = self.transforms.mean, self.transforms.std
        with torch.no_grad():
            moved = {key: tensor.to(device or self.device) for key, tensor in state.items()}
            return build_plan(moved, self.architecture, dtype=dtype, mean=mean, std=std)

    def refresh(self) -> None:
        """Fold the weights again at the next call. Needed only after changes that PyTorch does not count.

        These are writes through ``buffer.data``, and by NumPy, DLPack, another library's kernel or another process.
        All others are noticed.
        """
        self._changes.note_values()

    # -- running ---------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return compiled.run(compiled.without_gradient(x), self._key, outputs)
        if torch.compiler.is_exporting() or compiled.is_recorded(x):
            return self._run_plainly(x, outputs)
        derived = self._current()
        if compiled.needs_op(x):
            return compiled.run(x, self._key, outputs)
        check_input(x, self.architecture, derived.device)
        if x.shape[0] == 0:
            return self._empty(x.shape, outputs)
        executor = self._executor_of(derived)
        if not torch.is_grad_enabled():  # most calls: the context takes as long as all checks of the input
            return executor.run(x, outputs)
        with torch.no_grad():
            return executor.run(x, outputs)

    def _run_plainly(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        """Compute ``outputs`` with PyTorch's own operations, for a program that a tracer records."""
        if isinstance(x, Tensor):
            check_traced(x)
            if x.dtype == torch.uint8:
                x = normalised(x.to(torch.float32) / 255, self.transforms.mean, self.transforms.std)
            x = x.to(self.dtype)
        return plain.run(x, plain.tensors_of(self), self.architecture, outputs, self.dtype)

    def _empty(
        self, shape: Sequence[int], outputs: tuple[str, ...], device: torch.device | None = None
    ) -> list[Tensor]:
        """Return uninitialised outputs for an input of ``shape``, in the layouts that the executors return."""
        n, _, h, w = shape
        shapes: dict[str, Shape] = self.outline.shapes(n, h, w)
        device = device or self.device
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        results = []
        for output in outputs:
            if output == LOGITS:
                results.append(torch.empty(shapes[LOGITS], dtype=torch.float32, device=device))
            elif output == POOLED:
                results.append(torch.empty(n, self.architecture.features, dtype=dtype, device=device))
            else:
                nhwc = torch.empty(shapes[output], dtype=dtype, device=device)
                results.append(nhwc.permute(0, 3, 1, 2))
        return results

    # -- what is derived from the tensors --------------------------------------------------------------------

    def _begin(self) -> None:
        """Watch the tensors, and derive from them what does not need their values."""
        changes = Changes()
        changes.own(self)
        self._set(_changes=changes, _guard=Guard())
        self._derive()

    def _current(self) -> Derived:
        derived = self._derived
        if torch.compiler.is_compiling() or derived.stamp == self._changes.stamp:
            return derived  # compiled code looks for changes when it runs
        return self._derive()

    def _derive(self) -> Derived:
        """Discard what was derived from tensors, a dtype or transforms that have changed since."""
        with self._guard:
            stamp = self._changes.follow(self)
            first = next((tensor for tensor in (*self.parameters(), *self.buffers())), None)
            device = torch.device("cpu") if first is None else first.device
            dtype = self._compute_dtype(device)
            derived = Derived(stamp, device, dtype, self._outline(dtype))
            before = self.__dict__.get("_derived")
            if before is None or before.outline is not derived.outline or before.device != device:
                self._set(_key=compiled.register(self))  # compiled code relies on the shapes, dtype and device
            self._set(_derived=derived)
        return derived

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        return self._requested_dtype or (torch.float16 if device.type == "cuda" else torch.float32)

    def _outline(self, dtype: torch.dtype) -> Plan:
        return outline(self.architecture, dtype, self.transforms.mean, self.transforms.std)

    def _executor_of(self, derived: Derived) -> Executor:
        executor = derived.executor
        if executor is None:
            with derived.guard:
                executor = derived.executor
                if executor is None:
                    check_can_fold(derived.device, derived.dtype)
                    executor = derived.executor = make_executor(
                        self.plan_in(derived.dtype, derived.device), derived.device
                    )
        return executor

    @property
    def _executor(self) -> Executor:
        return self._executor_of(self._current())

    def _set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    # -- the interface of nn.Module --------------------------------------------------------------------------

    def _apply(self: _Folded, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Folded:
        """Implement ``.cuda()``, ``.to()``, ``.half()`` and similar methods.

        Moves the parameters, stores the dtype, and discards the folded copy, which the next call builds again.
        """
        try:
            moved = [fn(torch.empty(0, dtype=dtype, device=self.device)) for dtype in (torch.float32, torch.float16)]
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(
                f"The model cannot be moved: {error}. "
                f"{'A CUDA GPU is available' if torch.cuda.is_available() else 'No CUDA GPU is available here'}; "
                "model.to('cpu') always works"
            ) from error
        device = moved[0].device
        check_device(device)
        if moved[0].dtype == moved[1].dtype:
            self._requested_dtype = parse_dtype(moved[0].dtype)
        super()._apply(lambda tensor: tensor.to(device), recurse)
        self._derive()
        return self

    def share_memory(self: _Folded) -> _Folded:
        """Move the tensors to shared memory. If another process changes them, call :meth:`refresh` here."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.share_memory_()
        return self

    def train(self: _Folded, mode: bool = True) -> _Folded:
        if mode:
            raise GradientError(
                "fastres is for inference: batch norm is folded away and no gradients are computed. Train the "
                "torchvision model, then fastres.from_module(model) or fastres.load(name, weights=state_dict). For "
                "feature maps, call model.features(x, layers) instead of a feature extractor"
            )
        return super().train(False)

    def requires_grad_(self: _Folded, requires_grad: bool = True) -> _Folded:
        if requires_grad:
            raise GradientError("fastres computes no gradients; train the torchvision model and load its state dict")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" in self.__dict__ and (name in self._modules or (name == "fc" and isinstance(value, nn.Module))):
            self._replace_head(name, value)
        elif isinstance(value, nn.Module):
            raise ArchitectureError(
                f"model.{name} cannot be set: fastres runs a fixed plan and would ignore the module. "
                "Change the torchvision model and use fastres.from_module"
            )
        elif name == "transforms":
            self._set(transforms=presets.parse(of_processor(value)))
            self._changes.note()
        elif name == "categories":
            self._set(categories=None if value is None else parse_names(value, self.num_classes))
        elif name in ("architecture", "weights"):
            raise ArchitectureError(
                f"model.{name} cannot be set; load another model, or change its tensors with model.load_state_dict"
            )
        else:
            super().__setattr__(name, value)

    def _replace_head(self, name: str, value: Any) -> None:
        features = self.architecture.features
        if name == "fc" and isinstance(value, nn.Identity):
            self._set(architecture=self.architecture.with_classes(0))
            self._modules.pop("fc", None)
            self.categories = ()
        elif name == "fc" and isinstance(value, nn.Linear) and value.in_features == features and value.bias is not None:
            head = {part: _placed(tensor, self.device) for part, tensor in value.named_parameters()}
            self._set(architecture=self.architecture.with_classes(value.out_features))
            self._modules["fc"] = Parameters(head)
            for parameter in head.values():
                self._changes.adopt(parameter)
            if self.categories is not None and len(self.categories) != value.out_features:
                self.categories = None
        else:
            raise ArchitectureError(
                f"model.{name} cannot be replaced by {type(value).__name__}: fastres runs a fixed plan. "
                f"model.fc takes an nn.Linear({features}, classes), or nn.Identity() for no classifier; "
                "model.embed(x) gives the classifier's input; "
                "for anything else change the torchvision model and use fastres.from_module"
            )
        self._derive()

    def __prepare_scriptable__(self) -> NoReturn:
        raise ArchitectureError(
            "torch.jit.script cannot compile a fastres model. torch.jit.trace(model, x) and "
            "torch.export.export(model, (x,)) make programs with its weights, and 'fastres export' writes files"
        )

    def __copy__(self: _Folded) -> _Folded:
        """Return a model that shares the tensors, like a shallow copy of any module."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._set(_guard=Guard(), _derived=None)
        twin._derive()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_changes", "_derived", "_guard", "_key")
        state = {key: value for key, value in plain_tables(super().__getstate__()).items() if key not in derived}
        return {**state, "_source": self.weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "weights" in state:  # of version 0.1.0 and earlier
            state["_source"] = state.pop("weights")
        super().__setstate__(state)
        self._begin()


def _placed(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return ``parameter`` itself if it is a float32 tensor on ``device``, otherwise a converted copy."""
    if parameter.dtype == torch.float32 and parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device, torch.float32), requires_grad=False)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Return the compute dtype for a ``torch.dtype`` or its name, ``None`` for ``"auto"``. Raises ``DtypeError``."""
    if dtype == "auto":
        return None
    names = {dtype_name(known): known for known in COMPUTE_DTYPES}
    known = names.get(dtype_name(dtype))
    if known is None:
        eight = ". For int8, call fastres.quantize(model, images)" if dtype_name(dtype) == "int8" else ""
        raise DtypeError(
            f"dtype is {dtype}, but fastres computes in {', '.join(names)}; pass one of these or 'auto'{eight}"
        )
    return known
