"""The metadata of an exported file, as the strings of ONNX's ``metadata_props``.

Every value is text, so that any language can read it: ``mean``, ``std``, ``class_names`` and ``outputs`` are JSON
lists, ``preprocessing`` is ``true`` or ``false``, ``resize`` and ``crop`` are whole numbers of pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastres.files import read_regular
from fastres.images.transforms import Transforms
from fastres.model.model import Model
from fastres.network.plan import Plan
from fastres.quantisation.rounding import quantisable
from fastres.text import path_text
from fastres.version import __version__
from fastres.weights.download import cache_folder, file_sha256
from fastres.weights.published import WeightsEntry, entries

from .errors import ExportFileError, missing

KEYS = (
    "model",
    "weights",
    "weights_sha256",
    "state_sha256",
    "class_names",
    "mean",
    "std",
    "resize",
    "crop",
    "interpolation",
    "crop_rounding",
    "preprocessing",
    "outputs",
    "opset",
    "dtype",
    "quantisation",
    "fastres_version",
)
# Outputs of files, beside the logits and the features. ``top_k`` stands for two: the scores and the indices.
EMBEDDING, SOFTMAX, TOP_K = "embedding", "softmax", "top_k"
TOP_K_SCORES, TOP_K_INDICES = "top_k_scores", "top_k_indices"
# What the metadata of older files lacks.
OLDER = {"crop_rounding": "nearest", "quantisation": "{}"}


@dataclass(frozen=True)
class Metadata:
    """The metadata of one file.

    ``weights`` is the published entry's name (``"IMAGENET1K_V2"``), or a description of where the weights are from.
    ``weights_sha256`` is the hash of the checkpoint file. It is empty if there was no file, and only the published
    beginning of the hash if the file is no longer there. ``state_sha256`` is the hash of the tensors
    (:func:`fastres.weights.hashing.state_sha256`). ``class_names`` is ``None`` if they are unknown. ``preprocessing``
    says whether the graph runs ``transforms``. ``quantisation`` is the record of :func:`describe_quantisation`, empty
    for float.
    """

    model: str
    weights: str
    weights_sha256: str
    state_sha256: str
    class_names: tuple[str, ...] | None
    transforms: Transforms
    preprocessing: bool
    outputs: tuple[str, ...]
    opset: int
    dtype: str
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    fastres_version: str = __version__

    def as_strings(self) -> dict[str, str]:
        """Return the strings that are written into a file."""
        transforms = self.transforms
        values: dict[str, Any] = {
            **{key: getattr(self, key) for key in KEYS if hasattr(self, key)},
            "class_names": list(self.class_names or ()),
            "mean": list(transforms.mean),
            "std": list(transforms.std),
            "outputs": list(self.outputs),
            "quantisation": dict(self.quantisation),
            "resize": transforms.resize,
            "crop": transforms.crop,
            "interpolation": transforms.interpolation,
            "crop_rounding": transforms.crop_rounding,
        }
        texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
        return {key: texts[key] for key in KEYS}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], source: str) -> Metadata:
        """Parse the result of :meth:`as_strings`. Raise ``ExportFileError``, naming ``source``, if that fails."""
        strings = {**OLDER, **strings}
        absent = [key for key in KEYS if key not in strings]
        if absent:
            lacks = "any of its metadata" if len(absent) == len(KEYS) else ", ".join(absent)
            raise ExportFileError(
                f"{source} was not written by fastres export: it lacks {lacks}. Export the model again, or open files "
                "of other programs with onnxruntime.InferenceSession"
            )
        try:
            values = {key: strings[key] for key in ("model", "weights", "weights_sha256", "state_sha256", "dtype")}
            names = json.loads(strings["class_names"])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("class_names is not a list of names")
            return cls(
                **values,
                class_names=tuple(names) or None,
                transforms=Transforms(
                    int(strings["resize"]),
                    int(strings["crop"]),
                    tuple(json.loads(strings["mean"])),
                    tuple(json.loads(strings["std"])),
                    strings["interpolation"],  # type: ignore[arg-type]
                    strings["crop_rounding"],  # type: ignore[arg-type]
                ),
                preprocessing=bool(json.loads(strings["preprocessing"])),
                outputs=tuple(json.loads(strings["outputs"])),
                opset=int(strings["opset"]),
                quantisation=_record(strings["quantisation"]),
                fastres_version=strings["fastres_version"],
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise ExportFileError(f"{source} has metadata that cannot be read ({error}); export it again") from error


def _record(text: str) -> dict[str, Any]:
    if text == "int8":  # older files have no record
        return {"scales": "ONNX Runtime's calibration"}
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("quantisation is not a record")
    return record


def describe_quantisation(plan: Plan, scales: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a plan in 8 bit for a file; it is empty for a float plan.

    ``scales`` says where the scales are from.
    """
    quantisation = plan.quantisation
    if quantisation is None:
        return {}
    steps = {step.name: step for step in plan}
    rounded = [steps[name] for name in quantisable(plan) if name in quantisation.weights]
    return {
        "values": "uint8",
        "weights": "int8",
        "largest_weight": max((int(step.weight.to(torch.int32).abs().max()) for step in rounded), default=0),
        "steps": len(rounded),
        "float32_steps": [name for name in quantisable(plan) if name not in quantisation.weights],
        "scales": dict(scales),
    }


