"""fastres.evaluate as a whole: on held-out digits, on photographs with faults, resumed, and against a reference."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

import fastres
from fastres.errors import ClassifierError, InputError, LabelError, OutputError
from fastres.evaluation.place import DOCUMENT, REPORT, TABLE
from tests.object_store import upload

from .running import DIGITS, evaluate

RECORD = json.loads((Path(fastres.__file__).parent / "data" / "resnet20_digits.json").read_text())


def test_the_held_out_scans_give_the_training_record(held_out: Path, tmp_path: Path) -> None:
    result = evaluate(held_out, output=tmp_path / "out")
    accuracy = result["resnet20_digits float32"].accuracy
    assert accuracy is not None
    assert (result.images, result.unreadable) == (RECORD["held_out_images"], 0)
    assert accuracy.top1 == RECORD["held_out_correct"] / RECORD["held_out_images"]
    matrix = RECORD["confusion_matrix"]
    cells = {(label, answer): count for label, answer, count in accuracy.confusions}
    assert cells == {(a, b): n for a, row in enumerate(matrix) for b, n in enumerate(row) if n}
    assert result.labels is not None
    assert (result.labels.source, result.labels.order) == ("folders", "names")
    assert len(result.models[0].mistakes) == RECORD["held_out_images"] - RECORD["held_out_correct"]
    assert [m.score for m in result.models[0].mistakes] == sorted(m.score for m in result.models[0].mistakes)[::-1]


def test_the_files(few: Path, tmp_path: Path) -> None:
    result = evaluate(few, output=tmp_path / "out", command="fastres evaluate <few>")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted([DOCUMENT, REPORT, TABLE])
    document = json.loads((out / DOCUMENT).read_text())
    assert document["command"] == "fastres evaluate <few>"
    assert document["models"][0]["accuracy"]["top1"] == result.models[0].accuracy.top1  # type: ignore[union-attr]
    assert "&lt;few&gt;" in (out / REPORT).read_text()
    table = pq.read_table(out / TABLE)
    assert table.num_rows == 40
    predictions = fastres.load(DIGITS).predict(table["path"].to_pylist()[12:16])
    column = "resnet20_digits_float32"
    assert table[f"{column}_label"].to_pylist()[12:16] == [each[0].label for each in predictions]
    assert table[f"{column}_score"].to_pylist()[12:16] == pytest.approx([each[0].score for each in predictions])
    assert table["label"].to_pylist()[12:16] == ["3"] * 4


def test_nothing_is_written_without_an_output(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(few.rglob("*"))
    assert evaluate(few).output is None
    assert sorted(few.rglob("*")) == before
    assert not list(tmp_path.iterdir())


# -- photographs, with faults --------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Four classes, one of them without a folder, one image in the wrong folder, and two broken files."""
    folder = tmp_path / "photographs"
    pictures = {
        "animal": [data.chelsea(), load_sample_image("flower.jpg")],  # the flower is deliberately wrong
        "plant": [load_sample_image("flower.jpg"), load_sample_image("flower.jpg")[:, ::-1]],
        "thing": [data.coffee(), data.rocket()],
    }
    for name, arrays in pictures.items():
        (folder / name).mkdir(parents=True)
        for number, array in enumerate(arrays):
            Image.fromarray(np.ascontiguousarray(array)).save(folder / name / f"{number}.jpg")
    (folder / "thing" / "broken.jpg").write_bytes(b"no image")
    (folder / "plant" / "cut.jpg").write_bytes((folder / "plant" / "0.jpg").read_bytes()[:2000])
    return folder


def test_photographs_with_faults(photographs: Path, tmp_path: Path) -> None:
    model = fastres.load("resnet18", None, num_classes=4, categories=["animal", "plant", "thing", "person"])
    result = evaluate(photographs, {"random": model}, tmp_path / "out")
    assert (result.images, result.unreadable) == (6, 2)
    assert sorted(Path(error.name).name for error in result.errors) == ["broken.jpg", "cut.jpg"]
    assert result.labels is not None
    assert result.labels.missing == (3,)
    found = result["random"].accuracy
    assert found is not None
    assert (found.images, found.top5) == (6, None)
    assert [each.images for each in found.classes] == [2, 2, 2, 0]
    assert found.classes[3].top1 is None
    truth = [0, 0, 1, 1, 2, 2]
    images = [photographs / name / f"{n}.jpg" for name in ("animal", "plant", "thing") for n in (0, 1)]
    answers = [each[0].index for each in model.predict(images)]
    assert found.top1 == np.mean([a == b for a, b in zip(answers, truth, strict=True)])
    html = (tmp_path / "out" / REPORT).read_text()
    assert "cut.jpg" in html
    assert "1 of 4 classes has no images" in html
    assert html.count("data:image/jpeg") >= len(result["random"].mistakes) > 0
    assert "1 of 4 classes has no images that could be read: person" in str(result)
    assert "2 that could not be read (the first: " in str(result)


