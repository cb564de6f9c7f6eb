"""Candidates of an evaluation on a pretend GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastres
from fastres.bench.pretend_gpu.cuda import Pretence
from fastres.errors import DeviceError
from fastres.evaluation.engines import fastres_candidate, open_engine
from fastres.executors.gpu import GpuExecutor

pytestmark = pytest.mark.interpreter


def test_smaller_batches_are_padded(pretence: Pretence, averages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor sees one batch size, for logits and for values inside, and the answers are those of the images."""
    model = fastres.load("resnet20", weights=None).cuda()
    sizes, run = [], GpuExecutor.run

    def noted(self: GpuExecutor, x: Tensor, outputs: Sequence[str] = ()) -> list[Tensor]:
        sizes.append(len(x))
        return run(self, x, outputs)

    monkeypatch.setattr(GpuExecutor, "run", noted)
    candidate = fastres_candidate(model, batch_size=4, most=5)
    assert candidate.device == torch.device("cuda", 0)
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 32, 32).contiguous()
    for count in (1, 3, 4, 3):
        logits = candidate.run(pixels[:count]).logits
        assert logits is not None
        assert logits.device.type == "cpu"
        assert torch.equal(logits, pixels[:count].float().mean((1, 2, 3))[:, None].expand(-1, 10))
    assert candidate.layers is not None
    assert candidate.layers(pixels[:2], ["pooled", "layer9"])["pooled"].shape == (2, 10)
    assert set(sizes) == {4}


def test_openvino_has_no_gpu(pretence: Pretence) -> None:
    model = fastres.load("resnet20", weights=None).cuda()
    with pytest.raises(DeviceError, match="OpenVINO runs on the CPU"):
        open_engine(model, "openvino", batch_size=4, most=5)
    pytest.importorskip("onnxruntime")
    with pytest.raises(DeviceError, match="CUDAExecutionProvider is not in"):
        open_engine(model, "onnxruntime", batch_size=4, most=5)
