"""The engines that the benchmark compares, fastres and its alternatives, as rows of data.

In int8, batches and logits are float32. ``build_int8`` receives the file of the model in 8 bit, so that all engines
have the same scales. Eager PyTorch stays in float32 there, as the baseline.

To add an engine, write a ``build`` function (import the library inside it) and a function that returns why the engine
is absent, and add a row to ``PEERS``. ``build`` receives the network (float32, on the CPU, in eval mode) and must not
change it. It also receives an example batch ``[N, 3, H, W]`` with the device, dtype, memory format and batch size of
every call. It returns a function from such batches to logits ``[N, classes]`` in any floating-point dtype. Batches and
logits are tensors, or arrays of the engine's library (``Peer.native``). Everything runs under ``torch.inference_mode``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastres
from fastres.errors import FastresError, near_matches
from fastres.executors.cpu import check_dtype
from fastres.export import engines
from fastres.network.architectures import conv_specs

from . import compilers, jax_peer
from .eager import EagerResNet

Engine = Callable[[Any], Any]


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _itself(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Peer:
    """An engine and how to build it.

    ``reason_absent(device, dtype)`` returns why the engine cannot run, or ``None`` if it can; ``absent`` asks it, and
    also names engines without ``build_int8``. ``native`` converts a
    batch in ``memory_format`` to an array of the engine's library, and ``as_tensor`` converts its logits to a tensor;
    neither is timed. ``own_memory`` means that the engine does not use torch's allocator, so its peak memory on a GPU
    is unknown. ``slow`` means that building it can take minutes.
    """

    name: str
    what: str
    build: Callable[[EagerResNet, Any], Engine]
    reason_absent: Callable[[torch.device, torch.dtype], str | None] = _always
    memory_format: torch.memory_format = torch.contiguous_format
    native: Callable[[Tensor], Any] = _itself
    as_tensor: Callable[[Any], Tensor] = _itself
    own_memory: bool = False
    slow: bool = False
    build_int8: Callable[[Path, Any], Engine] | None = None

    def absent(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the engine cannot run in ``dtype`` on ``device``, or ``None`` if it can."""
        if dtype == torch.int8 and self.build_int8 is None:
            return None if self.name == EAGER.name else "it cannot run the plan in 8 bit"
        return self.reason_absent(device, dtype)

    def example(self, x: Tensor) -> Any:
        """Return ``x`` in the form in which the engine takes batches."""
        return self.native(x.contiguous(memory_format=self.memory_format))


def _eager(module: EagerResNet, x: Tensor) -> EagerResNet:
    return copy.deepcopy(module).to(x.device, x.dtype)


def _channels_last(module: EagerResNet, x: Tensor) -> EagerResNet:
    return _eager(module, x).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _folded(module: EagerResNet, x: Tensor) -> EagerResNet:
    """Fold each batch norm into its convolution with PyTorch's own function, in float32."""
    folded = copy.deepcopy(module)
    for spec in conv_specs(module.architecture):
        conv, norm = folded.get_submodule(spec.conv), folded.get_submodule(spec.norm)
        folded.set_submodule(spec.conv, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var,arg-type]
        folded.set_submodule(spec.norm, nn.Identity())
    return _channels_last(folded, x)


def _compile(mode: str) -> Callable[[EagerResNet, Tensor], Engine]:
    return lambda module, x: compilers.torch_compile(_channels_last(module, x), x, mode)


def _torch_tensorrt(module: EagerResNet, x: Tensor) -> Engine:
    return compilers.torch_tensorrt(_eager(module, x), x)


def _graphed(build: Callable[[EagerResNet, Tensor], Engine]) -> Callable[[EagerResNet, Tensor], Engine]:
    """Return a ``build`` function that captures the engine in a CUDA graph. A call copies the batch in and replays.

    A graph has the addresses of the weights but does not keep them, so the function that replays it keeps the engine.
    """

    def build_graphed(module: EagerResNet, x: Tensor) -> Engine:
        engine, batch = build(module, x), x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):  # warm up: capture needs libraries loaded and workspaces allocated
            for _ in range(3):
                engine(batch)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = engine(batch)

        def replay(x: Tensor, _kept: Engine = engine) -> Tensor:
            batch.copy_(x)
            graph.replay()
            return logits

        return replay

    return build_graphed


def _graphs_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs need a CUDA GPU"


