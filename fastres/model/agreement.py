"""Check that a live module computes what fastres would run in its place.

The module runs on a few random batches. Its operations must be those of the architecture, on its own tensors
(:mod:`fastres.model.tracing`). The numbers then confirm it: the results must agree with the model's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.network.architectures import Architecture
from fastres.weights.layouts import to_torchvision

from .modules import VOUCH, refusal
from .tracing import Recorder
from .wiring import Values, network

# Largest accepted relative difference. A wrong layer or weight differs a thousand times more.
AGREEMENT = 1e-3
AMPLITUDES = (1.0, 32.0)  # of normalised pixels: a clipped activation shows only if it is large
_LEAST = 48  # pixels; smaller images have maps of one pixel, on which different poolings agree


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run without gradients, autocast and inference mode, and restore the state of the random generator."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def reference_copy(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` in float32 on the CPU, in eval mode. Raises ``ArchitectureError``.

    torchvision's frozen batch norm becomes ordinary batch norm, which computes the same. In untrained networks the last
    scale of each residual branch is often zero, which would hide the branch's result: such scales become one.
    """
    try:
        twin = copy.deepcopy(module).float().cpu().eval()
    except Exception as error:
        raise refusal(module, f"it cannot be copied ({type(error).__name__}: {error})", VOUCH) from error
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            if type(layer).__name__ == "FrozenBatchNorm2d" and type(layer).__module__.startswith("torchvision."):
                setattr(parent, name, _thawed(layer))
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.weight is not None and not layer.weight.any():
            layer.weight.fill_(1)
    return twin


def _thawed(frozen: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps, dtype=torch.float32, device="cpu").eval()
    norm.load_state_dict(frozen.state_dict(), strict=False)
    norm.num_batches_tracked = None
    return norm


def check(
    module: nn.Module,
    twin: nn.Module,
    arch: Architecture,
    results: Callable[[Any], Mapping[str, Tensor]],
    candidate: Callable[[Tensor], Mapping[str, Tensor]],
) -> None:
    """Raise ``ArchitectureError`` unless ``twin``, the copy of ``module``, computes ``arch`` as fastres does.

    ``results`` takes what ``twin`` returns and gives tensors by their names in the plan. ``candidate`` gives the same
    for fastres, and may give more.
    """
    for batch in _batches(arch):
        _run(module, twin, arch, results, batch)
    size = max(_LEAST, arch.minimum_size)
    x = torch.randn(2, 3, size, size + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    for amplitude in AMPLITUDES:
        found = candidate(x * amplitude)
        expected = _run(module, twin, arch, results, x * amplitude, keep=tuple(found))
        for name, value in expected.items():
            _compare(module, name, found[name], value)


def _batches(arch: Architecture) -> Iterator[Tensor]:
    """Yield batches of other sizes, whose operations are compared only."""
    for n, height, width in ((3, 32, 32), (1, 97, 131)) if arch.stem == "cifar" else ((1, 224, 224),):
        yield torch.zeros(n, 3, height, width, dtype=torch.float32, device="cpu")


def _run(
    module: nn.Module,
    twin: nn.Module,
    arch: Architecture,
    results: Callable[[Any], Mapping[str, Tensor]],
    x: Tensor,
    keep: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Run ``twin`` on ``x`` and compare its operations; return the results, and the values of the plan in ``keep``."""
    values = Values()
    state = to_torchvision(twin.state_dict(keep_vars=True), arch)
    wanted = network(arch, state, values)
    recorder = Recorder(twin, values, x, {wanted[name] for name in keep})
    failure: Exception | None = None
    output: Any = None
    try:
        with recorder:
            output = twin(x)
    except Exception as error:  # whatever the module's own code raises
        failure = error
    if recorder.problem is not None:
        raise refusal(module, f"its forward does not compute a ResNet: {recorder.problem}", VOUCH) from failure
    if failure is not None:
        what = f"its forward fails on images {list(x.shape)} ({type(failure).__name__}: {failure})"
        raise refusal(module, what, VOUCH) from failure
    returned = results(output)
    for name, tensor in returned.items():
        if recorder.value(tensor) != wanted[name]:
            raise refusal(module, f"its forward returns something other than {name}", VOUCH)
    return {**{name: recorder.found[wanted[name]] for name in keep if wanted[name] in recorder.found}, **returned}


def _compare(module: nn.Module, name: str, found: Tensor, expected: Tensor) -> None:
    """Raise ``ArchitectureError`` if two results differ. Infinite ones, of overflowing weights, are not compared."""
    difference, size = float((found.reshape(expected.shape) - expected).norm()), float(expected.norm())
    if torch.isfinite(expected).all() and not difference <= AGREEMENT * size:
        raise refusal(
            module,
            f"its forward does not compute a ResNet: its {name} differ from fastres's (relative difference "
            f"{difference / size if size else difference:.2g} on random input)",
            VOUCH,
        )
