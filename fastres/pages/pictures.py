"""Small pictures inside an HTML file."""

from __future__ import annotations

import base64
import io

from PIL import Image

THUMBNAIL = 160  # pixels of the longer side
QUALITY = 80


def data_uri(picture: Image.Image) -> str:
    """Return a small copy of ``picture`` as a data URI. Tiny pictures are enlarged by whole pixels, not smoothed."""
    longer = max(picture.size)
    scale = THUMBNAIL / longer
    if scale > 1:
        picture = picture.resize([max(1, side * int(scale)) for side in picture.size], Image.Resampling.NEAREST)
    else:
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
