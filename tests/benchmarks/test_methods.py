"""The benchmark of all methods, whole, on pico experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import methods, rows, summary
from benchmarks.leads import Lead
from benchmarks.peers import Peer
from benchmarks.runs import Bench, Zoo

from bmm.store import Store


def benchmark(pico: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the quick benchmark on pico experts in this process; return the exit code and what it wrote."""
    said = ["--zoo", f"pico={pico / 'recipe.yaml'}", "--folder", str(pico / "bench"), "--output", str(pico / "results")]
    code = methods.main([*said, "--quick", "--processes", "1", *arguments])
    found: dict[str, Any] = json.loads((pico / "results" / "methods.json").read_text(encoding="utf-8"))
    return code, found


def shown(text: str, method: str) -> str:
    """Return the line of the printed table that is a method's."""
    return next(line for line in text.splitlines() if re.match(re.escape(method) + r"\s+\d", line))


# Of each way to make a row, one.
KINDS = (
    "average",
    "RegMean",
    "mergekit: TIES",
    "fusion-bench: RegMean++",
    "data-free on TSV-M, λ = 0.1",
    "data-free on TSV-M, λ by evidence",
    "propagated",
    "lead: LayerNorms too",
    "lead: tasks by their noise",
    "hybrid, searched",
)


