"""What each stage is asked for, given a recipe, its inputs and the results so far: pure functions, no work.

This is where the recipe is cut into the parts that each stage depends on, so it decides what is computed again when
something changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmm.grams.settings import sample_in
from bmm.recipe import Recipe
from bmm.search.plan import ANCHOR_TRIAL, ELECTION, PROPOSALS, RACES
from bmm.sources import Inputs
from bmm.stages.request import Request, Result

HEAD_ROWS = 2
"""Version of the rows on which heads of text models are fitted; once those of decoders were kept."""
OUTPUT_HEAD = 2
"""Version of a walk's sums of a language model's output head; once they were of the experts' answers."""
_LANGUAGE_MODELS = ("causal-lm", "seq2seq-lm", "lm-eval")
_HEADS_OF_TEXTS = ("text-classification", "text-regression")
_HALVES = ("bfloat16", "float16")
"""Of a recipe's dtypes, those in which a head is not what its expert or the fit has."""

Results = Mapping[str, Result]


class Requests:
    """The requests of one merge.

    Args:
        recipe: what the user asked for.
        inputs: what it names, fingerprinted.
        grams: make Gram matrices even where nothing in the merge reads them.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, *, grams: bool = False) -> None:
        self.recipe = recipe
        self.inputs = inputs
        self._with_grams = grams or recipe.reads_grams

    def build(self, stage: str, results: Results) -> Request:
        """Return the request of a stage, given the results of the stages before it."""
        match stage:
            case "experts":
                return self._experts()
            case "task-vectors":
                return self._request(stage, results, {})
            case "grams":
                return self._grams(results)
            case "anchor":
                anchor = self.inputs.anchor
                given: dict[str, Any] = {"checkpoint": anchor.digest} if anchor else {}
                if self.recipe.anchor.needs == "gram":
                    given["grams"] = results["grams"].outputs["experts"]
                elif self.recipe.anchor.needs == "fisher" or self.recipe.anchor.chooses_scale:
                    given["experts"] = results["experts"].outputs["experts"]
                if self.recipe.anchor.ordered:
                    given["order"] = self._order()
                settings: dict[str, Any] = {"anchor": self.recipe.anchor.said()}
                if self.recipe.anchor.chooses_scale:
                    settings["batch_size"] = self.recipe.evaluation.batch_size
                located = {"anchor": anchor.to_json() if anchor else None}
                return self._request(stage, results, given, settings, located)
            case "search":
                return self._search(results)
            case "evaluate":
                given = {**self._solved_from(results), "search": results["search"].outputs["search"]}
                if "dare" in self.recipe.evaluation.compare:
                    given["order"] = self._order()
                evaluation = self.recipe.evaluation.model_dump(mode="json")
                settings = {
                    "evaluation": evaluation,
                    "anchor": self.recipe.anchor.said(),
                    "grams": self.recipe.grams.source,
                    "batch_size": evaluation["batch_size"],
                }
                return self._request(stage, results, given, settings)
            case "publish":
                given = {"experts": results["experts"].outputs["experts"]}
                settings = {"dtype": self.recipe.dtype, "max_shard_size": self.recipe.max_shard_size}
                settings |= self._head_dtype()
                if not self.recipe.anchor_alone:
                    given["search"] = results["search"].outputs["search"]
                    return self._request(stage, results, given, settings)
                anchor = self.inputs.anchor
                given |= {"checkpoint": anchor.digest} if anchor else {}
                given |= {"order": self._order()} if self.recipe.anchor.ordered else {}
                settings["anchor"] = self.recipe.anchor.said()
                return self._request(stage, results, given, settings, {"anchor": anchor.to_json() if anchor else None})
        raise ValueError(f"there is no stage '{stage}'")

    def _experts(self) -> Request:
        experts = {
            expert.name: {"model": expert.model.digest, "task": expert.task, "data": expert.data}
            for expert in self.inputs.experts
        }
        where = {
            **self._models(),
            "tasks": [
                source.task.model_dump(mode="json") if source.task else dict(expert.task)
                for source, expert in zip(self.recipe.experts, self.inputs.experts, strict=True)
            ],
            "folder": str(self.recipe.folder),
        }
        return Request("experts", {"base": self.inputs.base.digest, "experts": experts}, {}, where)

    def _cluster(self) -> dict[str, Any]:
        """Return the cluster's settings, paths taken from the recipe's folder as everywhere."""
        found = self.recipe.cluster.model_dump(mode="json")
        if found["slurm"] is not None and found["slurm"]["logs"] is not None:
            found["slurm"]["logs"] = str(self.recipe.resolve(found["slurm"]["logs"]))
        return found

    def _grams(self, results: Results) -> Request:
        if not self._with_grams:
            return self._request("grams", results, {}, {"source": "none"})
        # Where matrices that were made elsewhere lie does not count, only what they are.
        settings = self.recipe.grams.model_dump(mode="json", exclude={"path"})
        given: dict[str, Any] = {}
        where: dict[str, Any] = {}
        if self.recipe.grams.source in ("activations", "hybrid"):
            given["experts"] = results["experts"].outputs["experts"]
            where["cluster"] = self._cluster()
        if self.inputs.grams:
            given["given"] = {name: grams.digest for name, grams in self.inputs.grams.items()}
            where["given"] = {name: grams.to_json() for name, grams in self.inputs.grams.items()}
        return self._request("grams", results, given, settings, where)

    def _request(
        self,
        stage: str,
        results: Results,
        given: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> Request:
        models = {
            "base": self.inputs.base.digest,
            "models": {expert.name: expert.model.digest for expert in self.inputs.experts},
            "layout": results["experts"].outputs["layout"],
        }
        return Request(stage, {**models, **given}, dict(settings or {}), {**self._models(), **(where or {})})

    def _models(self) -> dict[str, Any]:
        return {
            "base": self.inputs.base.to_json(),
            "experts": [expert.to_json() for expert in self.inputs.experts],
        }

    def _head_dtype(self) -> dict[str, str]:
        # Once heads had their expert's dtype, and fitted ones float32, in a merge of any dtype.
        return {"head_dtype": self.recipe.dtype} if self.recipe.dtype in _HALVES else {}

    def _output_head(self) -> dict[str, int]:
        kinds = {expert.task.kind for expert in self.recipe.experts if expert.task}
        return {} if kinds.isdisjoint(_LANGUAGE_MODELS) else {"output_head": OUTPUT_HEAD}

    def _head_rows(self) -> dict[str, int]:
        kinds = {expert.task.kind for expert in self.recipe.experts if expert.task}
        fitted = self.recipe.regression.fits_heads is not None and not kinds.isdisjoint(_HEADS_OF_TEXTS)
        return {"head_rows": HEAD_ROWS} if fitted else {}

    def _order(self) -> list[str]:
        return [expert.name for expert in self.inputs.experts]

    def _solved_from(self, results: Results) -> dict[str, Any]:
        return {
            "anchor": results["anchor"].outputs["anchor"],
            "grams": results["grams"].outputs["experts"],
            "experts": results["experts"].outputs["experts"],
        }

    def _search(self, results: Results) -> Request:
        search, regression = self.recipe.search, self.recipe.regression
        settings: dict[str, Any] = {
            "search": search.model_dump(mode="json"),
            "regression": regression.settings(),
            "minimum_coverage": self.recipe.coverage.minimum,
            "dtype": self.recipe.dtype,
            **self._head_dtype(),
        }
        given = self._solved_from(results)
        if regression.mode == "propagated":
            # The walk has its own.
            del given["grams"]
            settings |= sample_in(vars(self.recipe.grams)) | self._output_head()
        elif search.searches("rho"):
            given["gram_parts"] = results["grams"].outputs["parts"]
            settings["rho"] = getattr(self.recipe.grams, "rho", None)
        if search.trials and search.searcher in ("bayesian", "saas"):
            settings["proposals"] = PROPOSALS
        if search.trials and search.racing and (search.floors or search.also):
            settings["races"] = RACES
        if search.trials and search.objective != "share-of-expert":
            settings["election"] = ELECTION
        if search.trials and settings["regression"].get("rounds", 1) > 1:
            # Once the anchor's trial was the model of the round before.
            settings["anchor_trial"] = ANCHOR_TRIAL
        if not search.trials:
            # The settings of the search do not count where there is none, but for what the evidence asks of them.
            kept = {"per", "trials"} | ({"log10_lambda"} if regression.strength == "evidence" else set())
            settings["search"] = search.model_dump(mode="json", include=kept)
        if search.trials or regression.mode == "propagated" or regression.fits_heads is not None:
            settings["batch_size"] = self.recipe.evaluation.batch_size
            settings |= self._head_rows()
        elif not self._head_dtype():
            # No row is read, and no head.
            del given["experts"]
        where = {"cluster": self._cluster()}
        return self._request("search", results, given, settings, where)
