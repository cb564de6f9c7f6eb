"""fastres.images.decoding: every kind of image gives the right pixels, and errors name damaged files."""

from __future__ import annotations

import io
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from fastres.errors import ImageError
from fastres.images.decoding import load_image

ORIENTATION = 274
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 640 × 427, RGB."""
    datasets = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(datasets.load_sample_images().images[0])


@pytest.fixture(scope="module")
def small(photo: Image.Image) -> Image.Image:
    return photo.resize((48, 32))


def pixels(image: Any) -> np.ndarray:
    result = load_image(image)
    assert result.mode == "RGB"
    return np.asarray(result)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(width: int, height: int, bits: int, data: bytes, photometric: int = 1) -> bytes:
    """Return a little-endian grey TIFF with one strip."""
    rows = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    rows += [(273, 4, 8 + 2 + 8 * 12 + 4), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, kind, value in rows
    )
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + entries + b"\0\0\0\0" + data


def pgm(values: np.ndarray) -> bytes:
    """Return a 16-bit grey PGM, which old versions of Pillow read but do not write."""
    height, width = values.shape
    return f"P5 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()


class TestSources:
    def test_the_same_photograph_by_every_way_in(self, small: Image.Image, tmp_path: Path) -> None:
        expected = np.asarray(small)
        path = tmp_path / "a photo (1) ü.png"
        small.save(path)
        data = path.read_bytes()
        array = np.array(small)
        chw = torch.from_numpy(array).permute(2, 0, 1)
        with path.open("rb") as file:
            assert np.array_equal(pixels(file), expected)
            assert not file.closed
        for source in (str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data), Image.open(path)):
            assert np.array_equal(pixels(source), expected)
        for values in (array, array / 255, (array / 255).astype(np.float16), array.astype(np.uint16) * 256 + 77):
            assert np.array_equal(pixels(values), expected)
        for tensor in (chw, chw.contiguous(), chw / 255, chw.double() / 255, (chw.int() * 256 + 77).to(torch.uint16)):
            assert np.array_equal(pixels(tensor), expected)
        half = (chw / 255).to(
            torch.bfloat16
        )  # 8 significant bits: off by up to half a grey level, so by up to one after rounding
        assert np.abs(pixels(half).astype(int) - expected).max() <= 1

    def test_an_upright_rgb_image_is_returned_itself(self, small: Image.Image) -> None:
        assert load_image(small) is small

    def test_the_given_image_and_array_are_left_alone(self, small: Image.Image) -> None:
        rgba = small.convert("RGBA")
        array = np.asarray(small).astype(np.float32) / 255
        before = rgba.tobytes(), array.tobytes()
        load_image(rgba)
        load_image(array)
        assert (rgba.tobytes(), array.tobytes()) == before
        assert rgba.mode == "RGBA"

    @pytest.mark.parametrize("view", ["mirrored", "sliced", "fortran", "big-endian"])
    def test_arrays_in_any_memory_layout(self, small: Image.Image, view: str) -> None:
        array = np.asarray(small)
        source = {
            "mirrored": array[:, ::-1],
            "sliced": array[::2, 1::3],
            "fortran": np.asfortranarray(array),
            "big-endian": array.astype(">u2") * 256,
        }[view]
        expected = array if view in ("fortran", "big-endian") else np.ascontiguousarray(source)
        assert np.array_equal(pixels(source), expected)

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_channels_of_arrays_and_tensors(self, channels: int) -> None:
        array = np.random.default_rng(channels).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        expected = np.repeat(array[:, :, :1], 3, axis=2) if channels < 3 else array[:, :, :3]
        assert np.array_equal(pixels(array), expected)
        assert np.array_equal(pixels(torch.from_numpy(array).permute(2, 0, 1)), expected)

    def test_grey_without_a_channel_axis(self) -> None:
        array = np.arange(35, dtype=np.uint8).reshape(5, 7)
        expected = np.repeat(array[:, :, None], 3, axis=2)
        assert np.array_equal(pixels(array), expected)
        assert np.array_equal(pixels(torch.from_numpy(array)), expected)

    def test_floats_round_to_the_nearest_level(self) -> None:
        levels = np.arange(256).reshape(16, 16)
        for offset in (-0.49, 0.49):
            values = ((levels + offset) / 255).clip(0, 1)
            assert np.array_equal(pixels(values)[:, :, 0], levels)
            assert np.array_equal(pixels(torch.from_numpy(values))[:, :, 0], levels)

    def test_values_in_dropped_alpha_do_not_matter(self) -> None:
        for channels in (2, 4):
            array = np.full((4, 4, channels), 0.5, np.float32)
            array[:, :, -1] = 255
            assert (pixels(array) == 128).all()
            assert (pixels(torch.from_numpy(array).permute(2, 0, 1)) == 128).all()

    def test_overshoot_of_a_resize_is_rounded(self) -> None:
        assert pixels(np.array([[-9e-4, 1 + 9e-4]]))[0, :, 0].tolist() == [0, 255]
        assert pixels(torch.tensor([[-9e-4, 1 + 9e-4]]))[0, :, 0].tolist() == [0, 255]

    @pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "camera.png", "rocket.jpg"])
    def test_photographs_of_scikit_image(self, name: str) -> None:
        skimage = pytest.importorskip("skimage")
        io_ = pytest.importorskip("skimage.io")
        path = Path(skimage.__file__).parent / "data" / name
        if not path.exists():
            pytest.skip(f"this scikit-image ships without {name}")
        result = pixels(path)
        assert np.array_equal(result, np.asarray(Image.open(path).convert("RGB")))
        assert np.array_equal(result, pixels(io_.imread(path)))
        assert result.std() > 20  # a picture, not a constant

    @pytest.mark.parametrize("name", ["grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"])
    def test_samples_of_matplotlib(self, name: str) -> None:
        cbook = pytest.importorskip("matplotlib.cbook")
        path = cbook.get_sample_data(name, asfileobj=False)
        assert np.array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))


class TestModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_looks_like_the_photograph(self, small: Image.Image, mode: str) -> None:
        if mode == "LAB":
            cms = pytest.importorskip("PIL.ImageCms")
            profiles = cms.createProfile("sRGB"), cms.createProfile("LAB")
            image = cms.applyTransform(small, cms.buildTransform(*profiles, "RGB", "LAB"))
        elif mode in ("La", "PA"):
            image = small.convert("LA" if mode == "La" else "P").convert(mode)
        elif mode == "RGBa":
            image = small.convert("RGBA").convert("RGBa")
        else:
            image = small.convert(mode)
        assert image.mode == mode
        grey = mode in ("L", "LA", "La")
        expected = np.asarray(small.convert("L").convert("RGB") if grey else small).astype(int)
        limit = {"1": 130, "P": 40, "PA": 40}.get(mode, 8)  # one bit; a palette of 216 colours, dithered; rounding
        assert np.abs(pixels(image) - expected).mean() < limit
        if mode not in ("La",):
            assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))

    def test_alpha_is_dropped(self, small: Image.Image) -> None:
        rgba = small.copy()
        rgba.putalpha(Image.linear_gradient("L").resize(small.size))
        assert np.array_equal(pixels(rgba), np.asarray(small))

    @pytest.mark.parametrize("transparency", [0, bytes(range(256))])
    def test_palette_with_transparency(self, small: Image.Image, transparency: int | bytes, tmp_path: Path) -> None:
        palette = small.convert("P", palette=Image.Palette.ADAPTIVE)
        palette.save(tmp_path / "p.png", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = pixels(tmp_path / "p.png")
        assert Image.open(tmp_path / "p.png").info["transparency"] == transparency
        assert np.array_equal(result, np.asarray(palette.convert("RGB")))

    def test_cmyk_jpeg_is_not_inverted(self, small: Image.Image) -> None:
        data = encoded(small.convert("CMYK"), "JPEG", quality=95, subsampling=0)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert np.abs(pixels(data).astype(int) - np.asarray(small)).mean() < 4

    def test_first_frame_of_an_animation(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        for format in ("GIF", "PNG", "TIFF", "WEBP"):
            data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
            assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() < 8, format

    def test_given_frame_of_an_open_animation(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
        image = Image.open(io.BytesIO(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
        image.seek(1)
        assert np.array_equal(pixels(image), np.asarray(frames[1]))


class TestDeepGrey:
    ramp = np.arange(0, 65536, 17, dtype=np.uint16)[: 64 * 60].reshape(60, 64)

    def check(self, source: Any) -> None:
        assert np.array_equal(pixels(source), np.repeat((self.ramp >> 8).astype(np.uint8)[:, :, None], 3, axis=2))

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
    def test_sixteen_bit_files_are_scaled_not_clipped(self, format: str) -> None:
        self.check(pgm(self.ramp) if format == "PPM" else encoded(Image.fromarray(self.ramp), format))

    def test_sixteen_bit_images(self) -> None:
        image = Image.fromarray(self.ramp)
        assert image.mode == "I;16"
        for mode in ("I;16", "I", "I;16B"):
            self.check(image if mode == "I;16" else image.convert("I") if mode == "I" else self.big_endian())

    def big_endian(self) -> Image.Image:
        return Image.frombytes("I;16B", (64, 60), self.ramp.astype(">u2").tobytes())

    def test_twelve_bit_tiff(self) -> None:
        data = tiff(2, 1, 12, bytes([0xAB, 0xCF, 0xFF]))
        assert pixels(data)[0, :, 0].tolist() == [0xAB, 0xFF]

    def test_white_is_zero(self) -> None:
        data = tiff(3, 1, 16, struct.pack("<3H", 0, 0x1234, 0xFFFF), photometric=0)
        assert pixels(data)[0, :, 0].tolist() == [255, 255 - 0x12, 0]

    def test_floating_point(self) -> None:
        image = Image.fromarray(self.ramp.astype(np.float32) / 65535)
        assert image.mode == "F"
        expected = np.rint(self.ramp / 65535 * 255)
        assert np.array_equal(pixels(image)[:, :, 0], expected)
        assert np.array_equal(pixels(encoded(image, "TIFF"))[:, :, 0], expected)

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.array([[0, 70000]], np.int32), "from 0 to 70000; 16-bit grey must be 0..65535"),
            (np.array([[-1, 7]], np.int32), "from -1 to 7"),
            (np.array([[3, 200]], np.int32), "convert('L')"),
            (np.array([[0, 200]], np.float32), "divide it by 255"),
        ],
    )
    def test_values_of_another_scale_are_refused(self, values: np.ndarray, reason: str) -> None:
        with pytest.raises(ImageError, match=re.escape(reason)) as caught:
            load_image(Image.fromarray(values))
        assert "cannot be decoded" not in str(caught.value)

    def test_dark_sixteen_bit_files_are_read(self) -> None:
        values = np.array([[3, 200]], np.uint16)
        for data in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF"), pgm(values)):
            assert pixels(data).tolist() == [[[0] * 3] * 2]


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P"])
    def test_all_orientations(self, small: Image.Image, orientation: int, mode: str, tmp_path: Path) -> None:
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else small
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = tmp_path / "turned.png"
        (image if mode == "I;16" else image.convert(mode)).save(path, exif=exif)
        upright = pixels(ImageOps.exif_transpose(Image.open(path)))
        assert upright.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
        for source in (path, Image.open(path), Image.open(path).copy()):
            assert np.array_equal(pixels(source), upright)

    def test_orientations_differ(self, small: Image.Image) -> None:
        results = set()
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            results.add(pixels(encoded(small, "PNG", exif=exif)).tobytes())
        assert len(results) == 8

    def test_a_photo_taken_sideways(self, small: Image.Image) -> None:
        sideways = small.transpose(Image.Transpose.ROTATE_90)  # orientation 6 means a clockwise quarter turn
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        result = pixels(encoded(sideways, "JPEG", exif=exif, quality=95, subsampling=0))
        assert np.abs(result.astype(int) - np.asarray(small)).mean() < 4

    @pytest.mark.parametrize("value", [0, 9, 77])
    def test_unknown_orientations_are_ignored(self, small: Image.Image, value: int) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = value
        assert np.array_equal(pixels(encoded(small, "PNG", exif=exif)), np.asarray(small))

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize("exif", [b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"\xff" * 40])
    def test_damaged_exif_beside_sound_pixels(self, small: Image.Image, exif: bytes) -> None:
        for format in ("JPEG", "PNG", "WEBP"):
            data = encoded(small, format, exif=b"Exif\0\0" + exif)
            assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        copied = small.copy()
        copied.info["exif"] = exif
        assert np.array_equal(pixels(copied), np.asarray(small))


class TestDamagedFiles:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
    @pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
    def test_truncated(self, photo: Image.Image, format: str, share: float, tmp_path: Path) -> None:
        data = encoded(photo, format)
        path = tmp_path / f"cut.{format.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        for source in (path, path.read_bytes()):
            with pytest.raises(ImageError, match=r"(?i)damaged") as caught:
                load_image(source)
            if source is path:
                assert repr(str(path)) in str(caught.value)
        load_image(data)  # the whole file is fine

    def test_lazily_opened_and_truncated(self, photo: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        path.write_bytes(encoded(photo, "JPEG")[:9000])
        with pytest.raises(ImageError, match=re.escape(repr(str(path)))):
            load_image(Image.open(path))

    def test_closed_image(self, photo: Image.Image, tmp_path: Path) -> None:
        photo.save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            pass
        with pytest.raises(ImageError, match="closed"):
            load_image(image)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_flipped_bytes_are_read_or_refused(self, small: Image.Image, data: st.DataObject) -> None:
        format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
        content = bytearray(encoded(small, format))
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result: Any = load_image(bytes(content))
            except ImageError as error:
                result = error
        assert result.mode == "RGB" if isinstance(result, Image.Image) else str(result).startswith("The given data")

    @pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>not found</html>", bytes(5000)])
    def test_no_image(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "notes.jpg"
        path.write_bytes(content)
        for source in (path, content, io.BytesIO(content)):
            with pytest.raises(ImageError, match=r"not an image|empty|damaged"):
                load_image(source)

    def test_decompression_bomb(self, monkeypatch: pytest.MonkeyPatch, small: Image.Image) -> None:
        data = encoded(small, "PNG")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", small.width * small.height // 3)
        with pytest.raises(ImageError, match=r"too large: Image size \(1536 pixels\).*MAX_IMAGE_PIXELS"):
            load_image(data)

    def test_a_user_may_ask_for_truncated_files(self, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert load_image(encoded(photo, "JPEG")[:60000]).size == photo.size
