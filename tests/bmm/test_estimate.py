from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bmm.errors import RecipeError
from bmm.estimate import StagePlan, estimate_stages, worker_shortage
from bmm.kinds.registry import kind_of
from bmm.offline import estimate_offline, known_config
from bmm.outline import Outline, outline_of_config
from bmm.pipeline import STAGES
from bmm.plan import make_plan
from bmm.recipe import Recipe
from bmm.row_counts import calibration_rows
from bmm.sources import fingerprint_inputs
from bmm.store import Store

Edit = Callable[..., Path]
# One layer: query, key and value read one input; 8 wide, 32 inside.
SHAPES = {
    "embeddings.weight": (100, 8),
    "layer.0.attention.self.query.weight": (8, 8),
    "layer.0.attention.self.key.weight": (8, 8),
    "layer.0.attention.self.value.weight": (8, 8),
    "layer.0.attention.output.dense.weight": (8, 8),
    "layer.0.intermediate.dense.weight": (32, 8),
    "layer.0.output.dense.weight": (8, 32),
    "layer.0.output.dense.bias": (8,),
}
GRAM = 8 * (3 * 8**2 + 32**2)
SOLVED = 8 * (4 * 8 * 8 + 2 * 8 * 32)
MODEL = 4 * (100 * 8 + 4 * 8 * 8 + 2 * 8 * 32 + 8)


def stages(pico: Path, **changes: Any) -> dict[str, StagePlan]:
    recipe = Recipe.from_mapping({**Recipe.from_yaml(pico / "recipe.yaml").document(), **changes}, folder=pico)
    outline = Outline(SHAPES, MODEL, {})
    found = estimated(recipe, outline, 10, ("experts",))
    return {stage.stage: stage for stage in found}


def estimated(recipe: Recipe, outline: Outline, tokens: int, done: Sequence[str] = ()) -> tuple[StagePlan, ...]:
    return estimate_stages(recipe, outline, [tokens] * len(recipe.experts), calibration_rows(recipe), done)


def calibrated(pico: Path, rows: int) -> list[dict[str, Any]]:
    experts = Recipe.from_yaml(pico / "recipe.yaml").document()["experts"]
    for expert in experts:
        expert["task"]["calibration"]["rows"] = rows
    return list(experts)


def test_every_byte_of_a_layer_is_accounted_for(pico: Path) -> None:
    found = stages(pico, grams={"source": "task-vectors"}, regression={"mode": "module-wise"})
    assert list(found) == list(STAGES)
    assert [name for name, stage in found.items() if stage.cached] == ["experts"]
    assert found["grams"].disk_bytes == 3 * GRAM
    assert found["publish"].disk_bytes == MODEL
    assert found["search"].disk_bytes == MODEL
    assert "each map on its own" in found["search"].note


@pytest.mark.parametrize(("workers", "tasks"), [(1, 3), (2, 2), (3, 1), (9, 1)])
def test_the_walk_keeps_a_layer_of_every_row_where_the_expert_is(pico: Path, workers: int, tasks: int) -> None:
    few, many = (
        stages(
            pico,
            regression={"mode": "propagated"},
            experts=calibrated(pico, rows),
            cluster={"workers": workers, "memory_limit": "99GiB"},
        )["search"]
        for rows in (2 * 10**5, 4 * 10**5)
    )
    assert few.disk_bytes == many.disk_bytes == MODEL + GRAM + SOLVED
    assert f"{min(workers, 3)} worker" in few.note
    # Answers of six maps, the streams that two of them go into, and three streams more, of rows of ten tokens, in
    # float32; three experts shared out.
    grown = 4 * (4 * 8 + 32 + 8 + 2 * 8 + 3 * 8) * 10 * 2 * 10**5
    assert many.memory_bytes - few.memory_bytes == grown * tasks * min(workers, 3)
    assert many.worker_bytes - few.worker_bytes == (grown * tasks if workers > 1 else 0)


def test_without_test_rows_nothing_is_merged_to_be_compared(pico: Path) -> None:
    experts = calibrated(pico, 8)
    assert stages(pico, experts=experts)["evaluate"].disk_bytes == 6 * MODEL
    for expert in experts:
        del expert["task"]["test"]
    found = stages(pico, experts=experts)["evaluate"]
    assert found.disk_bytes == 0
    assert found.memory_bytes < stages(pico)["evaluate"].memory_bytes


