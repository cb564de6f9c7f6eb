"""Convert a plan's steps to the shapes that the kernels and the tuned tables use."""

from __future__ import annotations

import torch

from fastres.kernels import head
from fastres.kernels.routing import grouping, rules
from fastres.kernels.routing.tables import Block
from fastres.network.plan import Conv, Head, Joined, Shape
from fastres.text import dtype_name


def conv_shape(step: Conv, shape: Shape) -> rules.ConvShape:
    """Return the convolution that the kernel runs for ``step`` on ``shape`` (NHWC), small groups merged."""
    n, h, w, _ = shape
    k, r, s, c = step.weight.shape
    merge = grouping.merged_groups(c, step.groups) if step.groups > 1 else 1
    groups = step.groups // merge
    return rules.ConvShape(n, h, w, c * merge, k // groups, r, s, step.stride, step.padding, groups)


def linear_shape(step: Head, shape: Shape) -> rules.ConvShape:
    """Return the classifier as a convolution, for the head's input of ``shape`` (NHWC)."""
    return head.linear_shape(shape[0], shape[3], step.weight.shape[0])


def block_of(run: Joined, shape: Shape, dtype: torch.dtype) -> Block:
    """Return the key of a joined run in the tuned tables, for an input of ``shape`` (NHWC)."""
    shortcut, following = run.shortcut, run.following
    return Block(
        conv_shape(run.last if run.first is None else run.first, shape),
        dtype_name(dtype),
        run.first is not None,
        run.last.weight.shape[0],
        0 if shortcut is None else shortcut.weight.shape[3],
        1 if shortcut is None else shortcut.stride,
        0 if following is None else following.weight.shape[0],
    )
