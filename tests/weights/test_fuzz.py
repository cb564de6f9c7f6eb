"""Random damage to checkpoint files: they load with exactly the tensors in the file, or a named error is raised."""

from __future__ import annotations

import io
import os
import pickle
import random
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastres.errors import FastresError
from fastres.network.architectures import get_architecture
from fastres.weights.inspect import inspect
from fastres.weights.state import load_state

from .state_dicts import distinct_state, same

RESNET20 = get_architecture("resnet20")
FORMS = ("zip", "old", "safetensors")
SUFFIX = {"zip": ".pth", "old": ".pth", "safetensors": ".safetensors"}
LONGEST = 20.0  # seconds for a file that loads in milliseconds
EXAMPLES = 60
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def content_of(form: str, obj: Any) -> bytes:
    if form == "safetensors":
        return safetensors.torch.save(obj)
    stream = io.BytesIO()
    torch.save(obj, stream, _use_new_zipfile_serialization=form == "zip")
    return stream.getvalue()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return distinct_state("resnet20")


@pytest.fixture(scope="module")
def contents(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {form: content_of(form, state) for form in FORMS}


def outcome(path: Path) -> dict[str, Tensor] | None:
    """Return the weights of a file, or ``None`` if it is refused by name. Anything else fails."""
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load_state(RESNET20, path).state
        except FastresError:
            return None
        finally:
            assert time.monotonic() - begin < LONGEST
    return loaded


def by_its_library(path: Path, form: str) -> dict[str, Tensor] | None:
    """Return the tensors that the format's own library reads, or ``None`` if it cannot."""
    try:
        if form == "safetensors":
            return dict(safetensors.torch.load_file(path))
        return dict(torch.load(path, weights_only=True))
    except Exception:
        return None


def places(content: bytes, form: str) -> tuple[int, int]:
    """Return a part of a file in which most bytes are structure, not values."""
    if form == "safetensors":
        return 0, 8 + int.from_bytes(content[:8], "little")
    return (0, 20_000) if form == "old" else (len(content) - 20_000, len(content))


@pytest.mark.parametrize("form", FORMS)
@fuzz
@given(data=st.data())
def test_damaged_structure(
    tmp_path: Path, state: dict[str, Tensor], contents: dict[str, bytes], form: str, data: st.DataObject
) -> None:
    content = bytearray(contents[form])
    low, high = places(content, form)
    for _ in range(data.draw(st.integers(1, 3)) if form == "zip" else 1):
        place = data.draw(st.integers(low, high - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{SUFFIX[form]}"
    path.write_bytes(content)
    loaded = outcome(path)
    if loaded is not None and not same(loaded, state):
        expected = by_its_library(path, form)  # without checksums, other values may be what the file now says
        assert form != "zip"
        assert expected is not None
        for key, value in loaded.items():
            assert key.endswith("num_batches_tracked") or torch.equal(
                value.nan_to_num(), expected[key].float().nan_to_num()
            ), key


@pytest.mark.parametrize("form", FORMS)
@fuzz
@given(
    cut=st.floats(0, 1), inserted=st.binary(max_size=30), removed=st.integers(0, 2000), near_end=st.booleans()
)  # fmt: skip
def test_cuts_and_insertions(
    tmp_path: Path, state: dict[str, Tensor], contents: dict[str, bytes], form: str, cut: float, inserted: bytes,
    removed: int, near_end: bool,
) -> None:  # fmt: skip
    content = contents[form]
    place = int(cut * len(content)) if not near_end else len(content) - int(cut * 30_000)
    path = tmp_path / f"cut{SUFFIX[form]}"
    path.write_bytes(content[:place] + inserted + content[place + removed :])
    loaded = outcome(path)
    assert loaded is None or form != "zip" or same(loaded, state)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3),
    st.sampled_from([[], {}, (), set(), {"a": torch.ones(2)}, [torch.ones(1)], torch.float16, io.StringIO]),
    st.sampled_from([
        torch.tensor(1.0), torch.tensor([]), torch.tensor(float("nan")), torch.tensor(1j), torch.ones(1).expand(10, 64),
        torch.ones(10, 64, dtype=torch.int8), torch.eye(3).to_sparse(), torch.empty(10, 64, device="meta"),
        torch.ones(10, 64, dtype=torch.float64), torch.ones(64, 10).t(), torch.full((10,), float("inf")),
    ]),
)  # fmt: skip
KEYS = ["fc.weight", "fc.bias", "bn1.num_batches_tracked", "layer1.0.conv1.weight", "extra", "module.conv1.weight", ""]


@pytest.mark.parametrize("form", ["zip", "old", "memory"])
@fuzz
@given(data=st.data())
def test_odd_values_and_wrappers(
    tmp_path: Path, state: dict[str, Tensor], form: str, data: st.DataObject
) -> None:  # fmt: skip
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=2))
    prefix = data.draw(st.sampled_from(["", "module.", "model.net.", "a.b.", "layer1."]))
    odd: dict[Any, Any] = {prefix + key: value for key, value in {**state, **changes}.items()}
    for name in data.draw(st.lists(st.sampled_from(["state_dict", "model", "anything", 3]), max_size=2)):
        odd = {name: odd, **data.draw(st.dictionaries(st.sampled_from(["epoch", "args", "ema"]), VALUES, max_size=2))}
    if form == "memory":
        given_ = odd
        try:
            loaded: dict[str, Tensor] | None = load_state(RESNET20, given_).state
        except FastresError:
            loaded = None
    else:
        path = tmp_path / "odd.pth"
        path.write_bytes(content_of(form, odd))
        loaded = outcome(path)
    if loaded is not None:
        for key, value in loaded.items():
            expected = changes.get(key, state[key])
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(value.nan_to_num(), expected.float().nan_to_num()), key


class Marks:
    """Makes a folder if it is unpickled with code."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("form", ["zip", "old", "raw"])
@fuzz
@given(seed=st.integers(0, 10**9), changes=st.integers(0, 4))
def test_damaged_code_is_not_run(tmp_path: Path, form: str, seed: int, changes: int) -> None:
    folder = tmp_path / "made"
    obj = {"state_dict": {"fc.weight": torch.ones(2), "x": Marks(str(folder))}, "y": [Marks(str(folder))] * 2}
    draw = random.Random(seed)
    if form == "zip":
        source = zipfile.ZipFile(io.BytesIO(content_of("zip", obj)))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name in source.namelist():
                content = bytearray(source.read(name))
                for _ in range(changes if name.endswith("data.pkl") else 0):
                    content[draw.randrange(len(content))] = draw.choice(b"()Rbsu}]\x81\x93\x82ci.0" + bytes(range(8)))
                archive.writestr(name, content)
        whole = stream.getvalue()
    else:
        damaged = bytearray(content_of("old", obj) if form == "old" else pickle.dumps(obj["y"], seed % 6))
        for _ in range(changes):
            damaged[draw.randrange(len(damaged))] = draw.choice(b"()Rbsu}]\x81\x93\x82ci.0" + bytes(range(8)))
        whole = bytes(damaged)
    path = tmp_path / "evil.pth"
    path.write_bytes(whole)
    assert outcome(path) is None
    with suppress(FastresError):
        assert not inspect(path).runs
    assert not folder.exists()
