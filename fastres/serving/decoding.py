"""A process that decodes images for a server: it gets the bytes of a file and writes the pixels into a slot.

A file can end it, by a defect of a decoder or for lack of memory, without harm to other requests.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import time
import warnings
from dataclasses import dataclass

import torch
from PIL import Image

from fastres.errors import ImageError
from fastres.images.decoding import orientation
from fastres.images.jpeg import decoder
from fastres.images.jpeg_structure import count_scans
from fastres.images.transforms import Transforms
from fastres.memory import keep_little, settle

from .arena import Arena
from .failures import Refusal, too_many_pixels
from .messages import receive, send

FORMATS = ("JPEG", "PNG", "WEBP")
ACCEPTED = "JPEG, PNG or WebP"

_SIDEWAYS = tuple(map(Image.Transpose, (2, 4, 5, 6)))  # rotations by 90 degrees and their mirror images
# Small files can take long to decode. Each limit is several times what encoders write.
_LONGEST = 65_535  # pixels of a side; a JPEG cannot have more
_READS = 50_000  # of a header by Pillow: a few for each of its pieces
_CHUNKS = 20_000  # of a PNG
_SCANS = 20  # of a JPEG with the most pixels that are allowed; a smaller one may have more
_UPRIGHT = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a PNG without these is not turned

SLOT = struct.Struct("<I")  # before the bytes of a file in a request
OK = 200


@dataclass(frozen=True)
class Decoding:
    """How a decoder works: ``decoder`` is a name from :mod:`fastres.images.jpeg`, ``max_pixels`` width times height."""

    transforms: Transforms
    decoder: str
    max_pixels: int


def run(connection: socket.socket, arena: Arena, decoding: Decoding) -> None:
    """Answer requests for decoding until the other end closes ``connection``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the server ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection.setblocking(True)
    torch.set_num_threads(1)
    keep_little()
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = decoding.max_pixels
    _warm_up(decoding)
    settle()
    send(connection, b"")  # ready
    while (message := receive(connection)) is not None:
        (slot,) = SLOT.unpack_from(message)
        began = time.perf_counter()
        size, kind, text = (0, 0), "", ""
        status = OK
        try:
            size = decode(bytes(message[SLOT.size :]), arena, slot, decoding)
        except Refusal as refusal:
            status, kind, text = refusal.status, refusal.kind, refusal.message
        seconds = time.perf_counter() - began
        send(connection, json.dumps([status, seconds, *size, kind, text]).encode())
    os._exit(0)


def _warm_up(decoding: Decoding) -> None:
    """Decode an image, so that everything is imported."""
    with io.BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, "JPEG")
        decoder(decoding.decoder)(file.getvalue(), decoding.transforms)


def decode(data: bytes, arena: Arena, slot: int, decoding: Decoding) -> tuple[int, int]:
    """Write the pixels of an image file into ``slot``; return width and height of the upright image.

    Raises ``Refusal``.
    """
    size = checked_size(data, decoding.max_pixels)
    try:
        pixels = decoder(decoding.decoder)(data, decoding.transforms)
    except ImageError as error:
        raise Refusal(422, "ImageError", str(error).replace("The given data", "The image")) from error
    torch.from_numpy(arena.pixels(slot)).copy_(pixels.permute(1, 2, 0))
    return size


def checked_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return the size of an image from its header, as it is upright. Raises ``Refusal``."""
    if not data:
        raise Refusal(400, "ImageError", f"The request has no image; send the bytes of a {ACCEPTED} file as the body.")
    try:
        with Image.open(_Header(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise too_many_pixels(width, height, max_pixels)
            if max(width, height) > _LONGEST:
                raise Refusal(413, "TooLargeError", f"The image has a side of more than {_LONGEST:,} pixels; cut it.")
            _check_work(image, data, max_pixels)
            # Pillow decodes a whole PNG to look for its orientation.
            turnable = image.format != "PNG" or any(name in data for name in _UPRIGHT)
            turned = turnable and orientation(image) in _SIDEWAYS
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise Refusal(
            413, "TooLargeError", f"The image has more than {max_pixels:,} pixels; make it smaller."
        ) from None
    except Image.UnidentifiedImageError:
        raise Refusal(
            415,
            "FormatError",
            f"The {len(data):,} bytes are no image of a format that this server takes, or its beginning is damaged; "
            f"send a {ACCEPTED} file.",
        ) from None
    except Exception as error:  # Pillow raises any on a damaged header
        raise Refusal(422, "ImageError", f"The image's header is damaged ({type(error).__name__}).") from error
    return (height, width) if turned else (width, height)


class _Header(io.BytesIO):
    """A file whose header is refused if Pillow reads it in very many pieces."""

    left = _READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise _too_much_work("pieces")
        return super().read(size)


def _check_work(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raise ``Refusal`` if the image has more scans or chunks than its size explains."""
    if image.format == "PNG":
        place = 8
        for _ in range(_CHUNKS):
            place += 12 + int.from_bytes(data[place : place + 4], "big")
            if place >= len(data):
                return
        raise _too_much_work("chunks")
    allowed = _SCANS * max_pixels / max(image.width * image.height, 1)
    if image.info.get("progressive") and count_scans(data, allowed) > allowed:
        raise _too_much_work("scans")


def _too_much_work(parts: str) -> Refusal:
    return Refusal(
        422, "ImageError", f"The image has so many {parts} that it would take long to decode; save it again."
    )
