"""A plain server: FastAPI and eager PyTorch, one image a call, as people write it first. A program to be measured."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from fastres.bench.serve.networks import eager, top
from fastres.images.transforms import Transforms


def application(name: str, weights: str) -> FastAPI:
    """Return the application. Its thread pool runs several images at a time."""
    app, model, transforms = FastAPI(), eager(name, weights), Transforms(256, 224)

    def answer(data: bytes) -> list[dict[str, float]]:
        x = transforms(data)[None].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            return top(model(x))[0]

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, object]:
        return {"predictions": await run_in_threadpool(answer, await request.body())}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


if __name__ == "__main__":
    uvicorn.run(application(*sys.argv[1:3]), port=int(sys.argv[3]), log_level="warning", access_log=False)
