"""Read checkpoint files without running code from them.

The format is recognised by content: safetensors, or one of the two formats of ``torch.save``. Tensors and plain data
are read. Other objects in a pickle become inert (:mod:`fastres.weights.unpickling`); they do no harm beside the
weights. A file with nothing but such objects is refused. Every error about a bad file is a fastres error.
"""

from __future__ import annotations

import errno
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from fastres.errors import CorruptCheckpointError, UnsafeCheckpointError, WeightsError
from fastres.files import open_regular
from fastres.terminal import warn
from fastres.text import path_text

from .formats import HEADER, PICKLE, ZIP, is_safetensors, name_other, name_zip
from .torch_files import Content, DamageError, OtherFormatError, read_old, read_zip
from .unpickling import Inert

SUFFIXES = (".pth", ".pt", ".safetensors")
OTHER_SUFFIXES = (".th", ".ckpt", ".bin", ".tar")  # used for PyTorch files in other code bases

REMEDY = (
    "If you trust the file, load it in the program that made it and save only the weights: "
    "torch.save(model.state_dict(), path) or safetensors.torch.save_file(model.state_dict(), path). Or pass the state "
    "dict itself."
)
_TAR_OF_2016 = (b"sys_info", b"pickle", b"tensors", b"storages")  # the files in it
_LARGEST_TEXT = 1 << 26  # bytes of a file without a known beginning that is searched for the names of a pickle
Format = Literal["safetensors", "zip", "pickle"]


class MisnamedFileWarning(UserWarning):
    """The content of a checkpoint file is of another format than its name says; it was read all the same."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file, with tensors on the CPU, and its format; ``mapped`` tensors lie in the file's memory."""

    content: object
    format: Format
    misnamed: bool

    @property
    def mapped(self) -> bool:
        return self.format == "safetensors"


def is_path_like(text: str) -> bool:
    """Return True if a string looks like a path: it has a checkpoint's suffix or a path separator."""
    return is_checkpoint_name(text) or os.sep in text


def is_checkpoint_name(text: str) -> bool:
    """Return True if a string ends in the suffix of a checkpoint file."""
    return Path(text).suffix.lower() in SUFFIXES + OTHER_SUFFIXES


def read_checkpoint(path: Path) -> object:
    """Return the content of a checkpoint file, with tensors on the CPU; those of safetensors may be memory-mapped.

    Warns with :class:`MisnamedFileWarning` if the format is not the one that the suffix says. Raises the errors of
    :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    warn_misnamed(path, checkpoint, stacklevel=3)
    return checkpoint.content


def warn_misnamed(path: Path, checkpoint: Checkpoint, stacklevel: int) -> None:
    """Warn if the format is not the one that the suffix says."""
    if checkpoint.misnamed:
        is_, right = ("safetensors", ".safetensors") if checkpoint.mapped else ("torch.save", ".pth")
        warn(
            f"{path} was read, but it has the format of {is_}, not the one of its name. Rename it to *{right}",
            MisnamedFileWarning,
            stacklevel=stacklevel,
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file of any format.

    Raises ``WeightsError`` if the file does not exist or cannot be read, ``CorruptCheckpointError`` if it is truncated,
    altered or not a checkpoint, and ``UnsafeCheckpointError`` if it holds objects, but no tensors.
    """
    beginning = _beginning(path)
    named = path.suffix.lower()
    known = is_safetensors(beginning) or beginning.startswith((ZIP, PICKLE))
    try:
        if is_safetensors(beginning) or (named == ".safetensors" and not known):
            return Checkpoint(_read_safetensors(path, beginning), "safetensors", named in (".pth", ".pt"))
        misnamed = named == ".safetensors"
        return Checkpoint(_read_torch(path, beginning), "zip" if beginning.startswith(ZIP) else "pickle", misnamed)
    except OSError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except MemoryError as error:
        raise WeightsError(f"There is not enough memory to read {path} ({path.stat().st_size:,} bytes).") from error


def _beginning(path: Path) -> bytes:
    """Return the first bytes of a file; raises ``WeightsError`` unless it is a file that can be read."""
    try:
        if not path.exists():
            raise WeightsError(f"There is no file {path}. Pass the path of a {', '.join(SUFFIXES)} file.")
        if not path.is_file():
            raise WeightsError(f"{path} is not a file. Pass the path of a {', '.join(SUFFIXES)} file.")
        with open(path, "rb") as stream:
            return stream.read(HEADER)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def _read_safetensors(path: Path, beginning: bytes) -> object:
    from safetensors.torch import load_file

    _refuse_other(path, beginning)
    try:
        if path_text(path) == str(path):
            return load_file(path)
        with open_regular(path) as file:  # safetensors takes only names in UTF-8
            return load_file(f"/proc/self/fd/{file.fileno()}")
    except Exception as error:  # a damaged file can raise anything
        raise CorruptCheckpointError(_corrupt(path, "safetensors file", str(error) or "it is empty")) from error


