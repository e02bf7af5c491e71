"""What the splits of a task promise: disjoint, seeded, of the size asked for, independent of file order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import DataError
from bmm.evaluation.tables import opened
from bmm.kinds.settings import SplitSource
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import LabelledSet, Row, content_digest
from bmm.zoo.splits import SPLITS, SplitSizes, TaskRows, parquet, split, write_if_changed, write_splits

SIZES = SplitSizes(calibration=7, validation=5, test=9)


def make_set(train: int = 40, held_out: int = 30) -> LabelledSet:
    rows: list[Row] = [(f"text {index}", "ab"[index % 2]) for index in range(train + held_out)]
    return LabelledSet("any", ("a", "b"), rows[:train], rows[train:])


def digests(rows: list[Row]) -> set[str]:
    return {content_digest(content) for content, _ in rows}


@given(st.integers(0, 5), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_disjoint_sized_and_independent_of_order(seed: int, shared: int) -> None:
    plain = make_set()
    # Rows of the held-out part that also turn up, differently spaced, in the training part.
    leaked: list[Row] = [(str(text).replace(" ", "  "), label) for text, label in plain.held_out[:shared]]
    text_set = LabelledSet("any", plain.labels, plain.train + leaked, plain.held_out)
    rows = split(text_set, SIZES, seed)
    parts = [rows.training, rows.calibration, rows.validation, rows.test]
    assert [len(part) for part in parts] == [33, 7, 5, 9]
    assert len(set.union(*(digests(part) for part in parts))) == sum(len(part) for part in parts)
    assert digests(rows.validation + rows.test) <= digests(plain.held_out)
    shuffled = LabelledSet("any", plain.labels, text_set.train[::-1], text_set.held_out[::-1])
    assert digests(split(shuffled, SIZES, seed).test) == digests(rows.test)
    assert split(text_set, SIZES, seed).digest() == rows.digest()


def test_another_seed_draws_other_rows() -> None:
    assert split(make_set(), SIZES, 0).test != split(make_set(), SIZES, 1).test


def test_the_test_split_takes_what_there_is() -> None:
    assert len(split(make_set(held_out=8), SIZES).test) == 3


def test_calibration_leaves_half_of_the_rows_to_train() -> None:
    rows = split(make_set(train=11), SIZES)
    assert (len(rows.training), len(rows.calibration)) == (6, 5)


@pytest.mark.parametrize("counts", [(1, 30), (40, 5)])
def test_too_few_rows_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="too few"):
        split(make_set(*counts), SIZES)


def test_json_lines_read_back_and_are_written_once(tmp_path: Path) -> None:
    rows = TaskRows(("a",), [], [("naïve “quote”", "a")], [("b\u2028c", "a")], [("d", "a")])
    paths = write_splits(rows, tmp_path / "data")
    for name in SPLITS:
        lines = paths[name].read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        assert [(row["text"], row["label"]) for row in map(json.loads, lines)] == getattr(rows, name)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    write_splits(rows, tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == before
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(f"{n}.jsonl" for n in SPLITS)


def picture(value: int) -> Picture:
    return Picture("L", 2, 3, bytes([value, 0, 255, 7, 8, 9]))


def test_pictures_read_back_as_images_from_parquet(tmp_path: Path) -> None:
    rows: list[Row] = [(picture(index), "ab"[index % 2]) for index in range(5)]
    paths = write_splits(TaskRows(("a", "b"), [], rows[:2], rows[2:3], rows[3:]), tmp_path / "data")
    assert {path.name for path in paths.values()} == {f"{name}.parquet" for name in SPLITS}
    with opened(SplitSource(path="parquet", data_files=str(paths["calibration"])), tmp_path, "here") as table:
        assert table.column_names == ["image", "label"]
        assert list(table["label"]) == ["a", "b"]
    read = load_dataset("parquet", data_files=str(paths["test"]), split="train", cache_dir=str(tmp_path / "cache"))
    assert [image.tobytes() for image in read["image"]] == [picture(3).pixels, picture(4).pixels]
    assert paths["test"].read_bytes() == parquet(rows[3:])


def test_the_digest_of_a_task_is_that_of_its_pixels() -> None:
    rows: list[Row] = [(picture(index), "a") for index in range(2)]
    task = TaskRows(("a",), rows[:1], rows[1:], [], [])
    assert task.digest() == TaskRows(("a",), [(picture(0), "a")], [(picture(1), "a")], [], []).digest()
    assert task.digest() != TaskRows(("a",), rows[1:], rows[:1], [], []).digest()


def test_a_changed_text_replaces_the_file(tmp_path: Path) -> None:
    write_if_changed(tmp_path / "f", b"old")
    write_if_changed(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_text() == "new"