def test_shards_and_workers_follow_the_rows(pico: Path) -> None:
    found = stages(pico, experts=calibrated(pico, 24), grams={"shard_rows": 12}, cluster={"workers": 3})["grams"]
    assert "6 shards, 3 workers" in found.note
    assert found.disk_bytes == (3 + 6) * GRAM
    assert found.memory_bytes == 3 * found.worker_bytes
    jobs = {"workers": 64, "slurm": {}}
    elsewhere = stages(pico, experts=calibrated(pico, 24), grams={"shard_rows": 12}, cluster=jobs)["grams"]
    assert elsewhere.worker_bytes == found.worker_bytes > elsewhere.memory_bytes, "jobs have memory of their own"


def test_of_many_shards_only_those_that_are_not_added_yet_take_disk(pico: Path) -> None:
    few, many = (
        stages(pico, experts=calibrated(pico, rows), grams={"shard_rows": 1}, cluster={"workers": 3})["grams"]
        for rows in (10**3, 10**6)
    )
    assert "3000000 shards" in many.note
    # Two experts that are done, each with its sum and less than a block; two blocks of the last, what its workers
    # are at, the sum and the next one; and the matrices themselves.
    most = 2 * (1 + 64) + 2 * 64 + 3 * 3 + 2 + 2
    assert few.disk_bytes < many.disk_bytes == (3 + most) * GRAM


def test_of_a_sample_of_tokens_fewer_answers_are_kept(pico: Path) -> None:
    rows = 2 * 10**5
    grams, cluster = {"source": "activations", "tokens": 4}, {"workers": 1, "memory_limit": "99GiB"}
    whole, few, more = (
        stages(pico, experts=calibrated(pico, rows), cluster=cluster, grams={**grams, "tokens": tokens})
        for tokens in (None, 4, 11)
    )
    # Of six maps' answers, and of two streams; states pass on whole. Rows have ten tokens.
    saved = 4 * (4 * 8 + 32 + 8 + 2 * 8) * (10 - 4) * rows * 3
    assert whole["search"].memory_bytes - few["search"].memory_bytes == saved
    assert more["search"] == whole["search"]
    assert "shards, 4 tokens of each sequence, 1 worker" in few["grams"].note


def test_a_worker_over_its_limit_is_said_so(pico: Path) -> None:
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    made = estimated(recipe, Outline(SHAPES, MODEL, {}), 10)
    assert worker_shortage(made, recipe) is None
    tight = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"memory_limit": "100MiB"})})
    found = worker_shortage(made, tight)
    assert found is not None
    times, error = found
    assert times > 4
    assert "'cluster.memory_limit' is 100 MiB" in str(error)
    done = [replace(stage, cached=True) for stage in made]
    assert worker_shortage(done, tight) is None


@pytest.mark.parametrize("source", ["task-vectors", "artifact"])
def test_what_no_worker_does_has_no_limit(pico: Path, source: str) -> None:
    grams = {"source": source} | ({"path": "grams"} if source == "artifact" else {})
    found = stages(pico, grams=grams, regression={"mode": "module-wise"}, cluster={"memory_limit": "1MiB"})
    assert {stage.worker_bytes for stage in found.values()} == {0}


def test_offline_and_online_agree(pico: Path, edit_recipe: Edit) -> None:
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    config = known_config(recipe)
    assert config == pico / "base" / "config.json"
    offline, output_bytes = estimate_offline(recipe, config)
    online = make_plan(recipe, fingerprint_inputs(recipe), Store.open(pico / "store"))
    assert (offline, output_bytes) == (online.stages, online.output_bytes)
    edit_recipe(pico, cluster={"memory_limit": "100MiB"})
    with pytest.raises(RecipeError, match="memory_limit"):
        estimate_offline(Recipe.from_yaml(pico / "recipe.yaml"), config)


def _llama(layers: int) -> Outline:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return outline_of_config(config, kind_of("causal-lm").architecture, "config.json")


def test_eight_billion_parameters_are_streamed_through_small_workers_whatever_their_depth(pico: Path) -> None:
    recipe = Recipe.from_mapping(
        {
            **Recipe.from_yaml(pico / "recipe.yaml").document(),
            "experts": calibrated(pico, 128),
            "regression": {"mode": "module-wise", "lambda": 0.1},
            "search": "none",
            "cluster": {"workers": 1, "memory_limit": "24GB"},
        },
        folder=pico,
    )
    deep, flat = ({stage.stage: stage for stage in estimated(recipe, _llama(layers), 1024)} for layers in (32, 4))
    assert _llama(32).weights > 8e9
    assert "layer by layer" in deep["grams"].note
    assert worker_shortage(list(deep.values()), recipe) is None
    assert 0 < deep["grams"].worker_bytes < 24e9
    # The largest map, the output head, decides what the solve takes.
    assert deep["search"].memory_bytes == flat["search"].memory_bytes
    roomy = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"memory_limit": "900GB"})})
    whole = {stage.stage: stage for stage in estimated(roomy, _llama(32), 1024)}
    assert "layer by layer" not in whole["grams"].note
    assert whole["grams"].worker_bytes > 24e9


