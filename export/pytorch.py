"""Export a folded model with ``torch.export`` as one ``.pt2`` file, which loads with torch alone."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastres.errors import InputError
from fastres.executors.cpu import CpuExecutor
from fastres.model.model import Model
from fastres.network.plan import INPUT, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step
from fastres.terminal import progress_bar
from fastres.text import path_text

from .errors import VerificationError
from .files import checked_target, replacing
from .signature import DEFAULT_OPSET, DYNAMIC, Signature, check_outputs, describe, fold, load_model, make_signature
from .verification import TOLERANCE, Check, cases, relative_error, widened


@dataclass(frozen=True)
class TorchReport:
    """The file written, and its differences from the model; ``checks`` is empty if verification was turned off."""

    path: Path
    bytes: int
    dtype: str
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        lines = [f"{path_text(self.path)}: {self.bytes / 1e6:,.1f} MB, {self.dtype}"]
        lines += [f"verified against fastres, {check}" for check in self.checks] or ["not verified"]
        return "\n".join(lines)


class FoldedNetwork(nn.Module):
    """A plan in plain PyTorch: ``[N, 3, H, W]`` in the plan's dtype → float32 logits ``[N, classes]``."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.steps = plan.steps
        for index, step in enumerate(plan.steps):
            for part, (weight, bias) in enumerate(step.parameters):
                kcrs = weight.permute(0, 3, 1, 2).contiguous() if weight.ndim == 4 else weight
                self.register_buffer(f"weight_{index}_{part}", kcrs)
                self.register_buffer(f"bias_{index}_{part}", bias.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        values = {INPUT: x}
        for index, step in enumerate(self.steps):
            parameters = [
                (self.get_buffer(f"weight_{index}_{part}"), self.get_buffer(f"bias_{index}_{part}"))
                for part in range(len(step.parameters))
            ]
            values[step.output] = _run(step, values, parameters)
        return values[self.steps[-1].output].to(torch.float32)


def _run(step: Step, values: dict[str, Tensor], parameters: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = values[step.input]
    if isinstance(step, Pool):
        return _max_pool(x) if step.mode == "max" else _average_pool(x)
    if isinstance(step, SqueezeExcite):
        squeezed = functional.linear(x.mean((2, 3)), *parameters[0]).relu()
        gate = functional.linear(squeezed, *parameters[1]).sigmoid()
        return functional.relu(x * gate[:, :, None, None] + values[step.residual])
    ((weight, bias),) = parameters
    if isinstance(step, Head):
        return functional.linear(x.mean((2, 3)), weight, bias)
    assert isinstance(step, (Stem, Conv))
    groups = step.groups if isinstance(step, Conv) else 1
    y = functional.conv2d(x, weight, bias, step.stride, step.padding, groups=groups)
    if isinstance(step, Conv) and step.residual is not None:
        y = y + values[step.residual]
    if isinstance(step, Stem) or step.relu:
        y = functional.relu(y)
    return _max_pool(y) if isinstance(step, Stem) and step.pool else y


def _average_pool(x: Tensor) -> Tensor:
    """Return 2×2 averages of the pixels inside the image.

    ``ceil_mode`` is not used: with it, torch.export would treat odd and even sizes as different programs.
    """
    ones = torch.ones_like(x[:1, :1])
    total, share = (functional.avg_pool2d(functional.pad(values, (0, 1, 0, 1)), 2) for values in (x, ones))
    return total / share


def _max_pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2, 1)


def export_torch(
    model: str | Model | nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: Any = "DEFAULT",
    dtype: str | torch.dtype = "float32",
    image_size: int | Sequence[int] | str | None = None,
    batch: int | str = DYNAMIC,
    verify: bool = True,
    progress: bool = True,
) -> TorchReport:
    """Write ``model`` to ``path`` for ``torch.export.load(path).module()``, which needs no fastres.

    The arguments are those of :func:`fastres.export.onnx.export`. The program takes normalised images
    ``[batch, 3, height, width]`` in ``dtype`` and returns float32 logits. With ``image_size="dynamic"``, images must be
    a little larger than the network's minimum size, because ``torch.export`` treats one pixel after the last stage as
    a special case. The metadata is in the file's extra file ``metadata.json``. With ``verify``, the file is loaded
    and compared with fastres before it replaces an existing one.

    Raises the errors of :func:`fastres.export.onnx.export`.
    """
    target = checked_target(path, model, weights, utf8=False)
    with progress_bar(total=4, disable=not progress, bar_format="{desc:<18} {bar} {elapsed}") as bar:
        bar.set_description_str("load")
        loaded = load_model(model, weights, progress)
        signature = make_signature(loaded, DEFAULT_OPSET, dtype, image_size, batch, False, ("logits",), 5)
        bar.update()
        bar.set_description_str("trace")
        plan = fold(loaded, signature.dtype)
        if plan.quantisation is not None:
            raise InputError(
                f"This {plan.architecture.name} is in 8 bit, which a .pt2 program does not hold; export the float "
                "model, or write an ONNX file"
            )
        check_outputs(signature.outputs, plan)
        program = trace(plan, signature)
        metadata = describe(loaded, signature, plan).as_strings()
        del metadata["opset"]
        with replacing(target) as temporary:
            bar.update()
            bar.set_description_str("write")
            with temporary.open("wb") as file:
                torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
            del program
            bar.update()
            bar.set_description_str("verify")
            checks = _verify(temporary, plan, signature) if verify else ()
            size = temporary.stat().st_size
            bar.update()
    return TorchReport(target, size, metadata["dtype"], checks)


def trace(plan: Plan, signature: Signature) -> torch.export.ExportedProgram:
    """Return the program of ``plan``; dimensions that ``signature`` leaves open are symbolic."""
    least = least_size(plan)
    # torch.export would treat an example size of 1 as a constant, and equal sizes as one size.
    height, width = signature.image_size or (2 * least + 1, 3 * least + 3)
    example = torch.zeros(signature.batch or 2, 3, height, width, dtype=signature.dtype, device="cpu")
    dims: dict[int, Any] = {} if signature.batch else {0: torch.export.Dim("batch", min=1)}
    if signature.image_size is None:
        dims |= {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    with torch.no_grad():
        return torch.export.export(FoldedNetwork(plan).eval(), (example,), dynamic_shapes={"x": dims or None})


def least_size(plan: Plan) -> int:
    """Return the smallest height and width that leave more than one pixel after the last stage."""
    size = plan.architecture.minimum_size
    while plan.shapes(1, size, size)[plan.head.input][1] == 1:
        size += 1
    return size


def _verify(path: Path, plan: Plan, signature: Signature) -> tuple[Check, ...]:
    """Load the file and compare it with the plan on new random inputs. Raise ``VerificationError`` if they differ."""
    with path.open("rb") as file:
        program = torch.export.load(file).module()
    executor = CpuExecutor(widened(plan))
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    checks = []
    for batch, height, width in cases(signature, least_size(plan)):
        x = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float32, device="cpu").to(
            signature.dtype
        )
        with torch.no_grad():
            error = relative_error(program(x), executor.run(x.float())[0])
        if not error <= TOLERANCE[signature.dtype]:
            raise VerificationError(
                f"The exported {plan.architecture.name} and the model give different results: on {batch} random "
                f"images of {height}×{width} (seed {seed}), its logits differ by {error:.2g} (relative; "
                f"{TOLERANCE[signature.dtype]:g} is accepted). Nothing was written"
            )
        checks.append(Check(batch, height, width, {"logits": error}))
    return tuple(checks)
