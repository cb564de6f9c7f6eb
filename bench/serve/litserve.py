"""LitServe with eager PyTorch, as its documentation shows it: its batches, its queues. A program to be measured.

LitServe reads the annotation of ``decode_request``, so annotations must not be strings here.
"""

import sys
from typing import Any

import litserve
import torch
from fastapi import Request

from fastres.bench.serve.networks import eager, top
from fastres.images.transforms import Transforms

BATCH, TIMEOUT_S = 8, 0.01


class Classifier(litserve.LitAPI):
    """Decodes each image of a batch, and then runs the batch."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=TIMEOUT_S, api_path="/classify")
        self._name, self._weights = name, weights

    def setup(self, device: str) -> None:
        self._model, self._transforms = eager(self._name, self._weights), Transforms(256, 224)

    def decode_request(self, request: Request, **_: Any) -> torch.Tensor:
        return self._transforms(request["image"].file.read())

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs).contiguous(memory_format=torch.channels_last)

    def predict(self, x: torch.Tensor, **_: Any) -> list[list[dict[str, Any]]]:
        with torch.inference_mode():
            return top(self._model(x))

    def encode_response(self, output: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        return {"predictions": output}


def main(name: str, weights: str, port: str) -> None:
    """Serve; an image is the field of a form, because LitServe reads forms and JSON only."""
    server = litserve.LitServer(Classifier(name, weights), accelerator="cpu", healthcheck_path="/ready")
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:4])
