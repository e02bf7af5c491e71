"""The benchmark of searchers, whole, on pico experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import searchers


def test_runs_that_never_get_there_count_as_the_longest() -> None:
    assert searchers.median_reached([4, None, 10]) == 10
    assert searchers.median_reached([4, None, None]) is None
    assert searchers.median_reached([1, 2]) == 1.5


@pytest.mark.slow
def test_one_command_sets_searchers_beside_each_other(
    pico: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["--zoo", f"pico={pico / 'recipe.yaml'}", "--folder", str(pico / "bench"), "--output", str(pico / "results")]
    said += ["--seeds=2", "--trials=5", "--per=model", "--rows=16", "--only=bayesian", "--only=random"]
    assert searchers.main(said) == 0
    document = json.loads((pico / "results" / "search.json").read_text(encoding="utf-8"))
    costs = document["zoos"]["pico"]["costs"]
    assert 0 < costs["assembly_vs_evaluation"]["median"] < 1
    assert costs["proposal_96_dimensions_vs_evaluation"]["median"] > 0
    rows = {row["searcher"]: row for row in document["zoos"]["pico"]["rows"]}
    assert set(rows) == {"bayesian", "random", "best global λ", "anchor"}
    for row in rows.values():
        share = row["share_of_experts"]
        assert share["low"] <= share["mean"] <= share["high"]
    assert rows["bayesian"]["bayesian_minus_this"] is None
    assert rows["bayesian"]["below_anchor_on_validation"] == 0
    # With as many evaluations as it has, random search reaches its own median in at least one of its runs.
    assert rows["random"]["by_seed"] is not None
    assert len(rows["random"]["by_seed"]) == 2
    difference = rows["anchor"]["bayesian_minus_this"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    printed = capsys.readouterr().out
    assert "best global λ" in printed