def test_a_walk_of_eight_billion_parameters_fits_workers_of_one_expert_each(pico: Path) -> None:
    (first, *_) = calibrated(pico, 256)
    recipe = Recipe.from_mapping(
        {
            **Recipe.from_yaml(pico / "recipe.yaml").document(),
            "experts": [{**first, "name": f"expert{index}"} for index in range(5)],
            "regression": {"mode": "propagated", "lambda": 0.1},
            "search": "none",
            "cluster": {"workers": 5, "memory_limit": "24GB"},
        },
        folder=pico,
    )
    found = {stage.stage: stage for stage in estimate_stages(recipe, _llama(32), [128] * 5, [256] * 5)}
    assert "a walk, 5 workers" in found["search"].note
    assert worker_shortage(list(found.values()), recipe) is None
    flat = {stage.stage: stage for stage in estimate_stages(recipe, _llama(4), [128] * 5, [256] * 5)}
    assert found["search"].worker_bytes == flat["search"].worker_bytes


def test_an_anchor_is_merged_a_tensor_at_a_time_however_many_layers_there_are(pico: Path) -> None:
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    deep, flat = ({stage.stage: stage for stage in estimated(recipe, _llama(layers), 10)} for layers in (32, 4))
    assert deep["anchor"].memory_bytes == flat["anchor"].memory_bytes < 40e9
    assert deep["experts"].memory_bytes == flat["experts"].memory_bytes < 1e9
    alone = stages(pico, regression={"mode": "none"}, anchor={"method": "tsv"}, search="none")
    assert alone["publish"].memory_bytes == stages(pico, anchor={"method": "tsv"})["anchor"].memory_bytes


def test_matrices_that_nothing_reads_are_not_planned(pico: Path) -> None:
    found = stages(pico, regression={"mode": "propagated"}, evaluation={"compare": ["ta"]})["grams"]
    assert (found.disk_bytes, found.worker_bytes) == (0, 0)
    assert found.note == "nothing in this merge reads them"
    assert stages(pico, regression={"mode": "propagated"})["grams"].disk_bytes > 0


def test_grams_from_task_vectors_are_made_one_input_at_a_time(pico: Path) -> None:
    recipe = Recipe.from_mapping(
        {
            **Recipe.from_yaml(pico / "recipe.yaml").document(),
            "grams": {"source": "task-vectors"},
            "regression": {"mode": "module-wise", "lambda": 0.1},
            "search": "none",
        },
        folder=pico,
    )
    deep, flat = ({stage.stage: stage for stage in estimated(recipe, _llama(layers), 10)} for layers in (32, 4))
    assert deep["grams"].memory_bytes == flat["grams"].memory_bytes < 16e9
    assert deep["grams"].disk_bytes > 100e9


def test_a_single_worker_elsewhere_has_its_limit_too(pico: Path) -> None:
    rows = calibrated(pico, 2 * 10**5)
    for cluster in ({"slurm": {}}, {"scheduler": "tcp://127.0.0.1:1"}):
        found = stages(pico, experts=rows, cluster={"workers": 1, "memory_limit": "99GiB", **cluster})["search"]
        assert found.worker_bytes > found.memory_bytes
    assert "each worker needs" in found.note
    here = stages(pico, experts=rows, cluster={"workers": 1, "memory_limit": "99GiB"})["search"]
    assert here.worker_bytes == 0


def test_a_batch_inside_of_a_layer_is_counted(pico: Path) -> None:
    small, large = (
        stages(pico, evaluation={"batch_size": size}, cluster={"memory_limit": "99GiB"})["grams"].worker_bytes
        for size in (10, 10**6)
    )
    # A gate, what it opens and their product, 32 wide, of rows of ten tokens.
    assert large - small == 3 * 4 * 32 * 10 * (10**6 - 10)


def test_what_is_too_large_is_told_with_what_makes_it_smaller(pico: Path) -> None:
    found = {}
    for mode in ("propagated", "module-wise"):
        recipe = Recipe.from_mapping(
            {
                **Recipe.from_yaml(pico / "recipe.yaml").document(),
                "experts": calibrated(pico, 10**6),
                "regression": {"mode": mode},
                "evaluation": {"batch_size": 10**6},
                "cluster": {"memory_limit": "1GiB"},
            },
            folder=pico,
        )
        shortage = worker_shortage(estimated(recipe, Outline(SHAPES, MODEL, {}), 10), recipe)
        assert shortage is not None
        found[mode] = str(shortage[1])
    assert "raise it, or take fewer calibration rows" in found["propagated"]
    assert "raise it, or lower evaluation.batch_size" in found["module-wise"]
