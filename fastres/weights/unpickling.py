"""Read a pickle without running code from it: tensors and plain data are real, everything else is inert.

Python's unpickler imports what a pickle names and calls it. :class:`Unpickler` imports nothing. A name in the pickle
becomes an :class:`Inert`, and calling it makes another :class:`Inert`, unless the name is in a fixed table of functions
of this module that make containers and tensors. So nothing that a pickle can reach runs code, changes an object of the
process, or needs more memory than the file allows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

# Expanded tensors have more elements than their storage. Up to this number, or the file's bytes, they are read.
EXPANDED = 1 << 26
LONGEST_TUPLE_KEY = 8

DTYPES: dict[str, torch.dtype] = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Quantised storages are listed for their element sizes only: their tensors stay inert.
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
    "QUInt8Storage": torch.uint8, "QInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8, "QUInt2x4Storage": torch.uint8,
}  # fmt: skip
# Inert objects of these names are data of PyTorch or NumPy, not code.
KINDS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, without data",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
    "numpy.core.multiarray._reconstruct": "a NumPy array",
    "numpy._core.multiarray._reconstruct": "a NumPy array",
    "numpy.core.multiarray.scalar": "a NumPy scalar",
    "numpy._core.multiarray.scalar": "a NumPy scalar",
}
_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_DATA = {  # names that need no mention when a file is refused
    *KINDS, *_PLAIN_TENSORS, "torch.device", "torch.serialization._get_layout",
    "torch.storage._load_from_bytes", "numpy.dtype", "numpy.ndarray",
    "argparse.Namespace", "builtins.object", "__builtin__.object",
}  # fmt: skip


LoadStorage = Callable[[torch.dtype, Any, int, Any], Tensor]


class Inert(dict[Any, Any]):
    """What stands for an object that is not read: its ``name``, the ``state`` it was to get, and a mapping's items."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: object = None) -> None:
        super().__init__()
        self.name = name
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"

    def append(self, item: object) -> None:
        """Drop an item of a list of another class."""

    def extend(self, items: Iterable[object]) -> None:
        """Drop the items of a list of another class."""

    @property
    def is_module(self) -> bool:
        """True for a pickled ``nn.Module``."""
        state = self.state
        return isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in ("_modules", "_buffers"))

    @property
    def kind(self) -> str | None:
        """What the object is, if it is data of PyTorch or NumPy, else ``None``."""
        return KINDS.get(self.name)


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of a storage, uint8 ``[n]``, and the dtype of its elements."""

    dtype: torch.dtype
    data: Tensor


def key_of(value: object) -> Any:
    """Return ``value`` if it may be a dictionary's key, else an inert object: hashing deep tuples can crash Python."""
    simple = (str, bytes, int, float, bool, type(None), torch.dtype, Inert, Tensor)
    if type(value) is tuple and len(value) <= LONGEST_TUPLE_KEY and all(isinstance(part, simple) for part in value):
        return value
    return value if isinstance(value, simple) else Inert(type(value).__name__)


def _complex(real: object, imaginary: object = 0.0) -> object:
    if isinstance(real, (int, float)) and isinstance(imaginary, (int, float)):
        return complex(real, imaginary)
    return Inert("complex")


def _same(data: object, *_: object) -> object:
    return data


def _object_of(cls: object, *_: object) -> Inert:
    return Inert(cls.name if isinstance(cls, Inert) else "object")


