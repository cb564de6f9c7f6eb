"""Exported files as candidates: ``.onnx`` in ONNX Runtime or OpenVINO, ``.pt2`` in torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.classification.parcels import padded
from fastres.errors import DeviceError, FastresError, InputError
from fastres.images.transforms import Transforms, normalised
from fastres.network.plan import LOGITS
from fastres.text import path_text
from fastres.weights.download import file_sha256

from .candidates import Answers, Candidate
from .names import column_name
from .runtimes import OnnxRuntime, Opened, OpenVino, Outputs, TorchProgram, classes_in_graph

Layers = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]

# The engines of each kind of file, the default first.
FILE_ENGINES: dict[str, dict[str, Callable[..., Opened]]] = {
    ".onnx": {"onnxruntime": OnnxRuntime, "openvino": OpenVino},
    ".pt2": {"torch": TorchProgram},
}


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise ``ExportFileError`` unless there is a file at ``path``."""
    path = Path(path).expanduser()
    if not path.is_file():
        from fastres.export.errors import ExportFileError

        what = "is a folder" if path.is_dir() else "does not exist"
        raise ExportFileError(f"{path_text(path)} {what}; pass the path of a file that fastres export wrote")


def open_exported(
    path: Any, engine: str | None = None, *, batch_size: int, most: int, device: torch.device | None = None
) -> Candidate:
    """Return the candidate of a file that ``fastres export`` wrote.

    ``engine`` is ``"onnxruntime"`` (the default) or ``"openvino"`` for ``.onnx``, and ``"torch"`` for ``.pt2``. ONNX
    Runtime runs on ``device``; without one, it uses the GPU if torch sees one and ONNX Runtime has the CUDA provider.
    The other engines use the CPU. The answers have the ``most`` best classes, or as many as the file gives. They have
    logits only if the file does. ``layers`` is ``None`` for ``.pt2`` and for files that do their preprocessing
    themselves.

    Raises ``ExportFileError`` for a file that is missing, was not written by fastres or does not run, ``InputError``
    for another kind of file or engine, a file without classes, and one that takes images of another size than its
    transforms give, ``DeviceError`` for a device that the engine cannot use, and ``MissingDependencyError`` if a
    package is not installed.
    """
    path = Path(path).expanduser()
    engines = FILE_ENGINES.get(path.suffix.lower())
    if engines is None:
        raise InputError(
            f"{path_text(path)} is not a file that fastres export writes; give one that ends in "
            f"{' or '.join(FILE_ENGINES)}"
        )
    default = next(iter(engines))
    engine = default if engine is None else engine
    if engine not in engines:
        raise InputError(
            f"engine is {engine!r}, but {path.suffix} files run in {' or '.join(engines)}; use one of these"
        )
    check_file(path)
    opened = engines[engine](path, *_provider(engine, device))
    settings = {"file_sha256": file_sha256(path), "engine": engine, "engine_version": opened.version}
    return file_candidate(
        opened,
        path,
        lambda: nullcontext(path),
        name=path_text(path.name) + ("" if engine == default else f" ({engine})"),
        engine=engine,
        settings=settings,
        batch_size=batch_size,
        most=most,
    )


def _provider(engine: str, device: torch.device | None) -> tuple[Any, ...]:
    """Return how to open a file on ``device``. Raises ``DeviceError`` if the engine cannot use it."""
    if device is None:
        return ()
    if engine == "onnxruntime" and device.type in ("cpu", "cuda"):
        return ("cpu",) if device.type == "cpu" else (("cuda", {"device_id": str(device.index or 0)}),)
    if device.type != "cpu":
        raise DeviceError(f"Exported files run on the CPU in {engine}, but device is {str(device)!r}; leave it out")
    return ()


def file_candidate(
    opened: Opened,
    path: Path,
    again: Callable[[], AbstractContextManager[Path]],
    *,
    name: str,
    engine: str,
    settings: Mapping[str, Any],
    batch_size: int,
    most: int,
) -> Candidate:
    """Return the candidate of the file at ``path``, which is ``opened`` and exists now.

    ``again`` provides the file for later, to compute values inside the network. Raises the errors of
    :func:`open_exported`.
    """
    from fastres.export.metadata import SOFTMAX

    metadata = opened.metadata
    transforms, whole_pictures = metadata.transforms, metadata.preprocessing
    _check(opened, path)
    fixed = opened.input_shape[0] if isinstance(opened.input_shape[0], int) else None
    if fixed is None and opened.device.type == "cuda" and not whole_pictures:
        fixed = batch_size  # ONNX Runtime searches the kernels for each new batch size
    file = _File(opened, transforms, fixed, most)
    side = transforms.resize if whole_pictures else transforms.crop
    try:
        if whole_pictures:
            outputs = file.of_pictures([np.zeros((side, side, 3), np.uint8)])
        else:
            outputs = file.of_pixels(torch.zeros(1, 3, side, side, dtype=torch.uint8, device="cpu"))
    except FastresError:
        raise
    except Exception as error:  # the engines' exceptions have no common base class
        from fastres.export.errors import ExportFileError

        raise ExportFileError(
            f"{path_text(path)} cannot run on an image of {side}×{side} in {engine} {opened.version} ({error}); export "
            "it again, or use another engine"
        ) from error
    return Candidate(
        name=name,
        column=column_name(name),
        model=metadata.model,
        weights=metadata.weights,
        engine=engine,
        dtype=metadata.dtype,
        transforms=transforms,
        categories=metadata.class_names,
        num_classes=_classes(outputs, metadata.class_names, path),
        run=file.answers_of_pictures if whole_pictures else file.answers,
        settings={**settings, **opened.settings},
        whole_pictures=whole_pictures,
        device=opened.device,
        answers=_answers(outputs, most).indices.shape[1] if {LOGITS, SOFTMAX}.isdisjoint(outputs) else None,
        layers=file.layers(again) if opened.has_layers and not whole_pictures else None,
    )


