"""Rows of images: read from every kind of source, known by their pixels, kept as bytes, made into pixel values."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from images import SHAPE, SIDE, save_processor
from PIL import Image

from bmm.errors import ArtefactDamagedError, CheckpointError, DataError, UserError
from bmm.evaluation.data import Split, check_disjoint, source_files
from bmm.kinds.image_classification import ImageClassificationKind
from bmm.kinds.images import ImageReader, ImageRow, digest_pixels
from bmm.kinds.settings import ImageClassification, SplitSource

KIND = ImageClassificationKind()
LABELS = ["dark", "light"]


def pixels(seed: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def row_of(image: Image.Image, label: int = 0, form: str = "PNG") -> ImageRow:
    return ImageRow(digest_pixels(image.convert("RGB")), label, encoded(image, form))


def load(folder: Path, **source: Any) -> Split:
    unused = SplitSource(path="json", data_files="unused.jsonl")
    task = ImageClassification(kind="image-classification", calibration=unused, validation=unused, test=unused)
    return KIND.load_split(SplitSource(**source), task, LABELS, folder, "expert pets, test")


def write_rows(folder: Path, count: int = 4) -> list[str]:
    """Write images into one folder a class, and the same rows as JSON lines; return the digests in file order."""
    lines, digests = [], []
    for label, name in enumerate(LABELS):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(count):
            image = pixels(10 * label + index)
            image.save(folder / "data" / name / f"{index}.png")
            lines.append(json.dumps({"image": f"data/{name}/{index}.png", "label": name}) + "\n")
            digests.append(digest_pixels(image))
    (folder / "rows.jsonl").write_text("".join(lines))
    return digests


def test_folders_and_columns_of_paths_give_the_same_rows(tmp_path: Path) -> None:
    digests = write_rows(tmp_path)
    folder = load(tmp_path, path="imagefolder", data_files="data")
    assert [row.pixels for row in folder.rows] == digests
    assert [row.label for row in folder.rows] == [0] * 4 + [1] * 4
    listed = load(tmp_path, path="json", data_files="rows.jsonl")
    assert listed.rows == folder.rows
    one = load(tmp_path, path="imagefolder", data_files="data/light/*")
    assert [row.label for row in one.rows] == [1] * 4


def test_embedded_images_are_read_from_parquet_and_saved_folders(tmp_path: Path) -> None:
    digests = write_rows(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS[::-1])})
    images = [pixels(10 * label + index) for label in (0, 1) for index in range(4)]
    table = datasets.Dataset.from_dict({"image": images, "label": [1] * 4 + [0] * 4}, features=features)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in ({"path": "parquet", "data_files": "rows.parquet"}, {"path": "./saved"}):
        split = load(tmp_path, **source)
        assert [row.pixels for row in split.rows] == digests
        assert [row.label for row in split.rows] == [0] * 4 + [1] * 4
    parquet = SplitSource(path="parquet", data_files="rows.parquet")
    assert source_files(parquet, tmp_path, named="image") == [tmp_path / "rows.parquet"]


def test_the_images_that_rows_name_are_files_behind_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, count=1)
    source = SplitSource(path="json", data_files="rows.jsonl")
    named = [tmp_path / "data" / name / "0.png" for name in LABELS]
    assert source_files(source, tmp_path, named="image") == [tmp_path / "rows.jsonl", *named]
    assert source_files(source, tmp_path) == [tmp_path / "rows.jsonl"]


def test_an_image_outside_of_the_allowed_folders_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    pixels(0).save(tmp_path / "out.png")
    rows = [{"image": {"path": str(tmp_path / "out.png"), "bytes": None}, "label": "dark"}]
    (inside / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "json", "data_files": "rows.jsonl"}
    assert source_files(SplitSource(**source), inside, named="image")[1:] == [tmp_path / "out.png"]
    assert len(load(inside, **source)) == 1
    datasets.Dataset.from_list([{"image": str(tmp_path / "out.png"), "label": "dark"}]).save_to_disk(inside / "saved")
    assert source_files(SplitSource(path="saved"), inside, named="image")[-1] == tmp_path / "out.png"
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(inside))
    for said in (source, {"path": "saved"}):
        with pytest.raises(UserError, match=r"expert pets, test .*: row 1: .*out\.png lies outside"):
            load(inside, **said)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_an_image_is_known_by_its_pixels_in_any_lossless_format(seed: int, side: int) -> None:
    image = pixels(seed, side)
    digests = {digest_pixels(ImageRow("", 0, encoded(image, form)).decoded()) for form in ("PNG", "BMP", "TIFF")}
    assert digests == {digest_pixels(image)}
    other = np.asarray(image).copy()
    other[0, 0, 0] ^= 1
    assert digest_pixels(Image.fromarray(other)) not in digests
    assert digest_pixels(image.transpose(Image.Transpose.ROTATE_90)) != digest_pixels(image) or side == 1


def test_the_same_picture_in_two_splits_is_refused() -> None:
    first = Split("c", (row_of(pixels(0)), row_of(pixels(1))))
    second = Split("t", (row_of(pixels(2)), row_of(pixels(1), label=1, form="BMP")))
    with pytest.raises(DataError, match=r"splits calibration and test share 1 row, the first of them \"image [0-9a-f]"):
        check_disjoint("pets", {"calibration": first, "test": second})


def test_rows_come_back_with_their_bytes_and_each_image_is_kept_once(tmp_path: Path) -> None:
    split = Split("pets", (row_of(pixels(0)), row_of(pixels(1), 1, "BMP"), row_of(pixels(0), 1)))
    KIND.write_split(split, tmp_path, "test")
    back = KIND.read_split(tmp_path, "test")
    assert back.rows == split.rows
    assert back.digest == split.digest
    first = (tmp_path / "test.safetensors").read_bytes()
    assert first.count(split.rows[0].data) == 1
    KIND.write_split(split, tmp_path, "again")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    (tmp_path / "test.safetensors").write_bytes(first[: len(first) // 2])
    with pytest.raises(ArtefactDamagedError, match="the images of test are not whole"):
        KIND.read_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("gone.png", "row 1: the image gone.png cannot be read: No such file"),
        ("rows.jsonl", "row 1 has an image that cannot be decoded: cannot identify image file"),
        ("deep.png", "row 1 has an image that cannot be decoded: it has more than 8 bits a channel"),
        ("", "row 1 has no image in column 'image'"),
        (7, "row 1 has a value of type int in column 'image'"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path: Path, image: object, message: str) -> None:
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": image, "label": 1}) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, path="json", data_files="rows.jsonl")
    assert str(caught.value).startswith("expert pets, test (rows.jsonl)")
    assert "\n" not in str(caught.value)


def test_pixel_values_are_the_image_processors_own(tmp_path: Path) -> None:
    save_processor(tmp_path)
    images = [pixels(seed, 20 + seed) for seed in range(5)]
    config = transformers.ViTConfig(**SHAPE)
    prepared = ImageReader(tmp_path, config, "pets").prepare([row_of(image) for image in images])
    batches = [batch["pixel_values"] for batch in prepared.batches(2)]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for values, image in zip(torch.cat(batches), images, strict=True):
        assert torch.equal(values, processor(images=image, return_tensors="pt")["pixel_values"][0])
    again = [batch["pixel_values"] for batch in prepared.batches(2)]
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    assert list(prepared.order) == list(range(5))


def test_an_image_processor_of_another_size_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        ImageReader(tmp_path, transformers.ViTConfig(**SHAPE), "pets")
    save_processor(tmp_path, 2 * SIDE)
    with pytest.raises(CheckpointError, match=f"makes images of {2 * SIDE} x {2 * SIDE}, but the model takes {SIDE}"):
        ImageReader(tmp_path, transformers.ViTConfig(**SHAPE), "pets").prepare([row_of(pixels(0))])
    prepared = ImageReader(tmp_path, transformers.Dinov2Config(**SHAPE), "pets").prepare([row_of(pixels(0))])
    assert next(prepared.batches(1))["pixel_values"].shape == (1, 3, 2 * SIDE, 2 * SIDE)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the image processor in .* cannot be read"):
        ImageReader(tmp_path, transformers.ViTConfig(**SHAPE), "pets")
