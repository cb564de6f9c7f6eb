"""The error measures that all tests share: how far a result may be from the true one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fastres.bench.measure.calibration import spread
from fastres.bench.measure.rounding import float32_sums

# Largest relative rounding error of one number.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# The largest error accepted of a network, in multiples of eager PyTorch's error in the same dtype.
NETWORK_FACTOR = {torch.float32: 2.0, torch.float16: 1.25, torch.bfloat16: 1.25}

Forward = Callable[[nn.Module, Tensor], "Tensor | Mapping[str, Tensor]"]
CHUNK = 8  # images at a time through the float64 network, to limit its memory


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return ‖result − truth‖ / ‖truth‖ in float64. It is NaN or infinite if the result has such values."""
    truth = truth.double().cpu()
    return float((result.double().cpu() - truth).norm() / truth.norm())


def kernel_tolerance(dtype: torch.dtype, reduction: int, *, roundings: int = 1, truncates: bool = False) -> float:
    """Return the largest relative L2 error accepted of a kernel with float32 accumulation over ``reduction`` products.

    ``roundings`` is the number of roundings to ``dtype`` (one if only the output is rounded). Random accumulation
    errors grow with the square root of the reduction. Triton's interpreter ``truncates`` when it converts to bfloat16.
    """
    rounding = ROUNDING[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)
    return roundings * rounding + ROUNDING[torch.float32] * (1 + reduction) ** 0.5


class Yardstick:
    """A network in float64 on several batches of images, and the error of eager PyTorch in a dtype.

    The truth is the float32 ``module`` converted to float64, so rounding its weights counts as an error. Eager's error
    on one batch may be small by chance, and in float32 it depends on the kernels for this processor. So a result is
    compared with the largest of eager's errors over all ``inputs``. In float32 the accepted error is at least that of
    plain float32 sums, which is derived from the network and is the same on every machine.

    ``forward`` computes the compared values: the logits, or several values by name.
    """

    def __init__(
        self, module: nn.Module, *inputs: Tensor, forward: Forward | None = None, least_spread: float = 0.2
    ) -> None:
        self.inputs = inputs
        self._module, self._forward = module, forward or (lambda network, x: network(x))
        self._eager: dict[torch.dtype, dict[str, float]] = {}
        double = copy.deepcopy(module).double()
        self.truth = [self._values(double, x, torch.float64) for x in inputs]
        with float32_sums(double):
            self._sums = self.errors([self._values(double, x, torch.float64) for x in inputs])
        logits = torch.cat([values["logits"] for values in self.truth])
        assert len(logits) == 1 or spread(logits) > least_spread, "logits must depend on the image"

    def eager(self, dtype: torch.dtype) -> dict[str, float]:
        """Return the largest of eager PyTorch's errors in ``dtype``, for each value."""
        if dtype not in self._eager:
            module = copy.deepcopy(self._module).to(dtype)
            self._eager[dtype] = self.errors([self._values(module, x, dtype) for x in self.inputs])
        return self._eager[dtype]

    def limits(self, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Return the largest accepted error of each value of a batch."""
        eager = {name: NETWORK_FACTOR[dtype] * error for name, error in self.eager(dtype).items()}
        if dtype != torch.float32:
            return eager
        return {name: max(error, self._sums[name]) for name, error in eager.items()}

    def errors(self, results: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the largest error of each value. ``results`` are those of the first batches of the inputs."""
        worst: dict[str, float] = {}
        for values, truth in zip(map(_named, results), self.truth, strict=False):
            assert values.keys() == truth.keys()
            for name, value in values.items():
                assert value.shape == truth[name].shape, name
                worst[name] = max(relative_error(value, truth[name]), worst.get(name, 0.0), key=_nan_last)
        return worst

    def check(
        self,
        run: Callable[[Tensor], Tensor | Mapping[str, Tensor]],
        dtype: torch.dtype = torch.float32,
        batches: int | None = None,
    ) -> None:
        """Fail if ``run`` is too far off on one of the inputs, or on one of their first ``batches``."""
        found = self.errors(run(x) for x in self.inputs[:batches])  # each compared before the next is computed
        limits = self.limits(dtype)
        wrong = {name: (error, limits[name]) for name, error in found.items() if not error <= limits[name]}
        assert not wrong, f"(error, limit) in {dtype}: {wrong}"

    @torch.no_grad()
    def _values(self, network: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        # Make eager's float32 as precise as fastres's. cuDNN would use TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            given = x.to(dtype) if x.is_floating_point() else x
            pieces = given.split(CHUNK) if dtype == torch.float64 else [given]
            parts = [_named(self._forward(network, piece)) for piece in pieces]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _named(values: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": values} if isinstance(values, Tensor) else dict(values)


def _nan_last(error: float) -> float:
    return float("inf") if error != error else error
