"""``fastres inspect``: what a checkpoint is, and whether fastres runs it."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.errors import ArchitectureError, ConfigError, FastresError, WeightsError
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture, state_dict_shapes
from fastres.text import dtype_name

from .checkpoints import read_checkpoint
from .download import file_sha256
from .fitting import describe_misfits, known_fits
from .folders import SavedModel, architecture_beside, find_folder, names_a_folder, read_saved, weights_file
from .layouts import LAYOUTS, Unwrapped, recognise, unwrap_traced
from .state import load_state
from .timm_config import refuse_anti_aliasing

_LISTED = 6
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is.

    ``wrappers`` are the dictionaries and prefixes around the weights, outermost first, and ``beside`` what else the
    file holds. ``names`` is whose names the tensors have. ``models`` are the rows of the table that they fit, several
    where names and shapes do not tell them apart; ``nearest`` is the row that explains most of them where none fits.
    ``classes`` is ``None`` without a classifier. ``dtypes`` counts tensors. ``transforms`` and ``categories`` are the
    folder's own, if it has any. Where ``runs``, ``load`` is the line that loads it; otherwise ``reason`` says why not.
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

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        lines = [
            ("file", f"{self.path}: {self.bytes / 1e6:,.1f} MB, {self.format}"),
            ("sha256", self.sha256),
            ("names", self.names + (f", inside {' › '.join(self.wrappers)}" if self.wrappers else "")),
            ("beside", _shortened(self.beside)),
            ("tensors", f"{self.tensors} ({dtypes}), {self.parameters / 1e6:,.2f} million parameters"),
            ("model", " or ".join(self.models) or (f"none that fits; nearest is {self.nearest}")),
            ("classes", "no classifier" if self.classes is None else str(self.classes)),
            ("labels", _shortened(self.categories or ())),
            ("images", "" if self.transforms is None else _described(self.transforms)),
            ("fastres", f"runs it: {self.load}" if self.runs else f"does not run it. {self.reason}"),
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
    """Read the checkpoint at ``name``: a file, a folder that transformers or timm saved, or a cached hub id.

    Nothing in it is run. Raises ``WeightsError`` and its kinds where it cannot be read or holds no state dict.
    """
    saved: SavedModel | None = None
    refusal: FastresError | None = None
    if names_a_folder(name):
        path = weights_file(find_folder(name), str(name))
        try:
            saved = read_saved(name)
        except (ArchitectureError, ConfigError) as error:  # what the tensors are can be told all the same
            refusal = error
    else:
        path = Path(name).expanduser()
    if path.suffix.lower() == ".onnx":
        raise WeightsError(f"{path} is an ONNX file, not a checkpoint; fastres.export.onnx.inspect(path) reads it.")
    found = unwrap_traced(read_checkpoint(path))
    layout, state = _recognise(found.state)
    models, nearest = _models(state, saved)
    refusal = refusal or _refusal(path, state, models, nearest, saved)
    head = state.get("fc.weight")
    classes = head.shape[0] if head is not None and head.ndim == 2 else None
    return CheckpointReport(
        path=str(path),
        format=_format(path),
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


def _load_line(name: str, models: tuple[str, ...], classes: int | None, saved: SavedModel | None) -> str:
    if saved is not None:
        return f"fastres.load({name!r})"
    return f"fastres.load({models[0]!r}, {name!r}{', num_classes=0' if classes is None else ''})"


def _format(path: Path) -> str:
    if path.suffix.lower() == ".safetensors":
        return "safetensors"
    with open(path, "rb") as stream:
        return "PyTorch, zip archive" if stream.read(2) == b"PK" else "PyTorch, pickle (the format before 1.6)"


def _dtypes(found: Unwrapped) -> dict[str, int]:
    return dict(Counter(dtype_name(tensor.dtype) for tensor in found.state.values()).most_common())


def _recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Whose names the tensors have, and the tensors under torchvision's."""
    wanted = {key for arch in ARCHITECTURES.values() for key in state_dict_shapes(arch)}
    layout, renamed = recognise(state, wanted)
    if not wanted & renamed.keys():
        return "unknown", renamed
    return ("torchvision or timm" if layout is LAYOUTS[0] else layout.name), renamed


def _models(state: Mapping[str, Tensor], saved: SavedModel | None) -> tuple[tuple[str, ...], Architecture]:
    """The rows that the tensors fit, and the one that explains most of them."""
    if saved is not None:
        return (() if describe_misfits(state, saved.arch) else (saved.arch.name,)), saved.arch
    shapes = {(key, tuple(tensor.shape)) for key, tensor in state.items()}

    def overlap(arch: Architecture) -> float:
        wanted = set(state_dict_shapes(arch).items())
        return len(wanted & shapes) / len(wanted | shapes)

    return tuple(known_fits(state)), max(ARCHITECTURES.values(), key=overlap)


def _refusal(
    path: Path, state: dict[str, Tensor], models: tuple[str, ...], nearest: Architecture, saved: SavedModel | None
) -> FastresError | None:
    """Why fastres does not run the checkpoint; ``None`` where it does."""
    try:
        refuse_anti_aliasing(path.stem, str(path))
        if saved is not None:
            load_state(saved.arch, saved)
        else:
            beside = architecture_beside(path)
            if beside is not None and beside.name not in models:
                raise ArchitectureError(f"The config.json beside it names {beside.name}; fastres.load the folder.")
    except FastresError as error:
        return error
    if models:
        return None
    return WeightsError(f"Compared with {nearest.name}: {'; '.join(describe_misfits(state, nearest))}.")


def run(options: argparse.Namespace) -> int:
    """Print the report; exit status 1 where fastres does not run the checkpoint."""
    report = inspect(options.checkpoint)
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if options.json else report)
    return 0 if report.runs else 1
