"""Verify an exported file: compare ONNX Runtime, on the CPU, with fastres on new random inputs.

The reference is fastres's own CPU executor in float32. For a float16 file it gets the same half-precision weights and
inputs, widened to float32, so that only the graph is compared, not the rounding of its weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastres.executors.cpu import CpuExecutor
from fastres.images.transforms import Transforms
from fastres.network.plan import INPUT, LOGITS, Plan

from .errors import VerificationError, missing
from .metadata import SOFTMAX, TOP_K_INDICES, TOP_K_SCORES
from .signature import Signature, plan_value

BATCHES = (1, 2, 5)
# Largest accepted relative L2 error of an output. Measured with ONNX Runtime 1.32 on noise images, twelve calibrated
# networks (CPU, November 2026): float32 4e-7 (resnet20_digits) to 6e-5 (resnet152), float16 4e-4 to 1.8e-2.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}
# If the graph resizes, a pixel may round to the next grey level.
PREPROCESSING_TOLERANCE = 2e-2


class Executor(Protocol):
    """An executor of plans: the one that the file is compared with."""

    def run(self, x: Tensor, outputs: Sequence[str]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Check:
    """One comparison: the input size and the relative L2 error of each output.

    For a file in 8 bit, ``levels`` has the largest error of each value, in levels, computed from the reference's own
    inputs; it is empty if the values were not compared on this input.
    """

    batch: int
    height: int
    width: int
    errors: dict[str, float]
    levels: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        text = f"batch {self.batch}, {self.height}×{self.width}: relative error {errors}"
        if self.levels:
            largest = max(self.levels.values())
            unit = "level" if largest == 1 else "levels"
            text += f"; each of {len(self.levels)} values in 8 bit, from the same inputs: within {largest} {unit}"
        return text


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
    limit = tolerance(signature)
    checks = []
    for batch, height, width in cases(signature, plan.architecture.minimum_size):
        progress(f"verify, batch {batch}")
        given, x = _inputs(generator, signature, batch, height, width)
        expected = reference_outputs(executor, plan, x, signature)
        found = run_file(session, plan, given)
        checks.append(Check(batch, height, width, output_errors(found, expected)))
        judge(checks[-1], plan, signature, seed, dict.fromkeys(signature.names, limit))
    return tuple(checks)


def run_file(session: Any, plan: Plan, given: np.ndarray) -> dict[str, Tensor]:
    """Return the file's outputs by name. Raise ``VerificationError`` if ONNX Runtime cannot run it."""
    try:
        found = session.run(None, {INPUT: given})
    except Exception as error:  # onnxruntime's exceptions have no common base class
        shape = "×".join(map(str, given.shape))
        raise VerificationError(
            f"ONNX Runtime cannot run the exported {plan.architecture.name} on an input of {shape} ({error}); nothing "
            "was written. Another opset may help"
        ) from error
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def open_session(model: Path | bytes, threads: int = 0) -> Any:
    """Return an ONNX Runtime session on the CPU for a file or its content. By default, it chooses its ``threads``.

    Raises ``VerificationError`` if ONNX Runtime rejects it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
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
        return pictures, preprocessed(signature.preprocessing, pictures)
    values = torch.from_numpy(generator.standard_normal((batch, 3, height, width), dtype=np.float32))
    given = values.to(signature.dtype)
    return given.numpy(), given.to(torch.float32)


def preprocessed(transforms: Transforms, pictures: np.ndarray) -> Tensor:
    """Return the pixels that ``transforms`` make of ``pictures``: what an executor takes."""
    return torch.stack([transforms.pixels(picture) for picture in pictures])


def reference_outputs(executor: Executor, plan: Plan, x: Tensor, signature: Signature) -> dict[str, Tensor]:
    """Return the outputs that a file should have for ``x``, by name; for those of top_k, the scores of all classes."""
    wanted = {name: plan_value(plan, name) for name in signature.names}
    values = tuple(dict.fromkeys(wanted.values()))
    with torch.no_grad():
        results = dict(zip(values, executor.run(x, values), strict=True))
        expected = {name: results[value] for name, value in wanted.items()}
        if LOGITS in results:
            scores = results[LOGITS].softmax(1)
            expected |= {LOGITS: results[LOGITS], SOFTMAX: scores, TOP_K_INDICES: scores, TOP_K_SCORES: scores}
    return expected


def output_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each output. The best classes are compared by their scores in the reference."""
    errors = {}
    for name, result in found.items():
        truth = expected[name]
        if name in (TOP_K_SCORES, TOP_K_INDICES):
            best = truth.topk(result.shape[1], dim=1).values
            result = truth.gather(1, result) if name == TOP_K_INDICES else result
            truth = best
        errors[name] = relative_error(result, truth) if result.shape == truth.shape else float("inf")
    return errors


def judge(check: Check, plan: Plan, signature: Signature, seed: int, limits: Mapping[str, float]) -> None:
    """Raise ``VerificationError`` if an error is larger than its limit."""
    wrong = [
        f"{name} by {error:.2g} ({limits[name]:.2g} is accepted)"
        for name, error in check.errors.items()
        if not error <= limits[name]
    ]
    if wrong:
        half = signature.dtype == torch.float16
        advice = "float16 may be too coarse for these weights: try float32" if half else "Please report this"
        raise VerificationError(
            f"The exported {plan.architecture.name} and the model give different results: on {check.batch} random "
            f"images of {check.height}×{check.width} (seed {seed}), ONNX Runtime's results differ in "
            f"{', '.join(wrong)}, relative. Nothing was written. {advice}"
        )
