"""Gram matrices that no forward pass makes: from task vectors, blended, or made elsewhere.

Reads weights and other artefacts and writes `grams` artefacts, one an expert; the matrices themselves are
`bmm.grams.estimate`, folders from elsewhere `bmm.grams.published`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from bmm.errors import RecipeError
from bmm.grams import estimate
from bmm.grams import store as gram_store
from bmm.grams.collect import GramSum
from bmm.grams.published import GROUP, KIND, PublishedGrams, copy
from bmm.grams.store import GramReader
from bmm.modules.linear import LinearMap
from bmm.progress import Bar, progress
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.store import Draft, Reference
from bmm.weights import ExpertWeights

GRAM_VERSION = 3


def from_task_vectors(work: Work, setup: Setup) -> dict[str, Reference]:
    """Estimate every expert's Grams from its task vectors; they depend on base, expert and maps alone."""
    groups = _groups(setup)
    made = {}
    with setup.weights() as weights, progress("estimating Gram matrices", len(setup.experts) * len(groups)) as bar:
        for index, expert in enumerate(setup.experts):
            inputs = {"base": setup.base.digest, "expert": expert.model.digest}
            settings = {
                "source": "task-vectors",
                "groups": {group: [map_.to_json() for map_ in members] for group, members in groups.items()},
            }

            def make(draft: Draft, index: int = index, said: Mapping[str, object] = {**inputs, **settings}) -> None:
                gram_store.write(
                    draft.path / GROUP,
                    _estimates(weights, index, groups, bar),
                    said,
                    statistic="rows times the normalised product of the task vectors",
                )

            made[expert.name] = work.obtain(KIND, inputs, make, settings=settings, version=GRAM_VERSION)
    return made


def _estimates(
    weights: ExpertWeights, index: int, groups: Mapping[str, list[LinearMap]], bar: Bar
) -> Iterator[tuple[str, GramSum]]:
    for group, members in sorted(groups.items()):
        yield group, estimate.from_task_vectors(_task_vector(weights, index, map_) for map_ in members)
        bar.advance()


def _task_vector(weights: ExpertWeights, index: int, map_: LinearMap) -> torch.Tensor:
    return map_.matrix(partial(weights.expert, index), bias=False) - map_.matrix(weights.base, bias=False)


def blended(
    work: Work,
    setup: Setup,
    activations: Mapping[str, Reference],
    vectors: Mapping[str, Reference],
    options: Mapping[str, Any],
) -> dict[str, Reference]:
    """Blend every expert's Grams of activations with those of its task vectors.

    The `options` are the activations' share, `rho`, and the sample of tokens that they are of, if it is one.
    """
    groups = sorted(_groups(setup))
    made = {}
    for expert in setup.experts:
        parts = {"activations": activations[expert.name], "task-vectors": vectors[expert.name]}
        inputs = {"expert": expert.model.digest, **{name: part.digest for name, part in parts.items()}}
        settings = {"source": "hybrid", **options, "groups": groups}

        def make(
            draft: Draft,
            parts: Mapping[str, Reference] = parts,
            said: Mapping[str, object] = {**inputs, **settings},
        ) -> None:
            own, other = (GramReader(work.read(part).file(GROUP)) for part in parts.values())
            blends = ((group, estimate.blend(own.sum(group), other.sum(group), options["rho"])) for group in groups)
            gram_store.write(
                draft.path / GROUP, blends, said, statistic="sum of outer products, blended with the task vectors"
            )

        made[expert.name] = work.obtain(KIND, inputs, make, settings=settings, version=GRAM_VERSION)
    return made


def given(work: Work, request: Request, setup: Setup) -> dict[str, Reference]:
    """Take copies of Gram matrices that were made elsewhere, checked against these experts.

    Raises:
        RecipeError: a folder is damaged, was made from another expert, or lacks a matrix or has one of another size.
    """
    sizes = {group: members[0].inputs for group, members in sorted(_groups(setup).items())}
    made = {}
    with progress("copying Gram matrices", len(setup.experts)) as bar:
        for expert in setup.experts:
            found = PublishedGrams(**request.where["given"][expert.name])
            where = f"the Gram matrices of {expert.name}"

            def make(
                draft: Draft, found: PublishedGrams = found, where: str = where, digest: str = expert.model.digest
            ) -> None:
                copy(found, draft.path, where)
                _check(GramReader(draft.path / GROUP), digest, sizes, f"{where}: {found.path}")

            inputs = {"digest": found.digest, "expert": expert.model.digest}
            settings = {"source": "artifact", "groups": sizes}
            made[expert.name] = work.obtain(KIND, inputs, make, settings=settings, version=GRAM_VERSION)
            bar.advance()
    return made


def _check(reader: GramReader, expert: str, sizes: Mapping[str, int], where: str) -> None:
    """Refuse matrices that do not fit the expert."""
    recorded = reader.provenance.get("expert")
    if recorded is not None and recorded != expert:
        raise RecipeError(
            f"{where} was made from another expert (digest {str(recorded)[:12]}, this one has {expert[:12]}); "
            "publish it again from this expert"
        )
    names = set(reader.names())
    for group, size in sizes.items():
        if group not in names:
            raise RecipeError(f"{where} has no matrix for the input of {group}; publish it again from this expert")
        if reader.size(group) != size:
            raise RecipeError(
                f"{where} has a matrix of size {reader.size(group)} for the input of {group}, which has {size} "
                "features; publish it again from this expert"
            )


def _groups(setup: Setup) -> dict[str, list[LinearMap]]:
    """Return the regressed maps by the input that they read."""
    groups: dict[str, list[LinearMap]] = {}
    for map_ in setup.regressed:
        groups.setdefault(map_.input_group, []).append(map_)
    return groups
