"""ONNX files of models in 8 bit, as :func:`fastres.export.onnx.export` writes them: shapes, outputs, checks, times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastres
from fastres.bench.digits.data import as_image, load_scans
from fastres.errors import DtypeError, InputError
from fastres.executors.reference import ReferenceExecutor

onnx = pytest.importorskip("onnx")

from fastres.export import onnx as fx  # noqa: E402
from fastres.export import timing  # noqa: E402
from fastres.export.errors import VerificationError  # noqa: E402
from fastres.export.pytorch import export_torch  # noqa: E402
from fastres.export.runtime import Session  # noqa: E402
from fastres.export.server import export_server_repository  # noqa: E402
from fastres.export.timing import Timing  # noqa: E402
from tests.measures import relative_error  # noqa: E402

from .networks import digits_model, run, session  # noqa: E402
from .quantised import known  # noqa: E402

DIGITS = "resnet20_digits"


@pytest.mark.parametrize("opset", [fx.OLDEST_OPSET, 18, 19, 21, 22])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = fx.export(known("every step").model, path, opset=opset, image_size="dynamic", progress=False)
    assert [check.batch for check in report.checks] == [1, 2, 5]
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", opset)]


def test_every_output_is_the_references(tmp_path: Path) -> None:
    model, x = known("resnet18").model, known("resnet18").images
    path = tmp_path / "m.onnx"
    names = ("layer4", "logits", "stem", "embedding", "layer1", "softmax", "top_k")
    report = fx.export(model, path, image_size="dynamic", outputs=names, top_k=3, progress=False)
    assert report.outputs == (*names[:-1], "top_k_scores", "top_k_indices")
    assert report.dtype == "int8"
    given = fastres.images.transforms.normalised(x / 255, model.transforms.mean, model.transforms.std)
    found = dict(zip(report.outputs, map(torch.from_numpy, run(path, given)), strict=True))
    plan = model.plan
    values = ReferenceExecutor(plan).values(x, ("logits",))
    stem = found["stem"].permute(0, 2, 3, 1) / plan.quantisation.values["stem"].scale
    assert torch.allclose(stem, stem.round(), atol=1e-3)
    assert int((stem.round() - values["stem"].float()).abs().max()) <= 1
    assert found["layer4"].shape == (4, 512, 2, 2)
    assert torch.allclose(found["layer4"].mean((2, 3)), found["embedding"], atol=1e-5)
    assert torch.allclose(found["logits"].softmax(1), found["softmax"], atol=1e-6)
    assert torch.equal(found["softmax"].topk(3).indices, found["top_k_indices"])
    assert {value.dtype for name, value in found.items() if name != "top_k_indices"} == {torch.float32}


def test_pictures_are_preprocessed_in_the_graph(tmp_path: Path) -> None:
    model = known(DIGITS).model
    path = tmp_path / "m.onnx"
    fx.export(model, path, preprocessing=True, outputs=("logits",), progress=False)
    picture = np.random.default_rng(1).integers(0, 256, (1, 75, 61, 3), dtype=np.uint8)
    (found,) = run(path, picture)
    (expected,) = ReferenceExecutor(model.plan).run(model.transforms.pixels(picture[0])[None])
    assert relative_error(torch.from_numpy(found), expected) < 0.05
    # Nothing normalises: the stem's weights include it.
    assert "Sub" in fx.inspect(path).operators
    assert "preprocessing.normalised" not in {node.name for node in onnx.load(path).graph.node}


def test_metadata_and_session(tmp_path: Path) -> None:
    kept = known(DIGITS, keep=("stem", "layer2.0.conv1"), limit=64)
    path = tmp_path / "m.onnx"
    fx.export(kept.model, path, progress=False)
    metadata = fx.inspect(path).metadata
    record = json.loads(metadata["quantisation"])
    assert (metadata["dtype"], metadata["weights"]) == ("int8", "DIGITS_V1")
    assert record["float32_steps"] == ["stem", "layer2.0.conv1"]
    assert (record["steps"], record["largest_weight"]) == (22 - 2, 64)
    assert record["scales"] == {"images": {"measured": 64}}
    opened = Session(path, "cpu")
    assert opened.metadata.quantisation == record
    images = [as_image(scan) for scan in load_scans()[0][:8]]
    ours, float32 = opened.predict(images, 1), digits_model().predict(images, 1)
    assert [row[0].label for row in ours] == [row[0].label for row in float32]
    # The hash is that of the tensors in 8 bit.
    assert len({fx.describe(known(DIGITS, limit=limit).model, _signature(), kept.model.plan).state_sha256
                for limit in (64, 127)}) == 2  # fmt: skip


def _signature() -> fx.Signature:
    return fx.make_signature(known(DIGITS).model, 18, "float32", None, "dynamic", False, ("logits",), 5)


def test_a_saved_model_is_exported(tmp_path: Path) -> None:
    file = known(DIGITS).model.save(tmp_path / "m.safetensors")
    fx.export(str(file), tmp_path / "a.onnx", progress=False)
    fx.export(known(DIGITS).model, tmp_path / "b.onnx", progress=False)
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    assert np.array_equal(run(tmp_path / "a.onnx", x)[0], run(tmp_path / "b.onnx", x)[0])
    assert fx.inspect(tmp_path / "a.onnx").metadata["weights"] == str(file)


def test_weights_are_limited(tmp_path: Path) -> None:
    model = known(DIGITS, limit=127).model
    for limit in (None, 64):
        fx.export(model, tmp_path / "m.onnx", weight_limit=limit, progress=False, verify=limit is not None)
        tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
        levels = [onnx.numpy_helper.to_array(t) for name, t in tensors.items() if name.endswith("weight.levels")]
        assert max(abs(array.astype(int)).max() for array in levels) == (limit or 127)
        assert json.loads(fx.inspect(tmp_path / "m.onnx").metadata["quantisation"])["largest_weight"] == (limit or 127)


def test_server_repository(tmp_path: Path) -> None:
    report = export_server_repository(known(DIGITS).model, tmp_path, progress=False, max_batch_size=4)
    assert report.export.dtype == "int8"
    text = (tmp_path / DIGITS / "config.pbtxt").read_text()
    assert "data_type: TYPE_FP32" in text
    assert session(tmp_path / DIGITS / "1" / "model.onnx").get_inputs()[0].type == "tensor(float)"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("layer2.1.conv1.bias.levels", r"layer2\.1\.conv1 by up to \d+ levels"),
        ("layer1.0.conv2.weight.levels", r"layer1\.0 by up to \d+ levels"),
        ("head.weight.levels", "logits"),
    ],
)
def test_a_wrong_layer_is_named(change: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fx.build_model

    def broken(*args: object) -> object:
        model = real(*args)  # type: ignore[arg-type]
        for tensor in model.graph.initializer:
            if tensor.name == change:
                values = onnx.numpy_helper.to_array(tensor).copy()
                values[3] = -values[3]
                tensor.raw_data = values.tobytes()
        return model

    monkeypatch.setattr(fx, "build_model", broken)
    says = rf"ONNX Runtime on this processor computes {named} .*weight_limit=64"
    with pytest.raises(VerificationError, match=says):
        fx.export(known(DIGITS).model, tmp_path / "m.onnx", progress=False)
    assert os.listdir(tmp_path) == []


def test_times_say_where_8_bit_is_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0)
    report = fx.export(known(DIGITS).model, tmp_path / "m.onnx", batch=2, time=True, verify=False, progress=False)
    assert [time.batch for time in report.times] == [2] * len(report.times)
    assert report.times[0].runtime.startswith("ONNX Runtime")
    for time in report.times:
        assert time.milliseconds > 0
        assert time.speedup == pytest.approx(time.float32_milliseconds / time.milliseconds)
        assert str(time) in str(report)
    assert "SLOWER" in str(Timing("ONNX Runtime", 8, 2.0, 1.0, 0.5))
    assert "SLOWER" not in str(Timing("ONNX Runtime", 8, 1.0, 2.0, 2.0))


def test_what_8_bit_cannot_do_is_named(tmp_path: Path) -> None:
    model = known(DIGITS).model
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: fx.export(model, tmp_path / "m.onnx", dtype="float16", progress=False), DtypeError, "in 8 bit"),
        (lambda: fx.export(digits_model(), tmp_path / "m.onnx", time=True, progress=False), InputError, "in float32"),
        (
            lambda: fx.export(digits_model(), tmp_path / "m.onnx", weight_limit=64, progress=False),
            InputError,
            "in float",
        ),
        (lambda: fx.export(model, tmp_path / "m.onnx", weight_limit=128, progress=False), InputError, "at most 127"),
        (lambda: export_torch(model, tmp_path / "m.pt2", progress=False), InputError, "float model"),
    ]
    for export, kind, says in cases:
        with pytest.raises(kind, match=says):
            export()
    assert os.listdir(tmp_path) == []
