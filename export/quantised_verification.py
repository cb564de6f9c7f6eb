"""Verify an exported file in 8 bit: compare ONNX Runtime, on the CPU, with the reference executor.

Errors of one level grow from layer to layer, so the results of a whole network say little about its layers. Therefore
each value in 8 bit is first computed from the reference's own inputs: the graph is cut at every value in 8 bit, the
levels that steps read become its inputs, and those that they write its outputs. ONNX Runtime runs the same integer
kernels in the cut graph. Each level may be off by one, where a sum in float32 is rounded the other way, and after an
addition by the rounding of the branch (:mod:`fastres.quantisation.branches`).

The whole file is then compared with the reference on several shapes. Its outputs may be twice as far off as the
reference's own are if every level of every value is moved by one, up or down at random: twice, because the error of ten
logits of one image varies by chance. Softmax and the best classes are compared with the file's own logits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastres.executors.reference import ReferenceExecutor
from fastres.images.transforms import normalised
from fastres.kernels import reference
from fastres.network.plan import INPUT, LOGITS, POOLED, Conv, Plan
from fastres.network.quantisation import Quantisation, Scale
from fastres.quantisation.branches import branch_of, residual_convolutions

from . import verification
from .errors import VerificationError, missing
from .metadata import SOFTMAX, TOP_K_INDICES, TOP_K_SCORES
from .quantised_graph import PIXELS, levels_name
from .signature import Signature, plan_value
from .verification import Check

try:
    import onnx
except ImportError as error:
    raise missing("onnx") from error

Run = Callable[[bytes, list[str], dict[str, np.ndarray]], list[np.ndarray]]

# Float32 logits that ONNX Runtime computes from the reference's own pooled levels: relative error.
LOGITS_TOLERANCE = 1e-4
SHAKEN_RUNS, SHAKEN_FACTOR = 2, 2.0


def verify(
    path: Path, plan: Plan, signature: Signature, progress: Callable[[str], object] = lambda what: None
) -> tuple[Check, ...]:
    """Compare the file at ``path`` with ``plan``, which is in 8 bit: see above.

    ``progress`` is called with a short description before each comparison. Raises ``VerificationError``, which names
    the layers, if the file differs, and ``MissingDependencyError`` without onnxruntime.
    """
    seed = secrets.randbits(32)
    generator = np.random.default_rng(seed)
    executor = ReferenceExecutor(plan)
    model = onnx.load(str(path))
    cut = Layers(model, plan)
    values = tuple(dict.fromkeys(plan_value(plan, name) for name in signature.names))
    if LOGITS in values and LOGITS not in signature.names:
        model.graph.output.append(_tensor(LOGITS, onnx.TensorProto.FLOAT, None))
    session = verification.open_session(model.SerializeToString())
    checks: list[Check] = []
    for batch, height, width in verification.cases(signature, plan.architecture.minimum_size):
        progress(f"verify, batch {batch}")
        given, x = inputs(generator, plan, signature, batch, height, width)
        layers = cut.errors(given, x) if not checks else {}
        _judge_layers(layers, plan, seed)
        levels = {value: largest for value, (largest, _, _) in layers.items() if value != LOGITS}
        found = verification.run_file(session, plan, given)
        expected = verification.reference_outputs(executor, plan, x, signature)
        limits = _limits(plan, signature, x, expected, seed)
        if LOGITS in values:
            scores = found[LOGITS].softmax(1)
            expected |= {SOFTMAX: scores, TOP_K_INDICES: scores, TOP_K_SCORES: scores}
        checks.append(Check(batch, height, width, verification.output_errors(found, expected), levels))
        verification.judge(checks[-1], plan, signature, seed, limits)
    return tuple(checks)


def run_in_onnxruntime(model: bytes, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the ``outputs`` of an ONNX model, computed from those values of ``feed`` that it reads."""
    session = verification.open_session(model)
    known = {value.name for value in session.get_inputs()}
    found: list[np.ndarray] = session.run(outputs, {name: value for name, value in feed.items() if name in known})
    return found