def test_no_readable_image(photographs: Path, tmp_path: Path) -> None:
    for path in photographs.rglob("*.jpg"):
        path.write_bytes(b"no image")
    model = fastres.load("resnet18", None, num_classes=4, categories=["animal", "plant", "thing", "person"])
    result = evaluate(photographs, model, tmp_path / "out", against="float32", labels="folders", engines=["eager"])
    assert (result.images, result.unreadable) == (0, 8)
    assert [each.accuracy for each in result.models] == [each.speed for each in result.models] == [None, None]
    assert "could be read" in (tmp_path / "out" / REPORT).read_text()


def test_a_network_that_gives_nan(few: Path) -> None:
    model = fastres.load(DIGITS)
    with torch.no_grad():
        model.fc.bias[3] = float("nan")
    found = evaluate(few, model).models[0].accuracy
    assert found is not None
    assert (found.unanswered, found.top1, found.nll, found.ece) == (40, 0.0, None, None)


# -- comparisons ---------------------------------------------------------------------------------------------


def test_against_needs_no_labels(few: Path) -> None:
    result = evaluate([str(path) for path in few.rglob("*.png")], DIGITS, against="float32", engines=["eager"])
    eager, reference = result.models
    assert (reference.name, reference.agreement, reference.accuracy) == ("resnet20_digits float32", None, None)
    found = eager.agreement
    assert found is not None
    assert (found.reference, found.images, found.same_class) == (reference.name, 40, 1.0)
    assert found.logit_error is not None
    assert 0 < found.logit_error < 1e-5
    assert found.layers is not None
    assert found.layers_images == 32
    names = [layer.name for layer in found.layers]
    assert names[0] == "stem"
    assert all(0 <= layer.error < 1e-5 for layer in found.layers)
    assert result.labels is None
    assert "reference" in str(result)


def test_an_edited_layer_is_where_the_error_begins(few: Path) -> None:
    """The errors by layer point to the layer that differs."""
    model, edited = fastres.load(DIGITS), fastres.load(DIGITS)
    with torch.no_grad():
        edited.layer2[1].conv1.weight.mul_(1.5)
    result = evaluate(few, {"edited": edited}, against=model)
    found = result["edited"].agreement
    assert found is not None
    assert found.layers is not None
    errors = {layer.name: layer.error for layer in found.layers}
    first = next(name for name, error in errors.items() if error > 0.01)
    assert first.startswith("layer2.1.")
    assert all(error == 0 for name, error in errors.items() if name < "layer2.1")


def test_two_models_are_paired(few: Path) -> None:
    worse = fastres.load(DIGITS)
    with torch.no_grad():
        worse.fc.bias[0] += 100
    result = evaluate(few, {"good": fastres.load(DIGITS), "worse": worse})
    best, paired = result["good"], result["worse"].paired
    assert best.paired is None
    assert best.accuracy is not None
    assert paired is not None
    others = round(40 * best.accuracy.top1) - 4  # both are right about 0
    assert (paired.other, paired.only_this, paired.only_other) == ("good", 0, others)
    assert paired.p_value == pytest.approx(2 * 0.5**others)


def test_models_with_other_preprocessing_get_their_own_pixels(few: Path) -> None:
    """The same scans, padded instead of enlarged, are other pixels."""
    usual, other = fastres.load(DIGITS), fastres.load(DIGITS)
    other.transforms = fastres.Transforms(resize=16, crop=32, mean=usual.transforms.mean, std=usual.transforms.std)
    result = evaluate(few, {"usual": usual, "other": other}, against=usual, batch_size=7)
    images = sorted(few.rglob("*.png"))
    answers = ([each[0].label for each in model.predict(images)] for model in (usual, other))
    same = np.mean([a == b for a, b in zip(*answers, strict=True)])
    found = result["other"].agreement
    assert found is not None
    assert found.same_class == same < 1
    assert (found.layers, found.layers_reason) == (None, "their preprocessing differs")


# -- other sources and errors --------------------------------------------------------------------------------


