"""``fastres inspect``: describe a checkpoint, and say whether fastres can run it."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.errors import ArchitectureError, ConfigError, FastresError, StateDictMismatchError, WeightsError
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture, state_dict_shapes
from fastres.terminal import json_text
from fastres.text import dtype_name, path_text

from .checkpoints import is_path_like, open_checkpoint
from .download import file_sha256
from .fitting import describe_misfits, known_fits
from .folders import Folder, SavedModel, find_files, names_a_folder, parse_saved, weights_file
from .layouts import LAYOUTS, recognise
from .saved import is_saved, read
from .sources import find_source, usable_path
from .state import fit_source
from .wrapping import Unwrapped, unwrap_traced

_LISTED = 6
_FORMATS = {
    "safetensors": "safetensors",
    "zip": "PyTorch, zip archive",
    "pickle": "PyTorch, pickle (the format before 1.6)",
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class CheckpointReport:
    """The description of a checkpoint.

    ``wrappers`` are the dictionaries and prefixes around the weights, outermost first. ``beside`` are the other keys in
    the file. ``names`` is the library that the tensor names come from. ``models`` are the models that the tensors fit;
    there are several if names and shapes do not distinguish them. If none fits, ``nearest`` is the model that matches
    most tensors. ``classes`` is ``None`` without a classifier. ``dtypes`` counts tensors by dtype. ``transforms`` and
    ``categories`` are those of the folder or of fastres's own file. ``record`` says how a model in 8 bit was made. If
    ``runs``, ``load`` is the line of code that loads the
    checkpoint; otherwise ``reason`` says why fastres cannot run it.
    """

    path: str
    format: str
    bytes: int
    sha256: str
    names: str
    wrappers: tuple[str, ...]
    beside: tuple[str, ...]
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    models: tuple[str, ...]
    nearest: str | None
    classes: int | None
    transforms: Transforms | None
    categories: tuple[str, ...] | None
    runs: bool
    load: str | None
    reason: str | None
    record: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def _float_weights(self) -> str:
        return str((self.record or {}).get("float32", {}).get("weights", "unknown weights"))

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        lines = [
            ("file", f"{self.path}: {self.bytes / 1e6:,.1f} MB, {self.format}"),
            ("sha256", self.sha256),
            ("names", self.names + (f", inside {' › '.join(self.wrappers)}" if self.wrappers else "")),
            ("beside", _shortened(self.beside)),
            ("tensors", f"{self.tensors} ({dtypes}), {self.parameters / 1e6:,.2f} million parameters"),
            ("model", " or ".join(self.models) or (f"no match; the nearest is {self.nearest}")),
            ("classes", "no classifier" if self.classes is None else str(self.classes)),
            ("labels", _shortened(self.categories or ())),
            ("images", "" if self.transforms is None else _described(self.transforms)),
            ("8 bit", "" if self.record is None else f"made from {self._float_weights()}"),
            ("fastres", f"runs it: {self.load}" if self.runs else f"cannot run it. {self.reason}"),
        ]
        return "\n".join(f"{key:<8} {text}" for key, text in lines if text)


def _shortened(names: tuple[str, ...]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _described(transforms: Transforms) -> str:
    return (
        f"short side to {transforms.resize} ({transforms.interpolation}), centre {transforms.crop}×{transforms.crop}, "
        f"mean {transforms.mean}, std {transforms.std}"
    )


def inspect(name: str | os.PathLike[str]) -> CheckpointReport:
    """Describe the checkpoint ``name``: a file, a folder that transformers or timm saved, or a hub id.

    No code from the checkpoint is run. Raises ``WeightsError`` or a subclass if the checkpoint cannot be read or holds
    no state dict. The weights of a hub id are downloaded only if fastres runs the network of its configuration;
    otherwise the error of :func:`~fastres.weights.folders.read_saved` is raised.
    """
    saved: SavedModel | None = None
    refusal: FastresError | None = None
    if names_a_folder(name):
        files = find_files(name)
        try:
            saved = parse_saved(files)
        except (ArchitectureError, ConfigError) as error:  # the tensors can still be described
            if not isinstance(files, Folder):  # they would be downloaded for nothing
                raise
            refusal = error
        path = weights_file(files)
    else:
        path = usable_path(name)
        if str(name) in ARCHITECTURES and not path.exists():
            raise WeightsError(
                f"{name} is a model's name, and there is no such file. Pass the path of a checkpoint; 'fastres list' "
                "describes the models"
            )
        if path.exists() and is_saved(path):
            return _own(path)
    checkpoint = open_checkpoint(path)
    found = unwrap_traced(checkpoint.content)
    layout, state = _recognise(found.state)
    models, nearest = _models(state, saved)
    head = state.get("fc.weight")
    if refusal is None:
        refusal = _refusal(path, found, models, nearest, saved, headless=head is None)
    classes = head.shape[0] if head is not None and head.ndim == 2 else None
    return CheckpointReport(
        path=path_text(path),
        format=_FORMATS[checkpoint.format] + (", under the name of another format" if checkpoint.misnamed else ""),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        names=layout,
        wrappers=found.wrappers,
        beside=found.beside,
        tensors=len(state),
        parameters=sum(tensor.numel() for key, tensor in state.items() if not key.endswith(_STATISTICS)),
        dtypes=_dtypes(found),
        models=models,
        nearest=None if models else nearest.name,
        classes=classes,
        transforms=saved.transforms if saved is not None else None,
        categories=saved.categories if saved is not None else None,
        runs=refusal is None,
        load=_load_line(str(name), models, classes, saved) if refusal is None else None,
        reason=None if refusal is None else str(refusal),
    )


def _own(path: Path) -> CheckpointReport:
    """Describe a file that ``model.save`` wrote."""
    saved = read(path)
    dtypes = Counter(dtype_name(tensor.dtype) for tensor in saved.tensors.values())
    return CheckpointReport(
        path=path_text(path),
        format="safetensors, saved by fastres",
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        names="fastres" if saved.record is not None else "torchvision or timm",
        wrappers=(),
        beside=(),
        tensors=len(saved.tensors),
        parameters=sum(tensor.numel() for key, tensor in saved.tensors.items() if not key.endswith(_STATISTICS)),
        dtypes=dict(dtypes.most_common()),
        models=(saved.arch.name,),
        nearest=None,
        classes=saved.arch.num_classes or None,
        transforms=saved.transforms,
        categories=saved.categories,
        runs=True,
        load=f"fastres.load({path_text(path)!r})",
        reason=None,
        record=saved.record,
    )


def _load_line(name: str, models: tuple[str, ...], classes: int | None, saved: SavedModel | None) -> str:
    if saved is not None:
        return f"fastres.load({saved.source!r})"
    path = name if is_path_like(name) else os.path.join(".", name)
    return f"fastres.load({models[0]!r}, {path!r}{', num_classes=0' if classes is None else ''})"


def _dtypes(found: Unwrapped) -> dict[str, int]:
    return dict(Counter(dtype_name(tensor.dtype) for tensor in found.state.values()).most_common())


def _recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the library that the tensor names come from, and the tensors under torchvision's names."""
    wanted = {key for arch in ARCHITECTURES.values() for key in state_dict_shapes(arch)}
    layout, renamed = recognise(state, wanted)
    if not wanted & renamed.keys():
        return "unknown", renamed
    return ("torchvision or timm" if layout is LAYOUTS[0] else layout.name), renamed


