"""The pixels that a stem in 8 bit reads: channels-last levels with a border in the mean colour."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.forks import Guard
from fastres.network.plan import Stem
from fastres.network.quantisation import LARGEST

from .packing import SHAPES_KEPT
from .recent import Recent


class Pixels:
    """Makes the input of ``stem``'s convolution from images: pixels, or normalised images, which are rounded."""

    def __init__(self, stem: Stem) -> None:
        self._padding = stem.padding
        self._scale = [255 * std for std in stem.std]
        self._shift = [255 * mean for mean in stem.mean]
        self.scales, self.shifts = (
            torch.tensor(values, dtype=torch.float32, device="cpu") for values in (self._scale, self._shift)
        )
        self._borders: Recent[tuple[int, int], Tensor] = Recent(SHAPES_KEPT)
        self._guard = Guard()

    def of(self, x: Tensor) -> Tensor:
        """Return the pixels of ``x`` ``[N, 3, H, W]``, channels-last, with a border in the mean colour."""
        n, _, h, w = x.shape
        picture = self.picture(n, h, w)
        self.fill(picture, x)
        return picture.permute(0, 3, 1, 2)

    def picture(self, n: int, h: int, w: int) -> Tensor:
        """Return a picture ``[N, H + 2P, W + 2P, 3]`` in the mean colour, which stands for zeros."""
        size = (h + 2 * self._padding, w + 2 * self._padding)
        colour = [round(shift) for shift in self._shift]
        with self._guard:
            border = self._borders.get_or_make(
                size, lambda: torch.tensor(colour, dtype=torch.uint8, device="cpu").repeat(1, *size, 1)
            )
        return border.repeat(n, 1, 1, 1)

    def inside(self, picture: Tensor) -> Tensor:
        """Return the part of ``picture`` inside the border."""
        padding = self._padding
        return picture[:, padding : picture.shape[1] - padding, padding : picture.shape[2] - padding]

    def fill(self, picture: Tensor, x: Tensor) -> None:
        """Write the pixels of ``x`` inside the border of ``picture``."""
        n, _, h, w = x.shape
        inside = self.inside(picture)
        if x.dtype == torch.uint8:
            inside.copy_(x.permute(0, 2, 3, 1))
        elif x.is_contiguous():
            inside.copy_(self.unrounded(x).round_().clamp_(0, LARGEST).permute(0, 2, 3, 1))
        else:
            rows, scales, shifts = whole_rows(x, self.scales, self.shifts)
            inside.copy_(rows.mul(scales).add_(shifts).round_().clamp_(0, LARGEST).view(n, h, w, 3))

    def unrounded(self, x: Tensor) -> Tensor:
        """Return the pixels of normalised images ``x`` ``[N, 3, H, W]`` before they are rounded, in float32."""
        pixels = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        for channel, scale in enumerate(self._scale):  # one after another: a broadcast scale is slower
            plane = x[:, channel].to(torch.float32)
            torch.mul(plane, scale, out=pixels[:, channel]).add_(self.shifts[channel])  # rounds as oneDNN does
        return pixels


def whole_rows(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return images ``[N, C, H, W]`` as float32 rows ``[N·H, W·C]``, and each of ``values`` ``[C]`` for a row.

    Arithmetic on these is faster than with a broadcast value for each channel, if the images are channels-last.
    """
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).to(torch.float32).reshape(n * h, w * c)
    return rows, *(value.view(c).repeat(w) for value in values)
