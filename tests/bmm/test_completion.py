from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from bmm.completion import DATA_FREE_LAMBDA, Choices, complete
from bmm.grams.settings import GramSettings
from bmm.regression.settings import RegressionSettings
from bmm.search.settings import Search

ALL = ("calibration", "validation", "test")


def completed(*splits: str, **said: Any) -> Choices:
    """Complete a recipe of two experts, `one` with these splits and `two` with the same or with `two`."""
    own = {"one": splits, "two": said.pop("two", splits)}
    needs = said.pop("needs", ())
    grams: GramSettings = TypeAdapter(GramSettings).validate_python(said.get("grams", {"source": "activations"}))
    parts = Choices(
        grams,
        RegressionSettings.model_validate(said.get("regression", {})),
        TypeAdapter(Search).validate_python(said.get("search", {})),
    )
    accuracies = said.get("accuracies", False)
    return complete(parts, own, grams_said="grams" in said, accuracies=accuracies, needs=needs)


def outcome(choices: Choices) -> tuple[str, str, Any, int]:
    return choices.grams.source, choices.regression.mode, choices.regression.strength, choices.search.trials


VECTORS = {"source": "task-vectors"}


@pytest.mark.parametrize(
    ("splits", "said", "found"),
    [
        (ALL, {}, ("activations", "propagated", "search", 24)),
        (("calibration", "validation"), {}, ("activations", "propagated", "search", 24)),
        (("calibration", "test"), {}, ("activations", "propagated", 0.1, 0)),
        (
            ("calibration",),
            {"regression": {"mode": "module-wise"}},
            ("activations", "module-wise", DATA_FREE_LAMBDA, 0),
        ),
        ((), {}, ("task-vectors", "module-wise", DATA_FREE_LAMBDA, 0)),
        (("test",), {}, ("task-vectors", "module-wise", DATA_FREE_LAMBDA, 0)),
        (("validation", "test"), {}, ("task-vectors", "module-wise", "search", 24)),
        (ALL, {"grams": VECTORS}, ("task-vectors", "module-wise", "search", 24)),
        (ALL, {"search": "none"}, ("activations", "propagated", 0.1, 0)),
        (ALL, {"search": None}, ("activations", "propagated", 0.1, 0)),
        (ALL, {"search": {"trials": 0}}, ("activations", "propagated", 0.1, 0)),
        (ALL, {"regression": {"lambda": 0.3}}, ("activations", "propagated", 0.3, 0)),
        (ALL, {"regression": {"lambda": "search"}}, ("activations", "propagated", "search", 24)),
        (ALL, {"regression": {"lambda": "evidence"}}, ("activations", "propagated", "evidence", 0)),
        ((), {"regression": {"lambda": "evidence"}}, ("task-vectors", "module-wise", "evidence", 0)),
        (
            (),
            {"regression": {"lambda": {"qkv": 1}}, "search": {"seed": 3}},
            ("task-vectors", "module-wise", {"qkv": 1}, 0),
        ),
        ((), {"grams": {"source": "artifact", "path": "grams"}}, ("artifact", "module-wise", DATA_FREE_LAMBDA, 0)),
        (("calibration",), {"grams": {"source": "hybrid"}}, ("hybrid", "module-wise", DATA_FREE_LAMBDA, 0)),
    ],
)
def test_what_is_left_open_follows_from_the_rest(
    splits: tuple[str, ...], said: dict[str, Any], found: tuple[str, str, Any, int]
) -> None:
    choices = completed(*splits, **said)
    assert outcome(choices) == found
    # What has been completed is complete.
    assert complete(choices, {"one": splits, "two": splits}, grams_said=True) == choices


def test_module_wise_accuracies_are_searched_for_by_likelihood_unless_the_recipe_says_what_by() -> None:
    module_wise = {"regression": {"mode": "module-wise"}}
    assert completed(*ALL, **module_wise).search.objective == "share-of-expert"
    assert completed(*ALL, accuracies=True).search.objective == "share-of-expert"
    assert completed("validation", "test", accuracies=True).search.objective == "nll"
    said = completed(*ALL, **module_wise, accuracies=True, search={"objective": "share-of-expert"})
    assert said.search.objective == "share-of-expert"
    splits = {"one": ALL, "two": ALL}
    found = completed(*ALL, **module_wise, accuracies=True)
    assert found.search.objective == "nll"
    assert complete(found, splits, grams_said=True, accuracies=True) == found


def test_the_walks_own_strength_is_the_one_number_that_there_is() -> None:
    assert completed(*ALL, regression={"lambda": 0.3}).regression.walk_lambda == 0.3
    assert completed(*ALL, regression={"lambda": 0.3, "walk_lambda": 0.5}).regression.walk_lambda == 0.5
    assert completed("calibration", regression={"walk_lambda": 0.5}).regression.strength == 0.5
    assert completed(*ALL).regression.walk_lambda == 0.1


@pytest.mark.parametrize(
    ("splits", "said", "message"),
    [
        (
            ("test",),
            {"two": ()},
            "'experts': one has test rows and two has none; give test rows to every expert or to none",
        ),
        (ALL, {"two": ("calibration", "test")}, "one has validation rows and two has none"),
        (
            ALL,
            {"two": ("validation", "test")},
            "two has no calibration rows, which Gram matrices from 'activations' need",
        ),
        ((), {"grams": {"source": "activations"}}, "one has no calibration rows"),
        ((), {"grams": {"source": "hybrid"}}, "one has no calibration rows, which Gram matrices from 'hybrid' need"),
        (("calibration",), {"search": {"trials": 3}}, "'search.trials': a search needs validation rows"),
        (("calibration",), {"regression": {"lambda": "search"}}, "'regression.lambda': a search needs validation rows"),
        (ALL, {"regression": {"lambda": "search"}, "search": "none"}, "cannot be searched without trials"),
        (ALL, {"regression": {"lambda": 0.3}, "search": {"trials": 3}}, "this leaves nothing to search"),
        (ALL, {"grams": VECTORS, "regression": {"mode": "propagated"}}, "'regression.mode': .*from 'task-vectors'"),
        ((), {"grams": {"source": "artifact", "path": {"one": "a"}}}, "'grams.path': two has no folder"),
        (ALL, {"regression": {"mode": "module-wise", "rounds": 2}}, "'regression.rounds': only propagated .* walks"),
        (ALL, {"grams": VECTORS, "regression": {"walk_lambda": 0.5}}, "'regression.walk_lambda': only propagated"),
        (ALL, {"regression": {"mode": "none", "rounds": 2}}, "'regression.rounds': only propagated regression walks"),
        (
            ALL,
            {"regression": {"mode": "none", "task_weights": {"one": 2}}},
            "'regression.task_weights': without regression nothing is summed",
        ),
        (
            ("test",),
            {"needs": [("calibration", "'anchor': this")]},
            "'anchor': this needs calibration rows, and one has none",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(splits: tuple[str, ...], said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        completed(*splits, **said)


@pytest.mark.parametrize(
    "value", ["guess", 0, -1, True, float("inf"), float("nan"), {}, {"qkv": 0}, {"qkv": "x"}, [1.0], None]
)
def test_a_prior_strength_is_a_rule_or_positive_numbers(value: Any) -> None:
    with pytest.raises(
        ValueError, match="must be search, evidence, held-out, a positive number, or a positive number for each"
    ):
        RegressionSettings.model_validate({"lambda": value})
