"""Compressed files and tables that outlive neither their block nor their cache."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bmm.errors import DataError
from bmm.evaluation.tables import data_files, opened, saved_folder, shown
from bmm.kinds.settings import SplitSource


def test_compressed_files_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as handle:
        handle.write('{"text": "a"}\n{"text": "b"}\n')
    with opened(SplitSource(path="json", data_files="rows.jsonl.gz"), tmp_path, "here") as table:
        assert list(table["text"]) == ["a", "b"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    source = SplitSource(path="csv", data_files=["rows.csv", "*.csv", "./rows.csv"])
    assert data_files(source, tmp_path, "here") == [tmp_path / "rows.csv"]


def test_a_file_of_that_very_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].csv").write_text("text\na\n")
    (tmp_path / "a1.csv").write_text("text\nb\n")
    source = SplitSource(path="csv", data_files="a[1].csv")
    with opened(source, tmp_path, "here") as table:
        assert list(table["text"]) == ["a"]


def test_hub_ids_are_no_folders(tmp_path: Path) -> None:
    assert saved_folder(SplitSource(path="owner/name"), tmp_path, "here") is None
    with pytest.raises(DataError, match="nor a hub id"):
        saved_folder(SplitSource(path="../name"), tmp_path, "here")


def test_long_lists_are_shown_short() -> None:
    assert shown(SplitSource(path="json", data_files=["a", "b", "c", "d"])) == "a, b, c"
    assert shown(SplitSource(path="owner/name")) == "owner/name"
