"""A small picture as plain bytes: what an image set's rows hold, and how it becomes a PNG or a Pillow image.

Which pictures there are is in `bmm.zoo.image_sets`. Pillow is imported only where a picture is decoded or encoded.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

from bmm.errors import BMMError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_SIZE_END = 24
_CHANNELS = {"L": 1, "RGB": 3}


class PictureError(BMMError):
    """Bytes that are no picture, or not as many as its size needs."""


@dataclass(frozen=True)
class Picture:
    """`height` rows of `width` pixels, top left first, one byte a channel: grey (`L`) or red, green, blue."""

    mode: Literal["L", "RGB"]
    width: int
    height: int
    pixels: bytes

    def __post_init__(self) -> None:
        if len(self.pixels) != self.width * self.height * _CHANNELS[self.mode]:
            raise PictureError(f"{len(self.pixels)} bytes do not fill {self.width} × {self.height} {self.mode} pixels")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pixels with mode and size, whatever file format they came in."""
        return sha256(f"{self.mode} {self.width} {self.height}\n".encode() + self.pixels).hexdigest()

    def image(self) -> Image:
        """Return a Pillow image of the same mode."""
        from PIL import Image

        return Image.frombytes(self.mode, (self.width, self.height), self.pixels)

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        buffer = io.BytesIO()
        self.image().save(buffer, format="PNG")
        return buffer.getvalue()


def png_pixels(content: bytes) -> int:
    """Return how many pixels a PNG file says it holds, 0 where it is none."""
    if not content.startswith(_PNG_MAGIC) or len(content) < _PNG_SIZE_END:
        return 0
    return int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:_PNG_SIZE_END], "big")


def decode(content: bytes, side: int) -> Picture:
    """Return an image file as RGB on white, squeezed to `side` × `side` pixels (bicubic, antialiased).

    Raises:
        PictureError: the bytes are not an image, or one of more than `MOST_PIXELS` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise PictureError(f"an image of {opened.width} × {opened.height} pixels is more than is read here")
            # JPEG only: lets the decoder leave out detail that the smaller picture cannot hold.
            opened.draft("RGB", (2 * side, 2 * side))
            image = opened.convert("RGBA") if opened.mode in ("RGBA", "LA", "P", "PA") else opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"not an image that can be read: {error}") from None
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return Picture("RGB", side, side, small.tobytes())