def _models(state: Mapping[str, Tensor], saved: SavedModel | None) -> tuple[tuple[str, ...], Architecture]:
    """Return the models that the tensors fit, and the model that matches most of them."""
    if saved is not None:
        return (() if describe_misfits(state, saved.arch) else (saved.arch.name,)), saved.arch
    shapes = {(key, tuple(tensor.shape)) for key, tensor in state.items()}

    def overlap(arch: Architecture) -> float:
        wanted = set(state_dict_shapes(arch).items())
        return len(wanted & shapes) / len(wanted | shapes)

    return tuple(known_fits(state)), max(ARCHITECTURES.values(), key=overlap)


def _refusal(
    path: Path,
    found: Unwrapped,
    models: tuple[str, ...],
    nearest: Architecture,
    saved: SavedModel | None,
    headless: bool,
) -> FastresError | None:
    """Return the reason why ``fastres.load`` refuses the checkpoint, or ``None`` if it loads: fit it as it does."""
    arch = saved.arch if saved is not None else ARCHITECTURES[models[0]] if models else nearest
    num_classes = 0 if headless and saved is None else None
    try:
        source = find_source(arch, path if saved is None else saved)
        source.verify()
        fit_source(source, arch, found, num_classes, copy=False)
    except FastresError as error:
        if models or saved is not None or not isinstance(error, StateDictMismatchError):
            return error
        misfits = describe_misfits(_recognise(found.state)[1], nearest)
        return WeightsError(f"Compared with {nearest.name}: {'; '.join(misfits)}.") if misfits else error
    return None


def run(options: argparse.Namespace) -> int:
    """Print the report; return exit status 1 if fastres cannot run the checkpoint."""
    report = inspect(options.checkpoint)
    print(json_text(report.as_dict()) if options.json else report)
    return 0 if report.runs else 1
