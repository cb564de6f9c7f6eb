"""Exported files as candidates: their answers are the model's, and what cannot be evaluated is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastres
from fastres.bench.digits.data import as_image, load_scans
from fastres.errors import InputError, MissingDependencyError
from fastres.evaluation.candidates import Candidate
from fastres.evaluation.exported import open_exported
from fastres.images.transforms import Transforms
from fastres.weights.download import file_sha256
from tests.measures import relative_error

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import fastres.export  # noqa: E402
from fastres.export import onnx as fx  # noqa: E402
from fastres.export.errors import ExportFileError  # noqa: E402
from fastres.export.pytorch import export_torch  # noqa: E402
from fastres.export.runtime import Session  # noqa: E402
from tests.export.networks import digits_model  # noqa: E402
from tests.export.quantised import known  # noqa: E402

from .small import BATCH, MOST, NAMES, check_form, check_layers, digits, fresh, images_of, shaken_limits, small  # noqa: E402

ENGINES = ("onnxruntime", "openvino")


def exported(folder: Path, model: fastres.Model | None = None, name: str = "m.onnx", **options: Any) -> Path:
    given = small().model if model is None else model
    return fx.export(given, folder / name, verify=False, progress=False, **options).path


def opened(path: Path, engine: str | None = None) -> Candidate:
    if engine == "openvino":
        pytest.importorskip("openvino")
    return open_exported(path, engine, batch_size=BATCH, most=MOST)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": "dynamic"}, {"batch": 3}, {"dtype": "float16"}, {"outputs": ("softmax", "layer1", "logits")}],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_answers_of_the_file_are_the_networks(options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    candidate = opened(exported(tmp_path, **options), engine)
    small().check(candidate.run, getattr(torch, options.get("dtype", "float32")))
    assert candidate.dtype == options.get("dtype", "float32")
    assert not candidate.whole_pictures


@pytest.mark.parametrize("options", [{}, {"batch": 3}, {"dtype": "float16"}], ids=["symbolic", "fixed", "float16"])
def test_pixels_are_normalised_as_a_session_does(options: dict[str, Any], tmp_path: Path) -> None:
    path = exported(tmp_path, **options)
    session, pixels = Session(path, "cpu", threads=torch.get_num_threads()), small().pixels[:3]
    x = images_of(small().model, pixels).numpy().astype(session.input_dtype)
    expected = torch.from_numpy(session(x)["logits"])
    run = opened(path).run
    for given in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.flip(0).flip(0)):
        assert torch.equal(check_form(run(given), 3), expected)


def test_description(tmp_path: Path) -> None:
    path = exported(tmp_path, name="my net.onnx")
    candidate = opened(path)
    assert (candidate.name, candidate.column) == ("my net.onnx", "my_net_onnx")
    assert (candidate.model, candidate.engine, candidate.weights) == ("small", "onnxruntime", "a state dict")
    assert (candidate.categories, candidate.num_classes) == (tuple(NAMES), 10)
    assert candidate.transforms == small().model.transforms
    assert candidate.settings["file_sha256"] == file_sha256(path)
    assert candidate.settings["engine_version"] == sys.modules["onnxruntime"].__version__
    assert json.loads(json.dumps(candidate.settings)) == candidate.settings
    other = opened(path, "openvino")
    assert (other.name, other.column) == ("my net.onnx (openvino)", "my_net_onnx_openvino")
    assert other.settings["engine"] == "openvino"


@pytest.mark.parametrize("engine", ENGINES)
def test_files_without_logits_give_their_best_classes(engine: str, tmp_path: Path) -> None:
    """The number of classes is also known if the file has no class names and no output of that width."""
    pixels, nameless = small().pixels[:2], fresh()
    expected = small().model(pixels).softmax(1).topk(10, dim=1)
    for outputs, top_k, count in (("softmax", 5, 10), ("top_k", 3, 3), ("top_k", 7, MOST)):
        candidate = opened(exported(tmp_path, nameless, outputs=outputs, top_k=top_k), engine)
        answers = candidate.run(pixels)
        assert answers.logits is None
        assert torch.equal(answers.indices, expected.indices[:, :count])
        torch.testing.assert_close(answers.scores, expected.values[:, :count], rtol=1e-4, atol=1e-6)
        assert (candidate.num_classes, candidate.categories) == (10, None)
        assert candidate.answers == (None if outputs == "softmax" else count)


def test_classes_in_8_bit_are_counted(tmp_path: Path) -> None:
    model = known("every step").model
    assert model.categories is None
    candidate = opened(exported(tmp_path, model, outputs="top_k", top_k=2))
    assert (candidate.num_classes, candidate.dtype) == (10, "int8")


@pytest.mark.parametrize("engine", ENGINES)
def test_files_in_8_bit(engine: str, tmp_path: Path) -> None:
    model, pixels = known("resnet20_digits").model, digits()
    candidate = opened(exported(tmp_path, model), engine)
    values = ("stem", "layer1.0", "layer2.0.conv1", "layer3.2", "pooled", "logits")
    limits = shaken_limits(model, pixels, values)
    logits = torch.cat([check_form(candidate.run(part), len(part)) for part in pixels.split([1, 4, 2])])
    assert candidate.layers is not None
    layers = candidate.layers(pixels, values)
    assert layers.keys() == set(values)
    for name, value in {**layers, "answers": logits}.items():
        truth, limit = limits["logits" if name == "answers" else name]
        assert value.shape == truth.shape, name
        assert relative_error(value, truth) <= limit, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16", "batch": 3}, {"outputs": ("logits", "layer2", "embedding")}],
    ids=["plain", "float16", "outputs"],
)
def test_layers_are_the_models(options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    """Every value of the plan, even if it has another name in the file; others are left out."""
    model, path = small().model, exported(tmp_path, **options)
    before, pixels = path.read_bytes(), small().pixels[:4]
    wanted = [step.output for step in model.outline] + ["pooled"]
    truth = model.values(pixels, {name: name for name in wanted})
    truth["pooled"] = truth["pooled"].flatten(1)
    layers = opened(path, engine).layers
    assert layers is not None
    check_layers(
        layers(pixels, [*wanted, "layer2.7", "layer9.0.conv1"]),
        truth,
        model.plan,
        getattr(torch, options.get("dtype", "float32")),
    )
    assert layers(pixels, ["layer9.0"]) == {}
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"outputs": "top_k"}], ids=["symbolic", "fixed", "top_k"])
@pytest.mark.parametrize("engine", ENGINES)
def test_whole_pictures_of_any_size(options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    model = digits_model()
    scans, classes = load_scans()
    pictures = [
        np.asarray(as_image(scan).convert("RGB").resize((17 + 9 * i, 23 + 5 * i))) for i, scan in enumerate(scans[:5])
    ]
    path = exported(tmp_path, model, preprocessing=True, **options)
    candidate = opened(path, engine)
    assert candidate.whole_pictures
    assert candidate.layers is None
    answers = candidate.run(pictures)
    assert answers.indices[:, 0].tolist() == classes[:5].tolist()
    if "outputs" not in options:
        rows = Session(path, "cpu").predict(pictures, MOST)
        scores = torch.tensor([[prediction.score for prediction in row] for row in rows])
        # Engines may round a pixel to another grey level.
        torch.testing.assert_close(answers.scores, scores, rtol=0, atol=1e-6 if engine == "onnxruntime" else 5e-3)
        check_form(answers, 5)


@pytest.mark.parametrize("options", [{}, {"batch": 3}, {"image_size": "dynamic"}], ids=["symbolic", "fixed", "dynamic"])
def test_programs_of_torch(options: dict[str, Any], tmp_path: Path) -> None:
    path = export_torch(small().model, tmp_path / "m.pt2", verify=False, progress=False, **options).path
    candidate = opened(path)
    small().check(candidate.run)
    assert (candidate.engine, candidate.layers) == ("torch", None)
    assert (candidate.categories, candidate.num_classes) == (tuple(NAMES), 10)
    assert candidate.settings["engine_version"] == torch.__version__


def test_programs_in_float16(tmp_path: Path) -> None:
    path = export_torch(small().model, tmp_path / "m.pt2", dtype="float16", verify=False, progress=False).path
    small().check(opened(path).run, torch.float16)


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    for name, engine, message in (
        ("none.onnx", None, "does not exist"),
        ("m.bin", None, r"give one that ends in \.onnx or \.pt2"),
        ("m.onnx", "torch", "run in onnxruntime or openvino"),
        ("m.pt2", "openvino", "run in torch"),
    ):
        with pytest.raises((InputError, ExportFileError), match=message):
            opened(tmp_path / name, engine)
    with pytest.raises(InputError, match="export the model with logits"):
        opened(exported(tmp_path, outputs=("embedding", "layer1")))
    path = exported(tmp_path, image_size=(72, 64))
    for engine in ENGINES:
        with pytest.raises(InputError, match="takes images of 72×64 pixels, but its transforms crop to 64×64"):
            opened(path, engine)


def test_files_of_others_are_named(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    result = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input"], ["logits"])], "other", [value], [result])
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(foreign, tmp_path / "other.onnx")
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "other.pt2")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    for name, message in (("other", "was not written by fastres export"), ("broken", "cannot open|is not an ONNX")):
        for suffix, engine in ((".onnx", "onnxruntime"), (".onnx", "openvino"), (".pt2", "torch")):
            with pytest.raises(ExportFileError, match=message):
                opened(tmp_path / f"{name}{suffix}", engine)


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    """A graph for more channels than images have."""
    model = onnx.load(exported(tmp_path))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    del model.graph.output[1:]
    onnx.save(model, tmp_path / "wrong.onnx")
    for engine in ENGINES:
        with pytest.raises((ExportFileError, InputError)):
            opened(tmp_path / "wrong.onnx", engine)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, engines = exported(tmp_path), {"onnxruntime": "onnxruntime", "openvino": "openvino", "onnx": "openvino"}
    monkeypatch.delitem(sys.modules, "fastres.export.runtime")
    monkeypatch.delattr(fastres.export, "runtime")
    for package, engine in engines.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingDependencyError, match=f"{package} is needed here"):
                open_exported(path, engine, batch_size=BATCH, most=MOST)


def test_transforms_come_from_the_file(tmp_path: Path) -> None:
    """The pixels of another network's images are normalised with the file's own mean and standard deviation."""
    model = fresh()
    model.transforms = Transforms(70, 64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")
    candidate = opened(exported(tmp_path, model))
    assert candidate.transforms == model.transforms
    found = check_form(candidate.run(small().pixels[:2]), 2)
    assert relative_error(found, model(small().pixels[:2])) < 1e-5
