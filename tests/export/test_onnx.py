"""ONNX files: their contents, their results, and the errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import fastres
from fastres.errors import DtypeError, FastresError, InputError, MissingDependencyError, UnknownModelError
from fastres.export import onnx as fx
from fastres.export import verification
from fastres.export.errors import ExportError, ExportFileError, VerificationError
from tests.measures import relative_error

from .networks import SHALLOW, digits_model, every_step_model, network, run, session

onnx = pytest.importorskip("onnx")

# Deeper networks only have more of the same blocks.
WHOLE = ["resnet18", "resnet50", "resnext50_32x4d", "plain18", "resnet18d", "resnet20_digits"]


@pytest.mark.parametrize("name", [*WHOLE, *SHALLOW])
def test_onnxruntime_is_as_near_to_float64_as_eager(name: str, tmp_path: Path) -> None:
    known = network(name)
    path = tmp_path / "model.onnx"
    for dtype in ("float32", "float16"):
        report = fx.export(known.model, path, dtype=dtype, image_size="dynamic", progress=False)
        assert [check.batch for check in report.checks] == [1, 2, 5]
        opened = session(path)

        def logits(x: torch.Tensor, opened: onnxruntime.InferenceSession = opened, dtype: str = dtype) -> torch.Tensor:
            (found,) = opened.run(["logits"], {"input": x.numpy().astype(dtype)})
            assert found.dtype == np.float32
            return torch.from_numpy(found)

        known.check(logits, getattr(torch, dtype))


@pytest.mark.parametrize("opset", [13, 18])
def test_every_kind_of_step_at_odd_sizes(opset: int, tmp_path: Path) -> None:
    model = every_step_model()
    path = tmp_path / "model.onnx"
    outputs = ("logits", "stem", "layer1", "layer2")
    fx.export(model, path, opset=opset, image_size="dynamic", outputs=outputs, progress=False)
    for height, width in ((64, 64), (45, 71), (47, 66)):
        x = torch.randn(2, 3, height, width)
        logits, *features = run(path, x)
        assert relative_error(torch.from_numpy(logits), model(x)) < 1e-5
        for found, expected in zip(features, model.features(x).values(), strict=True):
            assert relative_error(torch.from_numpy(found), expected) < 1e-5


def test_graph_of_resnet50(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = fx.export(network("resnet50").model, path, image_size="dynamic", verify=False, progress=False)
    assert report.checks == ()
    assert os.listdir(tmp_path) == ["model.onnx"]
    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    blocks = 16
    assert operators == {
        "Conv": 53,
        "Add": blocks,
        "Relu": 1 + 3 * blocks,
        "MaxPool": 1,
        "ReduceMean": 1,
        "Gemm": 1,
    }
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    inspected = fx.inspect(path)
    assert [(v.name, v.dtype, v.shape) for v in inspected.inputs] == [
        ("input", "float32", ("batch", 3, "height", "width"))
    ]
    assert [(v.name, v.dtype, v.shape) for v in inspected.outputs] == [("logits", "float32", ("batch", 1000))]
    assert report.bytes == path.stat().st_size == inspected.bytes
    assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) * 4 <= inspected.bytes


@pytest.mark.parametrize("opset", [fx.OLDEST_OPSET, 15, 18, 21, 22])
@pytest.mark.parametrize("preprocessing", [False, True])
def test_opset_is_the_one_asked_for(opset: int, preprocessing: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    outputs = ("logits", "top_k", "embedding")
    report = fx.export(digits_model(), path, opset=opset, preprocessing=preprocessing, outputs=outputs, progress=False)
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert report.opset == opset
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert len(report.checks) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_output_is_the_models(dtype: str, tmp_path: Path) -> None:
    known = network("resnet18")
    path = tmp_path / "model.onnx"
    names = ("layer4", "logits", "stem", "embedding", "layer1", "softmax", "top_k")
    report = fx.export(known.model, path, image_size="dynamic", dtype=dtype, outputs=names, top_k=3, progress=False)
    assert report.outputs == (*names[:-1], "top_k_scores", "top_k_indices")
    given = known.images.numpy().astype(dtype)
    found = dict(zip(report.outputs, map(torch.from_numpy, run(path, given)), strict=True))
    features, embedding = known.model.features(known.images), known.model.embed(known.images)
    scores = known.model(known.images).softmax(1)
    limit = {"float32": 1e-5, "float16": 1e-2}[dtype]
    for name in ("stem", "layer1", "layer4"):
        assert found[name].dtype == getattr(torch, dtype)
        assert relative_error(found[name], features[name]) < limit, name
    assert relative_error(found["embedding"], embedding) < limit
    assert relative_error(found["softmax"], scores) < 3 * limit
    best = found["softmax"].topk(3, dim=1)
    assert torch.equal(found["top_k_scores"], best.values)
    assert torch.equal(found["top_k_indices"], best.indices)
    floats = ("logits", "embedding", "softmax", "top_k_scores")
    assert {found[name].dtype for name in floats} == {torch.float32}


def test_only_what_an_output_needs_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fx.export(network("resnet18").model, path, outputs=["layer2"], progress=False, image_size=64)
    assert fx.inspect(path).operators["Conv"] == 1 + 4 + 5
    assert fx.inspect(path).outputs[0].shape == ("batch", 128, 8, 8)
    fx.export(network("resnet18").model, path, outputs=["embedding"], progress=False, image_size=64)
    assert "Gemm" not in fx.inspect(path).operators


def test_static_batch_and_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = fx.export(digits_model(), path, batch=4, image_size=(24, 37), progress=False)
    assert report.input == (4, 3, 24, 37)
    assert [(c.batch, c.height, c.width) for c in report.checks] == [(4, 24, 37)]
    assert session(path).get_inputs()[0].shape == [4, 3, 24, 37]


def test_image_size_defaults_to_the_weights_crop(tmp_path: Path) -> None:
    report = fx.export(digits_model(), tmp_path / "a.onnx", progress=False)
    assert report.input == ("batch", 3, 32, 32)
    report = fx.export(network("resnet18").model, tmp_path / "b.onnx", verify=False, progress=False)
    assert report.input == ("batch", 3, 224, 224)


def test_float16_holds_the_half_precision_plan(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fx.export(digits_model(), path, dtype="float16", progress=False)
    model = onnx.load(path)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {array.dtype for name, array in weights.items() if name != "head.axes"} == {np.dtype("float16")}
    plan = digits_model().to(torch.float16).plan
    for step in plan.steps[:-1]:
        assert np.array_equal(weights[f"{step.name}.weight"], step.weight.permute(0, 3, 1, 2).numpy())
    assert fx.inspect(path).inputs[0].dtype == "float16"
    assert [node.op_type for node in model.graph.node].count("Cast") == 1


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fx.export("resnet20_digits", path, progress=False)
    metadata = fx.inspect(path).metadata
    weights = Path(fastres.__file__).parent / "data" / "resnet20_digits.safetensors"
    assert metadata["model"] == "resnet20_digits"
    assert metadata["weights"] == "DIGITS_V1"
    assert metadata["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(metadata["class_names"]) == [str(i) for i in range(10)]
    transforms = digits_model().transforms
    assert json.loads(metadata["mean"]) == list(transforms.mean)
    assert json.loads(metadata["std"]) == list(transforms.std)
    assert (metadata["resize"], metadata["crop"], metadata["interpolation"]) == ("32", "32", "bilinear")
    assert (metadata["opset"], metadata["dtype"]) == ("18", "float32")
    assert metadata["fastres_version"] == fastres.__version__
    assert session(path).get_modelmeta().custom_metadata_map == metadata
    parsed = fx.Metadata.from_strings(metadata, "the file")
    assert parsed.transforms == transforms
    assert parsed.as_strings() == metadata


def test_state_hash_follows_the_tensors(tmp_path: Path) -> None:
    hashes = set()
    for change in (0.0, 1e-3):
        model = digits_model()
        model.fc.bias.data[3] += change
        fx.export(model, tmp_path / "model.onnx", verify=False, progress=False)
        hashes.add(fx.inspect(tmp_path / "model.onnx").metadata["state_sha256"])
    assert len(hashes) == 2


def test_weights_file_is_hashed(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    torch.save(digits_model().state_dict(), file)
    fx.export("resnet20_digits", tmp_path / "model.onnx", weights=file, progress=False)
    metadata = fx.inspect(tmp_path / "model.onnx").metadata
    assert metadata["weights"] == str(file)
    assert metadata["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert metadata["class_names"] == "[]"


def test_inspection_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fx.export(network("resnet18").model, path, image_size="dynamic", verify=False, progress=False)
    text = str(fx.inspect(path)).splitlines()
    assert text[0] == f"{path}: {path.stat().st_size / 1e6:.1f} MB"
    assert "input  input  float32 [batch, 3, height, width]" in text
    assert "output  logits  float32 [batch, 1000]" in text
    assert "resize  256" in text


def test_existing_file_is_replaced_with_its_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "model.onnx", tmp_path / "link.onnx"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    report = fx.export(digits_model(), link, verify=False, progress=False)
    assert report.path == path
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert fx.inspect(path).metadata["model"] == "resnet20_digits"


def test_mismatch_raises_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    real = fx.build_model

    def broken(*args: object) -> object:
        model = real(*args)  # type: ignore[arg-type]
        for tensor in model.graph.initializer:
            if tensor.name == "layer2.1.conv1.bias":
                tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + 0.5).tobytes()
        return model

    monkeypatch.setattr(fx, "build_model", broken)
    with pytest.raises(VerificationError, match=r"the model give different results.*logits by"):
        fx.export(digits_model(), path, progress=False)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_invalid_graph_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fx.build_model

    def broken(*args: object) -> object:
        model = real(*args)  # type: ignore[arg-type]
        model.graph.node[5].input[0] = "nowhere"
        return model

    monkeypatch.setattr(fx, "build_model", broken)
    with pytest.raises(ExportError, match="rejects"):
        fx.export(digits_model(), tmp_path / "model.onnx", progress=False)
    assert os.listdir(tmp_path) == []


def test_verification_sees_nan(tmp_path: Path) -> None:
    check = verification.Check(1, 32, 32, {"logits": float("nan")})
    model = digits_model()
    signature = fx.make_signature(model, 18, "float32", None, "dynamic", False, ("logits",), 5)
    with pytest.raises(VerificationError):
        verification.judge(check, model.plan, signature, 0, {"logits": 1e-3})


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A real error of the operating system: the process may not write files as large as the model."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        "from fastres.export import onnx\n"
        "from fastres.export.errors import ExportFileError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    onnx.export('resnet20_digits', sys.argv[1], progress=False)\n"
        "except ExportFileError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"refused: {path} cannot be written (File too large)")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"opset": 12}, InputError, "13 to"),
        ({"opset": 999}, InputError, "13 to"),
        ({"opset": "18"}, InputError, "opset"),
        ({"opset": True}, InputError, "opset"),
        ({"dtype": "bfloat16"}, DtypeError, "float32 or float16"),
        ({"image_size": 7}, InputError, "at least 8×8"),
        ({"image_size": (32, 4)}, InputError, "at least 8×8"),
        ({"image_size": (32,)}, InputError, "image_size"),
        ({"image_size": "big"}, InputError, "'dynamic'"),
        ({"image_size": 0}, InputError, "image_size"),
        ({"image_size": 224, "preprocessing": True}, InputError, "leave image_size out"),
        ({"batch": 0}, InputError, "batch"),
        ({"batch": "many"}, InputError, "batch"),
        ({"outputs": ()}, InputError, "No outputs"),
        ({"outputs": ("logit",)}, InputError, "'logits'"),
        ({"outputs": ("logits", "logits")}, InputError, "twice"),
        ({"outputs": ("layer4",)}, InputError, "layer3"),
        ({"top_k": 0, "outputs": "top_k"}, InputError, "top_k"),
        ({"weights": None}, InputError, "has its own"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, object], kind: type[FastresError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        fx.export(digits_model(), tmp_path / "model.onnx", progress=False, **arguments)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_bad_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="resnet50"):
        fx.export("resnet5O", tmp_path / "model.onnx", progress=False)
    with pytest.raises(InputError, match="by name or as a module"):
        fx.export(3, tmp_path / "model.onnx", progress=False)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_bad_paths_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "missing" / "model.onnx", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "nul\0.onnx", "not a path"),
    ):
        with pytest.raises(ExportFileError, match=says):
            fx.export("no such model", path, progress=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportFileError, match="cannot be written"):
            fx.export(digits_model(), tmp_path / "model.onnx", progress=False)
    finally:
        tmp_path.chmod(0o700)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = digits_model()
    model.fc.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match="not finite numbers in float16"):
        fx.export(model, tmp_path / "model.onnx", dtype="float16", progress=False)
    assert os.listdir(tmp_path) == []


def test_missing_runtime_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"\[onnx\]"):
        fx.export("no such model", tmp_path / "model.onnx", progress=False)
    report = fx.export(digits_model(), tmp_path / "model.onnx", verify=False, progress=False)
    assert "not verified" in str(report)


def test_files_from_elsewhere_are_not_inspected(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    with pytest.raises(ExportFileError, match="cannot be read"):
        fx.inspect(other)
    for content in (b"", b"not a protobuf message at all"):
        other.write_bytes(content)
        with pytest.raises(ExportFileError, match="not an ONNX file"):
            fx.inspect(other)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", values[:1], values[1:])), other)
    with pytest.raises(ExportFileError, match="not written by fastres"):
        fx.inspect(other)


def test_a_torchvision_module_is_exported_with_its_own_classes(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    module = torchvision.models.resnet18(num_classes=7).eval()
    report = fx.export(module, tmp_path / "model.onnx", image_size=(40, 56), progress=False)
    x = torch.randn(2, 3, 40, 56)
    (logits,) = run(report.path, x)
    with torch.no_grad():
        assert relative_error(torch.from_numpy(logits), module(x)) < 1e-5
