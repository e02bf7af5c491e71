from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from bmm.checkpoint.layout import Layout
from bmm.errors import ArtefactDamagedError, CheckpointError, DataError
from bmm.grams.store import GramReader
from bmm.modules.linear import LinearMap
from bmm.pipeline import perform_here, run_stages
from bmm.plan import cached_results
from bmm.recipe import Recipe
from bmm.sources import Model, fingerprint_inputs
from bmm.stages.assembling import check_coverage
from bmm.stages.registry import STAGES
from bmm.stages.request import Request, Result
from bmm.stages.setup import Setup
from bmm.store import Store

Edit = Callable[..., Path]
ORDER = tuple(STAGES)


def stages(folder: Path, last: str) -> dict[str, Result]:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    upto = ORDER[: ORDER.index(last) + 1]
    return run_stages(recipe, fingerprint_inputs(recipe), Store.open(folder / "store"), perform_here, upto)


def kinds(folder: Path) -> Counter[str]:
    return Counter(entry.kind for entry in Store.open(folder / "store").entries())


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def outputs(folder: Path, stage: str, *path: str) -> Any:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store = Store.open(folder / "store")
    return store.read(cached_results(recipe, fingerprint_inputs(recipe), store)[stage].reference(*path))


def test_splits_that_overlap_are_refused_and_leave_no_rows(pico: Path) -> None:
    data = pico / "data" / "task1"
    row = (data / "test.jsonl").read_text().splitlines()[0]
    with (data / "calibration.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match="the expert task1: the splits calibration and test share 1 row"):
        stages(pico, "experts")
    assert kinds(pico)["stage-experts"] == 0
    assert not list((pico / "store" / "drafts").iterdir())


def test_an_expert_of_another_shape_is_refused(pico: Path) -> None:
    file = pico / "experts" / "task2" / "model.safetensors"
    name = "bert.encoder.layer.1.output.dense.weight"
    change(file, lambda tensors: tensors.update({name: torch.zeros(16, 30)}))
    with pytest.raises(CheckpointError, match=r"expert 'task2'.*encoder\.layer\.1\.output\.dense\.weight"):
        stages(pico, "experts")


def test_the_first_stage_copies_rows_and_classes(merged_source: Path) -> None:
    artefact = outputs(merged_source, "experts", "experts", "task1")
    value = artefact.read_json("expert.json")
    assert value["labels"] == ["yes", "no"]
    assert {name: split["rows"] for name, split in value["splits"].items()} == {
        "calibration": 48,
        "validation": 60,
        "test": 60,
    }
    modules = outputs(merged_source, "experts", "layout").read_json("modules.json")
    assert len(modules["maps"]) == 13
    assert sorted(modules["embeddings"]) == [
        f"embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type", "word")
    ]