def test_parquet(few: Path, tmp_path: Path) -> None:
    paths = sorted(few.rglob("*.png"))
    columns = {"image": [path.read_bytes() for path in paths], "label": [int(path.parent.name) for path in paths]}
    pq.write_table(pa.table({**columns, "id": [path.stem for path in paths]}), tmp_path / "digits.parquet")
    result = evaluate(tmp_path / "digits.parquet", output=tmp_path / "out", columns=["id"])
    assert result.models[0].accuracy == evaluate(few).models[0].accuracy
    assert pq.read_table(tmp_path / "out" / TABLE)["id"].to_pylist() == [path.stem for path in paths]
    assert "digits.parquet/" in (tmp_path / "out" / REPORT).read_text() or not result.models[0].mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": None}, InputError, "nothing to measure"),
        ({"decoder": "quick"}, InputError, "decoder is 'quick'"),
        ({"dtypes": ["int8"]}, InputError, "calibrate_on"),
        ({"dtypes": ["float8"]}, Exception, "float8"),
        ({"dtypes": []}, InputError, "dtypes is empty"),
        ({"engines": ["tensorrt"]}, InputError, "no engine 'tensorrt'"),
        ({"models": []}, InputError, "models is empty"),
        ({"models": 7}, InputError, "models is an int"),
        ({"models": [7]}, InputError, "A model cannot be an int"),
        ({"against": "float32"}, InputError, "nothing to compare"),
        ({"class_order": "alphabet"}, InputError, "alphabet"),
        ({"labels": [1, 2, 3]}, LabelError, "3 labels for 40 images"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
    ],
)
def test_arguments(few: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"models": DIGITS, **options}
    with pytest.raises(error, match=message):
        evaluate(few, options.pop("models"), **options)


def test_models_that_do_not_fit(few: Path) -> None:
    with pytest.raises(ClassifierError, match="evaluate needs a classifier"):
        evaluate(few, fastres.load("resnet18", None, num_classes=0))
    three = fastres.load("resnet18", None, num_classes=3)
    with pytest.raises(InputError, match="has 10 classes, but resnet18 float32 has 3"):
        evaluate(few, [DIGITS, three])
    other = fastres.load(DIGITS, categories=list("abcdefghij"))
    with pytest.raises(InputError, match=r"Class 0 is '0' for .*, but 'a' for"):
        evaluate(few, [DIGITS, other])


def test_a_wrong_folder_is_named_before_a_model_runs(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "source")
    (tmp_path / "source" / "ten").mkdir()
    shutil.copy(next(few.rglob("*.png")), tmp_path / "source" / "ten" / "x.png")
    with pytest.raises(LabelError, match="ten"):
        evaluate(tmp_path / "source", output=tmp_path / "out")
    shutil.rmtree(tmp_path / "source" / "ten")
    (tmp_path / "source" / "ten").mkdir()
    with pytest.raises(LabelError, match="ten"):
        evaluate(tmp_path / "source")


def test_outputs_are_never_inputs(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("a file")
    with pytest.raises(OutputError, match="is a file; pass the name of a folder"):
        evaluate(few, output=path)
    with pytest.raises(OutputError, match="does not exist; create it"):
        evaluate(few, output=tmp_path / "no" / "out")
    shutil.copytree(few, tmp_path / "source")
    (tmp_path / "source" / TABLE).write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"already has images\.parquet"):
        evaluate(tmp_path / "source", output=tmp_path / "source")
    assert (tmp_path / "source" / TABLE).read_bytes() == b"mine"


def test_names_of_the_same_model_differ(few: Path, tmp_path: Path) -> None:
    """Two checkpoints of one network are told apart by their files, or by numbers."""
    model = fastres.load(DIGITS)
    first, second = model.save(tmp_path / "first.safetensors"), model.save(tmp_path / "second.safetensors")
    names = [each.name for each in evaluate(few, [first, second, first]).models]
    assert len(set(names)) == 3
    assert "first.safetensors" in names[0]
    assert "second.safetensors" in names[1]


def test_images_in_an_object_store(few: Path, memory: str, tmp_path: Path) -> None:
    """The labels of folders, tars and Parquet files are found there as well, and the report has the pictures."""
    paths = sorted(few.rglob("*.png"))
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        for path in paths:
            tar.add(path, f"{path.stem}.png")
            label = tarfile.TarInfo(f"{path.stem}.cls")
            label.size = len(path.parent.name)
            tar.addfile(label, io.BytesIO(path.parent.name.encode()))
    labels = [int(path.parent.name) for path in paths]
    pq.write_table(
        pa.table({"image": [path.read_bytes() for path in paths], "label": labels}), tmp_path / "few.parquet"
    )
    expected = evaluate(few, output=tmp_path / "local").models[0]
    upload(few, f"{memory}/few")
    for name in ("few.tar", "few.parquet"):
        upload(tmp_path, memory, name)
    for name in ("few", "few.tar", "few.parquet"):
        result = evaluate(f"{memory}/{name}", output=tmp_path / f"out-{name}")
        assert result.models[0].accuracy == expected.accuracy
        assert f"{memory}/{name}" in result.source[0]
        pictures = [
            (tmp_path / place / REPORT).read_text().count("data:image/jpeg") for place in (f"out-{name}", "local")
        ]
        assert pictures[0] == pictures[1]
    named = {f"few/{path.relative_to(few)}": int(path.parent.name) for path in paths}
    assert evaluate(f"{memory}/few", labels=named).models[0].accuracy == expected.accuracy
