"""``fastres inspect``: its report on every kind of checkpoint, and that the code in the report runs."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastres
from fastres.commands.cli import main
from fastres.errors import CorruptCheckpointError, StateDictMismatchError, WeightsError
from fastres.weights.inspect import CheckpointReport, inspect
from tests.model.test_quantized import model

from .state_dicts import distinct_state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet18", 7)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def written(obj: Any, path: Path, **options: Any) -> Path:
    torch.save(obj, path, **options)
    return path


def load_as_told(report: CheckpointReport) -> fastres.Model:
    """Run the line of code in the report."""
    assert report.load is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return eval(report.load, {"fastres": fastres})


def test_a_plain_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    report = inspect(path)
    assert (report.format, report.names, report.models) == ("safetensors", "torchvision or timm", ("resnet18",))
    assert (report.classes, report.wrappers, report.beside) == (7, (), ())
    assert report.dtypes == {"float32": 102, "int64": 20}
    assert report.parameters == 11_176_512 + 7 * 513
    assert report.bytes == path.stat().st_size
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.runs
    assert load_as_told(report).num_classes == 7


def checkpoints(state: dict[str, Tensor]) -> dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]]:
    """The files that training scripts save: the object, the wrappers around its weights, and other entries."""
    average = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    return {
        "Lightning": (
            {
                "epoch": 3,
                "global_step": 100,
                "pytorch-lightning_version": "2.5.0",
                "state_dict": prefixed(state, "model."),
                "loops": {"fit_loop": {"state_dict": {}}},
                "callbacks": {},
                "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
                "hyper_parameters": {"lr": 0.1, "arch": "resnet18"},
            },
            ("state_dict", "model."),
            (
                "epoch",
                "global_step",
                "pytorch-lightning_version",
                "loops",
                "callbacks",
                "optimizer_states",
                "hyper_parameters",
            ),
        ),
        "Lightning, compiled": (
            {"state_dict": prefixed(state, "net._orig_mod.")},
            ("state_dict", "net.", "_orig_mod."),
            (),
        ),
        "DDP": ({"model": prefixed(state, "module."), "epoch": 1}, ("model", "module."), ("epoch",)),
        "EMA beside the weights": (
            {"state_dict": state, "state_dict_ema": average},
            ("state_dict",),
            ("state_dict_ema",),
        ),
        "EMA alone": (
            {"model_ema": {**prefixed(state, "module."), "n_averaged": torch.tensor(3)}},
            ("model_ema", "module."),
            (),
        ),
        "ema_state_dict": ({"ema_state_dict": state, "step": 3}, ("ema_state_dict",), ("step",)),
    }


@pytest.mark.parametrize("kind", list(checkpoints({})))
def test_wrappers(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    obj, wrappers, beside = checkpoints(state)[kind]
    report = inspect(written(obj, tmp_path / "last.ckpt"))
    assert (report.wrappers, report.beside) == (wrappers, beside)
    assert (report.models, report.classes) == (("resnet18",), 7)
    model = load_as_told(report)
    assert torch.equal(model.state_dict()["layer3.0.conv2.weight"], state["layer3.0.conv2.weight"])


def test_keys_of_other_parts_are_named_and_left_out(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = written({"state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(7)}}, tmp_path / "a.ckpt")
    report = inspect(path)
    assert (report.wrappers, report.beside) == (("state_dict", "model."), ("loss.weight",))
    model = load_as_told(report)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert "its part 'model.'" in repr(model.weights)


def test_keys_that_the_network_does_not_have_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    inside = {**prefixed(state, "model."), "model.loss.weight": torch.ones(7)}
    report = inspect(written({"state_dict": inside}, tmp_path / "a.ckpt"))
    assert not report.runs
    assert report.nearest == "resnet18"
    assert "1 unexpected: loss.weight" in str(report.reason)
    with pytest.raises(StateDictMismatchError, match=r"1 unexpected: loss\.weight"):
        fastres.load("resnet18", tmp_path / "a.ckpt")


def test_without_a_classifier(state: dict[str, Tensor], tmp_path: Path) -> None:
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    report = inspect(written(body, tmp_path / "body.pth"))
    assert report.classes is None
    assert load_as_told(report).num_classes == 0


def test_old_files_and_mixed_types(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {key: value.half() if value.ndim == 4 else value for key, value in state.items()}
    report = inspect(written(half, tmp_path / "old.pth", _use_new_zipfile_serialization=False))
    assert report.format == "PyTorch, pickle (the format before 1.6)"
    assert report.dtypes == {"float32": 82, "float16": 20, "int64": 20}


def test_names_of_other_codes(tmp_path: Path) -> None:
    small = {key.replace("fc.", "linear."): value for key, value in distinct_state("resnet20").items()}
    report = inspect(written(small, tmp_path / "cifar.th"))
    assert report.names == "CIFAR training codes"
    assert report.models == ("resnet20", "plain20", "resnet20_digits")  # option A's shortcuts have no parameters


def test_what_fastres_does_not_run(state: dict[str, Tensor], tmp_path: Path) -> None:
    deeper = {**state, "layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}
    report = inspect(written(deeper, tmp_path / "deeper.pth"))
    assert (report.runs, report.load, report.models, report.nearest) == (False, None, (), "resnet18")
    assert "Compared with resnet18: 1 unexpected: layer1.2.conv1.weight" in str(report.reason)
    report = inspect(written(nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth"))
    assert (report.names, report.models, report.runs) == ("unknown", (), False)
    report = inspect(written(state, tmp_path / "resnetblur18-1234abcd.pth"))
    assert not report.runs
    assert "a blur filter before each stride" in str(report.reason)


TIMM: dict[str, Any] = {
    "architecture": "resnet18",
    "num_classes": 7,
    "label_names": list("abcdefg"),
    "pretrained_cfg": {"input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic"},
}


class TestFolders:
    def folder(self, state: dict[str, Tensor], path: Path, **changes: Any) -> Path:
        path.mkdir()
        safetensors.torch.save_file(state, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**TIMM, **changes}))
        return path

    def test_timm(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        report = inspect(self.folder(state, tmp_path / "saved"))
        assert report.models == ("resnet18",)
        assert report.categories == tuple("abcdefg")
        assert report.transforms is not None
        assert (report.transforms.resize, report.transforms.interpolation) == (168, "bicubic")
        assert load_as_told(report).categories == tuple("abcdefg")
        text = str(report)
        for part in (
            "labels   a, b, c, d, e, f, … (7 in all)",
            "short side to 168 (bicubic)",
            "runs it: fastres.load(",
        ):
            assert part in text

    def test_refused(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        folder = self.folder(state, tmp_path / "blur", architecture="resnetblur18")
        for name in (folder, folder / "model.safetensors"):
            report = inspect(name)
            assert not report.runs
            assert "a blur filter before each stride" in str(report.reason)
        report = inspect(self.folder(state, tmp_path / "nine", num_classes=9, label_names=None))
        assert "contradicts itself" in str(report.reason)
        report = inspect(self.folder(state, tmp_path / "deeper", architecture="resnet34"))
        assert (report.runs, report.models) == (False, ())
        assert "do not fit resnet34" in str(report.reason)


def test_unreadable_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(CorruptCheckpointError, match="begins with b'<html>"):
        inspect(path)
    with pytest.raises(WeightsError, match="no file"):
        inspect(tmp_path / "nowhere.pth")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(WeightsError, match="is an ONNX file"):
        inspect(tmp_path / "model.onnx")


def test_the_command(state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = written(state, tmp_path / "good.pth"), written({"a": torch.ones(1)}, tmp_path / "bad.pth")
    assert main(["inspect", str(good)]) == 0
    assert "model    resnet18\nclasses  7\nfastres  runs it: fastres.load('resnet18', " in capsys.readouterr().out
    assert main(["inspect", str(bad), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["runs"] is False
    assert set(document) == set(CheckpointReport.__dataclass_fields__)
    assert main(["inspect", str(tmp_path / "none.pth")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_a_model_that_fastres_saved(tmp_path: Path) -> None:
    digits = fastres.load("resnet20_digits")
    report = inspect(digits.save(tmp_path / "digits.safetensors"))
    assert (report.format, report.models, report.classes) == ("safetensors, saved by fastres", ("resnet20_digits",), 10)
    assert report.categories == digits.categories
    assert report.record is None
    assert load_as_told(report).categories == digits.categories
    assert "8 bit" not in str(report)


def test_a_model_in_8_bit(tmp_path: Path) -> None:
    report = inspect(model().save(tmp_path / "eight.safetensors"))
    assert (report.names, report.models, report.classes) == ("fastres", ("resnet18",), 1000)
    assert report.dtypes["int8"] == 21
    assert report.record == {"images": 3}
    assert "8 bit    made from unknown weights" in str(report)
    assert load_as_told(report).dtype == torch.int8
