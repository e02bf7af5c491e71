"""Taking times and memory by turns, and keeping a benchmark's parts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import scale
from benchmarks.measuring import by_turns, ratio, run
from rich.console import Console


def test_functions_are_called_by_turns_and_each_turn_begins_at_the_other_end() -> None:
    calls: list[str] = []

    def one(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = by_turns({"a": lambda: one("a"), "b": lambda: one("b")}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_a_ratio_is_of_neighbours() -> None:
    assert ratio([1.0, 4.0, 3.0], [2.0, 2.0, 2.0]) == {"median": 1.5, "low": 0.5, "high": 2.0}


def test_a_process_is_measured_by_itself_and_its_failure_is_told() -> None:
    code = "import json, os; held = bytearray(200 * 2**20); print('noise'); print(json.dumps({'n': os.environ['X']}))"
    found = run(["-c", code], environment={"X": "5"})
    assert found.said == {"n": "5"}
    assert found.peak_rss_bytes > 200 * 2**20
    assert run(["-c", "pass"]).said == {}
    with pytest.raises(RuntimeError, match="wrong"):
        run(["-c", "raise SystemExit('wrong')"])


def test_parts_are_kept_and_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def load(name: str) -> Any:
        def measure(*_: Any, quick: bool) -> dict[str, Any]:
            measured.append(name)
            if name.endswith("gram_peer"):
                raise RuntimeError("no room")
            found = {"gram_seconds_vs_floor": 1.1, "spread": {"low": 1.0, "high": 1.3}, "quick": quick}
            few = {"median": 0.7, "low": 0.6, "high": 0.8}
            widths = {"gram_seconds_16_tokens_vs_all": {"384 wide": 0.7}, "methods": {"384 wide": {"seconds": few}}}
            return {**found, **widths}

        return SimpleNamespace(measure=measure)

    monkeypatch.setattr(scale.importlib, "import_module", load)
    arguments = ["--part", "floor", "--part", "peer", "--output", str(tmp_path)]
    assert scale.main(arguments) == 1
    assert scale.main(["--part", "floor", "--output", str(tmp_path)]) == 0
    assert measured == ["benchmarks.scaling.gram_floor", "benchmarks.scaling.gram_peer"]
    results = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert results["gram_seconds_vs_floor"] == 1.1
    assert results["details"]["floor"]["spread"]["high"] == 1.3
    console = Console(width=120, record=True)
    console.print(scale._table({**results, "merge_seconds_vs_mergekit": {"ta": 1.4}}))
    text = console.export_text()
    assert "1.100" in text
    sampled = next(line for line in text.splitlines() if "gram_seconds_16_tokens_vs_all 384 wide" in line)
    assert [word for word in sampled.split() if word.startswith("0.")] == ["0.700", "0.600", "0.800"]
    assert "merge_seconds_vs_mergekit ta" in text
