"""Models as candidates, in fastres's executor and in other engines."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fastres
from fastres.errors import ClassifierError, DeviceError, DtypeError, InputError, MissingDependencyError
from fastres.evaluation import engines
from fastres.evaluation.candidates import Candidate
from fastres.evaluation.engines import fastres_candidate, open_engine
from fastres.evaluation.names import column_name
from fastres.executors import cpu
from fastres.executors.processor import has_bf16
from fastres.version import __version__
from fastres.weights.hashing import state_sha256
from tests.measures import relative_error

from .small import BATCH, MOST, NAMES, check_form, check_layers, digits, fresh, shaken_limits, small

EXPORTED = ("onnxruntime", "openvino")


def opened(model: fastres.Model, engine: str) -> Candidate:
    if engine in EXPORTED:
        pytest.importorskip("onnx")
        pytest.importorskip(engine)
    return open_engine(model, engine, batch_size=BATCH, most=MOST)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_answers_are_the_networks(engine: str) -> None:
    candidate = opened(small().model, engine)
    small().check(candidate.run)
    channels_last = small().pixels[:4].contiguous(memory_format=torch.channels_last)
    assert torch.equal(check_form(candidate.run(channels_last), 4), check_form(candidate.run(small().pixels[:4]), 4))


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_float16(engine: str) -> None:
    small().check(opened(fresh("float16"), engine).run, torch.float16)


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_bfloat16(engine: str) -> None:
    model = fresh("bfloat16")
    if engine == "openvino" and not has_bf16():
        with pytest.raises(DtypeError, match="OpenVINO needs BF16 instructions"):
            open_engine(model, engine, batch_size=BATCH, most=MOST)
        return
    candidate = opened(model, engine)
    small().check(candidate.run, torch.bfloat16)
    assert candidate.dtype == "bfloat16"
    if engine == "openvino":
        assert candidate.settings["precision"] == "bf16"
        (exact, rounded) = (opened(each, engine).run(small().pixels[:4]).logits for each in (small().model, model))
        assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_layers(engine: str) -> None:
    model, pixels = small().model, small().pixels[:3]
    layers = opened(model, engine).layers
    assert layers is not None
    wanted = [step.output for step in model.outline] + ["pooled"]
    if engine == "eager":
        wanted = ["stem", "layer1.0", "layer2.0", "layer2.1", "pooled", "logits"]
    truth = model.values(pixels, {name: name for name in wanted})
    truth["pooled"] = truth["pooled"].flatten(1)
    check_layers(layers(pixels, [*wanted, "layer5.0"]), truth, model.plan, torch.float32)


@pytest.mark.parametrize("engine", EXPORTED)
def test_8_bit(engine: str) -> None:
    pytest.importorskip("onnx")
    from tests.export.quantised import known

    model, pixels = known("resnet20_digits").model, digits()
    candidate = opened(model, engine)
    ((truth, limit),) = shaken_limits(model, pixels, ("logits",)).values()
    assert relative_error(check_form(candidate.run(pixels), len(pixels)), truth) <= limit
    assert (candidate.name, candidate.dtype) == (f"resnet20_digits int8 ({engine})", "int8")


def test_fastres_computes_what_the_model_does() -> None:
    model, pixels = small().model, small().pixels
    candidate = fastres_candidate(model, batch_size=BATCH, most=MOST)
    small().check(candidate.run)
    assert torch.equal(check_form(candidate.run(pixels[:3]), 3), model(pixels[:3]))
    assert candidate.layers is not None
    found = candidate.layers(pixels[:2], ["layer2.0.conv1", "pooled", "nothing"])
    assert found.keys() == {"layer2.0.conv1", "pooled"}
    assert torch.equal(found["pooled"], model.embed(pixels[:2]))
    assert torch.equal(found["layer2.0.conv1"], model.values(pixels[:2], {"v": "layer2.0.conv1"})["v"])
    assert candidate.layers(pixels[:2], ["nothing"]) == {}


def test_fastres_in_8_bit_returns_real_numbers() -> None:
    pytest.importorskip("onnx")
    from tests.export.quantised import known

    model, pixels = known("resnet20_digits").model, digits()
    candidate = fastres_candidate(model, batch_size=BATCH, most=MOST)
    assert torch.equal(check_form(candidate.run(pixels), len(pixels)), model(pixels))
    values = tuple(step.output for step in model.outline)
    assert candidate.layers is not None
    found, limits = candidate.layers(pixels, values), shaken_limits(model, pixels, values)
    assert found.keys() == set(values)
    for name, (truth, limit) in limits.items():
        assert (found[name].dtype, found[name].shape) == (torch.float32, truth.shape)
        assert relative_error(found[name], truth) <= limit, name


def test_lower_precision_of_fastres() -> None:
    dtypes = [dtype for dtype in cpu.supported_dtypes() if dtype != torch.float32]
    for dtype in dtypes:
        candidate = fastres_candidate(fresh(str(dtype)), batch_size=BATCH, most=MOST)
        small().check(candidate.run, dtype)
        assert candidate.layers is not None
        assert candidate.layers(small().pixels[:2], ["stem"])["stem"].dtype == torch.float32


def test_description() -> None:
    model = small().model
    own = fastres_candidate(model, batch_size=BATCH, most=MOST)
    eager = opened(model, "eager")
    assert (own.name, own.column, own.engine) == ("small float32", "small_float32", "fastres")
    assert (eager.name, eager.column, eager.engine) == ("small float32 (eager)", "small_float32_eager", "eager")
    assert fastres_candidate(model, batch_size=BATCH, most=MOST, name="mine").column == "mine"
    for candidate in (own, eager, opened(model, "onnxruntime")):
        assert (candidate.model, candidate.weights, candidate.dtype) == ("small", "a state dict", "float32")
        assert (candidate.categories, candidate.num_classes) == (tuple(NAMES), 10)
        assert (candidate.transforms, candidate.device.type) == (model.transforms, "cpu")
        settings = candidate.settings
        assert json.loads(json.dumps(settings)) == settings
        assert settings["state_sha256"] == state_sha256(model.state_dict())
        assert (settings["fastres_version"], settings["dtype"]) == (__version__, "float32")
    assert eager.settings["engine_version"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("resnet18 float32 (onnxruntime)", "resnet18_float32_onnxruntime"),
        ("__a--b__", "a_b"),
        ("3.onnx", "model_3_onnx"),
        ("…", "model"),
        ("größe.pt2", "größe_pt2"),
    ],
)
def test_columns_are_identifiers(name: str, column: str) -> None:
    assert column_name(name) == column
    assert column.isidentifier()


def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    candidate = opened(small().model, "onnxruntime")
    assert candidate.layers is not None
    candidate.layers(small().pixels[:1], ["stem"])
    assert os.listdir(tmp_path) == []


def test_what_an_engine_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no engine called 'onnx'\. Did you mean 'onnxruntime'"):
        open_engine(small().model, "onnx", batch_size=BATCH, most=MOST)
    with pytest.raises(DtypeError, match="bfloat16, but ONNX files"):
        open_engine(fresh("bfloat16"), "onnxruntime", batch_size=BATCH, most=MOST)
    with pytest.raises(DtypeError, match="float16, but OpenVINO"):
        open_engine(fresh("float16"), "openvino", batch_size=BATCH, most=MOST)
    monkeypatch.setattr(engines, "has_bf16", lambda: False)
    with pytest.raises(DtypeError, match="needs BF16 instructions"):
        open_engine(fresh("bfloat16"), "openvino", batch_size=BATCH, most=MOST)


def test_8_bit_in_eager_is_named() -> None:
    pytest.importorskip("onnx")
    from tests.export.quantised import known

    with pytest.raises(DtypeError, match="8 bit, which PyTorch's own operations"):
        open_engine(known("resnet20_digits").model, "eager", batch_size=BATCH, most=MOST)


def test_a_network_without_classes_is_named() -> None:
    headless = fastres.load("resnet20", weights=None, num_classes=0)
    for engine in engines.ENGINES:
        with pytest.raises(ClassifierError, match="evaluate needs a classifier"):
            open_engine(headless, engine, batch_size=BATCH, most=MOST)
    with pytest.raises(ClassifierError, match="evaluate needs a classifier"):
        fastres_candidate(headless, batch_size=BATCH, most=MOST)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="openvino is needed here"):
        open_engine(small().model, "openvino", batch_size=BATCH, most=MOST)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, pixels = fresh("float16").cuda(), small().pixels
    for candidate in (
        fastres_candidate(model, batch_size=BATCH, most=MOST),
        open_engine(model, "eager", batch_size=BATCH, most=MOST),
    ):
        small().check(candidate.run, torch.float16)
        assert candidate.layers is not None
        assert candidate.layers(pixels[:3], ["layer1.0.conv1", "layer1.0"])["layer1.0"].shape[0] == 3
    with pytest.raises(DeviceError, match="OpenVINO runs on the CPU"):
        open_engine(model, "openvino", batch_size=BATCH, most=MOST)