def _read_torch(path: Path, beginning: bytes) -> object:
    is_zip = beginning.startswith(ZIP)
    if not is_zip:
        _refuse_other(path, beginning)
    try:
        if not beginning.startswith((ZIP, PICKLE)) and (not beginning or path.stat().st_size > _LARGEST_TEXT):
            raise DamageError("it is empty" if not beginning else f"it begins with {beginning[:16]!r}")
        found = read_zip(path) if is_zip else read_old(path)
    except MemoryError:
        raise
    except OtherFormatError as error:
        raise _other(path, is_zip, beginning, list(error.args[0])) from error
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek to a damaged place
            raise
        raise CorruptCheckpointError(_corrupt(path, "PyTorch checkpoint", _damage(beginning, error))) from error
    refusal = _refusal(found)
    if refusal is not None:
        raise UnsafeCheckpointError(f"{path} {refusal}")
    return found.value


def _refuse_other(path: Path, beginning: bytes) -> None:
    """Raise if a file is recognised as something other than a checkpoint."""
    if beginning[257:262] == b"ustar" and beginning.split(b"\0")[0] in _TAR_OF_2016:
        raise UnsafeCheckpointError(
            f"{path} has PyTorch's .tar format of 2016, which cannot be read without running code from it. {REMEDY}"
        )
    other = name_other(path, beginning)
    if other is not None:
        raise CorruptCheckpointError(_not_a_checkpoint(path, *other, f", it begins with {beginning[:16]!r}"))


def _not_a_checkpoint(path: Path, what: str, advice: str, more: str = "") -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) is {what}, not a checkpoint{more}. {advice}. fastres reads the files "
        "of torch.save and safetensors."
    )


def _other(path: Path, is_zip: bool, beginning: bytes, names: list[str]) -> WeightsError:
    """Return the error for an archive with the entries ``names``, or a pickle that uses the functions ``names``."""
    if not is_zip and names:
        return UnsafeCheckpointError(f"{path} {_holds_more(names)}")
    if not is_zip and not beginning.startswith(PICKLE):
        return CorruptCheckpointError(_corrupt(path, "PyTorch checkpoint", f"it begins with {beginning[:16]!r}"))
    if not is_zip:
        return CorruptCheckpointError(
            _not_a_checkpoint(
                path, "a pickle that torch.save did not write", "Load it in the program that made it, and torch.save it"
            )
        )
    if any(name.endswith("/constants.pkl") for name in names):
        return UnsafeCheckpointError(
            f"{path} is a TorchScript archive, which holds code, not only weights. "
            f"{REMEDY.replace('(model.', '(torch.jit.load(path).')}"
        )
    return CorruptCheckpointError(_not_a_checkpoint(path, *name_zip(names)))


def _corrupt(path: Path, kind: str, what: str) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a complete {kind}: {what}. The file may be truncated, or a web "
        "page or a Git LFS pointer may have been saved in its place. Download or save it again."
    )


def _damage(beginning: bytes, error: Exception) -> str:
    """Describe the damage of a file in a few words."""
    if isinstance(error, DamageError):
        return str(error)
    if isinstance(error, zipfile.BadZipFile):
        return "its archive is broken"
    if not beginning.startswith((ZIP, PICKLE)):
        return f"it begins with {beginning[:16]!r}"
    return f"its pickle is broken ({type(error).__name__})"


def _refusal(found: Content) -> str | None:
    """Return why a file that was read has no weights that can be trusted, or ``None``."""
    value = found.value
    if isinstance(value, Inert) and not value:
        names = [value.name, *(name for name in found.unknown if name != value.name)]
        return whole_module(names) if value.is_module else _holds_more(names)
    return _holds_more(list(found.unknown)) if found.unknown and not _has_tensors(value) else None


def whole_module(names: list[str]) -> str:
    """Return what to say of a pickled module, whose pickle uses ``names``."""
    return (
        f"holds a whole pickled nn.Module, not a state dict (its pickle uses {_listed(names)}). Reading it would run "
        f"code from the file. {REMEDY}"
    )


def _holds_more(names: list[str]) -> str:
    return (
        f"holds more than tensors and plain data: its pickle uses {_listed(names)}, which could run arbitrary code. "
        f"Nothing of it was run. {REMEDY}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _has_tensors(value: object) -> bool:
    """Return True if there is a tensor anywhere in ``value``, which may be nested and contain itself."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return False
