"""The Gram stage: activations, as which experts and shards are missing, who computes them, what is kept.

Between the shards (`bmm.grams.shards`), their sums (`bmm.grams.sums`), the cluster (`bmm.cluster`) and the store. No
worker starts unless a shard is missing. The sources that need no forward pass are `bmm.stages.gram_sources`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bmm.away import patiently, store_at_hand
from bmm.cluster.connection import workers
from bmm.cluster.run import run_all
from bmm.cluster.settings import ClusterSettings
from bmm.grams import store as gram_store
from bmm.grams.memory import whole_bytes
from bmm.grams.settings import sample_in
from bmm.grams.shards import ShardAnswer, ShardRequest, compute_shard, forget, shards_of
from bmm.grams.sums import RunningSum, SumLostError
from bmm.kinds.settings import reading
from bmm.modules.linear import LinearMap
from bmm.prediction import read_split
from bmm.progress import progress, tell
from bmm.sizes import parse_bytes
from bmm.sources import Expert
from bmm.stages.gram_sources import GRAM_VERSION, blended, from_task_vectors, given
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup, setup_of
from bmm.stages.summing import Summing
from bmm.store import Draft, Reference, artefact_key

_ATTEMPTS = 3
"""How often a job is begun whose running sum was damaged meanwhile."""


@dataclass(frozen=True)
class GramJob:
    """One expert's Gram matrices: what they are made from, and the shards that they are the sum of."""

    expert: str
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    shards: tuple[ShardRequest, ...]

    @property
    def key(self) -> str:
        """Key of the `grams` artefact."""
        return artefact_key("grams", GRAM_VERSION, self.inputs, self.settings)


def plan_job(
    work: Work,
    expert: Expert,
    data: Reference,
    maps: Sequence[LinearMap],
    shard_rows: int,
    batch_size: int,
    sample: Mapping[str, Any] | None = None,
    *,
    streamed: bool = False,
) -> GramJob:
    """Describe one expert's Grams; they depend on that expert, its calibration rows and the settings alone.

    With a `sample` (`tokens`, `tokens_seed`) no more of each sequence's tokens count. With `streamed` the expert's
    layers come into memory one at a time, for the same bytes.
    """
    split = read_split(work.read(data), "calibration")
    whole = ShardRequest(
        expert_digest=expert.model.digest,
        split_digest=split.digest,
        start=0,
        stop=len(split.rows),
        reading=reading(expert.task),
        batch_size=batch_size,
        maps=tuple(map_.to_json() for map_ in maps),
        store=work.store.location,
        expert_path=expert.model.path,
        expert_base=expert.model.base,
        data=data.to_json(),
        streamed=streamed,
        **(sample or {}),
    )
    inputs = {"expert": expert.model.digest, "calibration": split.digest}
    settings = {
        "source": "activations",
        "reading": dict(whole.reading),
        "shard_rows": shard_rows,
        "batch_size": batch_size,
        "maps": list(whole.maps),
        **(sample or {}),
    }
    return GramJob(expert.name, inputs, settings, tuple(shards_of(whole, len(split.rows), shard_rows)))


def compute(work: Work, jobs: Sequence[GramJob], cluster: ClusterSettings) -> dict[str, Reference]:
    """Return every job's `grams` artefact, computing the shards that no earlier run has finished."""
    with ExitStack() as locks:
        # Held from the list of what is missing to the removal of the shards: another run, which would find them gone,
        # would compute them again. Always in one order, so that two runs never wait for each other.
        for key in sorted({job.key for job in jobs}):
            locks.enter_context(work.store.locked("gram-job", key))
        return _compute(work, jobs, cluster)


def _compute(work: Work, jobs: Sequence[GramJob], cluster: ClusterSettings) -> dict[str, Reference]:
    store, seconds = work.store, cluster.retry_seconds
    # Experts with the same weights and rows are one job.
    running = {job.key: RunningSum(store, job.expert, job.shards) for job in jobs}
    left = [key for key in running if store.fresh or store.find("grams", key) is None]
    if store.fresh:
        for one in running.values():
            patiently(one.clear, seconds)
    counts: dict[str, dict[str, int]] = {}
    made: dict[str, Reference] = {}
    for attempt in range(_ATTEMPTS):
        _collect(work, [running[key] for key in left], cluster)
        for job in jobs:
            if job.expert in made:
                continue
            try:
                # The store may go away here as well as under a worker.
                made[job.expert] = patiently(partial(_sum, work, job, running[job.key], counts), seconds)
            except SumLostError:
                if attempt == _ATTEMPTS - 1:
                    raise
        left = list(dict.fromkeys(job.key for job in jobs if job.expert not in made))
        if not left:
            break
    _tell_counts(counts.values())
    return {job.expert: made[job.expert] for job in jobs}


