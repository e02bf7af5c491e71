from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax

from bmm.errors import UserError
from bmm.evaluation.calibration import MEASURES
from bmm.kinds.text_classification import TextClassificationKind
from bmm.pipeline import merge
from bmm.plan import cached_results
from bmm.prediction import read_split
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.sampling import Sampler
from bmm.search.setting import Setting
from bmm.sources import fingerprint_inputs, fingerprint_model
from bmm.stages.request import Request, Result, Work
from bmm.stages.sample import Draws, evaluate_samples, require_output, require_regression
from bmm.store import Reference, Store


class Finished:
    """A finished merge: its recipe, the way to its store, and its search."""

    def __init__(self, folder: Path) -> None:
        self.recipe = Recipe.from_yaml(folder / "recipe.yaml")
        self.work = Work(Store.open(folder / "store"))
        self.inputs = fingerprint_inputs(self.recipe)
        self.results: dict[str, Result] = cached_results(self.recipe, self.inputs, self.work.store)
        requests = Requests(self.recipe, self.inputs)
        self.request: Request = requests.build("search", self.results)
        self.rows: Request = requests.build("evaluate", self.results)
        self.search: Reference = self.results["search"].reference("search")

    def draws(self) -> Draws:
        return Draws(self.work, self.request, self.search)

    def measured(self, count: int, *, split: str = "test", seed: int = 0):
        asked = (self.request, self.rows, self.search, self.recipe.evaluation)
        return evaluate_samples(self.work, *asked, split, count, seed)


def test_draws_lie_around_the_published_model(merged: Path) -> None:
    finished = Finished(merged)
    draws = finished.draws()
    mean = draws.mean()
    # Without noise the posterior gives the published weights again, byte for byte.
    still = Sampler(draws._assembler, draws._settings, {}).weights(0, 0)
    assert all(torch.equal(tensor, mean[name]) for name, tensor in still.items())
    first = draws.state(0, 0)
    assert first.keys() == mean.keys()
    moved = {name for name in mean if not torch.equal(first[name], mean[name])}
    assert moved
    assert moved <= still.keys()
    # What was drawn before does not matter, nor does which process draws.
    again = finished.draws()
    again.state(0, 3)
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.state(0, 0).items())
    for other in ((1, 0), (0, 1)):
        assert any(not torch.equal(tensor, first[name]) for name, tensor in draws.state(*other).items())
        assert draws.identity(*other) != draws.identity(0, 0)


def test_what_the_walk_has_solved_is_what_its_moments_say(merged: Path) -> None:
    assembler = Finished(merged).draws()._assembler
    for module, problem in assembler.problems.items():
        lam = assembler.walked[module]
        solved = assembler.solve(module, Setting(lam, 1.0))
        torch.testing.assert_close(solved.solution, problem.posterior.mean(lam).float(), rtol=1e-5, atol=1e-6)
        assert solved.condition == pytest.approx(problem.posterior.condition(lam), rel=2e-3)


def test_the_noise_has_the_width_that_it_says(merged: Path) -> None:
    """The mean of 40 draws' squared deviations is within five standard errors of the closed form."""
    draws = Finished(merged).draws()
    sampler, noise = draws._sampler, draws.noise
    still = Sampler(draws._assembler, draws._settings, {}).weights(0, 0)
    some = [sampler.weights(7, index) for index in range(40)]
    for module, problem in draws._assembler.problems.items():
        if module not in noise:
            continue
        relative, gamma = noise[module].relative, draws._settings[module].gamma
        assert relative is not None
        lam = draws._settings[module].lam
        wide = relative * gamma * float((problem.posterior.mean(lam) - problem.base.double()).norm())
        names = [name for name in still if name.rpartition(".")[0] == module]
        squares = [
            sum(float((one[name].double() - still[name].double()).square().sum()) for name in names) for one in some
        ]
        error = 5 * np.std(squares) / np.sqrt(len(squares))
        assert np.mean(squares) == pytest.approx(wide**2, abs=error), module


