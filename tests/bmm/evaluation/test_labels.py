"""Labels of every kind that a column may hold, matched to an expert's classes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import DataError
from bmm.evaluation.labels import label_ids

NEWS = ["World", "Sports", "Business"]


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([2, 0, 1], NEWS, [2, 0, 1]),
        ([True, False], ["bad", "good"], [1, 0]),
        ([True, False], ["True", "False"], [0, 1]),
        (["Sports", "world", " BUSINESS "], NEWS, [1, 0, 2]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["0", "2", "LABEL_1", "label_2"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 2, 1, 2]),
        (["1", "5"], ["1", "2", "3", "4", "5"], [0, 4]),
        ([0, 1], ["0", "1"], [0, 1]),
        (["01"], ["0", "1"], [1]),
    ],
)
def test_kinds_of_labels(values: list[object], labels: list[str], expected: list[int]) -> None:
    assert label_ids(values, labels, "news") == expected


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (
            ["Sports", "Weather"],
            NEWS,
            r"^news: row 2 has the label 'Weather', .*World, Sports, Business.*correct",
        ),
        (["1"], NEWS, r"row 1 has the label '1'"),
        (["sPORTS"], ["Sports", "SPORTS"], r"row 1 has the label 'sPORTS'"),
        ([0, 3], NEWS, r"row 2 has the class id 3, but the expert has 3 classes \(0 to 2\)"),
        ([-1], NEWS, r"row 1 has the class id -1"),
        ([True], ["only"], r"row 1 has the class id 1, but the expert has 1 classes"),
        ([0, None], NEWS, r"row 2 has no label; remove"),
        ([1.0], NEWS, r"row 1 has the label 1.0 of type float; use class ids or class names"),
        ([1], ["1", "2"], r"could be a class id or a class name.*write the class names as strings"),
        (["x"], [str(i) for i in range(12)], r"0, 1, 2, 3, 4, 5, 6, 7, … 12 in all"),
    ],
)
def test_labels_that_the_expert_lacks(values: list[object], labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_ids(values, labels, "news")


def test_messages_use_the_given_row_numbers() -> None:
    with pytest.raises(DataError, match="row 41 has the label 'x'"):
        label_ids(["World", "x"], NEWS, "news", numbers=[7, 41])


@settings(deadline=None, max_examples=25)
@given(st.permutations(NEWS), st.lists(st.integers(0, 2), max_size=10))
def test_class_features_are_matched_by_name_not_by_id(feature: list[str], ids: list[int]) -> None:
    assert label_ids(ids, NEWS, "news", feature=feature) == [NEWS.index(feature[i]) for i in ids]


@pytest.mark.parametrize(
    ("feature", "labels"), [(["neg", "pos"], ["LABEL_0", "LABEL_1"]), (["0", "1"], ["negative", "positive"])]
)
def test_class_features_count_by_id_where_one_side_is_only_numbered(feature: list[str], labels: list[str]) -> None:
    assert label_ids([1, 0], labels, "reviews", feature=feature) == [1, 0]


def test_class_features_of_other_names_are_refused() -> None:
    with pytest.raises(DataError, match="row 2 has the label 'cat', which is none of the expert's classes"):
        label_ids([1, 0], NEWS, "news", feature=["cat", "Sports"])


def test_unlabelled_rows_of_a_class_feature_are_refused() -> None:
    with pytest.raises(DataError, match="row 1 has no label"):
        label_ids([-1], NEWS, "news", feature=NEWS)


def test_other_words_for_the_same_classes_go_by_their_order() -> None:
    names = ["polka_dotted", "blotchy_texture"]
    sentences = ["polka-dotted", "blotchy"]
    assert label_ids([1, 0], sentences, "here", feature=names, in_order=True) == [1, 0]
    assert label_ids([1, 0], sentences, "here", feature=["blotchy", "polka-dotted"], in_order=True) == [0, 1]
    # That the only class that occurs is called by the other's word says nothing.
    assert label_ids([0], ["a", "b"], "here", feature=["b", "c"], in_order=True) == [0]
    with pytest.raises(DataError, match="which is none of the expert's classes"):
        label_ids([1, 0], sentences, "here", feature=[*names, "banded"], in_order=True)
    with pytest.raises(DataError, match="which is none of the expert's classes"):
        label_ids([1, 0], sentences, "here", feature=names)
