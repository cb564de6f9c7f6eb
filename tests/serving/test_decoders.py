"""The processes that decode: their results, their errors, and what happens when they die."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from fastres.images.jpeg import EXACT, FAST
from fastres.images.transforms import Transforms
from fastres.serving import decoders, decoding
from fastres.serving.arena import Arena
from fastres.serving.decoders import Decoders
from fastres.serving.decoding import Decoding
from fastres.serving.failures import Refusal

TRANSFORMS = Transforms(resize=40, crop=32)
KILLS = b"this ends the process that reads it"
HANGS = b"this takes for ever"


def encoded(width: int = 64, height: int = 48, format: str = "JPEG", **options: Any) -> bytes:
    values = np.random.default_rng(width).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((width, height)).save(file, format, **options)
    return file.getvalue()


def dangerous(connection: socket.socket, arena: Arena, given: Decoding) -> None:
    """Run a decoder that two inputs can end or stop."""
    usual = decoding.decode

    def decode(data: bytes, *others: Any) -> tuple[int, int]:
        if data == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if data == HANGS:
            signal.pause()
        return usual(data, *others)

    decoding.decode = decode
    usual_run(connection, arena, given)


usual_run = decoding.run


@asynccontextmanager
async def running(
    count: int, decoder: str = FAST, patience: float = 30.0, max_pixels: int = 10**6
) -> AsyncIterator[tuple[Decoders, Arena]]:
    arena = Arena(8, TRANSFORMS.crop, classes=4, features=6)
    found = Decoders(count, arena, Decoding(TRANSFORMS, decoder, max_pixels), patience)
    await found.start()
    try:
        yield found, arena
    finally:
        await found.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def freed(slots: list[int], slot: int) -> Callable[[], None]:
    return partial(slots.append, slot)


def test_the_pixels_are_those_of_the_transforms() -> None:
    files = [encoded(), encoded(100, 40, "PNG"), encoded(33, 90, "WEBP", lossless=True)]

    async def test() -> None:
        free: list[int] = []
        async with running(2, EXACT) as (found, arena):
            work = [found.decode(slot, data, freed(free, slot)) for slot, data in enumerate(files)]
            for slot, (data, decoded) in enumerate(zip(files, await asyncio.gather(*work), strict=True)):
                expected = TRANSFORMS.pixels(data).permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(arena.pixels(slot), expected)
                assert (decoded.width, decoded.height) == Image.open(io.BytesIO(data)).size
            assert sorted(free) == [0, 1, 2]
            assert found.unfinished == 0

    run(test())


def test_bad_images_are_refused_by_name_and_the_process_goes_on() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    good = encoded(exif=turned)
    cases = [
        (b"", 400, "ImageError", "no image"),
        (b"<html></html>", 415, "FormatError", "JPEG, PNG or WebP"),
        (encoded(format="BMP"), 415, "FormatError", "no image of a format"),
        (good[:20], 415, "FormatError", "its beginning is damaged"),
        (good[:-300], 422, "ImageError", "truncated"),
        (encoded(1001, 1000, "PNG"), 413, "TooLargeError", "1001 × 1000"),
    ]

    async def test() -> None:
        free: list[int] = []
        async with running(1) as (found, _):
            for data, status, kind, said in cases:
                with pytest.raises(Refusal, match=said) as caught:
                    await found.decode(0, data, freed(free, 0))
                assert (caught.value.status, caught.value.kind) == (status, kind)
            decoded = await found.decode(0, good, freed(free, 0))
            assert (decoded.width, decoded.height) == (48, 64)  # upright
            assert len(free) == len(cases) + 1
            assert found.deaths == 0

    run(test())


def long_work() -> dict[str, bytes]:
    """Return files of up to 2 MB, each of which Pillow reads for seconds or minutes, with a word about each."""
    jpeg, file = encoded(progressive=True), encoded(format="PNG")
    last, ends = jpeg.rindex(b"\xff\xda"), file.index(b"IDAT") - 4
    chunk = b"\0\0\0\0prIv" + zlib.crc32(b"prIv").to_bytes(4, "big")
    line = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
        for name, content in (
            (b"IHDR", struct.pack(">IIBBBBB", 1, 900_000, 8, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(1_800_000))), (b"IEND", b""),
        )
    )  # fmt: skip
    return {
        "pieces": jpeg[:2] + b"\xff\xfe\0\2" * 500_000 + jpeg[2:],
        "many pieces": jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
        "so many pieces": jpeg[:20] + bytes(2_000_000) + jpeg[20:],  # behind the first segment
        "so many pieces that": file[:ends] + chunk * 150_000 + file[ends:],
        "chunks": file[:-12] + chunk * 150_000 + file[-12:],
        "scans": jpeg[:-2] + jpeg[last:-2] * 490 + jpeg[-2:],
        "side of more than": line,
    }


@pytest.mark.parametrize("said", long_work())
def test_small_files_that_take_long_are_refused(said: str) -> None:
    with pytest.raises(Refusal, match=said):
        decoding.checked_size(long_work()[said], 4_000 if said == "scans" else 1_000_000)


def test_the_pixels_of_a_png_are_decoded_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = encoded(format="PNG"), encoded(format="PNG", exif=exif)
    end, pixels = turned.index(b"eXIf") - 4, turned.index(b"IDAT") - 4
    behind = turned[:end] + turned[pixels:-12] + turned[end:pixels] + turned[-12:]  # the orientation comes last
    assert decoding.checked_size(turned, 10**6) == decoding.checked_size(behind, 10**6) == (48, 64)
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert decoding.checked_size(upright, 10**6) == (64, 48)


def test_a_process_that_dies_or_hangs_loses_only_the_image_that_did_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "run", dangerous)
    good = encoded()

    async def test() -> None:
        free: list[int] = []
        async with running(1, patience=1.0) as (found, _):
            files = [good, KILLS, good, HANGS, good, good]
            work = [found.decode(slot, data, freed(free, slot)) for slot, data in enumerate(files)]
            results = await asyncio.gather(*work, return_exceptions=True)
            for data, result in zip(files, results, strict=True):
                if data == good:
                    assert not isinstance(result, BaseException)
                else:
                    assert isinstance(result, Refusal)
                    assert (result.status, result.kind) == (422, "WorkerError")
            assert sorted(free) == list(range(6))
            assert found.deaths == 4  # two for each

    run(test())


def test_a_process_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, failures = decoders._Process.start, [OSError(24, "Too many open files"), EOFError()]

    async def start(process: decoders._Process, *arguments: Any) -> None:
        if failures:
            raise failures.pop(0)
        await usual(process, *arguments)

    monkeypatch.setattr(decoders._Process, "start", start)

    async def test() -> None:
        free: list[int] = []
        async with running(1) as (found, _):
            decoded = await found.decode(0, encoded(), freed(free, 0))
            assert (decoded.width, decoded.height) == (64, 48)
            assert not failures

    run(test())


def test_a_client_that_leaves_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "run", dangerous)

    async def test() -> None:
        free: list[int] = []
        async with running(1, patience=2.0) as (found, _):
            await found.decode(7, encoded(), freed(free, 7))  # the process is there
            stuck = asyncio.create_task(found.decode(0, HANGS, freed(free, 0)))
            ahead = asyncio.create_task(found.decode(1, encoded(), freed(free, 1)))
            waiting = asyncio.create_task(found.decode(2, encoded(), freed(free, 2)))
            await asyncio.sleep(0.1)
            waiting.cancel()
            stuck.cancel()
            await asyncio.sleep(0)
            assert free == [7, 2]  # the process still has the first two
            await ahead
            assert sorted(free) == [0, 1, 2, 7]

    run(test())
