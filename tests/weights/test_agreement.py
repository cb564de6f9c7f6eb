"""``fastres inspect`` says that fastres runs exactly what ``fastres.load`` loads, for many odd checkpoints."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import FastresError
from fastres.weights.inspect import CheckpointReport, inspect

from .state_dicts import distinct_state

State = dict[str, Tensor]


class Evil:
    def __reduce__(self) -> Any:
        return (eval, ("1/0",))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def headless(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


# Each case: what to save, and whether it loads.
CASES: dict[str, tuple[Callable[[State], Any], bool]] = {
    "plain": (lambda s: s, True),
    "half": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, True),
    "float8": (lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()}, True),
    "no head": (headless, True),
    "no head, prefixed": (lambda s: prefixed(headless(s), "encoder."), True),
    "other parts": (lambda s: {**prefixed(s, "net.body."), "queue": torch.ones(3)}, True),
    "two networks": (lambda s: {**prefixed(s, "a."), **prefixed(s, "b.")}, False),
    "two dictionaries": (lambda s: {"student": s, "teacher": s}, False),
    "nothing": (lambda s: {}, False),
    "a list": (lambda s: [s["fc.weight"]], False),
    "a module": (lambda s: nn.Linear(2, 2), False),
    "a module inside": (lambda s: {"model": nn.Linear(2, 2), "epoch": 1}, False),
    "a loss beside": (lambda s: {"hyper_parameters": {"loss": nn.MSELoss()}, "state_dict": s}, True),
    "code beside": (lambda s: {"state_dict": s, "x": Evil()}, True),
    "code inside": (lambda s: {**s, "fc.weight": Evil()}, False),
    "all-zero classifier": (lambda s: {**s, "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}, True),
    "all zero": (lambda s: {k: torch.zeros_like(v) for k, v in s.items()}, True),
    "not a number": (lambda s: {**s, "fc.bias": torch.full((10,), float("nan"))}, True),
    "odd counter": (lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(float("inf"))}, True),
    "no counters": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, True),
    "integers": (lambda s: {**s, "fc.weight": torch.ones(10, 64, dtype=torch.int8)}, False),
    "complex": (lambda s: {**s, "fc.weight": torch.ones(10, 64, dtype=torch.complex64)}, False),
    "sparse": (lambda s: {**s, "fc.weight": torch.eye(10, 64).to_sparse()}, False),
    "meta": (lambda s: {**s, "fc.weight": torch.empty(10, 64, device="meta")}, False),
    "float4": (lambda s: {**s, "fc.weight": torch.ones(10, 64).byte().view(torch.float4_e2m1fn_x2)}, False),
    "expanded": (lambda s: {**s, "fc.weight": torch.ones(1).expand(10, 64)}, True),
    "no bias": (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, False),
    "no classes": (lambda s: {**s, "fc.weight": torch.ones(0, 64), "fc.bias": torch.ones(0)}, False),
    "flat head": (lambda s: {**s, "fc.weight": torch.ones(640)}, False),
    "scalar head": (lambda s: {**s, "fc.weight": torch.tensor(1.0)}, False),
    "one more": (lambda s: {**s, "layer1.3.conv1.weight": torch.ones(16, 16, 3, 3)}, False),
    "one less": (lambda s: {k: v for k, v in s.items() if k != "layer3.2.bn2.bias"}, False),
    "a number as key": (lambda s: {**s, 3: torch.ones(1)}, False),
    "a number as value": (lambda s: {**s, "fc.scale": 3}, False),
    "CIFAR code": (lambda s: {k.replace("fc.", "linear."): v for k, v in s.items()}, True),
    "both heads": (lambda s: {**s, "linear.weight": torch.ones(10, 64)}, False),
}  # fmt: skip


def by_inspect(path: Path) -> tuple[bool, CheckpointReport | None]:
    try:
        report = inspect(path)
    except FastresError:
        return False, None
    return report.runs, report


def by_load(path: Path, report: CheckpointReport | None, num_classes: int | None) -> bool:
    """Return whether ``fastres.load`` loads a file, as a model of the report or as the one that it was made for."""
    for name in report.models if report is not None and report.models else ("resnet20",):
        try:
            fastres.load(name, path, num_classes=num_classes)
        except FastresError:
            continue
        return True
    return False


def is_for_safetensors(content: object) -> bool:
    """Return True if safetensors can hold ``content``: a dictionary of dense tensors with data."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        for key, value in content.items()
    )


FORMS = [("zip", name) for name in CASES]
FORMS += [("safetensors", name) for name in CASES if is_for_safetensors(CASES[name][0](distinct_state("resnet20")))]


@pytest.mark.parametrize(("form", "name"), FORMS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_inspect_and_load_agree(tmp_path: Path, name: str, form: str) -> None:
    make, loads = CASES[name]
    content = make(distinct_state("resnet20"))
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    runs, report = by_inspect(path)
    assert runs == by_load(path, report, 0 if name.startswith("no head") else None) == loads, report and report.reason
    if runs:
        assert report is not None
        assert report.load is not None
        eval(report.load, {"fastres": fastres})
    elif report is not None:
        assert report.reason


FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "page": b"<html>",
    "pickle": pickle.dumps({"a": 1}),
    "evil": pickle.dumps(Evil()),
    "cut": b"PK\x03\x04" + bytes(30),
    "tar": bytes(257) + b"ustar" + bytes(250),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_they_agree_on_other_files(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(FILES[name])
    with pytest.raises(FastresError) as inspected:
        inspect(path)
    with pytest.raises(FastresError) as loaded:
        fastres.load("resnet20", path)
    assert (type(inspected.value), str(inspected.value)) == (type(loaded.value), str(loaded.value))


def test_the_line_to_load_names_the_file_and_not_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = distinct_state("resnet20")
    for name in ("DEFAULT", "DIGITS_V1", "weights", "ResNet50_Weights.DEFAULT"):
        torch.save(state, name)
        report = inspect(name)
        assert report.load == f"fastres.load('resnet20', './{name}')"
        assert torch.equal(eval(report.load, {"fastres": fastres}).fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    "name", ["no-such.pth", "a\0b.pth", "x" * 5000, "https://example.com/a.pth", "~nobody_here/a.pth"]
)
def test_they_agree_on_paths(name: str) -> None:
    with pytest.raises(FastresError) as inspected:
        inspect(name)
    if name.endswith(".pth"):
        with pytest.raises(FastresError) as loaded:
            fastres.load("resnet20", name)
        assert str(inspected.value) == str(loaded.value)


@pytest.mark.parametrize("classes", [10, 7, 0])
@pytest.mark.parametrize("head", [10, None])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_they_agree_on_folders(tmp_path: Path, classes: int, head: int | None) -> None:
    state = distinct_state("resnet18", head or 10)
    safetensors.torch.save_file(state if head else headless(state), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": classes}))
    runs, _ = by_inspect(tmp_path)
    try:
        fastres.load(str(tmp_path))
    except FastresError:
        loads = False
    else:
        loads = True
    assert runs == loads == (classes == (head or 0))


def test_inspecting_a_misnamed_file_says_so_and_does_not_warn(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save(distinct_state("resnet20"), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = inspect(path)
    assert report.format == "PyTorch, zip archive, under the name of another format"
    assert report.runs
