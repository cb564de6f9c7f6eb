"""Commands, and exported files, on a pretend GPU."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastres
from fastres.bench import classify as classify_bench
from fastres.bench.pretend_gpu.cuda import Pretence
from fastres.commands import cli, demo
from fastres.errors import DeviceError

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("kernels_by_their_meaning")]

CUDA = torch.device("cuda", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures, one of them broken."""
    place = tmp_path / "images"
    place.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    (place / "broken.png").write_bytes(b"no image")
    return place


def test_env_names_the_gpu(pretence: Pretence, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    assert "H100" in capsys.readouterr().out


def test_predict_takes_the_gpu(pretence: Pretence, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", str(folder / "0.png"), str(folder / "1.png"), "--model", "resnet20_digits"]) == 0
    on_gpu = capsys.readouterr().out
    assert cli.main(["predict", str(folder / "0.png"), str(folder / "1.png"), "--model", "resnet20_digits",
                     "--device", "cpu"]) == 0  # fmt: skip
    on_cpu = capsys.readouterr().out

    def best(text: str) -> list[str]:
        return [line.split()[-1] for line in text.splitlines()[:2]]  # the picture and its most likely class

    assert best(on_gpu) == best(on_cpu)


@pytest.mark.parametrize("workers", [0, 1])
def test_classify_copies_ahead(pretence: Pretence, folder: Path, tmp_path: Path, workers: int) -> None:
    """Batches are copied on a separate stream. The fixture checks for races and for memory that is freed too early."""
    pq = pytest.importorskip("pyarrow.parquet")
    tables = []
    for device in ("cuda", "cpu"):
        output = tmp_path / f"{device}.parquet"
        model = fastres.load("resnet20_digits", device=device)
        options: dict[str, Any] = {"batch_size": 3, "workers": workers, "progress": False, "embed": True, "top_k": 2}
        report = fastres.classify(folder, output, model=model, decoder="exact", **options)
        assert (report.rows, report.errors) == (7, 1)
        tables.append(pq.read_table(output))
    on_gpu, on_cpu = tables
    assert on_gpu["path"] == on_cpu["path"]
    for name in on_gpu.column_names:
        for ours, theirs in zip(on_gpu[name].to_pylist(), on_cpu[name].to_pylist(), strict=True):
            if isinstance(ours, float):
                assert ours == pytest.approx(theirs, abs=2e-2)
    assert "record_stream" in pretence.timeline.log
    shapes = {key[0][0] for key in model_graphs(tmp_path, folder, pretence)}
    assert shapes == {3}, "an odd last batch is filled up"


def model_graphs(tmp_path: Path, folder: Path, pretence: Pretence) -> list[Any]:
    """Return the keys of the graphs and of the plain calls after a classification on the GPU."""
    model = fastres.load("resnet20_digits", device="cuda")
    fastres.classify(folder, tmp_path / "again.csv", model=model, batch_size=3, workers=0, progress=False)
    executor: Any = model._executor
    return [*executor._captured, *executor._called]


def test_the_benchmark_of_classify(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(classify_bench, "SIZES", (((40, 40), 1.0),))
    monkeypatch.setattr(classify_bench, "COMPARED", ((40, 40),))
    given = ["--models", "resnet20_digits", "--images", "44", "--rounds", "1", "--workers", "0", "--batch-size", "16"]
    assert classify_bench.main(given) == 0
    assert "resnet20_digits" in capsys.readouterr().out


def test_the_demo(
    pretence: Pretence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "compare_speed", functools.partial(demo.compare_speed, name="resnet20", size=32))
    report = demo.run(tmp_path / "digits.png", quick=True)
    assert (report.device, report.dtype) == ("cuda:0", "float16") or report.device == "cuda"
    assert report.accuracy >= 0.98
    assert "H100" in capsys.readouterr().out


# -- exported files ------------------------------------------------------------------------------------------


class OrtValue:
    """Replaces ONNX Runtime's memory on the GPU."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def data_type(self) -> str:
        return {torch.float32: "tensor(float)", torch.float16: "tensor(float16)"}[self.value.dtype]

    def shape(self) -> list[int]:
        return list(self.value.shape)

    def data_ptr(self) -> int:
        return self.value.data_ptr()


class CudaSession:
    """Replaces ONNX Runtime's session with a CUDA provider: binds by address, and doubles its input."""

    def __init__(self, real: Any, provider: str, options: dict[str, Any]) -> None:
        self.real, self.provider, self.options = real, provider, options
        self.bound: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return [self.provider]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.provider: {"device_id": str(self.options.get("device_id", 0))}}

    def io_binding(self) -> Any:
        outputs: list[OrtValue] = []

        def bind_input(name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
            self.bound.append((name, device, index, shape))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
            outputs.append(OrtValue(torch.from_numpy(memory[:10].copy() * 2).view(1, 10).to(CUDA)))

        return SimpleNamespace(
            bind_input=bind_input,
            bind_output=lambda name, device, index: self.bound.append((name, device, index)),
            synchronize_outputs=lambda: None,
            get_outputs=lambda: outputs,
        )

    def run_with_iobinding(self, binding: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The providers that sessions were created with."""
    pytest.importorskip("onnx")
    from fastres.export import runtime

    real, found = runtime.onnxruntime.InferenceSession, []

    def session(path: str, options: object, providers: list[tuple[str, dict[str, Any]]]) -> Any:
        found.append(providers)
        return CudaSession(real(path, options, providers=["CPUExecutionProvider"]), *providers[0])

    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))
    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", session)
    return found


def exported(folder: Path) -> Path:
    from fastres.export import onnx

    return onnx.export(fastres.load("resnet20_digits"), folder / "m.onnx", verify=False, progress=False).path


def test_a_cuda_session_binds_tensors_where_they_are(pretence: Pretence, asked: list[Any], tmp_path: Path) -> None:
    from fastres.export.runtime import Session

    session = Session(exported(tmp_path))
    assert asked[0][0][0] == "CUDAExecutionProvider"
    assert asked[0][0][1]["device_id"] == "0"
    x = torch.randn(2, 3, 32, 64, device=CUDA)[..., ::2]
    found = session(x)["logits"]
    assert found.device == CUDA
    assert torch.equal(found, 2 * x.contiguous().flatten()[:10].view(1, 10))
    assert [row[1:3] for row in session.session.bound] == [("cuda", 0), ("cuda", 0)]
    assert pretence.timeline.log.count("stream.synchronize") == 2


def test_a_session_runs_on_the_gpu_that_it_is_told(pretence: Pretence, asked: list[Any], tmp_path: Path) -> None:
    from fastres.export.engines import _provider
    from fastres.export.runtime import Session

    assert _provider("cuda", torch.device("cuda", 1)) == ("cuda", {"device_id": "1"})
    assert _provider("cpu", torch.device("cpu")) == ("cpu", {})
    path = exported(tmp_path)
    session = Session(path, [_provider("tensorrt", torch.device("cuda", 1), trt_fp16_enable="1"), "cuda"])
    assert asked[0][0] == ("TensorrtExecutionProvider", {"device_id": "1", "trt_fp16_enable": "1"})
    with pytest.raises(DeviceError, match=r"runs on cuda:1 .* on cuda:0"):
        session(torch.randn(1, 3, 32, 32, device=CUDA))


def test_a_cuda_session_uses_tf32_where_convolutions_may(pretence: Pretence, asked: list[Any], tmp_path: Path) -> None:
    from fastres.export.runtime import Session

    path, conv = exported(tmp_path), torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            conv.fp32_precision = setting
            Session(path, "cuda")
    finally:
        conv.fp32_precision = before
    assert [row[0][1]["use_tf32"] for row in asked] == ["1", "0"]
