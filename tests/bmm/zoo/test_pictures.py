"""Pictures keep their pixels; files of other sizes and with transparency become RGB on white."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bmm.zoo import pictures
from bmm.zoo.pictures import Picture, PictureError, decode, png_pixels


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


@given(st.sampled_from(["L", "RGB"]), st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=25, deadline=None)
def test_a_png_holds_the_same_pixels(mode: str, width: int, height: int, data: st.DataObject) -> None:
    size = width * height * (3 if mode == "RGB" else 1)
    picture = Picture(mode, width, height, data.draw(st.binary(min_size=size, max_size=size)))  # type: ignore[arg-type]
    with Image.open(io.BytesIO(picture.png())) as image:
        assert (image.mode, image.size, image.tobytes()) == (mode, (width, height), picture.pixels)
    assert png_pixels(picture.png()) == width * height


def test_the_digest_is_of_pixels_and_shape() -> None:
    one = Picture("L", 3, 2, bytes(range(6)))
    others = [Picture("L", 2, 3, bytes(range(6))), Picture("RGB", 2, 1, bytes(range(6))), Picture("L", 3, 2, bytes(6))]
    assert one.digest == Picture("L", 3, 2, bytes(range(6))).digest
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_pixels_must_fill_the_picture() -> None:
    with pytest.raises(PictureError, match="5 bytes do not fill 3 × 2"):
        Picture("L", 3, 2, bytes(5))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_is_squeezed_to_the_side(kind: str) -> None:
    picture = decode(encoded(Image.new("RGB", (40, 20), (200, 100, 50)), kind), 8)
    assert (picture.mode, picture.width, picture.height) == ("RGB", 8, 8)
    assert all(abs(value - (200, 100, 50)[index % 3]) <= 2 for index, value in enumerate(picture.pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = image.quantize() if mode == "P" else image.convert(mode)
    assert decode(encoded(image), 2).pixels == b"\xff" * 12


def test_what_is_no_image_or_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(Image.effect_noise((64, 64), 50))
    for content in (b"", b"text", whole[:100], encoded(Image.new("L", (4, 4)), "GIF")):
        with pytest.raises(PictureError, match="not an image"):
            decode(content, 8)
    assert png_pixels(b"text") == png_pixels(whole[:20]) == 0
    monkeypatch.setattr(pictures, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(PictureError, match="64 × 64 pixels is more"):
        decode(whole, 8)
