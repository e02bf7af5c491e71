from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from bmm.anchors.settings import Method
from bmm.errors import RecipeError
from bmm.recipe import Recipe

DESIGN = """
base_model: ./base                     # a folder, hub-id@revision, or an MLflow models:/ URI
experts:
  - name: news
    model: ./experts/news
    task:
      kind: text-classification
      text: text
      label: label
      max_length: 64
      calibration: {path: json, data_files: news/calibration.jsonl, split: train, rows: 256}
      validation:  {path: json, data_files: news/validation.jsonl, split: train}
      test:        {path: json, data_files: news/test.jsonl, split: train}
  - name: mail
    model: ./experts/mail
    task:
      text: subject
      text_pair: body
      calibration: {path: csv, data_files: [a.csv, b.csv], seed: 3}
      validation:  {path: org/mail, name: plain, split: dev, revision: abc}
      test:        {path: ./saved/mail}
anchor: {method: tsv}
grams: {source: activations}
regression: {mode: propagated}
search: {per: type, trials: 24, objective: share-of-expert, seed: 0}
cluster: {scheduler: null, workers: 2, memory_limit: 8GiB}
output: ./merged
"""


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(DESIGN))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(write(folder, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_that_was_promised_is_read(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(write(tmp_path, DESIGN))
    news, mail = recipe.experts
    assert (news.name, news.model, news.task.max_length) == ("news", "./experts/news", 64)
    assert news.task.calibration.data_files == "news/calibration.jsonl"
    assert news.task.calibration.rows == 256
    assert (mail.task.text, mail.task.text_pair, mail.task.calibration.seed) == ("subject", "body", 3)
    assert mail.task.calibration.data_files == ["a.csv", "b.csv"]
    assert (mail.task.validation.name, mail.task.validation.split) == ("plain", "dev")
    assert mail.task.validation.revision == "abc"
    assert (recipe.search.per, recipe.search.trials, recipe.search.seed) == ("type", 24, 0)
    assert (recipe.cluster.scheduler, recipe.cluster.workers, recipe.cluster.memory_limit) == (None, 2, "8GiB")
    assert (recipe.anchor.method, recipe.grams.source, recipe.regression.mode) == ("tsv", "activations", "propagated")
    assert recipe.resolve(recipe.output) == tmp_path / "merged"


def test_everything_but_base_experts_and_output_has_a_default(values: dict[str, Any]) -> None:
    short = {key: values[key] for key in ("base_model", "experts", "output")}
    assert Recipe.from_mapping(short).document() == Recipe.from_mapping(values).document()


@pytest.mark.parametrize("key", ["base_model", "experts", "output"])
def test_what_has_no_default_must_be_there(values: dict[str, Any], key: str) -> None:
    del values[key]
    with pytest.raises(RecipeError, match=f"the key '{key}' is missing"):
        Recipe.from_mapping(values)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ((), "trails"),
        ((), "wudi"),
        (("experts", 1), "experts.1.trails"),
        (("experts", 0, "task"), "experts.0.task.trails"),
        (("experts", 0, "task", "test"), "experts.0.task.test.trails"),
        (("anchor",), "anchor.trails"),
        (("anchor",), "anchor.checkpoint"),
        (("grams",), "grams.trails"),
        (("regression",), "regression.trails"),
        (("search",), "search.trails"),
        (("cluster",), "cluster.trails"),
        (("evaluation",), "evaluation.trails"),
        (("coverage",), "coverage.trails"),
        (("tracking",), "tracking.trails"),
    ],
)
def test_an_unknown_key_is_named_in_full(values: dict[str, Any], path: tuple[str | int, ...], named: str) -> None:
    place: Any = values
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[named.split(".")[-1]] = 1
    with pytest.raises(RecipeError, match=f"unknown key '{named}'"):
        Recipe.from_mapping(values)


def test_the_folder_is_not_the_users_to_set(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="'folder' is not a key"):
        Recipe.from_mapping({**values, "folder": "/elsewhere"})
    assert "folder" not in Recipe.from_mapping(values, folder="/somewhere").document()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("anchor", {"method": "magic"}, "'anchor.method': there is no method 'magic'; choose one of average, "),
        ("anchor", {"method": "ta", "scale": -1}, r"'anchor.scale': must be a number above 0 .*given: -1"),
        ("anchor", {"method": "ties", "scale": "test"}, r"'anchor.scale': .* or 'validation' \(given: 'test'\)"),
        ("anchor", {"method": "tsv", "scales": []}, r"'anchor.scales'"),
        ("anchor", {"method": "iso-c", "scales": [0.5, 3.0]}, r"'anchor.scales.1'"),
        ("anchor", "tsv", "'anchor': .*given: 'tsv'"),
        ("anchor", {"method": "checkpoint"}, "'anchor.path' is missing"),
        ("search", {"trials": -1}, r"'search.trials': .*given: -1"),
        ("search", "nothing", "'search': .*given: 'nothing'"),
        ("regression", {"lambda": -1}, r"'regression.lambda': must be search, evidence, .*given: -1"),
        (
            "regression",
            {"lambda": {"qkv": "x"}},
            "'regression.lambda': must be search, evidence, held-out, a positive number",
        ),
        ("regression", {"strength": 1.0}, "unknown key 'regression.strength'"),
        ("search", {"rho": [0.2, 0.8]}, "'search.rho': .*set grams.source to hybrid"),
        ("search", {"task_weights": [0.5, 2]}, "'search.task_weights': .*set regression.mode to module-wise"),
        ("search", {"task_weights": [0, 2]}, "'search.task_weights': both ends must lie between 0.001 and 1000"),
        ("search", {"groups": {"qkv": {"gamma": [0, 2000]}}}, r"'search.groups.qkv.gamma': both ends"),
        ("search", {"groups": {"qkv": {"delta": 1}}}, "unknown key 'search.groups.qkv.delta'"),
        ("search", {"tied": ["beta"]}, "'search.tied.0'"),
        ("search", {"floors": {"sport": 0.9}}, "'search.floors': there is no task 'sport'"),
        ("search", {"searcher": "saas", "floors": {"all": 0.9}}, "'search.searcher': saas takes one objective"),
        ("search", {"searcher": "grid"}, "'search.searcher'"),
        ("search", {"objective": "loss"}, "'search.objective'"),
        ("search", {"parallel": 0}, "'search.parallel'"),
        ("search", {"walk": "every-trial", "parallel": 2}, "'search.parallel': a walk takes all workers"),
        ("search", {"walk": "every-trial", "gamma": [0.9, 1.1]}, "'search.gamma': a walk in every trial"),
        ("search", {"walk": "every-trial", "groups": {"qkv": {"anchor_scale": 0.5}}}, "'search.anchor_scale': a walk"),
        ("search", {"walk": "every-trial", "groups": {"qkv": {"gamma": 2}}}, "'search.gamma': a walk in every trial"),
        ("search", {"walk": "every-trial", "groups": ["qkv"]}, "'search.groups': "),
        ("search", {"groups": {"qkv": {}}}, "'search.groups.qkv' says nothing; give it a range or a number, or"),
        ("search", {"groups": {"qkv": None}}, "'search.groups.qkv' says nothing; give it a range or a number, or"),
        (
            "search",
            {"groups": {"qkv": {"log10_lambda": [1, 3]}}},
            "'search.groups.qkv.log10_lambda': its upper end, 3",
        ),
        ("search", {"task_weights": 2}, "'search.task_weights': one number for all experts changes nothing"),
        ("search", {"log10_lambda": [-400, 2]}, "'search.log10_lambda': both ends must lie within ±30"),
        ("search", {"gamma": [0.5, float("inf")]}, "'search.gamma': both ends must lie within ±1000"),
        ("anchor", {"method": "fisher", "seed": 2**70}, "'anchor.seed'"),
        ("search", {"log10_lambda": [2, -4]}, "'search.log10_lambda': the lower end must not be above"),
        ("search", {"per": "colour"}, "'search.per'"),
        ("cluster", {"memory_limit": "much"}, r"'cluster.memory_limit': .*given: 'much'"),
        ("cluster", {"workers": 0}, "'cluster.workers'"),
        ("max_shard_size", "big", "'max_shard_size'"),
        ("dtype", "int8", "'dtype'"),
        ("evaluation", {"compare": ["average", "best"]}, "'evaluation.compare.1'"),
        ("coverage", {"minimum": 1.5}, "'coverage.minimum'"),
        ("grams", {"source": "guesses"}, "'grams.source': there is no source 'guesses'"),
        ("grams", {"source": "task-vectors", "shard_rows": 7}, "unknown key 'grams.shard_rows'"),
        ("grams", {"source": "task-vectors", "tokens": 7}, "unknown key 'grams.tokens'"),
        ("grams", {"tokens": 0}, "'grams.tokens': .*greater than or equal to 1"),
        ("grams", {"source": "hybrid", "rho": 1.5}, "'grams.rho'"),
        ("grams", {"source": "artifact"}, "'grams.path' is missing"),
        ("grams", {"source": "artifact", "path": {"news": "a"}}, "'grams.path': mail has no folder"),
        ("grams", {"source": "artifact", "path": {"news": "a", "mail": "b", "odd": "c"}}, "odd is no expert"),
        ("output", "", "'output'"),
        ("base_model", None, "'base_model'"),
        ("experts", [], "'experts'"),
    ],
)
def test_an_impossible_value_is_named_with_its_key(values: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.from_mapping({**values, key: value})


def test_every_method_but_a_checkpoint_can_be_compared(values: dict[str, Any]) -> None:
    methods = [method for method in get_args(Method) if method != "checkpoint"]
    recipe = Recipe.from_mapping({**values, "evaluation": {"compare": methods}})
    assert list(recipe.evaluation.compare) == methods
    with pytest.raises(RecipeError, match=r"'evaluation.compare': the method 'checkpoint' .*bmm eval"):
        Recipe.from_mapping({**values, "evaluation": {"compare": ["ta", "checkpoint"]}})


@pytest.mark.parametrize(
    "grams",
    [{"source": "task-vectors"}, {"source": "hybrid", "rho": 0.3}, {"source": "artifact", "path": "./grams"}],
)
def test_grams_that_the_walk_cannot_use_mean_module_wise_regression(
    values: dict[str, Any], grams: dict[str, Any]
) -> None:
    del values["regression"]
    recipe = Recipe.from_mapping({**values, "grams": grams})
    assert recipe.regression.mode == "module-wise"
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.document()))) == recipe
    assert (
        Recipe.from_mapping({**values, "grams": grams, "regression": {"heads": "keep"}}).regression.mode
        == "module-wise"
    )
    with pytest.raises(RecipeError, match=r"the recipe: 'regression.mode': .*from '.*'; set grams.source"):
        Recipe.from_mapping({**values, "grams": grams, "regression": {"mode": "propagated"}})
    assert Recipe.from_mapping(values).regression.mode == "propagated"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchor": {"method": "fisher"}}, "'anchor': the method 'fisher' needs calibration rows, and news has none"),
        ({"anchor": {"scale": "validation"}}, r"'anchor.scale': .* needs validation rows, and news has none"),
        ({"evaluation": {"compare": ["fisher"]}}, r"'evaluation.compare': .* needs calibration rows"),
        ({"evaluation": {"compare_at": "validation"}}, r"'evaluation.compare_at': .* needs validation rows"),
    ],
)
def test_what_cannot_do_without_rows_is_refused_without_them(
    values: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    for expert in values["experts"]:
        expert["task"] = {key: part for key, part in expert["task"].items() if key not in ("calibration", "validation")}
    for part in ("grams", "search", "regression"):
        del values[part]
    with pytest.raises(RecipeError, match=said):
        Recipe.from_mapping({**values, **changes})
    for expert in values["experts"]:
        del expert["task"]
    if "evaluation" in changes:
        assert Recipe.from_mapping({**values, **changes}).grams.source == "task-vectors"


def test_the_folders_of_grams_made_elsewhere_are_known_by_expert(values: dict[str, Any]) -> None:
    del values["regression"]
    for path in ("../grams/", {"mail": "../grams/mail", "news": "../grams/news"}):
        grams = Recipe.from_mapping({**values, "grams": {"source": "artifact", "path": path}}).grams
        assert grams.folders(("news", "mail")) == {"news": "../grams/news", "mail": "../grams/mail"}


@pytest.mark.parametrize("second", ["news", "NEWS"])
def test_two_experts_cannot_have_one_name(values: dict[str, Any], second: str) -> None:
    values["experts"][1]["name"] = second
    with pytest.raises(RecipeError, match="'news' is given to two experts"):
        Recipe.from_mapping(values)


@pytest.mark.parametrize("name", ["mean", "a/b", "../up", "", "-x", "a b", "x" * 65, 7])
def test_a_name_that_would_make_trouble_is_refused(values: dict[str, Any], name: Any) -> None:
    values["experts"][0]["name"] = name
    with pytest.raises(RecipeError, match=r"'experts(\.0\.name)?'"):
        Recipe.from_mapping(values)


def test_one_expert_is_not_a_merge(values: dict[str, Any]) -> None:
    values["experts"] = values["experts"][:1]
    with pytest.raises(RecipeError, match=r"'experts': .*at least 2"):
        Recipe.from_mapping(values)


@pytest.mark.parametrize("size", ["512KiB", "500MB", "1.5 GiB", "2TB", "64kiB", "100B"])
def test_sizes_are_written_as_people_write_them(values: dict[str, Any], size: str) -> None:
    assert Recipe.from_mapping({**values, "max_shard_size": size}).max_shard_size == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("output: 2024-13-45", "not valid YAML"),
        ("base_model: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("base_model: a\nbase_model: b", "'base_model' is given twice"),
        ("search: {trials: 3, trials: 4}", "'trials' is given twice"),
        ("- base_model", "must be a mapping"),
        ("", "must be a mapping"),
        ("just words", "must be a mapping"),
        (DESIGN + "1: 2", "'1': Keys should be strings"),
    ],
)
def test_what_is_not_a_recipe_gets_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_recipe_that_cannot_be_read_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe at .*none\.yaml.*bmm init"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder; name the recipe's YAML file"):
        Recipe.from_yaml(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("output: Köln".encode("latin-1"))
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(latin)


def test_yaml_may_share_what_several_experts_have_in_common(tmp_path: Path) -> None:
    text = """
    base_model: ./base
    output: ./merged
    experts:
      - name: one
        model: ./one
        task: &task
          max_length: 32
          calibration: {path: json, data_files: a.jsonl}
          validation: {path: json, data_files: b.jsonl}
          test: {path: json, data_files: c.jsonl}
      - name: two
        model: ./two
        task: {<<: *task, max_length: 48}
    """
    one, two = Recipe.from_yaml(write(tmp_path, text)).experts
    assert (one.task.max_length, two.task.max_length) == (32, 48)
    assert two.task.calibration == one.task.calibration


def test_the_schema_accepts_a_recipe_and_its_document_and_refuses_unknown_keys(values: dict[str, Any]) -> None:
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    document = Recipe.from_mapping(values).document()
    check.validate(json.loads(json.dumps(document)))
    check.validate(values)
    for wrong in (
        {**document, "trails": 1},
        {**document, "folder": "/somewhere"},
        {**document, "search": {**document["search"], "trails": 1}},
        {**document, "experts": document["experts"][:1]},
    ):
        assert list(check.iter_errors(json.loads(json.dumps(wrong)))), wrong


def test_the_document_gives_the_same_recipe_again(values: dict[str, Any]) -> None:
    values |= {"anchor": {"scale": 0.7}, "search": {"gamma": [0.9, 1.1]}}
    recipe = Recipe.from_mapping(values)
    assert (recipe.anchor.method, recipe.anchor.scale) == ("tsv", 0.7)
    again = Recipe.from_mapping(json.loads(json.dumps(recipe.document())))
    assert again == recipe


def test_the_document_of_an_anchor_alone_gives_the_same_recipe_again(values: dict[str, Any]) -> None:
    values |= {"regression": {"mode": "none"}}
    del values["grams"], values["search"]
    recipe = Recipe.from_mapping(values)
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.document()))) == recipe