@pytest.mark.slow
def test_draws_of_a_module_wise_merge_leave_biases_alone(
    merged: Path, edit_recipe: Callable[..., Path], in_process: None
) -> None:
    recipe = Recipe.from_yaml(edit_recipe(merged, regression={"mode": "module-wise"}, evaluation={"compare": []}))
    merge(recipe, store=merged / "store")
    draws = Finished(merged).draws()
    mean, one = draws.mean(), draws.state(0, 0)
    still = Sampler(draws._assembler, draws._settings, {}).weights(0, 0)
    assert all(torch.equal(tensor, mean[name]) for name, tensor in still.items())
    moved = {name for name in mean if not torch.equal(one[name], mean[name])}
    assert moved
    assert all(name.endswith(".weight") for name in moved)


def test_measures_are_those_of_averaged_probabilities(merged: Path) -> None:
    finished = Finished(merged)
    found, draws = finished.measured(2), finished.draws()
    answers = {}
    for artefact in (merged / "store" / "artefacts" / "predictions").iterdir():
        made = json.loads((artefact / "manifest.json").read_text(encoding="utf-8"))["made_from"]["inputs"]
        logits = load_file(artefact / "logits.safetensors")["logits"].numpy().astype(np.float64)
        answers[made["encoder"], made["head"], made["rows"]] = softmax(logits, axis=1)
    for expert in finished.inputs.experts:
        experts = finished.results["experts"].reference("experts", expert.name)
        test = read_split(finished.work.read(experts), "test")
        labels = np.array([row.label for row in test.rows])
        drawn = [answers[draws.identity(0, index), expert.model.digest, test.digest] for index in range(2)]
        averaged = np.mean(drawn, axis=0)
        entry = found["before"]["tasks"][expert.name]["sampled"]
        assert entry["nll"]["value"] == pytest.approx(-np.log(averaged[np.arange(len(labels)), labels]).mean())
        assert entry["accuracy"]["value"] == np.mean(averaged.argmax(axis=1) == labels)


def test_the_temperature_never_sees_the_test_rows(merged: Path) -> None:
    finished = Finished(merged)
    on_test, on_validation = finished.measured(2), finished.measured(2, split="validation")
    assert on_test["temperature"] == on_validation["temperature"]
    # It was fitted there: on the validation rows it cannot make the likelihood worse.
    for model in ("posterior_mean", "sampled"):
        before, after = (on_validation[when]["mean"][model]["nll"]["value"] for when in ("before", "after"))
        assert after <= before + 1e-9
        assert on_test["before"]["mean"][model]["accuracy"] == on_test["after"]["mean"][model]["accuracy"]
    assert set(on_test["after"]["mean"]["difference"]) == set(MEASURES)


def test_asking_again_computes_nothing(merged: Path) -> None:
    first = Finished(merged)
    found = first.measured(3)
    again = Finished(merged)
    assert again.measured(3) == found
    fewer = again.measured(2)
    assert again.work.made == 0
    assert fewer["before"]["mean"]["posterior_mean"] == found["before"]["mean"]["posterior_mean"]
    assert again.measured(3, seed=1)["before"]["mean"]["sampled"] != found["before"]["mean"]["sampled"]
    assert again.work.made > 0


def test_estimated_grams_give_no_width(merged: Path, edit_recipe: Callable[..., Path], in_process: None) -> None:
    path = edit_recipe(merged, grams={"source": "task-vectors"}, evaluation={"compare": []})
    merge(Recipe.from_yaml(path), store=merged / "store")
    with pytest.raises(UserError, match="task vectors"):
        Finished(merged).measured(2)


def test_a_task_without_classes_is_refused_before_any_work(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Finished(merged)
    # What a kind of task says that is not one of classes.
    monkeypatch.setattr(TextClassificationKind, "classes", False)
    with pytest.raises(UserError, match="task0 is not one of choosing a class"):
        finished.measured(2)
    assert finished.work.made == 0


def test_only_the_merges_own_output_has_a_posterior(merged: Path) -> None:
    finished = Finished(merged)
    own = fingerprint_model(str(merged / "merged"), merged, "MODEL")
    require_output(finished.work, own, finished.results["publish"])
    with pytest.raises(UserError, match="bmm merge"):
        require_output(finished.work, own, None)
    other = fingerprint_model(str(merged / "base"), merged, "MODEL")
    with pytest.raises(UserError, match="not its output"):
        require_output(finished.work, other, finished.results["publish"])


def test_without_regression_there_is_no_posterior_to_draw_from() -> None:
    require_regression("propagated")
    with pytest.raises(UserError, match=r"'regression\.mode: none' there is none"):
        require_regression("none")
