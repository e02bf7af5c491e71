from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm.digest import canonical_json, digest_each, digest_file, digest_files, digest_json, digest_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_canonical_json_means_the_same_and_is_stable(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2, max_size=5))
def test_the_order_of_keys_does_not_count(value: dict[str, int]) -> None:
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


def test_digests_are_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest() == digest_text("abc")
    assert digest_json("é") == hashlib.sha256('"é"'.encode()).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_json_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_json(value)


def test_a_text_that_is_no_unicode_still_has_a_digest_of_its_own() -> None:
    assert digest_text("\ud800") != digest_text("\ud801")


def test_files_are_known_by_name_and_bytes_and_not_by_order_or_place(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert (
        digest_files([("x", a), ("y", b)]) == digest_files([("y", b), ("x", a)]) == digest_files([("x", c), ("y", b)])
    )
    assert digest_files([("x", a), ("y", b)]) != digest_files([("x", b), ("y", a)])
    assert digest_files([("x", a)]) != digest_files([("z", a)])


def test_several_large_files_have_the_digests_that_each_has_alone(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (5 << 20))
    alone = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert digest_each(paths) == alone
    assert digest_files((path.name, path) for path in paths) == digest_json(
        {path.name: digest for path, digest in zip(paths, alone, strict=True)}
    )
