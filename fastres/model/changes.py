"""Notice every change of a model's tensors. A check reads one number, however many tensors the model has.

PyTorch counts the changes of each tensor, and an alias made by ``detach()`` shares the counter of its tensor. So all
tensors of a model are made as aliases of one empty tensor and get their data afterwards: ``copy_``, ``mul_``,
``load_state_dict``, an optimiser's step, and writes to a view or an alias of any of them advance one counter.

Assignments advance no counter. ``parameter.data = …`` is reported by :class:`Weight`, and ``module.weight = …``,
``functional_call`` and the like by :class:`Table`. Tensors that a user assigned have their own counters, which are read
one by one.

PyTorch does not count writes through ``buffer.data``, or by NumPy, DLPack, another library's kernel or another process.
``model.refresh()`` reports those. Buffers have no class of their own that could report ``data``, because the tracers of
PyTorch refuse tensors of unknown classes. They accept subclasses of ``nn.Parameter``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Stamp = tuple[object, ...]


class Changes:
    """Counts the changes of a model's tensors. Two equal stamps mean that nothing has changed in between."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self._counter = torch.empty(0, dtype=torch.float32, device="cpu")
        self._last = object()  # replaced by every assignment
        self._assigned = False
        # torch.utils.swap_tensors refuses a tensor that has a weak reference. It would replace one without a trace.
        self._own: dict[int, weakref.ref[Tensor]] = {}
        self._others: tuple[Tensor, ...] = ()

    def note(self) -> None:
        """Report a change that no counter shows."""
        self._last = object()

    def note_values(self) -> None:
        """Report that a tensor has other values, which no counter shows."""
        self._assigned = True
        self.note()

    @property
    def stamp(self) -> Stamp:
        """A value that differs from all earlier ones if something has changed."""
        if self._others:
            return self._last, self._counter._version, *map(_state, self._others)
        return self._last, self._counter._version

    @property
    def values_changed(self) -> bool:
        """True if the tensors may hold other values than when they were made."""
        return self._assigned or self._counter._version > 0 or bool(self._others)

    def own(self, module: nn.Module) -> None:
        """Replace the tensors of ``module`` and its submodules by ones that share the counter.

        They use the same memory, except that inference tensors, which cannot be counted, are copied.
        """
        made: dict[int, Tensor] = {}
        for node in module.modules():
            tables: tuple[dict[str, Any], ...] = (node._parameters, node._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and not self._owns(tensor):
                        if id(tensor) not in made:
                            made[id(tensor)] = self._alias(tensor)
                        table[name] = made[id(tensor)]

    def _alias(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            data = tensor.detach()
            if data.is_inference():
                data = data.clone()
            made = self._counter.detach()
            if isinstance(tensor, nn.Parameter):
                made = Weight(made, requires_grad=False)
                made.changes = self
        set_data(made, data)
        self._own[id(made)] = weakref.ref(made)
        return made

    def _owns(self, tensor: Tensor) -> bool:
        known = self._own.get(id(tensor))
        return known is not None and known() is tensor

    def adopt(self, parameter: nn.Parameter) -> None:
        """Make a user's parameter report assignments to its ``data``, by a change of its class."""
        if type(parameter) is nn.Parameter:
            parameter.__class__ = Weight
            parameter.changes = self  # type: ignore[attr-defined]

    def follow(self, module: nn.Module) -> Stamp:
        """Watch ``module`` with the tensors and submodules that it has now, and return the stamp of this state."""
        last = self._last  # read first: an assignment by another thread must make the stamp old
        others = []
        for node in module.modules():
            for kind in ("_parameters", "_buffers", "_modules"):
                table = node.__dict__[kind]
                if not isinstance(table, Table):
                    table = node.__dict__[kind] = Table(table)
                table.report_to(self)
            tensors = (*node._parameters.values(), *node._buffers.values())
            others += [tensor for tensor in tensors if tensor is not None and not self._owns(tensor)]
        self._others = tuple(others)
        return (last, *self.stamp[1:])


def _state(tensor: Tensor) -> object:
    """Return a value that changes with ``tensor``, which the user or another library made."""
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # an inference tensor, or one that torch.func has wrapped: count every call as a change
        return object()


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` the memory, shape, dtype and device of ``data``, without a report."""
    Tensor.data.__set__(tensor, data)  # type: ignore[attr-defined]


class Weight(nn.Parameter):
    """A model's parameter. It reports when it gets other data. Copies and pickles of it are plain parameters."""

    changes: Changes

    @property
    def data(self) -> Tensor:
        """An alias. Unlike that of other tensors, it shares the counter, so that writes to it are noticed.

        Assigned data are copied. Nobody could notice later changes of memory that PyTorch does not know to be shared.
        """
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            set_data(self, value.clone())
        self.changes.note_values()

    def detach(self) -> Tensor:
        """Return a plain alias. Only ``nn.Parameter(weight)`` gets one of this class, which it insists on."""
        alias = super().detach()
        if sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            alias = torch.Tensor._make_subclass(Weight, alias)
            alias.changes = self.changes
        return alias

    def _plain(self, data: Tensor) -> nn.Parameter:
        return nn.Parameter(data, requires_grad=self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = self._plain(self.detach().clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain(self.detach()).__reduce_ex__(protocol)


def _reporting(name: str) -> Callable[..., Any]:
    """Return the method ``name`` of ``dict`` with a report to the table's watchers afterwards."""
    change = getattr(dict, name)

    def method(self: Table, *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            for changes in self.watchers:
                changes.note()

    return method


class Table(dict[str, Any]):
    """A module's parameters, buffers or submodules by name. Reports every assignment to its watchers."""

    def __init__(self, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.watchers: tuple[Changes, ...] = ()

    def report_to(self, changes: Changes) -> None:
        """Report to ``changes`` too."""
        if changes not in self.watchers:
            self.watchers = (*self.watchers, changes)

    __setitem__ = _reporting("__setitem__")
    __delitem__ = _reporting("__delitem__")
    __ior__ = _reporting("__ior__")
    clear = _reporting("clear")
    pop = _reporting("pop")
    popitem = _reporting("popitem")
    setdefault = _reporting("setdefault")
    update = _reporting("update")
