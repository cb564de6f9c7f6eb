"""The engines that run exported files: ONNX Runtime, OpenVINO, and torch for ``.pt2`` programs.

Each opens a file that ``fastres export`` wrote, and runs it with as many CPU threads as torch uses. The packages are
imported when an engine is used.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastres.errors import MissingDependencyError
from fastres.network.plan import INPUT, POOLED

if TYPE_CHECKING:
    from fastres.export.metadata import Metadata

CPU = torch.device("cpu")
METADATA = "metadata.json"  # an extra file in a .pt2 program
_PROGRAM = ("archive_format", "serialized_exported_program.json")  # one of them is in each .pt2 program

Outputs = dict[str, Tensor]


class Opened:
    """A file that is ready to run.

    ``input_shape`` has a number for each fixed dimension and a name for the others. ``settings`` say how the engine
    computes, as JSON values. A call takes a batch of ``input_shape`` and ``input_dtype``, contiguous and on ``device``,
    and returns the file's outputs by name. ``has_layers`` says whether :meth:`inside` works.
    """

    version: str
    settings: Mapping[str, Any]
    device: torch.device
    metadata: Metadata
    input_shape: Sequence[int | str]
    input_dtype: torch.dtype
    has_layers: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Outputs:
        raise NotImplementedError

    def inside(self, path: Path, wanted: Sequence[str]) -> Callable[[Tensor], Outputs]:
        """Open the file at ``path`` again; return a function from a batch to the ``wanted`` values of the plan.

        Values that the file does not have are left out. In 8 bit they are dequantised.
        """
        raise NotImplementedError


class OnnxRuntime(Opened):
    """A file in ONNX Runtime, through :class:`fastres.export.runtime.Session` with its ``provider``."""

    def __init__(self, path: Path, provider: Any = None) -> None:
        from fastres.export import runtime

        self.session = runtime.Session(path, provider, threads=torch.get_num_threads())
        self.version = str(runtime.onnxruntime.__version__)
        self.settings = {"provider": self.session.provider}
        on_cuda = self.session.provider in runtime.ON_CUDA
        self.device = torch.device("cuda", self.session.device_index) if on_cuda else CPU
        self.metadata = self.session.metadata
        self.input_shape = self.session.input_shape
        self.input_dtype = _torch_dtype(self.session.input_dtype)

    def __call__(self, x: Tensor) -> Outputs:
        return self.session(x)

    def inside(self, path: Path, wanted: Sequence[str]) -> Callable[[Tensor], Outputs]:
        onnx = _onnx()
        model = onnx.load(str(path))
        names = inner_names(model.graph, wanted)
        tensors = list(dict.fromkeys(names.values()))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
        session = self.session.opened(model.SerializeToString()) if tensors else None

        def run(x: Tensor) -> Outputs:
            found = session.run(tensors, {INPUT: x.cpu().numpy()}) if session else []
            results = dict(zip(tensors, map(torch.from_numpy, found), strict=True))
            return {value: results[tensor] for value, tensor in names.items()}

        return run


class OpenVino(Opened):
    """A file in OpenVINO, on the CPU and tuned for latency.

    ``precision`` is that of the arithmetic, ``"f32"`` or ``"bf16"``. What the file computes in 8 bit stays so.
    """

    def __init__(self, path: Path, precision: str = "f32") -> None:
        from fastres.export.metadata import Metadata, inspect

        self._openvino = _openvino()
        self.version = str(self._openvino.__version__).split("-")[0]
        self.settings = {"precision": precision}
        self.device = CPU
        inspection = inspect(path)
        self.metadata = Metadata.from_strings(inspection.metadata, str(path))
        (given,) = inspection.inputs
        self.input_shape, self.input_dtype = given.shape, _torch_dtype(given.dtype)
        self._outputs = [output.name for output in inspection.outputs]
        self._request = self._requested(path)

    def __call__(self, x: Tensor) -> Outputs:
        return self._inferred(self._request, x, self._outputs)

    def inside(self, path: Path, wanted: Sequence[str]) -> Callable[[Tensor], Outputs]:
        names = inner_names(_onnx().load(str(path)).graph, wanted)
        request = self._requested(path, [tensor for tensor in names.values() if tensor not in self._outputs])

        def run(x: Tensor) -> Outputs:
            results = self._inferred(request, x, names.values())
            return {value: results[tensor] for value, tensor in names.items()}

        return run

    def _requested(self, path: Path, more: Sequence[str] = ()) -> Any:
        """Compile the file, with ``more`` tensors among its outputs. Raise ``ExportFileError`` if that fails."""
        from fastres.export.errors import ExportFileError
        from fastres.export.openvino_core import compiled, core

        try:
            model = core().read_model(str(path))
            if more:
                model.add_outputs(list(more))
            return compiled(model, self.settings["precision"]).create_infer_request()
        except Exception as error:  # openvino raises RuntimeError, and others from its plugins
            raise ExportFileError(
                f"OpenVINO {self.version} cannot compile {path} in {self.settings['precision']} ({error}); run it in "
                "onnxruntime"
            ) from error

    def _inferred(self, request: Any, x: Tensor, names: Iterable[str]) -> Outputs:
        results = request.infer([x.numpy()], share_inputs=True)
        return {name: torch.from_numpy(results[name]) for name in names}


class TorchProgram(Opened):
    """A ``.pt2`` program in torch, on the CPU."""

    has_layers = False

    def __init__(self, path: Path) -> None:
        from fastres.export.errors import ExportFileError
        from fastres.export.metadata import Metadata

        extra = {METADATA: ""}
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no zip archive")
            with zipfile.ZipFile(path) as archive:
                if not any(name.endswith(_PROGRAM) for name in archive.namelist()):
                    raise ValueError("it is no program of torch.export")
            program = torch.export.load(path, extra_files=extra)
            strings = json.loads(extra[METADATA] or "{}")
            self._program = program.module()
        except Exception as error:  # torch.export.load raises errors of many classes
            raise ExportFileError(
                f"torch {torch.__version__} cannot open {path} ({error}); pass a file that fastres export wrote"
            ) from error
        strings = strings if isinstance(strings, dict) else {}
        self.metadata = Metadata.from_strings({"opset": "0", **strings}, str(path))  # programs have no opset
        self.version = torch.__version__
        self.settings = {}
        self.device = CPU
        (name,) = program.graph_signature.user_inputs
        (given,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
        self.input_shape = [size if isinstance(size, int) else str(size) for size in given.shape]
        self.input_dtype = given.dtype

    def __call__(self, x: Tensor) -> Outputs:
        with torch.no_grad():
            (name,) = self.metadata.outputs
            return {name: self._program(x)}


def inner_names(graph: Any, wanted: Sequence[str]) -> dict[str, str]:
    """Return the tensor of an ONNX ``graph`` for each of the ``wanted`` values of a plan that it has.

    Tensors have the names of the values, in 8 bit after they are dequantised. A stage that is an output of the file has
    the name of the output instead, and the pooled features have a name of their own.
    """
    from fastres.export.metadata import EMBEDDING

    written = {name for node in graph.node for name in node.output}
    outputs = {output.name for output in graph.output}
    last: dict[str, int] = {}
    for constant in graph.initializer:
        if found := re.match(r"(layer\d+)\.(\d+)\.", constant.name):
            last[found[1]] = max(int(found[2]), last.get(found[1], 0))
    renamed = {f"{stage}.{block}": stage for stage, block in last.items() if stage in outputs}
    renamed[POOLED] = EMBEDDING if EMBEDDING in outputs else "head.mean"
    found_names = {value: renamed.get(value, value) for value in wanted}
    return {value: tensor for value, tensor in found_names.items() if tensor in written}


def classes_in_graph(path: Path) -> int:
    """Return the number of classes of an ONNX file: the rows of its classifier's weights."""
    from fastres.export.errors import ExportFileError

    graph = _onnx().load(str(path)).graph
    shapes = {constant.name: tuple(constant.dims) for constant in graph.initializer}
    shapes |= {
        node.output[0]: shapes[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes
    }
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in shapes:
            return int(shapes[node.input[1]][0])
    raise ExportFileError(f"{path} has no classifier whose classes can be counted; export it with logits or softmax")


def _torch_dtype(name: object) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, str(name))
    return dtype


def _onnx() -> Any:
    from fastres.export.errors import missing

    try:
        import onnx
    except ImportError as error:
        raise missing("onnx") from error
    return onnx


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("openvino is needed here but is not installed: pip install openvino") from error
    return openvino
