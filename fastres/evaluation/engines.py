"""Models as candidates: in fastres's own executor, in eager PyTorch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.classification.parcels import padded
from fastres.errors import DeviceError, DtypeError, InputError, near_matches
from fastres.executors.processor import cpu_name, has_bf16
from fastres.model import plain
from fastres.model.model import Model
from fastres.model.predict import require_classifier
from fastres.network.architectures import block_specs
from fastres.network.plan import LOGITS, POOLED
from fastres.text import dtype_name, path_text
from fastres.version import __version__
from fastres.weights.hashing import state_sha256

from .candidates import Answers, Candidate
from .exported import file_candidate, prepared
from .names import column_name
from .runtimes import OnnxRuntime, OpenVino

ENGINES = ("eager", "onnxruntime", "openvino")


def fastres_candidate(model: Model, *, batch_size: int, most: int, name: str | None = None) -> Candidate:
    """Return the candidate of a model, float or in 8 bit, in fastres's own executor.

    On a GPU, smaller batches are padded to ``batch_size``, because kernels and graphs already exist for that size.
    ``layers`` computes any value of the plan: float32 ``[N, C, h, w]`` on the CPU, ``[N, C]`` for ``"pooled"``. Values
    that the plan does not have are left out. Raises ``ClassifierError`` if the model has no classifier.
    """
    require_classifier(model, "evaluate")
    known = {value for step in model.outline for value in step.writes} | {POOLED}

    def placed(pixels: Tensor) -> Tensor:
        pixels = pixels.to(model.device, memory_format=torch.channels_last)
        return padded(pixels, batch_size) if model.device.type == "cuda" else pixels

    def run(pixels: Tensor) -> Answers:
        return Answers.of_logits(model(placed(pixels))[: len(pixels)], most)

    def layers(pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        values = {value: value for value in wanted if value in known}
        return _on_cpu(model.values(placed(pixels), values), len(pixels)) if values else {}

    return _candidate(model, "fastres", run, layers, {}, name)


def open_engine(model: Model, engine: str, *, batch_size: int, most: int) -> Candidate:
    """Return the candidate of a model in another engine: ``"eager"``, ``"onnxruntime"`` or ``"openvino"``.

    ``"eager"`` runs the network unfolded, in PyTorch's own operations, in the model's dtype and on its device. The
    others run an export of the model for any number of images: ONNX Runtime on the model's device, OpenVINO on the CPU.
    A bfloat16 model in OpenVINO is the float32 export, computed in bfloat16. ``layers`` computes the values between
    blocks in eager, and all values of the plan in the others.

    Raises ``InputError`` for another engine, ``ClassifierError`` if the model has no classifier, ``DtypeError`` and
    ``DeviceError`` for what the engine cannot do, ``MissingDependencyError`` if a package is not installed, and the
    errors of :func:`fastres.export.onnx.export`.
    """
    if engine not in ENGINES:
        raise InputError(
            f"There is no engine called {engine!r}.{near_matches(str(engine), ENGINES)} Models run in fastres, "
            f"{', '.join(ENGINES)}"
        )
    require_classifier(model, "evaluate")
    if engine == "eager":
        return _eager(model, most)
    opened_with = _checked_runtime(model, engine)
    with _exported(model) as path:
        opened = OnnxRuntime(path, opened_with) if engine == "onnxruntime" else OpenVino(path, opened_with)
        name = _name(model, engine)
        candidate = file_candidate(
            opened,
            path,
            lambda: _exported(model),
            name=name,
            engine=engine,
            settings={**_settings(model, engine), "engine_version": opened.version},
            batch_size=batch_size,
            most=most,
        )
    return replace(candidate, weights=path_text(model.weights), dtype=dtype_name(model.dtype))


def _eager(model: Model, most: int) -> Candidate:
    if model.dtype == torch.int8:
        raise DtypeError(
            f"This {model.architecture.name} is in 8 bit, which PyTorch's own operations do not compute; use "
            "onnxruntime or openvino, or the float model"
        )
    arch, dtype, device = model.architecture, model.dtype, model.device
    tensors = {name: _channels_last(tensor.to(dtype)) for name, tensor in plain.tensors_of(model).items()}
    known = {"stem", *(block.name for block in block_specs(arch)), POOLED, LOGITS}

    def values(pixels: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        x = _channels_last(prepared(pixels, model.transforms, device, dtype))
        with torch.no_grad():
            return dict(zip(outputs, plain.run(x, tensors, arch, outputs, dtype), strict=True))

    def run(pixels: Tensor) -> Answers:
        return Answers.of_logits(values(pixels, (LOGITS,))[LOGITS], most)

    def layers(pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        outputs = [value for value in dict.fromkeys(wanted) if value in known]
        return _on_cpu(values(pixels, outputs), len(pixels))

    return _candidate(model, "eager", run, layers, {"engine_version": torch.__version__}, None)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _candidate(
    model: Model, engine: str, run: Any, layers: Any, settings: Mapping[str, Any], name: str | None
) -> Candidate:
    name = name or _name(model, engine)
    return Candidate(
        name=name,
        column=column_name(name),
        model=model.architecture.name,
        weights=path_text(model.weights),
        engine=engine,
        dtype=dtype_name(model.dtype),
        transforms=model.transforms,
        categories=model.categories,
        num_classes=model.num_classes,
        run=run,
        settings={**_settings(model, engine), **settings},
        device=model.device,
        layers=layers,
    )


def _name(model: Model, engine: str) -> str:
    own = f"{model.architecture.name} {dtype_name(model.dtype)}"
    return own if engine == "fastres" else f"{own} ({engine})"


def _settings(model: Model, engine: str) -> dict[str, Any]:
    return {
        "architecture": model.architecture.name,
        "weights": path_text(model.weights),
        "state_sha256": state_sha256(model.state_dict()),
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
        "engine": engine,
        "fastres_version": __version__,
    }


def _checked_runtime(model: Model, engine: str) -> Any:
    """Return the provider of ONNX Runtime or the precision of OpenVINO. Raise an error for what they cannot do."""
    dtype, device = model.dtype, model.device
    if engine == "onnxruntime":
        if dtype == torch.bfloat16:
            raise DtypeError(
                "The model is in bfloat16, but ONNX files are exported in float32, float16 and int8; use one of these, "
                "or another engine"
            )
        return ("cuda", {"device_id": str(device.index or 0)}) if device.type == "cuda" else "cpu"
    if device.type != "cpu":
        raise DeviceError(
            f"The model is on {device}, but OpenVINO runs on the CPU here; load the model with device='cpu'"
        )
    if dtype == torch.float16:
        raise DtypeError(
            "The model is in float16, but OpenVINO computes in float32, bfloat16 and int8 here; use one of these, or "
            "another engine"
        )
    if dtype == torch.bfloat16 and not has_bf16():
        raise DtypeError(
            f"The model is in bfloat16, for which OpenVINO needs BF16 instructions. This processor ({cpu_name()}) has "
            "none, or an environment variable turns them off; use float32"
        )
    return "bf16" if dtype == torch.bfloat16 else "f32"


@contextmanager
def _exported(model: Model) -> Iterator[Path]:
    """Export the model for any number of images; yield the file, which is removed afterwards."""
    from fastres.export.onnx import export

    dtype = torch.float16 if model.dtype == torch.float16 else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        yield export(model, Path(folder) / "model.onnx", dtype=dtype, verify=False, progress=False).path


def _on_cpu(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the first ``count`` images' values in float32, on the CPU; ``"pooled"`` is ``[N, C]``."""
    found = {value: tensor[:count].to("cpu", torch.float32) for value, tensor in values.items()}
    return {value: tensor.flatten(1) if value == POOLED else tensor for value, tensor in found.items()}
