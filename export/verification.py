"""Verify an exported file: compare ONNX Runtime, on the CPU, with fastres on new random inputs.

The reference is fastres's own CPU executor in float32. For a float16 file it gets the same half-precision weights and
inputs, widened to float32, so that only the graph is compared, not the rounding of its weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.executors.cpu import CpuExecutor
from fastres.images.transforms import Transforms
from fastres.network.plan import INPUT, LOGITS, Plan

from .errors import VerificationError, missing
from .graph import SOFTMAX, TOP_K_INDICES, TOP_K_SCORES, Signature, plan_value

BATCHES = (1, 2, 5)
# Largest accepted relative L2 error of an output. Measured with ONNX Runtime 1.32 on noise images, twelve calibrated
# networks (CPU, November 2026): float32 4e-7 (resnet20_digits) to 6e-5 (resnet152), float16 4e-4 to 1.8e-2.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}
# If the graph resizes, a pixel may round to the next grey level.
PREPROCESSING_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Check:
    """One comparison: the input size and the relative L2 error of each output."""

    batch: int
    height: int
    width: int
    errors: dict[str, float]

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"batch {self.batch}, {self.height}×{self.width}: relative error {errors}"


def cases(signature: Signature, minimum: int) -> list[tuple[int, int, int]]:
    """Return (batch, height, width) of each comparison. If the size is free, the images are never square."""
    batches = BATCHES if signature.batch is None else (signature.batch,)
    if signature.preprocessing is not None:
        sizes = [(97, 131), (411, 303), (64, 181)]
    elif signature.image_size is None:
        sizes = [(minimum + 1, 2 * minimum + 7), (2 * minimum + 5, minimum + 3), (minimum, minimum + 15)]
    else:
        sizes = [signature.image_size]
    longest = max(len(batches), len(sizes))
    return [(batches[i % len(batches)], *sizes[i % len(sizes)]) for i in range(longest)]


def verify(
    path: Path,
    plan: Plan,
    signature: Signature,
    progress: Callable[[str], object] = lambda what: None,
) -> tuple[Check, ...]:
    """Compare the file at ``path`` with ``plan`` (its weights in the file's dtype).

    ``progress`` is called with a short description before each comparison. Raises ``VerificationError`` if ONNX Runtime
    rejects the file or an output differs, and ``MissingDependencyError`` without onnxruntime.
    """
    session = open_session(path)
    executor = CpuExecutor(widened(plan))
    seed = secrets.randbits(32)
    generator = np.random.default_rng(seed)
    checks = []
    for batch, height, width in cases(signature, plan.architecture.minimum_size):
        progress(f"verify, batch {batch}")
        given, x = _inputs(generator, signature, batch, height, width)
        expected = _reference(executor, plan, x, signature)
        try:
            found = session.run(list(signature.names), {INPUT: given})
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise VerificationError(
                f"ONNX Runtime cannot run the exported {plan.architecture.name} on a batch of {batch} images of "
                f"{height}×{width} ({error}); nothing was written. Another opset may help"
            ) from error
        named = dict(zip(signature.names, found, strict=True))
        checks.append(Check(batch, height, width, _errors(named, expected)))
        _judge(checks[-1], plan, signature, seed)
    return tuple(checks)


def open_session(path: Path) -> Any:
    """Return an ONNX Runtime session on the CPU. Raise ``VerificationError`` if it rejects the file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise VerificationError(
            f"ONNX Runtime {onnxruntime.__version__} rejects the exported file ({error}); nothing was written. "
            "Another opset may help"
        ) from error


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖ in float64; NaN or infinity if ``found`` contains any."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def tolerance(signature: Signature) -> float:
    """Return the largest accepted relative error of a file with this signature."""
    own = TOLERANCE[signature.dtype]
    return own if signature.preprocessing is None else max(own, PREPROCESSING_TOLERANCE)


def widened(plan: Plan) -> Plan:
    """Return the plan with its weights in float32."""
    steps = (
        step.with_parameters([(weight.to(torch.float32), bias) for weight, bias in step.parameters]) for step in plan
    )
    return replace(plan, steps=tuple(steps))


def _inputs(
    generator: np.random.Generator, signature: Signature, batch: int, height: int, width: int
) -> tuple[np.ndarray, Tensor]:
    """Return the inputs of the file, and the same inputs for the executor."""
    if signature.preprocessing is not None:
        pictures = generator.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        return pictures, _preprocessed(signature.preprocessing, pictures)
    values = torch.from_numpy(generator.standard_normal((batch, 3, height, width), dtype=np.float32))
    given = values.to(signature.dtype)
    return given.numpy(), given.to(torch.float32)


def _preprocessed(transforms: Transforms, pictures: np.ndarray) -> Tensor:
    return torch.stack([transforms.pixels(picture) for picture in pictures])


def _reference(executor: CpuExecutor, plan: Plan, x: Tensor, signature: Signature) -> dict[str, Tensor]:
    wanted = {name: plan_value(plan, name) for name in signature.names}
    values = tuple(dict.fromkeys(wanted.values()))
    with torch.no_grad():
        results = dict(zip(values, executor.run(x, values), strict=True))
        expected = {name: results[value] for name, value in wanted.items()}
        if LOGITS in results:
            scores = results[LOGITS].softmax(1)
            expected |= {SOFTMAX: scores, TOP_K_INDICES: scores, TOP_K_SCORES: scores}
    return expected


def _errors(found: dict[str, np.ndarray], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each output. The best classes are compared by their scores in the reference."""
    errors = {}
    for name, value in found.items():
        result, truth = torch.from_numpy(value), expected[name]
        if name in (TOP_K_SCORES, TOP_K_INDICES):
            best = truth.topk(result.shape[1], dim=1).values
            result = truth.gather(1, result) if name == TOP_K_INDICES else result
            truth = best
        errors[name] = relative_error(result, truth) if result.shape == truth.shape else float("inf")
    return errors


def _judge(check: Check, plan: Plan, signature: Signature, seed: int) -> None:
    limit = tolerance(signature)
    wrong = [f"{name} by {error:.2g}" for name, error in check.errors.items() if not error <= limit]
    if wrong:
        half = signature.dtype == torch.float16
        advice = "float16 may be too coarse for these weights: try float32" if half else "Please report this"
        raise VerificationError(
            f"The exported {plan.architecture.name} and the model give different results: on {check.batch} random "
            f"images of {check.height}×{check.width} (seed {seed}), ONNX Runtime's results differ in "
            f"{', '.join(wrong)} (relative; {limit:g} is accepted). Nothing was written. {advice}"
        )
