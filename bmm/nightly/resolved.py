"""What a night works on: every expert found, fingerprinted or left out, and all of it held fast for the whole night.

What is found once is kept in the store under the run's name, so that a retry of the run goes on with the very same
versions; stages that open a file look whether it is still the one that was fingerprinted. No weight is read and
nothing heavy is imported here: a night without news ends on what this module finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmm.digest import digest_json
from bmm.discovery import expand
from bmm.errors import ModelAwayError, OutputError, RecipeError, UserError
from bmm.nightly.settings import Nightly
from bmm.pipeline import STAGES
from bmm.recipe import ExpertSource, Recipe, explain
from bmm.recipe_file import read_mapping
from bmm.sources import (
    Expert,
    Inputs,
    check_output,
    fingerprint_expert,
    fingerprint_model,
    resolve_expert,
    with_experts,
)
from bmm.stages.request import version_of
from bmm.store import Draft, Store, artefact_key

_KIND = "night"
_VERSION = 1
_FILE = "night.json"
# How a merge is carried out, and what others are told of it, changes nothing of its model.
_NOT_IN_SIGNATURE = {"experts", "cluster", "tracking", "base_model"}


@dataclass(frozen=True)
class Resolved:
    """A night's recipe with its experts, all of them versions and digests by now.

    `left_out` holds, by name, what is wrong with experts that cannot be used.
    """

    recipe: Recipe
    inputs: Inputs
    left_out: Mapping[str, str]

    @property
    def nightly(self) -> Nightly:
        """What the recipe says of its nights."""
        return self.recipe.nightly or Nightly()

    @property
    def place(self) -> Place:
        """Where the model stands."""
        return _place(self.nightly, self.recipe.folder, self.recipe.output)

    @property
    def signature(self) -> str:
        """Equal for two nights on which there is nothing to do but what was done."""
        said = {key: value for key, value in self.recipe.document().items() if key not in _NOT_IN_SIGNATURE}
        anchor = self.inputs.anchor
        return digest_json(
            {
                "recipe": said,
                "gate": self.nightly.gate.model_dump(mode="json"),
                "versions": {stage: version_of(stage) for stage in STAGES},
                "base": self.inputs.base.digest,
                "anchor": anchor.digest if anchor else None,
                "grams": {name: grams.digest for name, grams in self.inputs.grams.items()},
                "experts": [[one.name, one.model.digest, one.task, one.data] for one in self.inputs.experts],
                "left_out": dict(self.left_out),
            }
        )

    def without(self, broken: Mapping[str, str]) -> Resolved:
        """Return the night without some experts that turned out to be broken.

        Raises:
            RecipeError: fewer than two experts are left.
            UserError: the recipe cannot do without one of them.
        """
        if not broken:
            return self
        left_out = {**self.left_out, **broken}
        experts = [one for one in self.inputs.experts if one.name not in broken]
        recipe = _with(self.recipe, [one for one in self.recipe.experts if one.name not in broken], left_out)
        return Resolved(recipe, replace(self.inputs, experts=tuple(experts)), left_out)

    def to_json(self) -> dict[str, Any]:
        """Return the night as plain JSON values."""
        return {
            "recipe": self.recipe.document(),
            "nightly": self.nightly.model_dump(mode="json"),
            "folder": str(self.recipe.folder),
            "inputs": self.inputs.to_json(),
            "left_out": dict(self.left_out),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Resolved:
        """Read a night back from `to_json`'s values."""
        said = {**value["recipe"], "nightly": value["nightly"]}
        recipe = Recipe.from_mapping(said, folder=value["folder"])
        return cls(recipe, Inputs.from_json(value["inputs"]), dict(value["left_out"]))

    def rows(self) -> list[dict[str, Any]]:
        """Return one line for each model that the night works on, and for each that it leaves out."""
        found = [
            {
                "what": what,
                "from": model.source,
                "version": model.revision or "",
                "digest": model.digest[:12],
                "state": "used",
            }
            for what, model in [("base", self.inputs.base), *((one.name, one.model) for one in self.inputs.experts)]
        ]
        out = [
            {"what": name, "from": "", "version": "", "digest": "", "state": f"left out: {why}"}
            for name, why in self.left_out.items()
        ]
        return found + out


@dataclass(frozen=True)
class Place:
    """Where a recipe's model stands: its name in the registry, and the folder that holds the champion."""

    model: str
    output: Path
    nightly: Nightly

    @property
    def candidate(self) -> Path:
        """The folder that holds what the last night merged, whether it became the champion or not."""
        return self.output.with_name(f"{self.output.name}-candidate")


