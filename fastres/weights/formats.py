"""Recognise files by their content: checkpoints, and other files that are saved under a checkpoint's name."""

from __future__ import annotations

from pathlib import Path

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # the formats of torch.save since 2020 and before 2020
HEADER = 512  # bytes of a file that recognition needs
_LONGEST_HEADER = 100_000_000  # safetensors' own limit for its JSON header
_UNPACK = "Unpack it, and pass the checkpoint inside"
_CONVERT = "Convert it in the program that made it: save the weights with torch.save or safetensors"

# Beginnings of files, what they are, and what to do.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras saves it", _CONVERT),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"GGUF", "a GGUF file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array file", "Pass a state dict of torch.from_numpy(array) for each parameter"),
    (b"version https://git-lfs", "a Git LFS pointer", "Run git lfs pull to get the file itself"),
    (b"\x08\x01\x12", "a TensorFlow SavedModel", _CONVERT),
    (b"<?xml", "an XML file", "Pass the checkpoint itself"),
)
_WEB = (b"<!doctype html", b"<html")
_TENSORFLOW_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of a TensorFlow checkpoint's .index


def is_safetensors(beginning: bytes) -> bool:
    """Return True if a file begins like a safetensors file: the length of a JSON header, then the header."""
    length = int.from_bytes(beginning[:8], "little")
    return beginning[8:9] == b"{" and 2 <= length <= _LONGEST_HEADER


def name_other(path: Path, beginning: bytes) -> tuple[str, str] | None:
    """Return what a file is and what to do, if it is recognised as something other than a checkpoint."""
    for start, what, advice in _BEGINNINGS:
        if beginning.startswith(start):
            return what, advice
    if beginning.lstrip().lower().startswith(_WEB):
        return "a web page", "Download the file again; the server sent a page in its place"
    if beginning[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if beginning[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _CONVERT
    if _is_onnx(path, beginning):
        return "an ONNX file", "fastres.export.onnx.inspect(path) reads it; fastres loads only checkpoints"
    if _is_msgpack(beginning):
        return "a msgpack file, as Flax saves it", _CONVERT
    return ("a TensorFlow checkpoint's index", _CONVERT) if _ends_with(path, _TENSORFLOW_INDEX) else None


def name_zip(names: list[str]) -> tuple[str, str]:
    """Return what a zip archive with the entries ``names`` is, and what to do, if torch.save did not write it."""
    last = {name.rpartition("/")[2] for name in names}
    if last & {"archive_format", "serialized_exported_program.json", "serialized_state_dict.json"}:
        return "an exported program (.pt2)", "torch.export.load(path).state_dict gives its weights"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", "Pass a state dict of torch.from_numpy(array) for each parameter"
    if "model.weights.h5" in last:
        return "a Keras model", _CONVERT
    return "a zip archive that torch.save did not write", _UNPACK


def _is_onnx(path: Path, beginning: bytes) -> bool:
    """An ONNX file begins with its version of the format, 3 or more, and the name of its producer or its graph."""
    begins = beginning[:1] == b"\x08" and 3 <= (beginning[1:2] or b"\0")[0] < 64
    return begins and (path.suffix.lower() == ".onnx" or beginning[2:3] in (b"\x12", b"\x3a", b"\x42"))


def _is_msgpack(beginning: bytes) -> bool:
    """A Flax file is a msgpack map from names to maps."""
    if len(beginning) < 4 or not (0x81 <= beginning[0] <= 0x8F and 0xA1 <= beginning[1] <= 0xBF):
        return False
    name = beginning[2 : 2 + (beginning[1] & 0x1F)]
    return name.isascii() and name.decode("ascii").isidentifier()


def _ends_with(path: Path, end: bytes) -> bool:
    try:
        with open(path, "rb") as stream:
            stream.seek(-len(end), 2)
            return stream.read() == end
    except OSError:
        return False
