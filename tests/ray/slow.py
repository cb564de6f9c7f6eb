"""Work for actors. Ray imports this file in each of them, so it imports little."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import ray


class Slow:
    """What says which process on which node has a row, after a moment."""

    def __call__(self, batch: Any) -> Any:
        time.sleep(0.3)
        facts = {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        return batch | {name: np.array([value] * len(batch["id"])) for name, value in facts.items()}
