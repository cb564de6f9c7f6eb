"""A classifier that tests can watch. Ray imports this file in each actor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fastres

from .slow import Slow


class Reporting(fastres.ray.Classifier):
    """A slow classifier that also says where it runs, and with how many threads."""

    def __call__(self, batch: Any) -> Any:
        facts = {"torch_threads": torch.get_num_threads(), "decoders": self._pool._max_workers}
        return super().__call__(Slow()(batch)) | {
            name: np.full(len(batch["id"]), value) for name, value in facts.items()
        }
