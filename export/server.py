"""Write a model repository for NVIDIA Triton Inference Server: ``config.pbtxt``, ``labels.txt``, ``1/model.onnx``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastres.arguments import whole_number
from fastres.errors import InputError
from fastres.model.model import Model
from fastres.network.architectures import ARCHITECTURES
from fastres.network.plan import LOGITS
from fastres.text import path_text

from .errors import ExportFileError
from .files import checked_folder, replacing_folder
from .metadata import SOFTMAX, Inspection, Value
from .onnx import ExportReport, check_opset, check_runtime, export, inspect
from .signature import DYNAMIC, load_model

DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64"}
# The time that a request waits for others to join its batch, much less than the time of a batch.
QUEUE_DELAY_US = 500
# Height and width of warm-up pictures if the input's are free.
WARM_UP_SIZE = 256


@dataclass(frozen=True)
class ServerReport:
    """The folder written, and the report of the model file in it."""

    folder: Path
    name: str
    export: ExportReport

    def __str__(self) -> str:
        return f"{path_text(self.folder)}: config.pbtxt, 1/model.onnx\n{self.export}"


def export_server_repository(
    model: str | Model | nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch_size: int = 32,
    weights: Any = "DEFAULT",
    progress: bool = True,
    **options: Any,
) -> ServerReport:
    """Write ``folder/<name>`` for Triton Inference Server's ONNX Runtime backend; ``folder`` is its model repository.

    ``name`` is the architecture's by default. The server joins requests into batches of at most ``max_batch_size`` and
    warms the model up with one image and with a full batch. ``options`` are those of
    :func:`fastres.export.onnx.export`, except ``batch``. The folder is created if needed. A model of the same name in
    it is replaced once the new one is complete.

    Raises the errors of :func:`fastres.export.onnx.export`, ``InputError`` for a name that cannot be a folder name or a
    ``max_batch_size`` below 1, and ``ExportFileError`` if the folder cannot be written.
    """
    max_batch_size = whole_number(max_batch_size, "max_batch_size")
    if options.get("batch", DYNAMIC) != DYNAMIC:
        raise InputError(f"batch is {options['batch']!r}, but the server forms batches itself; give max_batch_size")
    check_opset(options.get("opset", 18))
    if options.get("verify", True):
        check_runtime()
    root = Path(folder).expanduser()
    if model in ARCHITECTURES:
        checked_folder(root / (name or str(model)), model, weights)  # before the work
    loaded = load_model(model, weights, progress)
    name = loaded.architecture.name if name is None else name
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise InputError(
            f"name is {name!r}, but it becomes a folder's name and part of URLs; use letters, digits, '_', '-' and '.'"
        )
    checked_folder(root / name, model, weights)
    try:
        root.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportFileError(f"{root} cannot be created ({error.strerror or error}); give another folder") from error
    with replacing_folder(root / name) as temporary:
        (temporary / "1").mkdir()
        report = export(loaded, temporary / "1" / "model.onnx", progress=progress, **options)
        labels = loaded.categories
        if labels is not None:
            text = "".join(f"{' '.join(label.split())}\n" for label in labels)
            (temporary / "labels.txt").write_text(text, encoding="utf-8")
        inspection = inspect(temporary / "1" / "model.onnx")
        config = server_config(name, inspection, max_batch_size, labels=labels is not None)
        (temporary / "config.pbtxt").write_text(config, encoding="utf-8")
    target = (root / name).resolve()
    moved = ExportReport(**{**vars(report), "path": target / "1" / "model.onnx"})
    return ServerReport(target, name, moved)


def server_config(name: str, inspection: Inspection, max_batch_size: int, labels: bool) -> str:
    """Return a file's ``config.pbtxt``: the server's ``ModelConfig`` as protobuf text. ``dims`` exclude the batch."""
    (given,) = inspection.inputs
    inputs = f"input [\n{_tensor(given)}\n]"
    outputs = ",\n".join(_tensor(v, labels and v.name in (LOGITS, SOFTMAX)) for v in inspection.outputs)
    warm_up = ",\n".join(_warm_up(given, batch) for batch in sorted({1, max_batch_size}))
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch_size}
{inputs}
output [
{outputs}
]
instance_group [
  {{
    kind: KIND_AUTO
    count: 1
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {QUEUE_DELAY_US}
}}
model_warmup [
{warm_up}
]
"""


def _tensor(value: Value, labelled: bool = False) -> str:
    label = '\n    label_filename: "labels.txt"' if labelled else ""
    dims = ", ".join(map(str, _dims(value.shape, free=-1)))
    return f"""  {{
    name: "{value.name}"
    data_type: {DATA_TYPES[value.dtype]}
    dims: [ {dims} ]{label}
  }}"""


def _warm_up(value: Value, batch: int) -> str:
    dims = ", ".join(map(str, _dims(value.shape, free=WARM_UP_SIZE)))
    return f"""  {{
    name: "batch of {batch}"
    batch_size: {batch}
    inputs {{
      key: "{value.name}"
      value: {{
        data_type: {DATA_TYPES[value.dtype]}
        dims: [ {dims} ]
        random_data: true
      }}
    }}
  }}"""


def _dims(shape: Sequence[int | str], free: int) -> list[int]:
    return [free if isinstance(size, str) else size for size in shape[1:]]
