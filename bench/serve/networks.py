"""The network of the servers that fastres is compared with: torchvision's module, or the same in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet
from fastres.network.architectures import get_architecture


def eager(name: str, weights: str) -> nn.Module:
    """Return the network ``name`` with the state dict in the file ``weights``, ready for inference."""
    model = EagerResNet(get_architecture(name))
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return model


def top(logits: Tensor, count: int = 5) -> list[list[dict[str, Any]]]:
    """Return the best classes of each row of ``logits`` ``[N, classes]``, as the answers of fastres have them."""
    scores, indices = logits.softmax(1).topk(count, dim=1)
    return [
        [{"index": index, "score": score} for index, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
