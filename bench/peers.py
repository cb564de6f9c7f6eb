"""The engines that a benchmark compares, each a row of data: fastres and what else a user could pick.

To add one, write a ``build`` function (import the library inside it) and a function that says why it is absent, and add
a row to ``PEERS``. ``build`` is given the network (float32, on the CPU, eval mode; not to be changed) and an example
batch ``[N, 3, H, W]`` with the device, dtype, memory format and batch size of every call; it returns a function from
such batches to logits ``[N, classes]`` in any floating-point dtype. Everything runs under ``torch.inference_mode``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastres
from fastres.architectures import conv_specs
from fastres.cpu import check_dtype
from fastres.errors import FastresError, near_matches
from fastres.export import engines

from .eager import EagerResNet

Engine = Callable[[Tensor], Tensor]


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """An engine: how to build it and, by ``reason_absent(device, dtype)``, why it cannot be run (``None``: it can)."""

    name: str
    what: str
    build: Callable[[EagerResNet, Tensor], Engine]
    reason_absent: Callable[[torch.device, torch.dtype], str | None] = _always
    memory_format: torch.memory_format = torch.contiguous_format

    def example(self, x: Tensor) -> Tensor:
        """``x`` in the layout that the engine is given its batches in."""
        return x.contiguous(memory_format=self.memory_format)


def _eager(module: EagerResNet, x: Tensor) -> EagerResNet:
    return copy.deepcopy(module).to(x.device, x.dtype)


def _channels_last(module: EagerResNet, x: Tensor) -> EagerResNet:
    return _eager(module, x).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _folded(module: EagerResNet, x: Tensor) -> EagerResNet:
    """Each batch norm folded into its convolution by PyTorch's own function, in float32."""
    folded = copy.deepcopy(module)
    for spec in conv_specs(module.architecture):
        conv, norm = folded.get_submodule(spec.conv), folded.get_submodule(spec.norm)
        folded.set_submodule(spec.conv, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var,arg-type]
        folded.set_submodule(spec.norm, nn.Identity())
    return _channels_last(folded, x)


def _compile(module: EagerResNet, x: Tensor) -> Engine:
    """``torch.compile`` with weights frozen, so that Inductor folds batch norm; compiled here.

    ``fullgraph`` because Dynamo would otherwise fall back to eager without a word after some recompilations.
    """
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    compiled: Engine = torch.compile(_channels_last(module, x), dynamic=False, fullgraph=True)
    with inductor.patch(freezing=True):
        compiled(x)
    return compiled


def _compiler_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler on the CPU, and there is none; install g++ or clang"
    return None


def _graphed(build: Callable[[EagerResNet, Tensor], Engine]) -> Callable[[EagerResNet, Tensor], Engine]:
    """``build``'s engine captured in a CUDA graph; a call copies the batch in and replays it."""

    def build_graphed(module: EagerResNet, x: Tensor) -> Engine:
        engine, batch = build(module, x), x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):  # warm up aside: capture must find libraries loaded and workspaces there
            for _ in range(3):
                engine(batch)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = engine(batch)

        def replay(x: Tensor) -> Tensor:
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


def _openvino(module: EagerResNet, x: Tensor) -> Engine:
    return engines.openvino_engine(fastres.from_module(module), x)


def _fastres_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return None
    try:
        check_dtype(dtype)
    except FastresError as error:
        return str(error)
    return None


EAGER = Peer("eager", "PyTorch, contiguous NCHW: what torchvision's model does", _eager)
FASTRES = Peer("fastres", "fastres.load(name)", _fastres, _fastres_unsupported)

_LAST = torch.channels_last
PEERS: tuple[Peer, ...] = (
    EAGER,
    Peer("eager_channels_last", "PyTorch, channels last", _channels_last, memory_format=_LAST),
    Peer("folded_channels_last", "PyTorch, batch norm folded, channels last", _folded, memory_format=_LAST),
    Peer("compile", "torch.compile, weights frozen, channels last", _compile, _compiler_absent, _LAST),
    Peer("eager_cudagraph", "eager_channels_last in a CUDA graph", _graphed(_channels_last), _graphs_absent, _LAST),
    Peer("folded_cudagraph", "folded_channels_last in a CUDA graph", _graphed(_folded), _graphs_absent, _LAST),
    Peer("onnxruntime", "fastres export, ONNX Runtime", _onnxruntime, engines.onnxruntime_absent),
    Peer("openvino", "fastres export, OpenVINO", _openvino, engines.openvino_absent),
    FASTRES,
)


def select(names: str | None) -> tuple[Peer, ...]:
    """The engines that ``names`` (comma-separated; all for ``None``) lists, eager and fastres always among them.

    Raises ``FastresError`` for a name that no engine has.
    """
    if names is None:
        return PEERS
    known = {peer.name: peer for peer in PEERS}
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    for name in sorted(wanted - set(known)):
        raise FastresError(f"No engine is called {name!r}.{near_matches(name, known)} There are {', '.join(known)}")
    return tuple(peer for peer in PEERS if peer.name in wanted or peer in (EAGER, FASTRES))
