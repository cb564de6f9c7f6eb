"""Run a Plan with the reference functions of its steps (``kernels/reference.py``), joined steps with merged weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastres.kernels import reference
from fastres.network.plan import INPUT, Conv, Head, Joined, Plan, Stem


@torch.no_grad()
def run_plan(plan: Plan, x: Tensor, rounded: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Tensor]:
    """Return all values of ``plan`` for the images ``x`` [N, 3, H, W], in the dtype of its weights, NHWC.

    ``rounded`` is applied to the result of each step.
    """
    values = {INPUT: x}
    for step in plan:
        source = values[step.input]
        if isinstance(step, Stem):
            made = reference.stem(
                source, step.weight, step.bias, step.mean, step.std,
                stride=step.stride, padding=step.padding, pool=step.pool,
            )  # fmt: skip
        elif isinstance(step, Head):
            made = reference.linear(reference.average_pool(source), step.weight, step.bias)
        elif isinstance(step, Joined):
            made = _joined(step, source, values)
        else:
            assert isinstance(step, Conv)
            made = _conv(step, source, values)
        values[step.output] = rounded(made)
    return values


def _conv(step: Conv, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    residual = None if step.residual is None else values[step.residual]
    return reference.conv2d(
        x, step.weight, step.bias, residual,
        stride=step.stride, padding=step.padding, groups=step.groups, relu=step.relu,
    )  # fmt: skip


def _joined(step: Joined, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    if step.first is not None:
        x = _conv(step.first, x, values)
    last, shortcut = step.last, step.shortcut
    weight = step.weight[:, : last.weight[0].numel()].reshape(last.weight.shape)
    if shortcut is None:
        assert last.residual is not None
        added = values[last.residual]
    else:
        projection = step.weight[:, last.weight[0].numel() :].reshape(shortcut.weight.shape)
        added = reference.conv2d(
            values[shortcut.input], projection, torch.zeros_like(step.bias), stride=shortcut.stride
        )
    y = reference.conv2d(
        x, weight, step.bias, added, stride=last.stride, padding=last.padding, groups=last.groups, relu=last.relu
    )
    if step.following is not None:
        values[step.following.output] = _conv(step.following, y, values)
    return y