@dataclass(frozen=True)
class Value:
    """An input or output of a file: its name, element type (``"float32"``) and shape, symbolic dimensions by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Inspection:
    """The contents of a file, read without running it."""

    path: Path
    bytes: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: dict[str, int]
    metadata: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        values = {
            kind: {value.name: {"dtype": value.dtype, "shape": list(value.shape)} for value in getattr(self, kind)}
            for kind in ("inputs", "outputs")
        }
        return {
            "path": path_text(self.path),
            "bytes": self.bytes,
            **values,
            "operators": self.operators,
            **self.metadata,
        }

    def __str__(self) -> str:
        lines = [f"{path_text(self.path)}: {self.bytes / 1e6:,.1f} MB"]
        for kind, values in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"{kind}  {v.name}  {v.dtype} [{', '.join(map(str, v.shape))}]" for v in values]
        lines.append("operators  " + ", ".join(f"{count} {name}" for name, count in self.operators.items()))
        lines += [f"{key}  {_shortened(key, text)}" for key, text in self.metadata.items()]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read the inputs, outputs, operators and metadata of the file at ``path``.

    Raises ``ExportFileError`` if it is missing, is not an ONNX file, or was not written by fastres.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx") from error
    path = Path(path).expanduser()
    try:
        content = read_regular(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportFileError(f"{path} cannot be read: {reason}; check the path and its permissions") from error
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise ExportFileError(f"{path} is not an ONNX file ({error}); pass a file that fastres export wrote") from error
    if not model.graph.node:
        raise ExportFileError(f"{path} is not an ONNX file: it has no graph; pass a file that fastres export wrote")
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    Metadata.from_strings(metadata, str(path))
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return Inspection(
        path,
        len(content),
        tuple(_value(info) for info in model.graph.input),
        tuple(_value(info) for info in model.graph.output),
        operators,
        metadata,
    )


def _value(info: Any) -> Value:
    import onnx

    tensor = info.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return Value(info.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _shortened(key: str, text: str) -> str:
    names = json.loads(text) if key == "class_names" else []
    return f"{len(names)}: {', '.join(names[:3])}, …, {names[-1]}" if len(names) > 12 else text


def describe_weights(model: Model) -> tuple[str, str]:
    """Return ``weights`` and ``weights_sha256`` of a loaded model: see :class:`Metadata`."""
    for entry in entries(model.architecture.name).values() if _is_published(model) else ():
        if model.weights == f"{entry.model} {entry.name} ({entry.file})":
            return entry.name, _entry_sha256(entry)
    try:
        path = Path(model.weights)
        return model.weights, file_sha256(path) if path.is_file() else ""
    except (OSError, ValueError):
        return model.weights, ""


def _is_published(model: Model) -> bool:
    return model.weights.startswith(f"{model.architecture.name} ")


def _entry_sha256(entry: WeightsEntry) -> str:
    """Return the whole hash if the file is in the cache or bundled, else the published beginning of it."""
    path = cache_folder() / entry.file
    if entry.bundled or not path.is_file():
        return entry.sha256
    digest = file_sha256(path)
    return digest if digest.startswith(entry.sha256) else entry.sha256
