"""A checkpoint's tensors as a tree of modules, which gives a model's parameters torchvision's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, GradientError
from fastres.text import article

from .changes import Changes, Table, set_data

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Parameters(nn.Module):
    """A module that holds named tensors and cannot be called. The network runs fused, from a folded copy of them.

    The tensors can be changed in every way that PyTorch offers; the next call uses the new values. Settings such as a
    stride or an epsilon cannot be set: the plan is fixed, and would ignore them.
    """

    _names: frozenset[str] = frozenset()  # of the tensors, once they are all there

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.training = False
        for name, tensor in tensors.items():
            if name in _BUFFERS:
                self.register_buffer(name, tensor)
            elif isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._names = frozenset(tensors)

    def __getitem__(self, index: int) -> nn.Module:
        """``model.layer1[0]``, as in torchvision."""
        return self._modules[str(range(len(self._modules))[index])]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(p.shape)}" for name, p in self.named_parameters(recurse=False))

    # -- changes ---------------------------------------------------------------------------------------------

    @property
    def _tables(self) -> tuple[dict[str, Any], ...]:
        return self._parameters, self._buffers

    @property
    def _watchers(self) -> tuple[Changes, ...]:
        return self._parameters.watchers if isinstance(self._parameters, Table) else ()

    def __setattr__(self, name: str, value: Any) -> None:
        inside = self.__dict__.get("_modules", {})
        if isinstance(value, nn.Module) or name in inside:
            raise ArchitectureError(
                f"{name} cannot be replaced by {article(value)} inside a fastres model, which runs a fixed plan. "
                "Assign its tensors (model.conv1.weight = nn.Parameter(…)), load a state dict, or change the "
                "torchvision model and use fastres.from_module"
            )
        if name not in self._names and name != "training" and not name.startswith("_"):
            self._refuse_new(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._names:
            raise ArchitectureError(
                f"{name} cannot be taken from a layer of a fastres model. To parametrise or prune weights, do it with "
                "the torchvision model, make it permanent, and use fastres.from_module"
            )
        super().__delattr__(name)

    def _refuse_new(self, name: str) -> NoReturn:
        raise ArchitectureError(
            f"{name} cannot be set on a layer of a fastres model: the plan is fixed and would ignore it. "
            "Change the torchvision model (make pruning and parametrisations permanent) and use fastres.from_module"
        )

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if self._names and name not in self._names:
            self._refuse_new(name)
        super().register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if self._names and name not in self._names:
            self._refuse_new(name)
        super().register_parameter(name, param)
        if param is not None:
            for changes in self._watchers:
                changes.adopt(param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Parameters:
        """Move or convert the tensors in place, so that they stay the same objects and keep their shared counter."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        rounded = False
        for table in self._tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                with torch.no_grad():
                    result = fn(tensor.detach())
                rounded |= result.dtype != tensor.dtype
                if torch._has_compatible_shallow_copy_type(tensor, result):
                    set_data(tensor, result)
                elif isinstance(tensor, nn.Parameter):
                    table[name] = nn.Parameter(result, requires_grad=tensor.requires_grad)
                else:
                    table[name] = result
        for changes in self._watchers:
            changes.note_values() if rounded else changes.note()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        """Load like any module. With ``assign=True`` the tensors are copied all the same, and keep the given dtype."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if local_metadata.get("assign_to_params_buffers", False):
            for table in self._tables:
                for name, tensor in table.items():
                    if tensor is not None and state_dict.get(prefix + name) is not None:
                        table[name] = _copy(tensor)
            for changes in self._watchers:
                changes.own(self)
                changes.note_values()

    def train(self, mode: bool = True) -> Parameters:
        if mode:
            raise GradientError(
                "A layer of a fastres model cannot be trained: fastres is for inference, with batch norm folded away. "
                "Train the torchvision model, then fastres.from_module(model)"
            )
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Parameters:
        if requires_grad:
            raise GradientError("fastres computes no gradients; train the torchvision model and load its state dict")
        super().requires_grad_(False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return plain_tables(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names = frozenset({*self._parameters, *self._buffers})  # which early versions did not save

    # -- calls -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("called")

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("hooked")

    register_forward_hook = _refuse_hook
    register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook
    register_backward_hook = _refuse_hook

    def _refuse(self, what: str) -> NoReturn:
        raise ArchitectureError(
            f"A layer of a fastres model cannot be {what}: layers run fused, not one by one. "
            "model.features(x) returns the outputs of the stem and of each stage, model.embed(x) returns the pooled "
            "features, and fastres.Backbone(model, return_layers) replaces IntermediateLayerGetter"
        )


def tree(state: Mapping[str, Tensor]) -> dict[str, Parameters]:
    """Return the top-level modules that hold ``state`` (dotted names) as parameters and buffers."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = tensor
    modules = {}
    for name, members in groups.items():
        own = {key: tensor for key, tensor in members.items() if "." not in key}
        module = Parameters(own)
        for child, node in tree({key: tensor for key, tensor in members.items() if "." in key}).items():
            module.add_module(child, node)
        modules[name] = module
    return modules


def plain_tables(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's ``__dict__`` with ordinary dictionaries for its tables, to copy or pickle it."""
    return {name: dict(value) if isinstance(value, Table) else value for name, value in attributes.items()}


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