@dataclass(frozen=True)
class _File:
    """An opened file and its batches: of exactly ``batch`` images, or of any number if that is ``None``."""

    opened: Opened
    transforms: Transforms
    batch: int | None
    most: int

    def answers(self, pixels: Tensor) -> Answers:
        return _answers(self.of_pixels(pixels), self.most)

    def answers_of_pictures(self, pictures: Sequence[np.ndarray]) -> Answers:
        return _answers(self.of_pictures(pictures), self.most)

    def of_pixels(self, pixels: Tensor) -> Outputs:
        return self._run(self.opened, self._prepared(pixels))

    def of_pictures(self, pictures: Sequence[np.ndarray]) -> Outputs:
        """Run pictures of any size, one after another, as :meth:`fastres.export.runtime.Session.predict` does."""
        found = []
        for picture in pictures:
            x = torch.tensor(np.asarray(picture), dtype=torch.uint8, device=self.opened.device)
            found.append(self._run(self.opened, x[None]))
        return _joined(found)

    def layers(self, again: Callable[[], AbstractContextManager[Path]]) -> Layers:
        """Return the function that computes values inside the network; each call opens the file and closes it."""

        def layers(pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
            with again() as path:
                run = self.opened.inside(path, wanted)
            found = self._run(run, self._prepared(pixels))
            return {value: tensor.to("cpu", torch.float32) for value, tensor in found.items()}

        return layers

    def _prepared(self, pixels: Tensor) -> Tensor:
        return prepared(pixels, self.transforms, self.opened.device, self.opened.input_dtype)

    def _run(self, run: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
        """Return the outputs for ``x``, in parts if the batch is fixed. The last part is padded with zeros."""
        return _joined(list(self._parts(run, x)))

    def _parts(self, run: Callable[[Tensor], Outputs], x: Tensor) -> Iterator[Outputs]:
        for part in x.split(self.batch or max(len(x), 1)):
            results = run(part if self.batch is None else padded(part, self.batch))
            yield {name: value[: len(part)] for name, value in results.items()}


def prepared(pixels: Tensor, transforms: Transforms, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return raw RGB, uint8 ``[N, 3, H, W]``, as normalised images in ``dtype``, contiguous and on ``device``.

    They are normalised in float32, to the same numbers on every device.
    """
    x = pixels.to(device).to(torch.float32, memory_format=torch.contiguous_format)
    # CUDA would multiply by the reciprocal of a Python number.
    scaled = x / torch.full((1,), 255, dtype=torch.float32, device=device)
    return normalised(scaled, transforms.mean, transforms.std).to(dtype)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _answers(outputs: Outputs, most: int) -> Answers:
    from fastres.export.metadata import SOFTMAX, TOP_K_INDICES, TOP_K_SCORES

    if LOGITS in outputs:
        return Answers.of_logits(outputs[LOGITS], most)
    if SOFTMAX in outputs:
        softmax = outputs[SOFTMAX].cpu()
        scores, indices = softmax.sort(dim=1, descending=True, stable=True)  # all, because the label may be any
    else:
        scores, indices = (outputs[name].cpu()[:, :most] for name in (TOP_K_SCORES, TOP_K_INDICES))
    return Answers(indices, scores, None)


def _classes(outputs: Outputs, names: Sequence[str] | None, path: Path) -> int:
    """Return the number of classes of a file with these ``outputs`` and class ``names``."""
    from fastres.export.metadata import SOFTMAX

    for output in (LOGITS, SOFTMAX):
        if output in outputs:
            return outputs[output].shape[1]
    return len(names) if names else classes_in_graph(path)


def _check(opened: Opened, path: Path) -> None:
    """Raise ``InputError`` if a file has no classes, or takes images of another size than its transforms give."""
    from fastres.export.metadata import SOFTMAX, TOP_K_INDICES

    metadata = opened.metadata
    if not {LOGITS, SOFTMAX, TOP_K_INDICES} & set(metadata.outputs):
        raise InputError(
            f"{path_text(path)} has the outputs {', '.join(metadata.outputs)}, but no classes; export the model with "
            "logits among its outputs"
        )
    if metadata.preprocessing:
        return
    crop, sizes = metadata.transforms.crop, opened.input_shape[2:]
    if any(isinstance(size, int) and size != crop for size in sizes):
        raise InputError(
            f"{path_text(path)} takes images of {'×'.join(map(str, sizes))} pixels, but its transforms crop to "
            f"{crop}×{crop}; export it with that image size, or with a dynamic one"
        )