@pytest.mark.parametrize(
    ("task", "objective"),
    [
        ({}, "nll"),
        ({"metric": "f1"}, "share-of-expert"),
        ({"kind": "text-regression"}, "share-of-expert"),
        ({"kind": "causal-lm"}, "share-of-expert"),
    ],
)
def test_what_a_search_maximises_depends_on_what_every_task_is_worth(
    values: dict[str, Any], task: dict[str, Any], objective: str
) -> None:
    del values["search"]["objective"]
    assert Recipe.from_mapping(values).search.objective == "share-of-expert"
    values["regression"] = {"mode": "module-wise"}
    given = values["experts"][1]["task"]
    values["experts"][1]["task"] = {name: given[name] for name in ("calibration", "validation", "test")} | task
    assert Recipe.from_mapping(values).search.objective == objective


def test_a_walk_in_every_trial_may_have_groups_with_a_lambda_of_their_own(values: dict[str, Any]) -> None:
    groups = {"qkv": {"log10_lambda": [-2, 0]}, "mlp-in": {"gamma": None, "log10_lambda": -1}}
    recipe = Recipe.from_mapping({**values, "search": {"walk": "every-trial", "groups": groups}})
    assert recipe.search.groups["qkv"].ranges() == {"log10_lambda": (-2.0, 0.0)}


def test_a_walk_in_every_trial_goes_one_round(values: dict[str, Any]) -> None:
    said = {**values, "search": {"walk": "every-trial"}, "regression": {"rounds": 2}}
    with pytest.raises(RecipeError, match=r"'regression.rounds': with search.walk: every-trial .*; set it to 1, or"):
        Recipe.from_mapping(said)


def test_a_recipe_cannot_be_changed(values: dict[str, Any]) -> None:
    recipe = Recipe.from_mapping(values)
    with pytest.raises(ValidationError):
        recipe.output = "elsewhere"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.search.trials = 3  # type: ignore[misc]


def test_paths_are_taken_from_the_recipes_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, DESIGN)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    recipe = Recipe.from_yaml(Path("..") / path.name)
    assert recipe.resolve("./base") == tmp_path / "base"
    assert recipe.resolve("/absolute") == Path("/absolute")