def test_a_task_vectors_norm_is_measured_and_a_zero_one_is_told(pico: Path) -> None:
    base = load_file(pico / "base" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    file = pico / "experts" / "task0" / "model.safetensors"
    change(file, lambda tensors: tensors.update({f"bert.{name}": base[name] + 0.5}))
    result = stages(pico, "task-vectors")["task-vectors"]
    norms = Store.open(pico / "store").read(result.reference("experts", "task0")).read_json("norms.json")
    assert norms[name]["norm"] == pytest.approx(0.5 * math.sqrt(16 * 32), rel=1e-6)
    assert norms[name]["base_norm"] == pytest.approx(float(base[name].double().norm()))


@pytest.mark.parametrize("which", ["experts/task1", "base"])
def test_a_weight_that_is_not_finite_is_refused_by_name(pico: Path, which: str) -> None:
    name = "encoder.layer.0.output.dense.weight"
    key = name if which == "base" else f"bert.{name}"
    change(pico / which / "model.safetensors", lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{which}: the tensor {key} has 512 NaN"):
        stages(pico, "task-vectors")


def test_one_changed_expert_has_its_own_grams_made_again_and_no_other(merged: Path, in_process: None) -> None:
    before = outputs(merged, "grams", "experts", "task0")
    old = kinds(merged)
    file = merged / "data" / "task1" / "calibration.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    result = stages(merged, "grams")
    assert (result["experts"].state, result["task-vectors"].state, result["grams"].state) == ("ran", "cached", "ran")
    assert kinds(merged)["grams"] == old["grams"] + 1
    assert kinds(merged)["gram-shard"] == 0
    assert result["grams"].reference("experts", "task0") == before.reference
    reader = GramReader(
        Store.open(merged / "store").read(result["grams"].reference("experts", "task1")).file("grams.zarr")
    )
    assert reader.rows("pooler.dense") == 40
    assert len(reader.provenance["shards"]) == 2


def test_a_sample_of_tokens_is_told_with_the_matrices(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    sample = {"tokens": 3, "tokens_seed": 7}

    def made(**grams: Any) -> tuple[GramReader, str]:
        edit_recipe(merged, grams={"shard_rows": 24, **grams})
        result = stages(merged, "grams")["grams"]
        path = Store.open(merged / "store").read(result.reference("experts", "task2")).file("grams.zarr")
        attributes = zarr.open_group(path, mode="r")["encoder.layer.0.output.dense"].attrs
        return GramReader(path), str(attributes["statistic"])

    before, plain = made()
    assert "tokens" not in before.provenance
    assert plain == "sum of outer products, padding left out"
    after, statistic = made(**sample)
    assert {name: after.provenance[name] for name in sample} == sample
    assert statistic == f"{plain}, of at most 3 tokens a sequence"
    # Of 48 rows, each longer than that.
    assert {after.rows(name) for name in after.names() if name != "pooler.dense"} == {3 * 48}
    # No row is longer than this: the same matrices, under a name of their own.
    longest, _ = made(tokens=16)
    assert all(torch.equal(longest.gram(name), before.gram(name)) for name in before.names())
    blended, _ = made(source="hybrid", **sample)
    assert {name: blended.provenance[name] for name in sample} == sample


def test_the_cut_into_shards_changes_nothing_but_rounding(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    before = GramReader(outputs(merged, "grams", "experts", "task2").file("grams.zarr"))
    edit_recipe(merged, grams={"shard_rows": 7})
    reference = stages(merged, "grams")["grams"].reference("experts", "task2")
    after = GramReader(Store.open(merged / "store").read(reference).file("grams.zarr"))
    assert len(after.provenance["shards"]) == 7
    for name in before.names():
        assert before.rows(name) == after.rows(name)
        torch.testing.assert_close(before.gram(name), after.gram(name), rtol=1e-4, atol=1e-6)


def test_an_anchor_checkpoint_of_another_shape_is_refused(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, anchor={"method": "checkpoint", "path": "./experts/task0"})
    found = stages(merged, "anchor")["anchor"]
    state = load_file(Store.open(merged / "store").read(found.reference("anchor")).file("model.safetensors"))
    expert = load_file(merged / "experts" / "task0" / "model.safetensors")
    assert all(torch.equal(tensor, expert[f"bert.{name}"]) for name, tensor in state.items())
    name = "bert.encoder.layer.1.output.dense.weight"
    other = merged / "other"
    other.mkdir()
    (other / "config.json").write_bytes((merged / "experts" / "task0" / "config.json").read_bytes())
    save_file({**expert, name: torch.zeros(16, 30)}, other / "model.safetensors", metadata={"format": "pt"})
    edit_recipe(merged, anchor={"method": "checkpoint", "path": "./other"})
    with pytest.raises(CheckpointError, match=r"the anchor checkpoint .*other has encoder\.layer\.1\.output\.dense"):
        stages(merged, "anchor")


def test_module_wise_weights_are_the_closed_form_of_the_best_setting(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, regression={"mode": "module-wise"})
    assert stages(merged, "search")["search"].state == "ran"
    search = outputs(merged, "search", "search")
    published = load_file(search.file("model.safetensors"))
    anchor = load_file(outputs(merged, "anchor", "anchor").file("model.safetensors"))
    readers = [GramReader(outputs(merged, "grams", "experts", f"task{i}").file("grams.zarr")) for i in range(3)]
    experts = [load_file(merged / "experts" / f"task{i}" / "model.safetensors") for i in range(3)]
    base = load_file(merged / "base" / "model.safetensors")
    modules = outputs(merged, "experts", "layout").read_json("modules.json")
    group_of = {f"{map_['module']}.weight": map_["input_group"] for map_ in modules["maps"]}
    for entry in search.read_json("coverage.json"):
        name = entry["parameter"]
        if entry["treatment"] != "regressed":
            assert torch.equal(published[name], anchor[name]), name
            continue
        grams = [reader.gram(group_of[name]) for reader in readers]
        prior, mean = anchor[name].double(), anchor[name].double()
        if entry["lambda"] is not None:
            total = torch.stack(grams).sum(0)
            size = total.shape[0]
            matrix = total + entry["lambda"] * total.trace() / size * torch.eye(size, dtype=torch.float64)
            pull = sum((e[f"bert.{name}"].double() - prior) @ gram for e, gram in zip(experts, grams, strict=True))
            mean = prior + torch.linalg.solve(matrix, pull, left=False)  # type: ignore[arg-type]
            assert entry["condition"] == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-3)
        wanted = base[name].double() + entry["gamma"] * (mean - base[name].double())
        torch.testing.assert_close(published[name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_with_one_trial_the_anchor_is_published_bit_for_bit(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, search={"trials": 1})
    results = stages(merged, "search")
    assert [results[stage].state for stage in ORDER[:5]] == ["cached"] * 4 + ["ran"]
    store = Store.open(merged / "store")
    search = store.read(results["search"].reference("search"))
    anchor = store.read(results["anchor"].reference("anchor"))
    assert search.file("model.safetensors").read_bytes() == anchor.file("model.safetensors").read_bytes()
    assert "regressed" not in {entry["treatment"] for entry in search.read_json("coverage.json")}


def test_too_little_coverage_is_refused(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, coverage={"minimum": 1.0})
    assert stages(merged, "search")["search"].state == "ran"
    layout = outputs(merged, "experts", "layout")
    value = layout.read_json("modules.json")
    maps = tuple(LinearMap.from_json(map_) for map_ in value["maps"] if "intermediate" not in map_["module"])
    shape = Layout.from_json(layout.read_json("layout.json"))
    setup = Setup(Model("", "", None, ""), (), shape, maps, frozenset(value["embeddings"]))
    check_coverage(setup, 0.7)
    with pytest.raises(CheckpointError, match=r"largest missed: encoder\.layer\.\d\.intermediate\.dense\.weight"):
        check_coverage(setup, 0.9)


def test_an_artefact_that_is_damaged_midway_has_its_stage_run_again(merged: Path) -> None:
    recipe = Recipe.from_yaml(merged / "recipe.yaml")
    inputs = fingerprint_inputs(recipe)
    seen: list[str] = []

    def execute(store: Store, request: Request) -> Result:
        seen.append(request.stage)
        if len(seen) == 2:
            raise ArtefactDamagedError("lost on the way")
        return perform_here(store, request)

    results = run_stages(recipe, inputs, Store.open(merged / "store"), execute, ORDER)
    assert seen == ["experts", "task-vectors", *ORDER]
    assert list(results) == list(ORDER)

    def broken(store: Store, request: Request) -> Result:
        raise ArtefactDamagedError("always lost")

    with pytest.raises(ArtefactDamagedError, match="always lost"):
        run_stages(recipe, inputs, Store.open(merged / "store"), broken, ORDER)
