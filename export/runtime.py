"""Run an exported file: ``fastres.export.runtime.Session``, ONNX Runtime with the file's own preprocessing.

If the requested provider does not start, ONNX Runtime silently continues on the CPU. Here that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.arguments import whole_number
from fastres.errors import DeviceError, InputError
from fastres.images.decoding import load_image
from fastres.images.transforms import batch_sources, normalised
from fastres.model.predict import results_of, top_predictions
from fastres.model.predictions import Prediction
from fastres.network.plan import INPUT, LOGITS
from fastres.text import dtype_name

from .errors import ExportFileError, missing
from .metadata import Metadata

try:
    import onnxruntime
except ImportError as error:
    raise missing("onnxruntime") from error

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
ON_CUDA = (PROVIDERS["cuda"], PROVIDERS["tensorrt"])
CONV_SEARCHES = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")

Provider = str | tuple[str, Mapping[str, Any]]


class Session:
    """An exported file, ready to run.

    ONNX Runtime tries ``providers`` in order. Each is a short name (``"cpu"``, ``"cuda"``, ``"tensorrt"``,
    ``"openvino"``), ONNX Runtime's own name (``"CUDAExecutionProvider"``), or a pair of either and its options.
    ``None`` is ``"cuda"`` if torch sees a GPU and ONNX Runtime has the provider, else ``"cpu"``. ``threads`` is the
    number of CPU threads; by default ONNX Runtime chooses.

    ``conv_search`` is CUDA's ``cudnn_conv_algo_search``: ``"EXHAUSTIVE"`` times cuDNN's algorithms at each new shape's
    first call, ``"HEURISTIC"`` asks cuDNN, ``"DEFAULT"`` takes one algorithm for all. In float32, CUDA uses TF32 if
    ``torch.backends.cudnn.conv.fp32_precision`` is ``"tf32"``. That is torch's default, unless
    ``torch.backends.cudnn.allow_tf32`` or another of torch's settings turns it off. CUDA runs on torch's current GPU
    unless its option ``device_id`` names another.

    Raises ``ExportFileError`` for a file that is missing or was not exported by fastres, ``InputError`` for an unknown
    provider, and ``DeviceError`` if the first provider is not the one in use.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Provider | Sequence[Provider] | None = None,
        *,
        conv_search: str = "EXHAUSTIVE",
        threads: int | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ExportFileError(f"{self.path} does not exist; pass the path of a file that fastres export wrote")
        asked = _provider_list(providers, conv_search)
        wanted = asked[0][0]
        if wanted in ON_CUDA:
            _load_cuda_libraries()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # On processors without VNNI instructions, slower kernels in 8 bit that do not overflow. No effect on others.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._options, self._asked = options, asked
        try:
            self.session = onnxruntime.InferenceSession(str(self.path), options, providers=asked)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise ExportFileError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {self.path} on {wanted} ({error}); pass a file "
                "that fastres export wrote, or export it again"
            ) from error
        self.provider: str = self.session.get_providers()[0]
        if self.provider != wanted:
            raise DeviceError(
                f"{wanted} was requested, but ONNX Runtime {onnxruntime.__version__} fell back to {self.provider}: the "
                "provider did not start. Check the GPU, its driver and the CUDA and cuDNN libraries, or pass "
                "providers='cpu'"
            )
        options_in_use = self.session.get_provider_options()[self.provider]
        self.device_index = int(options_in_use.get("device_id", 0))
        self.metadata = Metadata.from_strings(self.session.get_modelmeta().custom_metadata_map, str(self.path))
        self.output_names: tuple[str, ...] = tuple(value.name for value in self.session.get_outputs())
        (given,) = self.session.get_inputs()
        self.input_shape: tuple[int | str, ...] = tuple(given.shape)
        self.input_dtype = np.dtype({"tensor(float)": "float32", "tensor(float16)": "float16"}.get(given.type, "uint8"))

    def __repr__(self) -> str:
        return f"Session({self.path.name}, {self.metadata.model} {self.metadata.weights}, {self.provider})"

    def __call__(self, x: np.ndarray | Tensor) -> dict[str, Any]:
        """Run the file on ``x``, which has its input's shape and dtype; return its outputs by name.

        An array gives arrays, a tensor gives tensors. With the CUDA or TensorRT provider, a CUDA tensor is bound in
        place and the results stay on the GPU. Raises ``InputError`` for another shape or dtype, and ``DeviceError`` for
        a tensor that is not on the session's GPU.
        """
        self._check(x)
        if isinstance(x, Tensor) and x.is_cuda and self.provider in ON_CUDA:
            return self._run_bound(x)
        array = x.cpu().numpy() if isinstance(x, Tensor) else x
        results = self.session.run(None, {INPUT: array})
        if isinstance(x, Tensor):
            results = [torch.from_numpy(result).to(x.device) for result in results]
        return dict(zip(self.output_names, results, strict=True))

    def predict(self, images: Any, top_k: int = 5, *, batch_size: int = 32) -> Any:
        """Predict classes as :meth:`fastres.Model.predict` does, with the file's transforms and class names.

        Raises ``ImageError`` for anything that is not an image, and ``InputError`` if the file has no ``logits`` or
        takes images of another size than its transforms give.
        """
        if LOGITS not in self.output_names:
            raise InputError(
                f"{self.path.name} has the outputs {', '.join(self.output_names)}, but predict needs logits; "
                "export the model with logits among its outputs"
            )
        top_k, batch_size = whole_number(top_k, "top_k"), whole_number(batch_size, "batch_size")
        sources = batch_sources(images)
        ranked: list[tuple[Prediction, ...]] = []
        for count, x in self._batches(sources, batch_size):
            logits = torch.as_tensor(self(x)[LOGITS])[:count]
            ranked += top_predictions(logits, top_k, self.metadata.class_names)
        return results_of(images, sources, ranked)

    def opened(self, graph: bytes) -> Any:
        """Return ONNX Runtime's session for another graph, opened with the providers and options of this file."""
        return onnxruntime.InferenceSession(graph, self._options, providers=self._asked)

    def _batches(self, sources: list[Any], batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield inputs for the file, each with its number of images; a fixed batch is padded with zeros."""
        fixed = self.input_shape[0] if isinstance(self.input_shape[0], int) else None
        in_graph = self.metadata.preprocessing
        # If the graph resizes pictures, they keep their own sizes, so each is a batch of its own.
        step = 1 if in_graph else (fixed or batch_size)
        for start in range(0, len(sources), step):
            chunk = sources[start : start + step]
            batch = np.asarray(load_image(chunk[0]))[None] if in_graph else self._preprocessed(chunk, start)
            lacking = (fixed or len(chunk)) - len(chunk)
            yield len(chunk), np.pad(batch, [(0, lacking), (0, 0), (0, 0), (0, 0)])

    def _preprocessed(self, chunk: list[Any], start: int) -> np.ndarray:
        """Return normalised images ``[N, 3, crop, crop]`` in the file's dtype."""
        transforms = self.metadata.transforms
        pixels = transforms.batch(chunk, first_index=start).to("cpu", torch.float32)
        images = normalised(pixels / 255, transforms.mean, transforms.std)
        return images.contiguous().numpy().astype(self.input_dtype)

    def _check(self, x: np.ndarray | Tensor) -> None:
        dtype = dtype_name(x.dtype)
        fits = len(x.shape) == len(self.input_shape) and all(
            isinstance(known, str) or known == given for known, given in zip(self.input_shape, x.shape, strict=True)
        )
        if not fits or dtype != str(self.input_dtype):
            known = ", ".join(map(str, self.input_shape))
            raise InputError(
                f"{self.path.name} takes {self.input_dtype} [{known}] but was given {dtype} {list(x.shape)}; "
                "session.predict(...) takes images of any kind"
            )

    def _run_bound(self, x: Tensor) -> dict[str, Tensor]:
        """Run the file on a CUDA tensor; inputs and outputs stay on the GPU."""
        index = x.device.index
        if index != self.device_index:
            raise DeviceError(
                f"{self.path.name} runs on cuda:{self.device_index} but was given a tensor on {x.device}; pass "
                f"providers=('cuda', {{'device_id': {index}}}) for a session there"
            )
        x = x.contiguous()
        torch.cuda.current_stream(x.device).synchronize()  # ONNX Runtime reads x on a stream of its own
        binding = self.session.io_binding()
        binding.bind_input(INPUT, "cuda", index, self.input_dtype, tuple(x.shape), x.data_ptr())
        for name in self.output_names:
            binding.bind_output(name, "cuda", index)
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        found = binding.get_outputs()
        results = {
            name: torch.as_tensor(_CudaArray(value), device=x.device).clone()
            for name, value in zip(self.output_names, found, strict=True)
        }
        torch.cuda.current_stream(x.device).synchronize()  # ONNX Runtime may reuse its memory from here on
        return results


class _CudaArray:
    """ONNX Runtime's GPU memory in a form that other libraries read: the CUDA array interface, version 3."""

    def __init__(self, value: Any) -> None:
        kind = {"tensor(float)": "<f4", "tensor(float16)": "<f2", "tensor(int64)": "<i8"}[value.data_type()]
        self.value = value  # owns the memory
        self.__cuda_array_interface__ = {
            "shape": tuple(value.shape()),
            "typestr": kind,
            "data": (value.data_ptr(), False),
            "version": 3,
        }


def _provider_list(
    providers: Provider | Sequence[Provider] | None, conv_search: str
) -> list[tuple[str, dict[str, Any]]]:
    """Return ONNX Runtime's names and options. Raise ``InputError`` if unknown, ``DeviceError`` if not installed."""
    available = onnxruntime.get_available_providers()
    if conv_search not in CONV_SEARCHES:
        raise InputError(f"conv_search is {conv_search!r}; give one of {', '.join(CONV_SEARCHES)}")
    if providers is None:
        providers = "cuda" if torch.cuda.is_available() and PROVIDERS["cuda"] in available else "cpu"
    single = isinstance(providers, str) or (len(providers) == 2 and isinstance(providers[1], Mapping))
    rows = [providers] if single else list(providers)
    if not rows:
        raise InputError(f"No providers were given; pass one of {', '.join(PROVIDERS)}")
    result = []
    for row in rows:
        name, given = (row, {}) if isinstance(row, str) else row
        full = PROVIDERS.get(str(name).lower(), str(name))
        if full not in onnxruntime.get_all_providers():
            raise InputError(f"There is no provider called {name!r}; short names are {', '.join(PROVIDERS)}")
        if full not in available:
            raise DeviceError(
                f"{full} is not in this onnxruntime {onnxruntime.__version__}, which has {', '.join(available)}. For "
                "CUDA and TensorRT: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )
        result.append((full, {**_default_options(full, conv_search), **given}))  # type: ignore[dict-item]
    return result


def _default_options(provider: str, conv_search: str) -> dict[str, Any]:
    device: dict[str, Any] = {}
    if provider in ON_CUDA and torch.cuda.is_available():
        device = {"device_id": str(torch.cuda.current_device())}
    if provider != PROVIDERS["cuda"]:
        return device
    return device | {
        "cudnn_conv_algo_search": conv_search,
        "cudnn_conv_use_max_workspace": "1",
        "use_tf32": "1" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "0",  # type: ignore[attr-defined]
    }


def _load_cuda_libraries() -> None:
    """Make ONNX Runtime find the CUDA and cuDNN libraries that came with torch."""
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
