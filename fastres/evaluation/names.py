"""Names of candidates, and of the columns that begin with them."""

from __future__ import annotations

import re


def column_name(name: str) -> str:
    """Return ``name`` as an identifier: letters, digits and underscores, without a digit at the beginning.

    >>> column_name("resnet18 float32 (onnxruntime)")
    'resnet18_float32_onnxruntime'
    """
    column = re.sub(r"[\W_]+", "_", name).strip("_") or "model"
    return f"model_{column}" if column[0].isdecimal() else column
