"""Damaged and hostile configurations of both libraries: a named error, or the value that was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.errors import ConfigError, CorruptCheckpointError, FastresError
from fastres.images.transforms import Transforms
from fastres.weights.folders import SavedModel, read_saved
from fastres.weights.inspect import inspect

from .state_dicts import distinct_state

TIMM: dict[str, Any] = {
    "architecture": "resnet18",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "global_pool": "avg",
    "model_args": {"in_chans": 3},
    "pretrained_cfg": {
        "input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "tag": "a1_in1k",
    },
}  # fmt: skip
TRANSFORMERS: dict[str, Any] = {
    "model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512],
    "embedding_size": 64, "num_channels": 3, "hidden_act": "relu", "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False, "id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 1 / 255,
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False,
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {"timm": TIMM, "transformers": TRANSFORMERS, "processor": PROCESSOR}
ODD: list[Any] = [
    None, True, "x", "224", -1, 0, 1.5, 1e30, 1e-30, 10**300, -(10**300), float("nan"), float("inf"), [], {}, [[]],
    ["a", None, 1], [float("nan")] * 3, ["0.5"] * 3, [True] * 3, [0, 0, 0], [-1, 1, 1], [3, 10**9, 10**9],
    [3, 224.0, 224.0], [3, "224", "224"], [3, True, True], [10**9] * 4, {"shortest_edge": True},
    {"height": 1e9, "width": 1e9}, {"0": None}, ["\ud800"],
]  # fmt: skip


def paths(config: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return every field of a configuration, as the keys that lead to it."""
    found = []
    for key, value in config.items():
        found.append((*before, key))
        found += paths(value, (*before, key)) if isinstance(value, dict) else []
    return found


PLACES = [(name, path) for name, config in FILES.items() for path in paths(config)]


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**config, key: changed(config[key], tuple(rest), value) if rest else value}


def written(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """Write a folder of the library that ``name`` belongs to, with ``config`` in place of that file."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    files = {"config.json": TIMM if name == "timm" else TRANSFORMERS}
    files |= {} if name == "timm" else {"preprocessor_config.json": PROCESSOR}
    files["preprocessor_config.json" if name == "processor" else "config.json"] = config
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return folder


def check(saved: SavedModel) -> None:
    """Fail unless everything in ``saved`` can be used."""
    assert 0 <= saved.arch.num_classes <= 2_000_000
    assert all(isinstance(depth, int) and 1 <= depth <= 1000 for depth in saved.arch.depths)
    if saved.transforms is not None:
        assert isinstance(saved.transforms, Transforms)
        assert 1 <= saved.transforms.crop <= 65_536
    assert saved.categories is None or all(isinstance(name, str) for name in saved.categories)


def refusal(folder: Path) -> str | None:
    """Return the error of a folder, which must be named and short, or ``None`` if everything in it can be used."""
    try:
        check(read_saved(folder))
    except FastresError as error:
        text = str(error)
    else:
        return None
    assert str(folder) in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize(("name", "path"), PLACES)
def test_any_value_anywhere_is_taken_or_named(tmp_path: Path, name: str, path: tuple[str, ...]) -> None:
    refused = 0
    for value in ODD:
        folder = written(tmp_path / "saved", name, changed(FILES[name], path, value))
        refused += refusal(folder) is not None
    assert refused or path[-1] in ("tag", "model_args", "num_labels", "do_normalize", "id2label", "0", "1", "2")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_drawn_values_are_taken_or_named(tmp_path: Path, place: tuple[str, tuple[str, ...]], value: Any) -> None:
    name, path = place
    folder = written(tmp_path / "saved", name, changed(FILES[name], path, value))
    refusal(folder)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=40), place=st.integers(0, 400), keep=st.booleans())
def test_damaged_files_are_taken_or_named(tmp_path: Path, content: bytes, place: int, keep: bool) -> None:
    folder = written(tmp_path / "saved", "timm", TIMM)
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(text[:place] + content + (text[place:] if keep else b""))
    refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"architecture": "resnet18", "architecture": "resnet34"}', "two values for 'architecture'"),
        (json.dumps(TIMM).encode("utf-16"), "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"architecture": ' + b"[" * 100_000 + b"}", "is not JSON|nested too deeply"),
        (b'{"architecture": ' + b"[" * 60 + b"]" * 60 + b"}", "nested too deeply"),
        (b'{"architecture": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[]", "holds a list, not a JSON object"),
        (b"", "is not JSON"),
    ],
)
def test_files_that_are_no_configuration_are_corrupt(tmp_path: Path, content: bytes, message: str) -> None:
    folder = written(tmp_path / "saved", "timm", TIMM)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message):
        read_saved(folder)


def test_a_byte_order_mark_and_repeated_fields_do_no_harm(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", "timm", TIMM)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"architecture": "resnet18", ', 1), encoding="utf-8-sig")
    assert read_saved(folder).arch.name == "resnet18"


@pytest.mark.parametrize("place", [("mean",), ("std",)])
@pytest.mark.parametrize("value", [["0.5"] * 3, [float("nan")] * 3, [True] * 3, [[0.5], 0.5, 0.5], [0.5, 0.5]])
def test_colours_that_are_no_numbers_are_named(tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    config = changed(TIMM, ("pretrained_cfg", *place), value)
    with pytest.raises(ConfigError, match=rf"{place[0]} is .*three (finite )?numbers"):
        read_saved(written(tmp_path / "saved", "timm", config))


def test_inspect_describes_the_tensors_of_a_damaged_configuration(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", "timm", changed(TIMM, ("pretrained_cfg", "mean"), "grey"))
    safetensors.torch.save_file(distinct_state("resnet18", 3), folder / "model.safetensors")
    report = inspect(folder)
    assert not report.runs
    assert "mean is 'grey'" in str(report.reason)
    assert report.models == ("resnet18",)
