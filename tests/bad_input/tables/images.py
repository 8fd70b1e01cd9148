"""Files of images, asked about and in chats."""

import io
import struct
import zlib

from cases import GENERATE, Case, pipe, text
from PIL import Image


def encoded(size=(8, 8), form="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


def huge_png(width, height):
    """The beginning of an image of that size: enough to open it, not to decode it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 64), b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_bad_sum():
    """An image one of whose checksums is wrong."""
    content = bytearray(encoded())
    content[30] ^= 1
    return bytes(content)


FILES = {
    "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "none of PNG"),
    "a drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "none of PNG"),
    "a page": (b"%PDF-1.7\n", "none of PNG"),
    "a format that is not taken": (b"P5 4 4 255\n" + b"\0" * 16, "none of PNG"),
    "an icon": (encoded(form="ICO"), "none of PNG"),
    "text": (b"hello", "none of PNG"),
    "nothing": (b"", "cannot be read"),
    "zero bytes": (b"\0" * 100, "none of PNG"),
    "the first bytes": (encoded()[:20], "cannot be read"),
    "half": (encoded((64, 64), "JPEG")[:300], "cannot be read"),
    "half a GIF": (encoded((64, 64), "GIF")[:40], "cannot be read"),
    "half a WebP": (encoded((64, 64), "WEBP")[:40], "cannot be read"),
    "half a TIFF": (encoded((64, 64), "TIFF")[:100], "cannot be read"),
    "half a BMP": (encoded((64, 64), "BMP")[:60], "cannot be read"),
    "a wrong checksum": (with_bad_sum(), "cannot be read"),
    "more pixels than are decoded": (huge_png(10_000, 10_000), "10000 x 10000 pixels"),
    "far more pixels": (huge_png(100_000, 100_000), "pixels"),
    "no width": (huge_png(0, 10), "cannot be read"),
    "a size without end": (huge_png(2**31 - 1, 2**31 - 1), "pixels"),
}
CASES = {
    **{
        name: Case(command=f"{GENERATE} --image a.png", change=text("a.png", content), named=named)
        for name, (content, named) in FILES.items()
    },
    **{
        f"in chats: {name}": Case(
            command="evaluate small --data data",
            change=text("data/images/000000-0.png", content),
            named=named,
        )
        for name, (content, named) in FILES.items()
    },
    "no file": Case(command=f"{GENERATE} --image nowhere.png", named="nowhere.png"),
    "a folder": Case(command=f"{GENERATE} --image data", named="is not a file"),
    "a device": Case(command=f"{GENERATE} --image /dev/zero", named="is not a file"),
    "a pipe": Case(command=f"{GENERATE} --image a.png", change=pipe("a.png"), named="is not a file"),
    "a name that is too long": Case(command=f"{GENERATE} --image {'x' * 300}", named="x" * 30),
    "a zero byte in a name": Case(command=f"{GENERATE} --image", more=("a\0.png",), named="image"),
}