def _collect(work: Work, sums: Sequence[RunningSum], cluster: ClusterSettings) -> None:
    """Have the workers compute the shards that are missing, and add up, in the meantime, those that are there."""
    for running in sums:
        patiently(running.resume, cluster.retry_seconds)
    missing = [(running, index) for running in sums for index in running.missing()]
    try:
        with Summing(cluster.retry_seconds) as summing:
            for running in sums:
                summing.take(running)
            if missing:
                _ask(missing, summing, cluster)
    except BaseException:
        # One shard's error ends the workers in the middle of others.
        work.store.remove_leftovers()
        raise


def _ask(missing: Sequence[tuple[RunningSum, int]], summing: Summing, cluster: ClusterSettings) -> None:
    requests = [vars(running.shards[index]) for running, index in missing]

    def landed(place: int, answer: ShardAnswer) -> None:
        running, index = missing[place]
        running.note(index, answer.reference, answer.attempts)
        summing.take(running)

    rows = sum(_rows(request) for request in requests)
    with progress("collecting Gram matrices", rows, "rows") as bar, workers(cluster) as reached:
        run_all(reached, compute_shard, requests, bar, steps=_rows, landed=landed)
        if cluster.scheduler is not None:
            # Its workers live on, and are asked for other things.
            reached.everywhere(forget)


def _tell_counts(counts: Iterable[Mapping[str, int]]) -> None:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    computed, again, found = (total[name] for name in ("computed", "again", "found"))
    if again or found:
        tell(f"Gram shards: {computed} computed, {again} begun again, {found} found.")


def _rows(shard: Mapping[str, Any]) -> float:
    return float(shard["stop"] - shard["start"])


def _sum(work: Work, job: GramJob, running: RunningSum, counts: MutableMapping[str, dict[str, int]]) -> Reference:
    """Return the sum of a job's shards.

    Args:
        work: the way to the store.
        job: says what they are.
        running: their sum, as far as it has been made.
        counts: is given what came of the job's shards, by expert, if they are summed now.
    """

    def make(draft: Draft) -> None:
        provenance = {**job.inputs, **job.settings, "shards": running.keys}
        gram_store.write(draft.path / "grams.zarr", running.total(), provenance, statistic=_statistic(job.settings))
        draft.provenance["shards"] = counts[job.expert] = counted(running.begun)

    with store_at_hand(work.store, Reference.from_json(job.shards[0].data)):
        reference = work.obtain("grams", job.inputs, make, settings=job.settings, version=GRAM_VERSION)
    # The shards are summed and the sum is durable: they have done their work.
    running.clear()
    return reference


def _statistic(settings: Mapping[str, Any]) -> str:
    if "tokens" not in settings:
        return gram_store.STATISTIC
    return f"{gram_store.STATISTIC}, of at most {settings['tokens']} tokens a sequence"


def counted(attempts: Sequence[int]) -> dict[str, int]:
    """Count shards by how often they were begun, found ones not at all.

    Returns:
        `computed`: shards that this run computed; `again`: attempts beyond the first; `found`: shards that were there.
    """
    computed = [count for count in attempts if count]
    return {"computed": len(computed), "again": sum(computed) - len(computed), "found": len(attempts) - len(computed)}


def grams(work: Work, request: Request) -> dict[str, Any]:
    """Make every expert's Gram matrices, from the source that the recipe names; none where nothing reads them.

    Raises:
        ClusterError: the Dask workers failed for good.
        RecipeError: matrices that were made elsewhere do not fit these experts.
    """
    if request.settings["source"] == "none":
        return {"experts": {}}
    setup = setup_of(work, request)
    match request.settings["source"]:
        case "task-vectors":
            made = from_task_vectors(work, setup)
        case "hybrid":
            parts = {"activations": _from_activations(work, request, setup)}
            parts["task-vectors"] = from_task_vectors(work, setup)
            options = {"rho": request.settings["rho"], **sample_in(request.settings)}
            made = blended(work, setup, parts["activations"], parts["task-vectors"], options)
            # A search for the share of each needs them apart.
            return {"experts": _said(made), "parts": {source: _said(part) for source, part in parts.items()}}
        case "artifact":
            made = given(work, request, setup)
        case _:
            made = _from_activations(work, request, setup)
    return {"experts": _said(made)}


def _said(made: Mapping[str, Reference]) -> dict[str, dict[str, str]]:
    return {name: reference.to_json() for name, reference in made.items()}


def _from_activations(work: Work, request: Request, setup: Setup) -> dict[str, Reference]:
    """Collect the Grams of every expert over its own calibration rows."""
    readers = list({map_.input_group: map_ for map_ in reversed(setup.regressed)}.values())[::-1]
    cluster = ClusterSettings.model_validate(request.where["cluster"])
    weights = sum(math.prod(parameter.shape) for parameter in setup.layout.shared)
    streamed = whole_bytes(weights, [map_.inputs for map_ in readers]) > parse_bytes(cluster.memory_limit)
    jobs = [
        plan_job(
            work,
            expert,
            Reference.from_json(request.inputs["experts"][expert.name]),
            readers,
            request.settings["shard_rows"],
            request.settings["batch_size"],
            sample_in(request.settings),
            streamed=streamed,
        )
        for expert in setup.experts
    ]
    return compute(work, jobs, cluster)
