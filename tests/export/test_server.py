"""Model repositories for NVIDIA Triton Inference Server, checked with the server's own schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import InputError

onnx = pytest.importorskip("onnx")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")

from google.protobuf import text_format  # noqa: E402

from fastres.export.errors import ExportFileError  # noqa: E402
from fastres.export.server import export_server_repository  # noqa: E402

from .networks import digits_model, run, session  # noqa: E402

NUMPY_NAMES = {"TYPE_FP32": "tensor(float)", "TYPE_FP16": "tensor(float16)", "TYPE_UINT8": "tensor(uint8)"}


def parsed(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())


def type_name(number: int) -> str:
    return model_config.DataType.Name(number)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16", "image_size": "dynamic", "outputs": ("layer3", "logits")},
        {"preprocessing": True, "outputs": ("logits", "softmax", "top_k")},
    ],
)
def test_config_says_what_the_file_has(options: dict[str, Any], tmp_path: Path) -> None:
    report = export_server_repository(digits_model(), tmp_path / "models", progress=False, max_batch_size=8, **options)
    folder = tmp_path / "models" / "resnet20_digits"
    assert report.folder == folder
    assert report.export.path == folder / "1" / "model.onnx"
    assert sorted(os.listdir(folder)) == ["1", "config.pbtxt", "labels.txt"]
    assert os.listdir(folder / "1") == ["model.onnx"]
    config, opened = parsed(folder), session(folder / "1" / "model.onnx")
    assert (config.name, config.backend, config.max_batch_size) == ("resnet20_digits", "onnxruntime", 8)
    assert config.HasField("dynamic_batching")
    for ours, theirs in ((config.input, opened.get_inputs()), (config.output, opened.get_outputs())):
        assert [value.name for value in ours] == [value.name for value in theirs]
        for value, known in zip(ours, theirs, strict=True):
            kind = type_name(value.data_type)
            assert NUMPY_NAMES.get(kind, "tensor(int64)") == known.type
            assert [-1 if isinstance(size, str) else size for size in known.shape[1:]] == list(value.dims)
            assert known.shape[0] == "batch"
    labelled = [value.name for value in config.output if value.label_filename]
    assert labelled == [name for name in ("logits", "softmax") if name in {v.name for v in config.output}]
    assert (folder / "labels.txt").read_text().splitlines() == [str(digit) for digit in range(10)]


def test_warm_up_is_an_input_that_the_file_takes(tmp_path: Path) -> None:
    import numpy as np

    for options in ({}, {"preprocessing": True}, {"image_size": "dynamic"}):
        export_server_repository(digits_model(), tmp_path, progress=False, max_batch_size=3, verify=False, **options)
        warm_ups = parsed(tmp_path / "resnet20_digits").model_warmup
        assert [warm_up.batch_size for warm_up in warm_ups] == [1, 3]
        for warm_up in warm_ups:
            (tensor,) = warm_up.inputs.values()
            dtype = {"TYPE_FP32": np.float32, "TYPE_UINT8": np.uint8}[type_name(tensor.data_type)]
            x = np.zeros((warm_up.batch_size, *tensor.dims), dtype)
            assert run(tmp_path / "resnet20_digits" / "1" / "model.onnx", x)[0].shape == (warm_up.batch_size, 10)


def test_a_model_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for classes in (10, 4):
        model = digits_model()
        if classes == 4:
            model.fc = __import__("torch").nn.Linear(64, 4)
        export_server_repository(model, tmp_path, name="digits", progress=False, verify=False)
        assert parsed(tmp_path / "digits").output[0].dims == [classes]
        assert (tmp_path / "digits" / "labels.txt").exists() is (classes == 10)
    assert sorted(os.listdir(tmp_path)) == ["digits", "other"]


def test_a_failure_leaves_the_old_model(tmp_path: Path) -> None:
    export_server_repository(digits_model(), tmp_path, progress=False, verify=False)
    before = (tmp_path / "resnet20_digits" / "config.pbtxt").read_bytes()
    with pytest.raises(InputError):
        export_server_repository(digits_model(), tmp_path, outputs=("nothing",), progress=False)
    assert os.listdir(tmp_path) == ["resnet20_digits"]
    assert (tmp_path / "resnet20_digits" / "config.pbtxt").read_bytes() == before


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    for options, says in (
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"batch": 4}, "max_batch_size"),
        ({"name": "../up"}, "name is"),
        ({"opset": 3}, "opset"),
    ):
        with pytest.raises(InputError, match=says):
            export_server_repository(digits_model(), tmp_path / "new", progress=False, **options)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportFileError, match="is a file"):
        export_server_repository(digits_model(), tmp_path / "file", progress=False)
    with pytest.raises(ExportFileError, match="does not exist"):
        export_server_repository(digits_model(), tmp_path / "no" / "where", progress=False)
    assert os.listdir(tmp_path) == ["file"]
