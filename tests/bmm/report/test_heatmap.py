"""The λ map: where a parameter belongs, and what its cell shows."""

from __future__ import annotations

import pytest

from bmm.report.heatmap import OUTSIDE, cells, lambda_map, place


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("encoder.layer.3.output.dense.weight", ("encoder.layer", "3", "MLP out")),
        ("encoder.layer.11.attention.self.query.weight", ("encoder.layer", "11", "query")),
        ("transformer.layer.0.ffn.lin1.weight", ("transformer.layer", "0", "ffn.lin1")),
        ("layers.2.self_attn.k_proj.weight", ("layers", "2", "self_attn.k_proj")),
        ("pooler.dense.weight", ("", OUTSIDE, "pooler.dense")),
    ],
)
def test_place(parameter, expected):
    assert place(parameter) == expected


def test_cells_hold_log10_lambda_and_none_for_the_anchor(document):
    found = cells(document)
    assert len(found) == 6 * 6
    assert found["key", "0"] is None
    entry = next(e for e in document["coverage"] if e["parameter"] == "encoder.layer.2.output.dense.weight")
    assert 10 ** found["MLP out", "2"] == pytest.approx(entry["lambda"])


def test_an_infinite_lambda_is_the_anchor(document):
    for entry in document["coverage"]:
        entry["lambda"] = None
    assert set(cells(document).values()) == {None}
    assert lambda_map(document) is None


def test_one_row_and_one_column_are_enough(document):
    document["coverage"] = [e for e in document["coverage"] if e["parameter"] == "encoder.layer.0.output.dense.weight"]
    assert list(cells(document)) == [("MLP out", "0")]
    assert lambda_map(document) is not None


def test_two_towers_are_kept_apart(document):
    kept = document["coverage"][1:3]
    towers = [{**e, "parameter": f"{tower}.{e['parameter']}"} for e in kept for tower in ("text", "vision")]
    document["coverage"] = towers
    assert set(cells(document)) == {("text.encoder.layer query", "0"), ("vision.encoder.layer query", "0")}


def test_a_regressed_matrix_outside_of_the_layers_has_its_own_column(document):
    document["coverage"].append({**document["coverage"][1], "parameter": "pooler.dense.weight"})
    assert cells(document)["pooler.dense", OUTSIDE] is not None
    assert lambda_map(document) is not None
