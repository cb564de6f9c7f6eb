"""The hash of a state dict's tensors, which does not depend on the file or the order that they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values of the tensors, in the order of names.

    Integers count only in 8 bit and in 32 bit, as models in 8 bit have them: others are counters of batches.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.int32):
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
