"""Six labelled image sets, read from the archives that `bmm.zoo.fetching` brings.

Cleaning a set is the work of `bmm.zoo.sets`, cutting it into training, calibration, validation and test rows that
of `bmm.zoo.splits`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickletools
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bmm.zoo.archives import read_debian, read_folder, read_members
from bmm.zoo.packages import ANIMALS, DIGITS, FASHION_MNIST, MNIST, OPENCLIPART, TEXTILE, PackageError
from bmm.zoo.pictures import Picture, PictureError, decode, png_pixels
from bmm.zoo.sets import Row, Source

# Photographs and clip art are kept at the side that the experts see.
SIDE = 56
CLIPART_FEWEST = 100
CLIPART_MOST = 500
CLIPART_PIXELS = 2_000_000
CLIPART_SEED = 0

_ANIMALS = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
_ANIMAL_NAMES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_TEXTILE = "conformal_clip_data/data/textile_images/simulated/"
_FASHION = "usr/share/datasets/fashion-mnist/"
_FASHION_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_MNIST = "package/src/digits/{}.json"
_CLIPART = "usr/share/openclipart/png/"
_CLIPART_UNSORTED = "unsorted"
_SIDE_28 = 28
_SIDE_8 = 8
_DIGITS_BRIGHTEST = 16


@contextmanager
def _sound(archive: Path) -> Iterator[None]:
    """Turn content that is not what the set's file holds into the sentence for a damaged package."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, EOFError, OSError, zlib.error, PictureError) as error:
        raise PackageError(
            f"{archive} does not hold what its set needs: {error}; delete the file and run again"
        ) from error


def _grey(pixels: bytes, labels: Sequence[str], side: int) -> list[Row]:
    """Cut `pixels`, one byte each, into one picture of `side` × `side` for each label."""
    area = side * side
    if len(pixels) != area * len(labels):
        raise ValueError(f"{len(pixels)} bytes for {len(labels)} pictures of {area}")
    return [
        (Picture("L", side, side, pixels[index * area : (index + 1) * area]), label)
        for index, label in enumerate(labels)
    ]


