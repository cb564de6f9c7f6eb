"""The C functions of the oneDNN in torch's library, with their types, and the errors that they report.

The C interface is the same in all versions 3 of oneDNN. Its reference: https://uxlfoundation.github.io/oneDNN/.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint, c_void_p
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastres.errors import DeviceError, OneDnnError

from .symbols import SymbolsError, function_addresses

_LIBRARY = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").resolve()
_MAJOR, _OPENMP = 3, 2  # the version of the interface, and DNNL_RUNTIME_OMP

_DIMENSIONS, _OUT = POINTER(c_int64), POINTER(c_void_p)
# The arguments of the functions that return a status. Every object of oneDNN is a pointer.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "engine_create": (_OUT, c_int, c_size_t),
    "stream_create": (_OUT, c_void_p, c_uint),
    "stream_wait": (c_void_p,),
    "stream_destroy": (c_void_p,),
    "memory_desc_create_with_tag": (_OUT, c_int, _DIMENSIONS, c_int, c_int),
    "memory_desc_create_with_strides": (_OUT, c_int, _DIMENSIONS, c_int, _DIMENSIONS),
    "memory_desc_clone": (_OUT, c_void_p),
    "memory_desc_destroy": (c_void_p,),
    "memory_create": (_OUT, c_void_p, c_void_p, c_void_p),
    "memory_set_data_handle": (c_void_p, c_void_p),
    "memory_destroy": (c_void_p,),
    "post_ops_create": (_OUT,),
    "post_ops_append_sum": (c_void_p, c_float, c_int32, c_int),
    "post_ops_append_eltwise": (c_void_p, c_int, c_float, c_float),
    "post_ops_destroy": (c_void_p,),
    "post_ops_append_binary": (c_void_p, c_int, c_void_p),
    "primitive_attr_create": (_OUT,),
    "primitive_attr_set_scratchpad_mode": (c_void_p, c_int),
    "primitive_attr_set_post_ops": (c_void_p, c_void_p),
    "primitive_attr_set_scales_mask": (c_void_p, c_int, c_int),
    "primitive_attr_destroy": (c_void_p,),
    "convolution_forward_primitive_desc_create": (
        _OUT, c_void_p, c_int, c_int, *[c_void_p] * 4, *[_DIMENSIONS] * 4, c_void_p,
    ),
    "pooling_forward_primitive_desc_create": (
        _OUT, c_void_p, c_int, c_int, *[c_void_p] * 2, *[_DIMENSIONS] * 5, c_void_p,
    ),
    "inner_product_forward_primitive_desc_create": (_OUT, c_void_p, c_int, *[c_void_p] * 5),
    "binary_primitive_desc_create": (_OUT, c_void_p, c_int, *[c_void_p] * 4),
    "reorder_primitive_desc_create": (_OUT, *[c_void_p] * 5),
    "primitive_desc_query": (c_void_p, c_int, c_int, c_void_p),
    "primitive_desc_destroy": (c_void_p,),
    "primitive_create": (_OUT, c_void_p),
    "primitive_execute": (c_void_p, c_void_p, c_int, c_void_p),
    "primitive_destroy": (c_void_p,),
}  # fmt: skip
# The functions that return something else: the result and the arguments.
_QUERIES: dict[str, tuple[Any, ...]] = {
    "version": (c_void_p,),
    "memory_desc_get_size": (c_size_t, c_void_p),
    "get_effective_cpu_isa": (c_int,),
    "memory_desc_equal": (c_int, c_void_p, c_void_p),
    "primitive_desc_query_md": (c_void_p, c_void_p, c_int, c_int),
}

# dnnl_cpu_isa_avx512_core and dnnl_cpu_isa_avx2, and how many float32 numbers their vectors have
_LANES = {0x27: 16, 0x7: 8}

# dnnl_status_t
_SUCCESS, _OUT_OF_MEMORY = 0, 1
_STATUSES = ("success", "out of memory", "invalid arguments", "unimplemented", "last implementation reached",
             "runtime error", "not required")  # fmt: skip


class _Version(ctypes.Structure):
    """dnnl_version_t"""

    _fields_ = (
        ("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p), ("cpu_runtime", c_uint),
        ("gpu_runtime", c_uint),
    )  # fmt: skip


class Library:
    """oneDNN's functions, without the prefix ``dnnl_``. Those that return a status raise an error for a failure."""

    def __init__(self, addresses: dict[str, int]) -> None:
        self._addresses = addresses
        for name, arguments in _FUNCTIONS.items():
            # Objects are also destroyed while the interpreter ends, when no Python code may run for a check.
            checked = not name.endswith("_destroy")
            setattr(self, name, self._function(name, c_int, *arguments, checked=checked))
        # The functions of a run check the status: a check in Python at each call takes almost as long as the call.
        self.execute = self._function("primitive_execute", c_int, *_FUNCTIONS["primitive_execute"])
        self.check_execution = partial(_check, "primitive_execute")
        for name, types in _QUERIES.items():
            setattr(self, name, self._function(name, *types))
        version = _Version.from_address(self.version())
        self.number = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != _MAJOR or version.cpu_runtime != _OPENMP:
            raise SymbolsError(f"torch has oneDNN {self.number}, but {_MAJOR}.x with OpenMP is needed")
        self.engine = self.created(self.engine_create, 1, 0)  # dnnl_cpu

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    @property
    def lanes(self) -> int | None:
        """The float32 numbers in a vector of the instructions that oneDNN uses: 16 or 8; ``None`` for older ones."""
        instructions = self.get_effective_cpu_isa()  # each set contains the bits of those that it extends
        return next((lanes for bits, lanes in _LANES.items() if instructions & bits == bits), None)

    def address(self, name: str) -> int:
        """Return where the function ``name`` is."""
        return self._addresses[f"dnnl_{name}"]

    def created(self, create: Callable[..., None], *arguments: Any) -> int:
        """Return the object that ``create`` writes to its first argument."""
        made = c_void_p()
        create(ctypes.byref(made), *arguments)
        assert made.value is not None
        return made.value

    def _function(self, name: str, result: Any, *arguments: Any, checked: bool = False) -> Any:
        function = ctypes.CFUNCTYPE(result, *arguments)(self.address(name))
        if checked:
            function.errcheck = partial(_check, name)  # type: ignore[assignment]
        return function


def _check(name: str, status: int, *_: object) -> None:
    """Raise an error for a status other than success of the function ``name``."""
    if status == _SUCCESS:
        return
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"oneDNN has no memory left (dnnl_{name})")
    said = _STATUSES[status] if status < len(_STATUSES) else f"status {status}"
    raise OneDnnError(
        f"oneDNN's function dnnl_{name} says {said!r}. Set FASTRES_WITHOUT=primitives to go through torch's "
        "operators, and report this"
    )


def library() -> Library:
    """Return oneDNN's functions. Raises ``DeviceError`` if :func:`absent` says why they cannot be called."""
    found = _library()
    if isinstance(found, str):
        raise DeviceError(f"oneDNN cannot be called directly: {found}")
    return found


def absent() -> str | None:
    """Return why oneDNN's functions cannot be called here; ``None`` if they can."""
    found = _library()
    return found if isinstance(found, str) else None


@lru_cache
def _library() -> Library | str:
    """Return oneDNN's functions, or why they cannot be called."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"this is {platform.system()} on {platform.machine()}, and it is done on Linux on x86_64 only"
    try:
        names = [f"dnnl_{name}" for name in (*_FUNCTIONS, *_QUERIES)]
        return Library(function_addresses(_LIBRARY, names, "dnnl_"))
    except SymbolsError as error:
        return str(error)
