"""The network in JAX, built from the Plan and compiled by XLA.

It uses plain ``jax.lax`` for folded convolutions in NHWC, residual add, ReLU, max-pool and head. Batches and logits are
JAX arrays, so that conversions are not timed. A call returns when its result is ready.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastres.folding.build import build_plan
from fastres.network.plan import INPUT, LOGITS, Conv, Head, Plan, Pool, SqueezeExcite, Stem, Step

from .eager import EagerResNet

if TYPE_CHECKING:
    from jax import Array

# By default JAX takes three quarters of the GPU memory when it starts, which would leave too little for other engines.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

LAYOUTS = ("NHWC", "HWIO", "NHWC")  # input, weight [R, S, C / groups, K], output: JAX's own layouts, fastest in XLA


def to_jax(x: Tensor) -> Array:
    """Return ``x`` ``[N, 3, H, W]``, channels last, as a JAX array ``[N, H, W, 3]``, without a copy on a GPU."""
    import jax

    array: Array = jax.dlpack.from_dlpack(x.permute(0, 2, 3, 1))
    return array


def to_torch(logits: Array) -> Tensor:
    """Return a JAX array as a tensor, without a copy."""
    tensor: Tensor = torch.from_dlpack(logits)
    return tensor


def jax_engine(module: EagerResNet, x: Array) -> Callable[[Array], Array]:
    """Compile ``module``'s network for batches like ``x`` ``[N, H, W, 3]``. Logits are float32 ``[N, classes]``."""
    import jax

    plan = build_plan(module.state_dict(), module.architecture, dtype=getattr(torch, x.dtype.name))
    device = next(iter(x.devices()))
    parameters = [
        [
            (
                jax.device_put(jax.dlpack.from_dlpack(weight), device),
                jax.device_put(jax.dlpack.from_dlpack(bias), device),
            )
            for weight, bias in _tensors(step)
        ]
        for step in plan
    ]
    ieee = x.dtype.name == "float32" and torch.get_float32_matmul_precision() == "highest"
    precision = jax.lax.Precision.HIGHEST if ieee else jax.lax.Precision.DEFAULT
    compiled = jax.jit(lambda parameters, x: _forward(plan, parameters, x, precision))

    def run(x: Array) -> Array:
        logits: Array = compiled(parameters, x).block_until_ready()
        return logits

    return run


def _tensors(step: Step) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each layer in the step.

    A convolution's weight is ``[R, S, C / groups, K]``; a linear layer's is ``[C, K]``.
    """
    return [((w.permute(1, 2, 3, 0) if w.ndim == 4 else w.T).contiguous(), bias) for w, bias in step.parameters]


def _forward(plan: Plan, parameters: list[Any], x: Array, precision: Any) -> Array:
    """Run every step of ``plan`` on ``x`` ``[N, H, W, 3]``, traced by JAX; ``parameters`` are (weight, bias) pairs."""
    from jax import lax
    from jax import numpy as jnp

    values: dict[str, Array] = {INPUT: x}
    for step, layers in zip(plan, parameters, strict=True):
        y = values[step.input]
        if isinstance(step, Pool):
            values[step.output] = _max_pool(y) if step.mode == "max" else _average_pool(y)
            continue
        if isinstance(step, SqueezeExcite):
            gated = _squeeze_excite(y, layers, precision)
            values[step.output] = jnp.maximum(gated + values[step.residual], 0)
            continue
        ((weight, bias),) = layers
        if isinstance(step, Head):
            pooled = jnp.mean(y, (1, 2), dtype=jnp.float32).astype(y.dtype)
            product = jnp.dot(pooled, weight, precision=precision, preferred_element_type=jnp.float32)
            values[step.output] = product + bias
            continue
        assert isinstance(step, (Stem, Conv))
        y = lax.conv_general_dilated(
            y,
            weight,
            (step.stride, step.stride),
            [(step.padding, step.padding)] * 2,
            dimension_numbers=LAYOUTS,
            feature_group_count=step.groups if isinstance(step, Conv) else 1,
            precision=precision,
        )
        y = y + bias.astype(y.dtype)
        if isinstance(step, Conv) and step.residual is not None:
            y = y + values[step.residual]
        if isinstance(step, Stem) or step.relu:
            y = jnp.maximum(y, 0)
        values[step.output] = _max_pool(y) if isinstance(step, Stem) and step.pool else y
    return values[LOGITS]


def _max_pool(y: Array) -> Array:
    """Max-pool 3×3 with stride 2 and padding 1, NHWC."""
    from jax import lax

    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(y, -math.inf, lax.max, window, strides, padding)


def _average_pool(y: Array) -> Array:
    """Average-pool 2×2 with stride 2 over the pixels inside the image, NHWC."""
    from jax import lax
    from jax import numpy as jnp

    _, h, w, _ = y.shape
    window, padding = (1, 2, 2, 1), ((0, 0), (0, h % 2), (0, w % 2), (0, 0))
    total, count = (
        lax.reduce_window(values, 0.0, lax.add, window, window, padding)
        for values in (y.astype(jnp.float32), jnp.ones((1, h, w, 1), jnp.float32))
    )
    return (total / count).astype(y.dtype)


def _squeeze_excite(y: Array, layers: list[Any], precision: Any) -> Array:
    import jax
    from jax import numpy as jnp

    (squeeze, squeeze_bias), (expand, expand_bias) = layers
    mean = jnp.mean(y, (1, 2), dtype=jnp.float32).astype(y.dtype)
    squeezed = jnp.maximum(jnp.dot(mean, squeeze, precision=precision) + squeeze_bias.astype(y.dtype), 0)
    gate = jax.nn.sigmoid(jnp.dot(squeezed, expand, precision=precision) + expand_bias.astype(y.dtype))
    return y * gate[:, None, None, :]


def jax_absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why :func:`jax_engine` is not available, or ``None`` if it is."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed: pip install jax, or 'jax[cuda12]' for a GPU"
    if device.type == "cuda":
        import jax

        try:
            jax.devices("gpu")
        except RuntimeError:
            return f"this jax {jax.__version__} has no GPU backend: pip install 'jax[cuda12]'"
    return None