def idx_data(content: bytes) -> tuple[tuple[int, ...], bytes]:
    """Return shape and bytes of a gzipped IDX file of unsigned bytes (the MNIST format).

    Raises:
        ValueError: it is another kind of file, or not as long as its shape.
    """
    plain = gzip.decompress(content)
    if plain[:3] != b"\x00\x00\x08" or len(plain) < 4 + 4 * plain[3]:
        raise ValueError("not an IDX file of bytes")
    rank = plain[3]
    shape = tuple(int.from_bytes(plain[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank))
    data = plain[4 + 4 * rank :]
    count = 1
    for length in shape:
        count *= length
    if len(data) != count:
        raise ValueError(f"{len(data)} bytes for the shape {shape}")
    return shape, data


def largest_bytes(pickle: bytes) -> bytes:
    """Return the longest byte string that a pickle names, found by its opcodes; the pickle is not loaded.

    Raises:
        ValueError: it is not a pickle, or names no byte string.
    """
    strings = [argument for _, argument, _ in pickletools.genops(pickle) if isinstance(argument, bytes)]
    if not strings:
        raise ValueError("no array in it")
    return max(strings, key=len)


def _read_fashion(archive: Path) -> tuple[list[Row], list[Row] | None]:
    members = read_debian(archive, lambda name: name.startswith(_FASHION))

    def part(stem: str) -> list[Row]:
        _, ids = idx_data(members[f"{_FASHION}{stem}-labels-idx1-ubyte.gz"])
        _, pixels = idx_data(members[f"{_FASHION}{stem}-images-idx3-ubyte.gz"])
        return _grey(pixels, [_FASHION_NAMES[index] for index in ids], _SIDE_28)

    with _sound(archive):
        return part("train"), part("t10k")


def _read_mnist(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read one file a digit: all its pictures in one list of brightnesses from 0 to 1."""
    members = read_members(archive, [_MNIST.format(digit) for digit in range(10)])
    rows: list[Row] = []
    with _sound(archive):
        for digit in range(10):
            values = json.loads(members[_MNIST.format(digit)])["data"]
            pixels = bytes(round(value * 255) for value in values)
            rows += _grey(pixels, [str(digit)] * (len(pixels) // _SIDE_28**2), _SIDE_28)
    return rows, None


def _read_digits(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read 64 brightnesses from 0 to 16 and the digit, a line."""
    rows: list[Row] = []
    with _sound(archive):
        text = gzip.decompress(archive.read_bytes()).decode("ascii")
        for line in csv.reader(io.StringIO(text)):
            *values, digit = (int(float(value)) for value in line)
            pixels = bytes(value * 255 // _DIGITS_BRIGHTEST for value in values)
            rows += _grey(pixels, [str(digit)], _SIDE_8)
    return rows, None


def _read_animals(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read two pickled arrays, (rows, 28, 28) of bytes and (rows,) of 64-bit integers, without unpickling them."""
    names = [_ANIMALS.format(part) for part in ("data", "label")]
    members = read_members(archive, names)
    with _sound(archive):
        pixels, ids = (largest_bytes(gzip.decompress(members[name])) for name in names)
        labels = [_ANIMAL_NAMES[int.from_bytes(ids[start : start + 8], "little")] for start in range(0, len(ids), 8)]
        return _grey(pixels, labels, _SIDE_28), None


def _read_textile(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read one photograph a file, its folder being its class."""
    rows: list[Row] = []
    with _sound(archive):
        for name, content in read_folder(archive, _TEXTILE).items():
            label, _, filename = name.removeprefix(_TEXTILE).partition("/")
            if filename.endswith(".jpg"):
                rows.append((decode(content, SIDE), label))
    return rows, None


def clipart_folder(name: str) -> str | None:
    """Return the topmost folder that sorts a file of the clip art, None where it has none."""
    folder, _, rest = name.removeprefix(_CLIPART).partition("/")
    wanted = name.startswith(_CLIPART) and name.endswith(".png") and rest and folder != _CLIPART_UNSORTED
    return folder if wanted else None


def _read_clipart(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read the folders that hold enough drawings, of each a seeded draw of at most `CLIPART_MOST`."""
    members = read_debian(archive, lambda name: clipart_folder(name) is not None)
    by_folder: dict[str, list[str]] = {}
    for name in sorted(members):
        # Posters of a hundred million pixels take longer than all others together.
        if png_pixels(members[name]) > CLIPART_PIXELS:
            continue
        by_folder.setdefault(str(clipart_folder(name)), []).append(name)
    rows: list[Row] = []
    with _sound(archive):
        for folder, names in sorted(by_folder.items()):
            if len(names) < CLIPART_FEWEST:
                continue
            draw = random.Random(f"{folder}/{CLIPART_SEED}")  # noqa: S311 - a draw of rows, not a secret
            chosen = names if len(names) <= CLIPART_MOST else sorted(draw.sample(names, CLIPART_MOST))
            label = folder.replace("_", " ")
            rows += [(decode(members[name], SIDE), label) for name in chosen]
    return rows, None


SOURCES: Mapping[str, Source] = {
    "fashion": Source(FASHION_MNIST, "which of 10 kinds of clothing a small grey photograph shows", _read_fashion),
    "mnist": Source(MNIST, "a handwritten digit", _read_mnist),
    "animals": Source(ANIMALS, "which of 10 animals has this silhouette", _read_animals),
    "clipart": Source(OPENCLIPART, "which of 12 folders a drawing was filed in", _read_clipart),
    "textile": Source(TEXTILE, "whether a fabric is sound or has a local or a global defect", _read_textile),
    "digits": Source(DIGITS, "a handwritten digit, 8 × 8 pixels", _read_digits),
}