@pytest.mark.slow
def test_one_command_makes_the_whole_table(pico: Path, in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--rows=16", "--rows-figure", *(f"--only={kind}" for kind in KINDS)]
    code, document = benchmark(pico, *said)
    assert code == 0
    zoo = document["zoos"]["pico"]
    assert zoo["failures"] == []
    found = {row["method"]: row for row in zoo["rows"]}
    assert set(found) == {*KINDS, "experts, one a task", "base with the experts' heads"}
    printed = capsys.readouterr().out
    for name, row in found.items():
        share = row["share_of_experts"]
        assert share["low"] <= share["mean"] <= share["high"], name
        assert shown(printed, name).split(name)[1].split()[0] == f"{100 * share['mean']:.1f}"
        assert row["seconds"] > 0 or not row["merged"]
    assert found["experts, one a task"]["share_of_experts"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["base with the experts' heads"]["share_of_experts"]["mean"] < 1
    ours = {name: json.dumps(row["tasks"]) for name, row in found.items() if row["ours"] and not row["seeded"]}
    assert len(set(ours.values())) == len(ours), "two methods are one model"
    assert [point["rows"] for point in zoo["over_rows"]["propagated"]] == [16]
    assert (pico / "results" / "rows-pico.png").read_bytes().startswith(b"\x89PNG")

    # Again: every model and every answer is there already, and the figures are the same ones.
    made = {(entry.kind, entry.key): entry.made for entry in Store.open(pico / "bench" / "pico" / "store").entries()}
    code, again = benchmark(pico, *said)
    assert code == 0
    assert {
        (entry.kind, entry.key): entry.made for entry in Store.open(pico / "bench" / "pico" / "store").entries()
    } == made
    assert again["zoos"] == document["zoos"]


def test_every_row_is_a_recipe_of_its_own_or_a_peer(pico: Path) -> None:
    bench = Bench(Zoo("pico", pico / "recipe.yaml", pico / "bench"))
    table = rows.rows(16)
    assert len({row.method for row in table}) == len(table)
    own = [row for row in table if isinstance(row.how, rows.How)]
    recipes = [bench.recipe(row.how, 1, 16) for row in own]
    known = {(json.dumps(recipe.document()), row.rows) for row, recipe in zip(own, recipes, strict=True)}
    assert len(known) == len(recipes)
    peers = [json.dumps(vars(row.how), sort_keys=True) for row in table if isinstance(row.how, Peer | Lead)]
    assert len(set(peers)) == len(peers) == len(table) - len(recipes)
    for recipe in recipes:
        assert {expert.task.calibration.seed for expert in recipe.experts} == {1}
    # What is said to need no rows asks for none: nothing that it does changes with their draw.
    for row, recipe in zip(own, recipes, strict=True):
        if row.data_free:
            assert recipe.anchor.needs is None
            assert row.how.stage == "anchor" or (recipe.grams.source, recipe.search.trials) == ("task-vectors", 0)
    assert {row.method for row in rows.rows(16, quick=True)} >= set(KINDS)


def test_each_draw_of_calibration_rows_makes_another_model(pico: Path, in_process: None) -> None:
    said = [f"--zoo=pico={pico / 'recipe.yaml'}", f"--folder={pico / 'bench'}", f"--output={pico / 'results'}"]
    only = ["--only=RegMean", "--only=average"]
    assert methods.main([*said, *only, "--processes=1", "--seeds=2", "--rows=16"]) == 0
    document = json.loads((pico / "results" / "methods.json").read_text(encoding="utf-8"))
    drawn = {row["method"]: row for row in document["zoos"]["pico"]["rows"]}
    assert len(drawn["RegMean"]["by_seed"]) == 2
    assert len(drawn["average"]["by_seed"]) == 1
    kinds = [entry.kind for entry in Store.open(pico / "bench" / "pico" / "store").entries()]
    # One average, two of RegMean; for the latter Grams of three experts, twice.
    assert kinds.count("anchor") == 3
    assert kinds.count("grams") == 6


def test_a_method_that_fails_costs_the_table_nothing_else(
    pico: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strengths = {"mode": "module-wise", "lambda": {"a group that is not there": 1.0}}
    impossible = rows.How({**rows.DATA_FREE, "regression": strengths, "search": "none"}, "search")
    broken = rows.Row("too much asked", impossible, ours=True, data_free=True, seeded=False)
    table = [row for row in rows.rows(4) if row.method == "average"]
    monkeypatch.setattr(methods, "rows", lambda *_, **__: [broken, *table])
    code, document = benchmark(pico)
    assert code == 1
    assert [row["method"] for row in document["zoos"]["pico"]["rows"][2:]] == ["average"]
    assert "a group that is not there" in document["zoos"]["pico"]["failures"][0]["why"]
    assert "no row for too much asked" in capsys.readouterr().out


def test_a_zoo_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["--zoo", "fish", "--folder", str(tmp_path)]) == 2
    assert "there is no zoo 'fish'" in capsys.readouterr().err
    assert methods.main(["--zoo", f"mine={tmp_path / 'no.yaml'}", "--folder", str(tmp_path)]) == 2


def test_a_row_that_is_not_there_is_told(pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = f"--zoo=pico={pico / 'recipe.yaml'}"
    assert methods.main([zoo, "--folder", str(pico / "bench"), "--only=averge", "--processes=1"]) == 2
    assert "there is no row 'averge'; choose from average, " in " ".join(capsys.readouterr().err.split())


def row(
    method: str,
    share: float,
    *,
    ours: bool = False,
    anchor: bool = False,
    data_free: bool = False,
    aimed: bool = False,
) -> dict[str, Any]:
    return {
        "method": method,
        "ours": ours,
        "anchor": anchor,
        "data_free": data_free,
        "aimed": aimed,
        "merged": True,
        "share_of_experts": {"mean": share},
    }


def test_what_is_aimed_at_is_asked_of_the_walk_over_all_tokens_at_any_strength() -> None:
    assert [row.method for row in rows.rows(4) if row.aimed] == [
        "propagated",
        "propagated, 1,024 rows, 16 tokens a sequence",
        "propagated, λ by held-out rows",
        "propagated, searched",
    ]


def test_targets_are_held_against_anchors_and_what_needs_no_data_against_all_that_needs_none() -> None:
    table = [
        row("WUDI", 0.94, anchor=True, data_free=True),
        row("RegMean", 0.97, anchor=True),
        # No anchor, but a method without data all the same.
        row("somebody's", 0.95, data_free=True),
        row("RegMean++", 0.99),
        row("propagated", 0.985, ours=True, aimed=True),
        # Tried beside it: reported, not judged.
        row("propagated, 16 tokens a sequence", 0.98, ours=True),
        row("lead: LayerNorms too", 0.98, ours=True),
        row("module-wise, searched", 0.965, ours=True),
        row("ours without data", 0.96, ours=True, data_free=True),
    ]
    text = [
        (aim["method"], round(aim["target"], 4), aim["met"]) for aim in summary.targets(table, "text-classification")
    ]
    assert text == [
        ("propagated", 0.99, False),
        ("propagated", 0.98, True),
        ("module-wise, searched", 0.97, False),
        ("ours without data", 0.95, True),
    ]
    images = [(round(aim["target"], 4), aim["met"]) for aim in summary.targets(table, "image-classification")[:2]]
    assert images == [(0.98, True), (1.02, False)]
    assert summary.verdict(summary.targets(table, "text-classification")[0]).endswith("MISSED")