class Layers:
    """A file in 8 bit, cut at every value in 8 bit."""

    def __init__(self, model: onnx.ModelProto, plan: Plan) -> None:
        assert plan.quantisation is not None
        self.plan = plan
        self.quantisation: Quantisation = plan.quantisation
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        names = {levels_name(value): value for value in (PIXELS, *self.quantisation.values) if value != INPUT}
        self.has_logits = any(output.name == LOGITS for output in graph.output)
        del graph.output[:]
        self.values: list[str] = []
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.output[0] in names:
                levels = node.output[0]
                self.values.append(names[levels])
                node.output[0] = _found(levels)
                graph.input.append(_tensor(levels, onnx.TensorProto.UINT8, _shape(names[levels], plan)))
                graph.output.append(_tensor(_found(levels), onnx.TensorProto.UINT8, None))
        if self.has_logits:
            graph.output.append(_tensor(LOGITS, onnx.TensorProto.FLOAT, None))

    def errors(self, given: np.ndarray, x: Tensor, run: Run = run_in_onnxruntime) -> dict[str, tuple[int, float, int]]:
        """Return, for each value, its largest error in levels, the share of its levels off by more, and the limit.

        ``given`` is the file's input, ``x`` the same for the reference. For the logits, the error is 0 or 1: whether
        they are farther off than float32 explains. ``run`` runs the cut graph.
        """
        expected, read = self.expected(x)
        feed = {INPUT: given, **{levels_name(value): read[value] for value in self.values}}
        wanted = [_found(levels_name(value)) for value in self.values] + [LOGITS] * self.has_logits
        results = run(self.model.SerializeToString(), wanted, feed)
        errors = {}
        for value, found in zip(self.values, results, strict=False):
            off = np.abs(found.astype(np.int32) - expected[value])
            limit = self.limits.get(value, 1)
            errors[value] = (int(off.max()), float((off > limit).mean()), limit)
        if self.has_logits:
            error = verification.relative_error(torch.from_numpy(results[-1]), torch.from_numpy(expected[LOGITS]))
            errors[LOGITS] = (int(not error <= LOGITS_TOLERANCE), 1.0, 0)
        return errors

    @property
    def limits(self) -> dict[str, int]:
        """How many levels each sum may be off: one if its branch's scale is less than twice its own."""
        limits = {}
        for step in self._additions():
            branch, total = branch_of(step, self.quantisation), self.quantisation.values[step.output]
            limits[step.output] = 1 + math.floor(0.5 * branch.scale / total.scale * (1 + 1e-4))
        return limits

    def expected(self, x: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the levels that the file should have for ``x``, and those that its steps read: the reference's.

        They differ where a branch is outside its levels' range.
        """
        plan, scales = self.plan, self.quantisation.values
        outputs = (LOGITS,) if self.has_logits else tuple(value for value in self.values if value in scales)
        values = ReferenceExecutor(plan).values(x, outputs)
        logits = {LOGITS: values[LOGITS].float().numpy()} if self.has_logits else {}
        values[PIXELS] = _padded(x, plan).permute(0, 2, 3, 1)
        if POOLED in self.values:
            values[POOLED] = reference.quantised(values[POOLED], scales[POOLED].scale)
        read = {value: _planes(values[value]) for value in self.values}
        sums = {
            step.output: _planes(_added(step, values, self.quantisation))
            for step in self._additions()
            if step.output in self.values
        }
        return {value: levels.astype(np.int32) for value, levels in (read | sums).items()} | logits, read

    def _additions(self) -> tuple[Conv, ...]:
        return tuple(step for step in residual_convolutions(self.plan) if step.name in self.quantisation.weights)


def inputs(
    generator: np.random.Generator, plan: Plan, signature: Signature, batch: int, height: int, width: int
) -> tuple[np.ndarray, Tensor]:
    """Return pictures as the file takes them, and their pixels for the reference: noise, every second one smooth."""
    pictures = generator.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    coarse = generator.integers(0, 256, (batch, 3, 6, 6)).astype(np.float32)
    smooth = functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bilinear", align_corners=False)
    pictures[::2] = smooth.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()[::2]
    if signature.preprocessing is not None:
        return pictures, verification.preprocessed(signature.preprocessing, pictures)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return normalised(x.to(torch.float32) / 255, plan.stem.mean, plan.stem.std).numpy(), x


def _limits(plan: Plan, signature: Signature, x: Tensor, expected: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Return the largest accepted error of each output: that of the shaken reference, or of float32 if larger."""
    limits = dict.fromkeys((*expected, SOFTMAX, TOP_K_INDICES, TOP_K_SCORES), verification.TOLERANCE[torch.float32])
    shaken = ReferenceExecutor(plan, torch.Generator(device="cpu").manual_seed(seed))
    for _ in range(SHAKEN_RUNS):
        for name, value in verification.reference_outputs(shaken, plan, x, signature).items():
            if name not in (SOFTMAX, TOP_K_INDICES, TOP_K_SCORES):
                error = verification.relative_error(value, expected[name])
                limits[name] = max(limits[name], SHAKEN_FACTOR * error)
    return limits


def _judge_layers(errors: Mapping[str, tuple[int, float, int]], plan: Plan, seed: int) -> None:
    wrong = [
        f"{value} by up to {largest} levels ({share:.1%} of them)" if value != LOGITS else LOGITS
        for value, (largest, share, limit) in errors.items()
        if largest > limit
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise VerificationError(
            f"The exported {plan.architecture.name} in 8 bit and the reference give different results (seed {seed}): "
            f"from the same levels, ONNX Runtime on this processor computes {', '.join(wrong[:3])}{more} differently. "
            "Nothing was written. Processors without VNNI instructions add two products in 16 bits, which may be too "
            "few: export with weight_limit=64 for them. Otherwise please report this"
        )


def _added(step: Conv, values: Mapping[str, Tensor], quantisation: Quantisation) -> Tensor:
    """Return the levels of a sum whose branch is cut to the range of its levels, but not rounded."""
    scales = quantisation.values
    branch = reference.quantised_conv2d(
        values[step.input],
        scales[step.input].scale,
        step.weight,
        quantisation.weights[step.name],
        step.bias,
        stride=step.stride,
        padding=step.padding,
        groups=step.groups,
    )
    least, largest = branch_of(step, quantisation).range
    assert step.residual is not None
    residual, total = scales[step.residual], scales[step.output]
    y = branch.clamp(least, largest) + _real(values[step.residual], residual)
    return reference.quantised(y.relu() if step.relu else y, total.scale, total.zero_point)


def _real(levels: Tensor, scale: Scale) -> Tensor:
    return scale.scale * (levels.double() - scale.zero_point)


def _padded(x: Tensor, plan: Plan) -> Tensor:
    """Return pixels with the stem's border, uint8 ``[N, 3, H, W]``."""
    border = (torch.tensor(plan.stem.mean, dtype=torch.float64, device="cpu") * 255).round().view(1, 3, 1, 1)
    return (functional.pad(x.double() - border, [plan.stem.padding] * 4) + border).to(torch.uint8)


def _planes(value: Tensor) -> np.ndarray:
    """Return a value in the file's layout: channels before height and width."""
    array: np.ndarray = (value if value.dim() == 2 else value.permute(0, 3, 1, 2)).contiguous().numpy()
    return array


def _found(levels: str) -> str:
    return f"{levels}.found"


def _shape(value: str, plan: Plan) -> list[int | str]:
    if value == POOLED:
        return ["batch", plan.head.weight.shape[1]]
    least = plan.architecture.minimum_size
    channels = 3 if value == PIXELS else plan.shapes(1, least, least)[value][3]
    return ["batch", channels, f"{value}.height", f"{value}.width"]


def _tensor(name: str, kind: int, shape: list[int | str] | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, shape)
