"""Sound image files of many kinds, and seeded damage to them, for tests that try many damaged files."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION, SCAN = 274, 0xDA


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return an image with smooth parts, edges and some noise, the same one on every call."""
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [np.sin(9 * rows + k) * np.cos(7 * columns - k) + (rows + k / 5 > columns) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 0.05, (height, width, 3))
    pixels = (np.stack(channels, 2) + noise + 1) * 85
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of a file that holds ``image``."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sound_jpegs(width: int = 300, height: int = 260) -> dict[str, bytes]:
    """Return JPEGs of every kind that cameras and programs write."""
    image, exif = picture(width, height), Image.Exif()
    exif[ORIENTATION] = 6
    files = {
        "baseline": encoded(image, quality=90, subsampling=2),
        "4:2:2": encoded(image, quality=80, subsampling=1),
        "4:4:4": encoded(image, quality=85, subsampling=0),
        "progressive": encoded(image, quality=75, progressive=True),
        "progressive 4:4:4": encoded(image, quality=92, progressive=True, subsampling=0),
        "grey": encoded(image.convert("L"), quality=80),
        "progressive grey": encoded(image.convert("L"), progressive=True),
        "restarts": encoded(image, quality=80, restart_marker_rows=2),
        "progressive restarts": encoded(image, progressive=True, restart_marker_blocks=5),
        "rotated": encoded(image, quality=80, exif=exif),
        "own tables": encoded(image, quality=70, optimize=True),
        "RGB": encoded(image, quality=80, keep_rgb=True),
        "CMYK": encoded(image.convert("CMYK"), quality=80),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)], quality=60),
        "comment and profile": encoded(image, comment=b"a comment", icc_profile=bytes(range(256)) * 9, dpi=(72, 72)),
    }
    small = picture(19, 13)
    return files | {"small": encoded(small), "small progressive": encoded(small, progressive=True)}


def segments(data: bytes) -> list[tuple[int, int]]:
    """Return start and end of the marker segments of a sound JPEG up to its first scan."""
    found, start = [], 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        found.append((start, end))
        if data[start + 1] == SCAN:
            break
        start = end
    return found


_MARKERS = (0xC0, 0xC2, 0xC4, 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xEE, 0xFE)
_CONTENTS = (b"JFIF\0\1\1\0\0\1\0\1\0\0", b"Exif\0\0MM", *(b"Adobe\0d\0\0\0\0" + bytes((n,)) for n in range(4)))


def damaged(data: bytes, dice: random.Random, header: int | None = None) -> bytes:
    """Return ``data`` with damage in one to three places; half of them are in the first ``header`` bytes."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        end = min(header or len(changed), len(changed)) if dice.random() < 0.5 else len(changed)
        if end:
            _damage(changed, dice.randrange(end), dice)
    return bytes(changed)


def _damage(changed: bytearray, place: int, dice: random.Random) -> None:
    """Flip, replace, cut, clear, remove, insert or copy bytes at ``place``, or change the segments of a JPEG."""
    kind = dice.randrange(11)
    if kind <= 2:
        changed[place] ^= 1 << dice.randrange(8)
    elif kind == 3:
        changed[place] = dice.choice((0, 1, 3, 0x11, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    elif kind == 4:
        changed[place : place + 2] = bytes((0xFF, dice.choice(_MARKERS)))
    elif kind == 5:
        del changed[place + dice.randrange(2) * dice.randrange(99) :]
    elif kind == 6:
        length = min(dice.choice((1, 2, 8, 64, 512)), len(changed) - place)
        changed[place : place + length] = bytes(length)
    elif kind == 7:
        del changed[place : place + dice.choice((1, 2, 7, 100))]
    elif kind == 8:
        changed[place:place] = dice.randbytes(dice.choice((1, 2, 9, 100)))
    elif kind == 9:
        length, other = dice.choice((4, 64, 1000)), dice.randrange(len(changed))
        changed[place : place + length] = changed[other : other + length]
    elif changed[:2] == b"\xff\xd8" and (parts := segments(bytes(changed))):
        _damage_segments(changed, parts, dice)


def _damage_segments(changed: bytearray, parts: list[tuple[int, int]], dice: random.Random) -> None:
    """Remove, repeat, copy or add a segment."""
    start, stop = dice.choice(parts)
    part, kind = changed[start:stop], dice.randrange(4)
    if kind == 0:
        del changed[start:stop]
    elif kind == 1:
        changed[start:start] = part
    elif kind == 2:
        other = dice.choice(parts)[0]
        changed[other:other] = part
    else:
        content = dice.choice(_CONTENTS)
        marker = bytes((0xFF, dice.choice((0xE0, 0xEE, 0xE1, 0xFE))))
        changed[start:start] = marker + (len(content) + 2).to_bytes(2, "big") + content
