"""A checkpoint's tensors as a tree of modules, which gives a model's parameters torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from fastres.errors import ArchitectureError

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Parameters(nn.Module):
    """A module that holds named tensors and cannot be called. The network runs fused, from a folded copy of them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.training = False
        for name, tensor in tensors.items():
            if name in _BUFFERS:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def __getitem__(self, index: int) -> nn.Module:
        """``model.layer1[0]``, as in torchvision."""
        return self._modules[str(range(len(self._modules))[index])]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("called")

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("hooked")

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("hooked")

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
