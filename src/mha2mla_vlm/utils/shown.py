"""How pages show bytes and images."""

import base64
import io
from typing import Any

from PIL import Image

FORMATS: tuple[dict[str, Any], ...] = ({"format": "PNG", "optimize": True}, {"format": "WEBP", "quality": 80})


def size_text(value: float) -> str:
    """Bytes in a fitting unit."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def data_url(image: Image.Image, side: int) -> str:
    """An image of at most `side` pixels on its longer side, as a `data:` URL: a drawing as PNG, a photograph
    as WebP, whichever is smaller.
    """
    small = image.copy()
    small.thumbnail((side, side))
    found = []
    for options in FORMATS:
        buffer = io.BytesIO()
        small.save(buffer, **options)
        found.append((buffer.tell(), options["format"], buffer.getvalue()))
    _, kind, data = min(found)
    return f"data:image/{str(kind).lower()};base64,{base64.b64encode(data).decode()}"