def _fastres(module: EagerResNet, x: Tensor) -> Engine:
    arch = module.architecture
    state, classes = module.state_dict(), arch.num_classes
    return fastres.load(arch.name, state, num_classes=classes, dtype=x.dtype, device=x.device)


def _onnxruntime(module: EagerResNet, x: Tensor) -> Engine:
    return engines.onnxruntime_engine(fastres.from_module(module), x)


def _onnxruntime_tensorrt(module: EagerResNet, x: Tensor) -> Engine:
    return engines.onnxruntime_tensorrt_engine(fastres.from_module(module), x)


def _openvino(module: EagerResNet, x: Tensor) -> Engine:
    return engines.openvino_engine(fastres.from_module(module), x)


def _fastres_int8(file: Path, x: Tensor) -> Engine:
    return fastres.load(file)


def _onnxruntime_int8(file: Path, x: Tensor) -> Engine:
    return engines.onnxruntime_engine(fastres.load(file), x)


def _openvino_int8(file: Path, x: Tensor) -> Engine:
    return engines.openvino_engine(fastres.load(file), x)


def _fastres_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "fastres computes in int8 on the CPU only" if dtype == torch.int8 else None
    try:
        check_dtype(torch.float32 if dtype == torch.int8 else dtype)
    except FastresError as error:
        return str(error)
    return None


EAGER = Peer("eager", "PyTorch, contiguous NCHW, like torchvision's model", _eager)
FASTRES = Peer("fastres", "fastres.load(name)", _fastres, _fastres_unsupported, build_int8=_fastres_int8)

_LAST = torch.channels_last
PEERS: tuple[Peer, ...] = (
    EAGER,
    Peer("eager_channels_last", "PyTorch, channels last", _channels_last, memory_format=_LAST),
    Peer("folded_channels_last", "PyTorch, batch norm folded, channels last", _folded, memory_format=_LAST),
    Peer("eager_cudagraph", "eager_channels_last in a CUDA graph", _graphed(_channels_last), _graphs_absent, _LAST),
    Peer("folded_cudagraph", "folded_channels_last in a CUDA graph", _graphed(_folded), _graphs_absent, _LAST),
    Peer("compile", "torch.compile, weights frozen, channels last",
         _compile(compilers.DEFAULT), compilers.torch_compile_absent, _LAST, slow=True),
    Peer("compile_max_autotune", "compile with mode='max-autotune'",
         _compile(compilers.MAX_AUTOTUNE), compilers.torch_compile_absent, _LAST, slow=True),
    Peer("torch_tensorrt", "Torch-TensorRT, CUDA graphs",
         _torch_tensorrt, compilers.torch_tensorrt_absent, own_memory=True, slow=True),
    Peer("onnxruntime", "fastres export, ONNX Runtime (its CUDA provider on a GPU)",
         _onnxruntime, engines.onnxruntime_absent, own_memory=True, build_int8=_onnxruntime_int8),
    Peer("onnxruntime_tensorrt", "fastres export, ONNX Runtime's TensorRT provider",
         _onnxruntime_tensorrt, engines.onnxruntime_tensorrt_absent, own_memory=True, slow=True),
    Peer("openvino", "fastres export, OpenVINO", _openvino, engines.openvino_absent, own_memory=True,
         build_int8=_openvino_int8),
    Peer("jax", "the same network in JAX, batch norm folded, compiled by XLA",
         jax_peer.jax_engine, jax_peer.jax_absent, _LAST, jax_peer.to_jax, jax_peer.to_torch, own_memory=True),
    FASTRES,
)  # fmt: skip


def select(names: str | None, without: str | None = None) -> tuple[Peer, ...]:
    """Return the engines that ``names`` lists (comma-separated; ``None`` for all), without those in ``without``.

    Eager and fastres are always included. Raise ``FastresError`` for an unknown name.
    """
    unwanted = set() if without is None else _known(without)
    wanted = {peer.name for peer in PEERS} if names is None else _known(names)
    return tuple(peer for peer in PEERS if peer.name in wanted - unwanted or peer in (EAGER, FASTRES))


def _known(names: str) -> set[str]:
    known = {peer.name: peer for peer in PEERS}
    given = {name.strip() for name in names.split(",") if name.strip()}
    for name in sorted(given - set(known)):
        raise FastresError(f"No engine is called {name!r}.{near_matches(name, known)} Available: {', '.join(known)}")
    return given