class Unpickler(pickle._Unpickler):
    """Read the pickle at the start of ``stream``, whose file has ``limit`` bytes.

    ``load_storage(dtype, key, count, view)`` returns the bytes of a storage of ``count`` elements. After ``load()``,
    ``unknown`` holds the names that the pickle uses beyond tensors and plain data, in order.
    """

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Any, limit: int, load_storage: LoadStorage) -> None:
        # Python 2 wrote byte strings in any encoding.
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self.unknown: dict[str, None] = {}
        self._limit = max(limit, EXPANDED)
        self._copies_left = limit  # items that containers may copy from others, so that none grows by repetition
        self._load_storage = load_storage
        self._makers: dict[str, Callable[..., object]] = {
            "collections.OrderedDict": self._mapping, "collections.Counter": self._mapping,
            "collections.defaultdict": lambda factory=None, items=(): self._mapping(items),
            "builtins.set": self._set, "__builtin__.set": self._set,
            "builtins.frozenset": self._set, "__builtin__.frozenset": self._set,
            "builtins.bytearray": self._bytes, "__builtin__.bytearray": self._bytes, "_codecs.encode": self._bytes,
            "builtins.complex": _complex, "__builtin__.complex": _complex,
            "torch.Size": lambda sizes=(): tuple(self._counted(sizes)),
            "copyreg._reconstructor": _object_of, "copy_reg._reconstructor": _object_of,
            "copyreg.__newobj__": _object_of, "copy_reg.__newobj__": _object_of,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": _same,
            "torch._utils._rebuild_parameter_with_state": _same,
            "torch.nn.parameter.Parameter": _same,
            "torch.nn.parameter.Buffer": _same,
            "torch._tensor._rebuild_from_type_v2": self._typed,
        }  # fmt: skip

    # What a pickle names and calls

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full not in self._makers and full not in _DATA and not self._is_storage(full):
            self.unknown[full] = None
        return Inert(full)

    @staticmethod
    def _is_storage(name: str) -> bool:
        return name.startswith("torch.") and name.rpartition(".")[2] in STORAGES

    def persistent_load(self, pid: object) -> Storage | Inert:
        """Return the storage that ``pid`` describes: type, key, location, number of elements, and perhaps a view.

        Old files describe classes of modules as well, with their source code. A class is inert like every other.
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Inert):
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("a persistent id is not that of a storage")
        kind, key, _, count, view = (*pid[1:], None)[:5]
        if not isinstance(kind, Inert) or not self._is_storage(kind.name) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("the description of a storage is damaged")
        dtype = STORAGES[kind.name.rpartition(".")[2]]
        return Storage(dtype, self._load_storage(dtype, key, count, view))

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Inert) or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something that is not a function")
        maker = self._makers.get(function.name)
        return Inert(function.name) if maker is None else maker(*arguments)

    def _counted(self, items: object) -> Any:
        """Return ``items``, a container or string, if it may be copied."""
        if not isinstance(items, (list, tuple, set, dict, str)):
            raise pickle.UnpicklingError("a container is made from something other than a container")
        self._copies_left -= len(items)
        if self._copies_left < 0:
            raise pickle.UnpicklingError("its containers hold more than the file")
        return items

    def _mapping(self, items: object = ()) -> dict[Any, Any]:
        found = self._counted(items)
        if isinstance(found, dict):
            return dict(found)
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in found):
            raise pickle.UnpicklingError("a mapping is made from something other than pairs")
        return {key_of(key): value for key, value in found}

    def _set(self, items: object = ()) -> set[Any]:
        return set(map(key_of, self._counted(items)))

    def _bytes(self, text: object = b"", encoding: object = None) -> object:
        if isinstance(text, str) and encoding in ("latin1", "latin-1"):
            return self._counted(text).encode("latin1")
        return text if isinstance(text, bytes) else Inert("bytes")

    def _tensor(
        self, storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None
    ) -> object:
        if isinstance(storage, Inert):
            return Inert("torch.Tensor")
        if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor is damaged")
        if type(offset) is not int or any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise pickle.UnpicklingError("the shape of a tensor is damaged")
        if prod(size) > self._limit:
            raise pickle.UnpicklingError("a tensor has more elements than the file can hold")
        return torch.as_strided(storage.data.view(dtype or storage.dtype), size, stride, offset)

    def _tensor_v2(
        self, storage: object, offset: object, size: object, stride: object, grad: object, hooks: object,
        metadata: object = None,
    ) -> object:  # fmt: skip
        return self._marked(self._tensor(storage, offset, size, stride), metadata)

    def _tensor_v3(
        self, storage: object, offset: object, size: object, stride: object, grad: object, hooks: object, dtype: object,
        metadata: object = None,
    ) -> object:  # fmt: skip
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor has no dtype")
        return self._marked(self._tensor(storage, offset, size, stride, dtype), metadata)

    def _marked(self, tensor: object, metadata: object) -> object:
        """Return ``tensor`` with the lazy conjugation or negation that its metadata describes."""
        if not isinstance(tensor, Tensor) or not isinstance(metadata, dict):
            return tensor
        if metadata.get("conj") is True:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if metadata.get("neg") is True else tensor

    def _typed(self, function: object, kind: object, arguments: object, state: object = None) -> object:
        if isinstance(kind, Inert) and kind.name in _PLAIN_TENSORS:
            return self._call(function, arguments)
        return Inert("torch._tensor._rebuild_from_type_v2")

    # The instructions that would call something, or store into it

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(self._call(self.stack.pop(), arguments))

    def _newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self._newobj()

    def _obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.append(self._call(function, tuple(arguments)))

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        arguments = self.pop_mark()
        self.append(self._call(self.find_class(module, name), tuple(arguments)))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def _extension(self) -> None:
        raise pickle.UnpicklingError("it uses copyreg's extension registry")

    def _into_mapping(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError("an item is set in something that is not a mapping")
        target.update({key_of(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._into_mapping(items)

    def _setitems(self) -> None:
        self._into_mapping(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._into_mapping(items)

    def _additems(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(key_of, items))

    def _frozenset(self) -> None:
        items = self.pop_mark()  # which replaces self.append
        self.append(self._set(items))

    def _bytearray8(self) -> None:
        (length,) = (int.from_bytes(self.read(8), "little"),)
        self.append(self.read(min(length, self._limit)))

    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _newobj, pickle.NEWOBJ_EX[0]: _newobj_ex,
            pickle.OBJ[0]: _obj, pickle.INST[0]: _inst, pickle.BUILD[0]: _build, pickle.EXT1[0]: _extension,
            pickle.EXT2[0]: _extension, pickle.EXT4[0]: _extension, pickle.SETITEM[0]: _setitem,
            pickle.SETITEMS[0]: _setitems, pickle.DICT[0]: _dict, pickle.ADDITEMS[0]: _additems,
            pickle.FROZENSET[0]: _frozenset, pickle.BYTEARRAY8[0]: _bytearray8,
        }
    )  # fmt: skip