def place_of(path: Path) -> Place:
    """Read of a recipe no more than where its model stands, whatever became of its experts.

    Raises:
        RecipeError: the file is no recipe.
    """
    said = read_mapping(path)
    output = said.get("output")
    if not isinstance(output, str):
        raise RecipeError(f"{path}: the key 'output' is missing; add it")
    return _place(_nightly(said, path), path.resolve().parent, output)


def _place(nightly: Nightly, folder: Path, output: str) -> Place:
    target = (folder / Path(output).expanduser()).resolve()
    words = f"{folder.name}-{target.name}"
    default = "".join(one if one.isalnum() or one in "_- " else "-" for one in words)[:120]
    return Place(nightly.model or default, target, nightly)


def _nightly(said: Mapping[str, Any], path: Path) -> Nightly:
    try:
        return Nightly.model_validate(said.get("nightly") or {})
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, 'nightly')}") from None


def resolve_night(path: Path) -> Resolved:
    """Find everything that a recipe names now, and take its digests; leave out what cannot be used if it says so.

    Raises:
        UserError: the recipe is none, or what is left cannot be merged.
        ModelAwayError: a server that a model is on does not answer.
    """
    said = read_mapping(path)
    folder, broken = path.resolve().parent, dict[str, str]()
    nightly = _nightly(said, path)
    try:
        value = expand(said, folder, broken)
        experts = _readable(value.get("experts"), broken)
        recipe = Recipe.from_mapping({**value, "experts": experts}, folder=folder, where=str(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error)}") from None
    recipe = recipe.model_copy(update={"nightly": nightly})
    check_output(recipe)
    base = fingerprint_model(recipe.base_model, folder, "base_model")
    found: list[Expert] = []
    for expert in recipe.experts:
        try:
            found.append(fingerprint_expert(expert, resolve_expert(expert, recipe), recipe, base))
        except (ModelAwayError, OutputError):
            # Nothing is known of the expert.
            raise
        except UserError as error:
            broken[expert.name] = str(error)
    if broken and nightly.broken == "stop":
        raise RecipeError(f"{_told(broken)}; mend it, or let the night go on without (nightly.broken: leave-out)")
    left = {expert.name for expert in found}
    recipe = _with(recipe, [expert for expert in recipe.experts if expert.name in left], broken)
    return Resolved(recipe, with_experts(recipe, base, found), broken)


def hold(store: Store, run: str, resolved: Resolved) -> Resolved:
    """Keep what a run works on, and return what is kept of it: that of its first attempt."""
    key = _key(run)
    kept, _ = store.obtain(_KIND, key, lambda draft: _write(draft, resolved), describe={"run": run})
    return Resolved.from_json(store.read(kept).read_json(_FILE))


def held(store: Store, run: str) -> Resolved | None:
    """Return what an earlier attempt of a run works on, None if there was none."""
    kept = store.find(_KIND, _key(run))
    return None if kept is None else Resolved.from_json(store.read(kept).read_json(_FILE))


def _key(run: str) -> str:
    return artefact_key(_KIND, _VERSION, {"run": run}, None)


def _write(draft: Draft, resolved: Resolved) -> None:
    draft.write_json(_FILE, resolved.to_json())


def _readable(entries: Any, broken: dict[str, str]) -> Any:
    """Return the experts whose lines can be read, and note the others."""
    if not isinstance(entries, list | tuple):
        return entries
    readable = []
    for entry in entries:
        try:
            ExpertSource.model_validate(entry)
            readable.append(entry)
        except ValidationError as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                return entries
            broken[name] = explain(error)
    return readable


def _with(recipe: Recipe, experts: list[ExpertSource], broken: Mapping[str, str]) -> Recipe:
    """Return a recipe with only some of its experts.

    Raises:
        RecipeError: these are too few.
        UserError: the recipe cannot do without the others.
    """
    if len(experts) < 2:
        raise RecipeError(f"fewer than two experts can be used: {_told(broken)}; mend or replace it")
    if len(experts) == len(recipe.experts):
        return recipe
    said = {**recipe.document(), "experts": [expert.model_dump(mode="json") for expert in experts]}
    nightly = None if recipe.nightly is None else recipe.nightly.model_dump(mode="json")
    return Recipe.from_mapping({**said, "nightly": nightly}, folder=recipe.folder)


def _told(broken: Mapping[str, str]) -> str:
    return "; ".join(f"{name} is broken ({why})" for name, why in broken.items()) or "the recipe names no others"
