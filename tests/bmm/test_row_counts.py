from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bmm.recipe import Recipe
from bmm.row_counts import UNKNOWN, calibration_rows


def rows_of(folder: Path, calibration: dict[str, object]) -> int:
    task = {"kind": "text-classification", "calibration": calibration}
    experts = [{"name": "one", "model": "one", "task": task}, {"name": "two", "model": "two"}]
    said = {"base_model": "b", "experts": experts, "output": "o", "grams": {"source": "task-vectors"}}
    recipe = Recipe.from_mapping(said, folder=folder)
    found, none = calibration_rows(recipe)
    assert none == 0
    return found


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 40), last=st.booleans())
def test_lines_are_counted(tmp_path_factory: pytest.TempPathFactory, count: int, last: bool) -> None:
    folder = tmp_path_factory.mktemp("lines")
    lines = [json.dumps({"text": "word " * index, "label": 0}) for index in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n" * last)
    (folder / "rows.csv").write_text("\n".join(["text,label", *(f"{index},0" for index in range(count))]) + "\n" * last)
    parquet.write_table(pa.table({"text": ["a"] * count}), folder / "rows.parquet")
    for builder, name in (("json", "rows.jsonl"), ("csv", "rows.csv"), ("parquet", "rows.parquet")):
        assert rows_of(folder, {"path": builder, "data_files": name}) == count
    both = {"path": "json", "data_files": ["rows.jsonl", "rows.jsonl"]}
    assert rows_of(folder, both) in (count, 2 * count)
    assert rows_of(folder, {"path": "json", "data_files": "rows.jsonl", "rows": 7}) == 7
    if count > 1:
        assert rows_of(folder, {"path": "json", "data_files": "rows.jsonl", "skip": 1}) == count - 1


def test_what_nobody_can_tell_yet_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a"},\n{"text": "b"}]')
    assert rows_of(tmp_path, {"path": "json", "data_files": "rows.json"}) == UNKNOWN
    assert rows_of(tmp_path, {"path": "owner/set", "revision": 40 * "a"}) == UNKNOWN
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert rows_of(tmp_path, {"path": "parquet", "data_files": "broken.parquet"}) == UNKNOWN
