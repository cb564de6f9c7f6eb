"""Running exported files with ``fastres.export.runtime.Session``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastres.bench.digits.data import as_image, load_scans
from fastres.errors import DeviceError, ImageError, InputError

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export import runtime  # noqa: E402
from fastres.export.errors import ExportFileError  # noqa: E402
from fastres.export.runtime import Session  # noqa: E402

from .networks import digits_model  # noqa: E402


def exported(folder: Path, **options: object) -> Path:
    return fx.export(digits_model(), folder / "m.onnx", verify=False, progress=False, **options).path  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"preprocessing": True}, {"batch": 3}, {"dtype": "float16"}])
def test_predicts_what_the_model_predicts(options: dict[str, object], tmp_path: Path) -> None:
    scans, digits = load_scans()
    images = [as_image(scan) for scan in scans[:7]]
    session = Session(exported(tmp_path, **options), "cpu")
    found, expected = session.predict(images, 2, batch_size=4), digits_model().predict(images, 2)
    assert [row[0].label for row in found] == [str(digit) for digit in digits[:7]]
    for ours, theirs in zip(found, expected, strict=True):
        assert [p.index for p in ours] == [p.index for p in theirs]
        assert [p.score for p in ours] == pytest.approx([p.score for p in theirs], abs=5e-3)


def test_arrays_give_arrays_and_tensors_tensors(tmp_path: Path) -> None:
    session = Session(exported(tmp_path, outputs=("embedding", "logits")), "cpu", threads=1)
    x = torch.randn(2, 3, 32, 32)
    tensors, arrays = session(x), session(x.numpy())
    assert list(tensors) == ["embedding", "logits"]
    assert isinstance(arrays["logits"], np.ndarray)
    assert torch.equal(tensors["logits"], torch.from_numpy(arrays["logits"]))
    assert torch.allclose(tensors["embedding"], digits_model().embed(x), atol=1e-4)


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    session = Session(exported(tmp_path), "cpu")
    for x in (
        np.zeros((1, 3, 31, 32), np.float32),
        np.zeros((3, 32, 32), np.float32),
        torch.zeros(1, 3, 32, 32).half(),
    ):
        with pytest.raises(InputError, match=r"takes float32 \[batch, 3, 32, 32\]"):
            session(x)
    with pytest.raises(ImageError):
        session.predict("nowhere.jpg")
    with pytest.raises(InputError, match="top_k"):
        session.predict([], top_k=0)
    without = Session(exported(tmp_path, outputs="embedding"), "cpu")
    with pytest.raises(InputError, match="needs logits"):
        without.predict([])


def test_a_provider_that_is_absent_or_unknown_is_named(tmp_path: Path) -> None:
    path = exported(tmp_path)
    with pytest.raises(InputError, match="short names are cpu, cuda"):
        Session(path, "gpu")
    with pytest.raises(InputError, match="conv_search"):
        Session(path, "cpu", conv_search="fastest")
    with pytest.raises(InputError, match="No providers"):
        Session(path, [])
    absent = set(runtime.onnxruntime.get_all_providers()) - set(runtime.onnxruntime.get_available_providers())
    for name in sorted(absent)[:2]:
        with pytest.raises(DeviceError, match=name):
            Session(path, name)


def test_a_silent_fallback_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider is listed but does not start: ONNX Runtime would continue on the CPU, but the session raises."""
    path = exported(tmp_path)
    real = runtime.onnxruntime.InferenceSession
    asked = []

    def falls_back(name: str, options: object, providers: list[tuple[str, dict[str, str]]]) -> object:
        asked.extend(providers)
        return real(name, options, providers=["CPUExecutionProvider"])

    preloaded = []
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))
    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", falls_back)
    monkeypatch.setattr(runtime.onnxruntime, "preload_dlls", lambda: preloaded.append(True), raising=False)
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider was requested, but .* fell back to CPU"):
        Session(path, "cuda", conv_search="HEURISTIC")
    assert asked[0][0] == "CUDAExecutionProvider"
    assert asked[0][1]["cudnn_conv_algo_search"] == "HEURISTIC"
    assert preloaded == [True]


def test_options_of_the_user_win() -> None:
    known = runtime.PROVIDERS["cpu"]
    assert runtime._provider_list(("cpu", {"a": "1"}), "DEFAULT") == [(known, {"a": "1"})]
    assert runtime._provider_list([("cpu", {"a": "1"}), "CPUExecutionProvider"], "DEFAULT")[1] == (known, {})


def test_files_that_cannot_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportFileError, match="does not exist"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportFileError, match="cannot open"):
        Session(tmp_path / "bad.onnx", "cpu")


@pytest.mark.gpu
def test_cuda_binds_its_tensors(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in runtime.onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    session = Session(exported(tmp_path, outputs=("logits", "layer3", "top_k")), "cuda")
    x = torch.randn(3, 3, 32, 32, device="cuda")
    found = session(x)
    model = digits_model()
    assert all(value.is_cuda for value in found.values())
    assert torch.allclose(found["logits"].cpu(), model(x.cpu()), atol=2e-2)
    assert torch.allclose(found["layer3"].cpu(), model.features(x.cpu())["layer3"], atol=5e-2)
    assert found["top_k_indices"].dtype == torch.int64
