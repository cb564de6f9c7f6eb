"""Files that are no checkpoints: the error says what they are."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from fastres.errors import CorruptCheckpointError
from fastres.weights.checkpoints import read_checkpoint

OTHER_FORMATS: dict[str, tuple[bytes, str]] = {
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "weights.pth.gz": (b"\x1f\x8b\x08" + bytes(40), "a gzip file.*Unpack it"),
    "weights.pth": (b"\x28\xb5\x2f\xfd" + bytes(40), "a zstd file"),
    "model.gguf": (b"GGUF" + bytes(40), "a GGUF file"),
    "array.npy": (b"\x93NUMPY" + bytes(40), "a NumPy array file.*from_numpy"),
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
    "page.pth": (b"\n<!DOCTYPE html><html>", "a web page"),
    "model.tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "a TensorFlow Lite model"),
    "saved_model.pb": (b"\x08\x01\x12\x80", "a TensorFlow SavedModel"),
    "model.pth": (b"\x08\x08\x12\x07pytorch", "an ONNX file.*export.onnx.inspect"),
    "flax.msgpack": (b"\x82\xa6params\x82", "a msgpack file, as Flax"),
    "model.index": (b"\0\0\0" + bytes(40) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "a TensorFlow checkpoint's index"),
    "weights.tar": (bytes(257) + b"ustar" + bytes(250), "a tar archive.*Unpack it"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_other_formats_are_named(tmp_path: Path, name: str, suffix: str) -> None:
    content, message = OTHER_FORMATS[name]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=rf"is {message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a.npy", "b.npy"], r"a NumPy archive \(\.npz\)"),
        (["model/archive_format", "model/data/weights/w_0"], r"an exported program \(\.pt2\).*torch\.export\.load"),
        (["config.json", "model.weights.h5"], "a Keras model"),
        (["run/last.pth"], "a zip archive that torch.save did not write.*Unpack"),
        ([], "not a"),
    ],
)
def test_other_archives_are_named(tmp_path: Path, entries: list[str], message: str) -> None:
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for entry in entries:
            archive.writestr(entry, b"x")
    with pytest.raises(CorruptCheckpointError, match=message):
        read_checkpoint(path)
