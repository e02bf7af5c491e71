"""Splits: reading them from every kind of source, keeping them, keeping them apart."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import ArtefactDamagedError, DataError
from bmm.evaluation.data import Split, check_disjoint, source_files
from bmm.kinds.settings import SplitSource, TextClassification
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow as Row

KIND = TextClassificationKind()
LABELS = ["bad", "good"]
EXAMPLES = [{"text": f"text number {i}", "label": i % 2} for i in range(10)]

ROWS = st.builds(Row, text=st.text(), text_pair=st.none() | st.text(), label=st.integers(0, 50))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task_of(**columns: str) -> TextClassification:
    source = SplitSource(path="json", data_files="unused.jsonl")
    return TextClassification(calibration=source, validation=source, test=source, **columns)


def load(folder: Path, labels: list[str] = LABELS, *, task: TextClassification | None = None, **source: Any) -> Split:
    return KIND.load_split(SplitSource(**source), task or task_of(), labels, folder, "expert reviews, test")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "reviews.jsonl", EXAMPLES)
    return tmp_path


@settings(deadline=None, max_examples=25)
@given(st.lists(ROWS, max_size=8))
def test_json_lines_round_trip_is_exact(rows: list[Row]) -> None:
    split = Split("any", tuple(rows))
    text = split.to_jsonl()
    assert text.count("\n") == len(rows)
    assert len(text.splitlines()) == len(rows)
    back = Split.from_jsonl("any", text, KIND.row)
    assert back == split
    assert back.digest == split.digest


@pytest.mark.parametrize(
    "odd", ["\u2028\u2029\x85", "\x00\x1f", "👩‍👩‍👧 é e\u0301", '\r\n\t "\\', "\ufeffmark", "\ud800"]
)
def test_json_lines_keep_odd_characters(odd: str) -> None:
    split = Split("any", (Row(odd, odd[::-1], 0), Row("after", None, 1)))
    assert Split.from_jsonl("any", split.to_jsonl(), KIND.row) == split


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a", "label": 1}', ""])
def test_a_damaged_line_is_named(line: str) -> None:
    good = Split("any", (Row("a", None, 0),)).to_jsonl()
    with pytest.raises(ArtefactDamagedError, match="the rows of reviews: line 2"):
        Split.from_jsonl("reviews", good + line + "\n" + good, KIND.row)


def test_digests_know_what_makes_rows_and_splits_the_same() -> None:
    split = Split("a", (Row("one  two\n", None, 0), Row("three", "", 1)))
    same_rows = Split("b", (Row(" one two", None, 1), Row("three", "", 1)))
    other_pair = Split("c", (Row("one two", "", 0), Row("three", None, 1)))
    assert split.row_digests == same_rows.row_digests
    assert split.digest != same_rows.digest
    assert not set(split.row_digests) & set(other_pair.row_digests)
    assert Split("renamed", split.rows).digest == split.digest
    assert Split("turned", split.rows[::-1]).digest != split.digest


def expected(examples: list[dict[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(example["text"], None, example["label"]) for example in examples)


def test_json_is_read_in_file_order(reviews: Path) -> None:
    split = load(reviews, path="json", data_files="reviews.jsonl")
    assert split.rows == expected(EXAMPLES)
    assert split.name == "expert reviews, test"


def test_a_changed_file_is_read_anew(reviews: Path) -> None:
    before = (reviews / "reviews.jsonl").stat()
    load(reviews, path="json", data_files="reviews.jsonl")
    changed = [{**example, "text": example["text"].replace("text", "TEXT")} for example in EXAMPLES]
    write_jsonl(reviews / "reviews.jsonl", changed)
    os.utime(reviews / "reviews.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(reviews, path="json", data_files="reviews.jsonl").rows == expected(changed)


def test_nothing_stays_behind(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, scratch = reviews / "home", reviews / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, home / name)
    assert len(load(reviews, path="json", data_files="reviews.jsonl")) == 10
    assert not home.exists()
    assert list(scratch.iterdir()) == []


def test_bars_and_log_level_are_put_back(reviews: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.enable_progress_bars()
    level = datasets.utils.logging.get_verbosity()
    (reviews / "broken.jsonl").write_text("no json\n")
    with pytest.raises(DataError):
        load(reviews, path="json", data_files="broken.jsonl")
    load(reviews, path="json", data_files="reviews.jsonl")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == level
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["text", "label"])
        writer.writeheader()
        writer.writerows(EXAMPLES)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(EXAMPLES).to_parquet(str(path))


@pytest.mark.parametrize(("builder", "write"), [("csv", write_csv), ("parquet", write_parquet)])
def test_other_builders(tmp_path: Path, builder: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / "rows")
    assert load(tmp_path, path=builder, data_files="rows").rows == expected(EXAMPLES)


def test_csv_words_that_look_missing_are_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nNone,bad\nNA,good\nnull,bad\n")
    assert [row.text for row in load(tmp_path, path="csv", data_files="rows.csv").rows] == [
        "None",
        "NA",
        "null",
    ]


def test_the_text_builder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"there is no column 'label' \(there are: text\); set task.label"):
        load(tmp_path, path="text", data_files="rows.txt")


@pytest.mark.parametrize("folder", ["plain", "odd [1] *?", ".hidden"])
def test_patterns_and_lists_below_any_folder(tmp_path: Path, folder: str) -> None:
    home = tmp_path / folder
    write_jsonl(home / "parts" / "b.jsonl", EXAMPLES[5:])
    write_jsonl(home / "parts" / "a.jsonl", EXAMPLES[:5])
    for named in ("parts/*.jsonl", ["parts/a.jsonl", "parts/b.jsonl"], str(home / "parts" / "a.jsonl")):
        split = load(home, path="json", data_files=named)
        assert split.rows == expected(EXAMPLES[: len(split)])
        source = SplitSource(path="json", data_files=named)
        files = [home / "parts" / "a.jsonl", home / "parts" / "b.jsonl"]
        assert source_files(source, home) == files[: len(split) // 5]


def test_pairs_and_column_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [{"premise": "a", "hypothesis": "b", "gold": "good"}])
    task = task_of(text="premise", text_pair="hypothesis", label="gold")
    assert load(tmp_path, task=task, path="json", data_files="pairs.jsonl").rows == (Row("a", "b", 1),)
    write_jsonl(tmp_path / "half.jsonl", [{"premise": "a", "hypothesis": None, "gold": "good"}])
    with pytest.raises(DataError, match="row 1 has no text in column 'hypothesis'"):
        load(tmp_path, task=task, path="json", data_files="half.jsonl")


def test_samples_are_seeded_without_replacement_in_file_order(reviews: Path) -> None:
    samples = [load(reviews, path="json", data_files="reviews.jsonl", rows=6, seed=seed) for seed in (0, 0, 1)]
    places = [[EXAMPLES.index({"text": row.text, "label": row.label}) for row in sample.rows] for sample in samples]
    assert places[0] == places[1] != places[2]
    assert all(len(set(place)) == 6 and place == sorted(place) for place in places)
    assert load(reviews, path="json", data_files="reviews.jsonl", rows=10, seed=3).rows == expected(EXAMPLES)


def test_parts_of_one_order_share_no_row_and_together_are_all(reviews: Path) -> None:
    parts = [(0, 3), (3, 4), (7, None)]
    taken = [
        load(reviews, path="json", data_files="reviews.jsonl", seed=5, skip=skip, rows=rows).rows
        for skip, rows in parts
    ]
    assert [len(rows) for rows in taken] == [3, 4, 3]
    assert sorted(row.text for rows in taken for row in rows) == sorted(example["text"] for example in EXAMPLES)
    with pytest.raises(DataError, match=r"4 rows after 7 skipped rows are asked for, but there are 10; lower"):
        load(reviews, path="json", data_files="reviews.jsonl", skip=7, rows=4)


def test_slices_of_a_split(reviews: Path) -> None:
    assert load(reviews, path="json", data_files="reviews.jsonl", split="train[2:4]").rows == expected(EXAMPLES[2:4])


def test_saved_datasets_with_class_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    table = datasets.Dataset.from_list(EXAMPLES, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "many"))
    turned = tuple(Row(row.text, None, 1 - row.label) for row in expected(EXAMPLES))
    assert load(tmp_path, path="./one").rows == turned
    assert load(tmp_path, path="many", split="test").rows == turned
    assert {path.name for path in source_files(SplitSource(path="one"), tmp_path)} >= {
        "dataset_info.json",
        "state.json",
    }
    with pytest.raises(DataError, match=r"there is no split 'train' \(there are: test\)"):
        load(tmp_path, path="many")


def test_hub_ids_go_to_the_hub_and_have_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fake(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        return datasets.Dataset.from_list(EXAMPLES)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = {"path": "owner/reviews", "name": "en", "revision": "abc", "split": "test"}
    assert load(tmp_path, **source).rows == expected(EXAMPLES)
    assert {key: asked[key] for key in source} == source
    assert "trust_remote_code" not in asked
    assert not Path(asked["cache_dir"]).exists()
    assert source_files(SplitSource(**source), tmp_path) == []


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(path: str, **options: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(DataError, match=r"test \(owner/reviews\): the data set cannot be loaded: no route"):
        load(tmp_path, path="owner/reviews")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "json"}, "the json builder needs files; name them in `data_files`"),
        (
            {"path": "json", "data_files": "gone.jsonl"},
            r"test \(gone.jsonl\): there is no file .*gone.jsonl; correct",
        ),
        ({"path": "json", "data_files": "gone/*.jsonl"}, r"there is no file .*gone/\*.jsonl; correct"),
        ({"path": "json", "data_files": "."}, "is a folder; name the files in it"),
        ({"path": "json", "data_files": "s3://bucket/x.jsonl"}, "s3://bucket/x.jsonl is not a local file"),
        ({"path": "json", "data_files": "empty.jsonl"}, "the file is empty; name one that has rows"),
        ({"path": "json", "data_files": "blank.jsonl"}, "rows; name "),
        ({"path": "csv", "data_files": "header.csv"}, "the file has no rows; name one that has some"),
        (
            {"path": "json", "data_files": "broken.jsonl"},
            r"broken.jsonl cannot be read as json: .*; correct the file",
        ),
        (
            {"path": "json", "data_files": ["reviews.jsonl", "broken.jsonl"]},
            r"\): \S*broken.jsonl cannot be read as json",
        ),
        ({"path": "parquet", "data_files": "reviews.jsonl"}, r"reviews.jsonl cannot be read as parquet"),
        ({"path": "json", "data_files": "reviews.jsonl", "split": "test"}, 'Unknown split "test"'),
        (
            {"path": "json", "data_files": "reviews.jsonl", "rows": 11},
            "11 rows are asked for, but there are 10; lower",
        ),
        (
            {"path": "json", "data_files": "nolabel.jsonl"},
            r"no column 'label' \(there are: text, mark\); set task.label",
        ),
        (
            {"path": "json", "data_files": "notext.jsonl"},
            "row 2 has no text in column 'text'; remove the row",
        ),
        ({"path": "json", "data_files": "white.jsonl"}, "row 1 has no text in column 'text'"),
        ({"path": "json", "data_files": "numbers.jsonl"}, "row 1 has a value of type int in column 'text'"),
        (
            {"path": "json", "data_files": "class.jsonl"},
            "row 2 has the label 'ugly', which is none of the expert's classes",
        ),
        ({"path": "json", "data_files": "mixed.jsonl"}, "row 2 has the label 'ugly'"),
        (
            {"path": "here"},
            "is not a data set written by save_to_disk; set `path` to one of json, csv, parquet, text, imagefolder, "
            "audiofolder",
        ),
        ({"path": "pandas", "data_files": "reviews.jsonl"}, "`path` is 'pandas', which is neither one of"),
        ({"path": "./not/there"}, "`path` is './not/there', which is neither one of"),
    ],
)
def test_mistakes_are_one_sentence(reviews: Path, source: dict[str, Any], message: str) -> None:
    (reviews / "here").mkdir()
    (reviews / "empty.jsonl").touch()
    (reviews / "blank.jsonl").write_text("\n\n")
    (reviews / "header.csv").write_text("text,label\n")
    (reviews / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text":\n')
    write_jsonl(reviews / "nolabel.jsonl", [{"text": "a", "mark": 1}])
    write_jsonl(reviews / "notext.jsonl", [{"text": "a", "label": 1}, {"text": None, "label": 1}])
    write_jsonl(reviews / "white.jsonl", [{"text": " \n", "label": 1}])
    write_jsonl(reviews / "numbers.jsonl", [{"text": 4, "label": 1}])
    write_jsonl(reviews / "class.jsonl", [{"text": "a", "label": "Good"}, {"text": "b", "label": "ugly"}])
    write_jsonl(reviews / "mixed.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "ugly"}])
    with pytest.raises(DataError, match=message) as caught:
        load(reviews, **source)
    assert str(caught.value).startswith("expert reviews, test (")
    assert "\n" not in str(caught.value)


def test_source_files_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^expert a \(gone.csv\): there is no file"):
        source_files(SplitSource(path="csv", data_files="gone.csv"), tmp_path, "expert a")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=3, max_size=3))
def test_splits_are_disjoint_or_refused(numbers: list[list[int]]) -> None:
    names = ("calibration", "validation", "test")
    splits = {
        name: Split(name, tuple(Row(f"row {n}", None, n % 2) for n in some))
        for name, some in zip(names, numbers, strict=True)
    }
    sets = [set(some) for some in numbers]
    if sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2]:
        with pytest.raises(DataError):
            check_disjoint("reviews", splits)
    else:
        check_disjoint("reviews", splits)


def test_an_overlap_is_described() -> None:
    long = "word " * 40
    splits = {
        "calibration": Split("c", (Row("own", None, 0),)),
        "validation": Split("v", (Row("x", None, 0), Row(long, None, 0), Row("same", None, 0), Row("same", None, 1))),
        "test": Split("t", (Row("same ", None, 1), Row("\t" + long, None, 1))),
    }
    with pytest.raises(DataError) as caught:
        check_disjoint("reviews", splits)
    start = " ".join(long.split())[:60]
    assert str(caught.value) == (
        f'reviews: the splits validation and test share 2 rows, the first of them "{start}…"; '
        "remove them from one of the two"
    )
