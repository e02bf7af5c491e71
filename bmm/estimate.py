"""How much memory and disk each stage of a merge takes, from the outline of its base and the recipe alone.

No weight is read, and nothing is measured. The walk of propagated regression and the Gram stage are estimated from
the sizes of the linear maps' inputs; how exact that is, is measured by the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from bmm.anchors.memory import anchor_bytes
from bmm.checkpoint.mapped import MOST_BYTES
from bmm.cluster.settings import in_flight
from bmm.errors import RecipeError
from bmm.grams.blocks import most_held
from bmm.grams.memory import PROCESS_BYTES, streamed_bytes, whole_bytes
from bmm.grams.settings import ArtifactGrams, HybridGrams, TaskVectorGrams, sample_in
from bmm.kinds.settings import ZeroShotImageClassification
from bmm.outline import Outline
from bmm.recipe import Recipe
from bmm.regression.room import room_for_answers, without_answers
from bmm.sizes import parse_bytes, readable_bytes

_FLOAT32, _FLOAT64 = 4, 8
_HEADLESS = {None, "causal-lm", "seq2seq-lm", "lm-eval"}


@dataclass(frozen=True)
class StagePlan:
    """One stage: whether it is done, what it writes to the store, and the memory that it needs at its peak.

    `worker_bytes` is the part of that memory which one Dask worker needs; 0 where none works.
    """

    stage: str
    cached: bool
    disk_bytes: int
    memory_bytes: int
    note: str = ""
    worker_bytes: int = 0


def estimate_stages(
    recipe: Recipe, outline: Outline, tokens: Sequence[int], rows: Sequence[int], done: Collection[str] = ()
) -> tuple[StagePlan, ...]:
    """Return what each stage needs.

    Args:
        recipe: what is asked for.
        outline: of the base's encoder.
        tokens: of a row of each expert's, at most.
        rows: calibration rows of each expert.
        done: stages that need not run.
    """
    matrices = outline.matrices.values()
    sizes = outline.gram_sizes
    experts = len(recipe.experts)
    gram = sum(size**2 for size in sizes) * _FLOAT64
    solved = sum(number * outputs * inputs for number, outputs, inputs in matrices) * _FLOAT64
    factors = gram + solved
    model = outline.weights * _FLOAT32
    grams = _grams(recipe, outline, tokens, rows)
    walk_workers, walk_each, walk_moments = _walk(recipe, outline, tokens, rows)
    solving = _solving_walk(outline, experts) if walk_workers else _solving(outline)
    # The moments of every layer go to the store.
    walk_disk = factors if walk_workers else 0
    trial_workers = trial_each = 0
    if recipe.search.trials:
        # All factors, the rest of the model, and the encoder that is measured.
        search_memory = PROCESS_BYTES + 4 * model + factors + gram // max(len(sizes), 1) * experts
        if recipe.search.parallel > 1:
            # Each worker that measures has all of it; here the experts' own answers are run.
            trial_workers, trial_each = min(recipe.search.parallel, recipe.cluster.workers), search_memory
            search_memory = max(solving, PROCESS_BYTES + 4 * model)
    else:
        search_memory = solving
    if _fits_heads(recipe) and (whole := whole_bytes(outline.weights, ())) <= parse_bytes(recipe.cluster.memory_limit):
        search_memory = max(search_memory, whole)
    # Without test rows nothing is measured, so nothing is merged to be compared either.
    measured = any("test" in expert.splits() for expert in recipe.experts)
    compared = len(recipe.evaluation.compare) * measured
    # Gradients are summed in float64, beside the model and one row's own.
    fishers, fisher_memory = experts * model, 4 * model
    anchored = fishers if recipe.anchor.method == "fisher" else 0
    merging = PROCESS_BYTES + anchor_bytes(
        recipe.anchor.method, outline.widest, outline.stored_bytes / max(outline.weights, 1), experts
    )
    if compared and "fisher" in recipe.evaluation.compare and not anchored:
        compared += experts
    # Workers elsewhere have memory of their own.
    local = int(recipe.cluster.local)
    walk_here = walk_workers * walk_each * local
    walk_note = f"a walk, {_workers(recipe, walk_workers, walk_each)}" if walk_workers else "each map on its own"
    return tuple(
        replace(stage, cached=stage.stage in done)
        for stage in (
            # Heads are made by the base's other tower, about as large.
            StagePlan("experts", False, 0, PROCESS_BYTES + model * _makes_heads(recipe)),
            StagePlan("task-vectors", False, 0, PROCESS_BYTES),
            grams,
            StagePlan(
                "anchor",
                False,
                model * (2 if recipe.anchor.chooses_scale else 1) + anchored,
                # A scale is chosen by measuring whole models.
                max(
                    merging,
                    PROCESS_BYTES + 3 * model * recipe.anchor.chooses_scale,
                    PROCESS_BYTES + model + fisher_memory if anchored else 0,
                ),
            ),
            StagePlan(
                "search",
                False,
                outline.stored_bytes + walk_disk,
                # A single share is walked in the process that solves; others stand beside it.
                search_memory
                + max(
                    walk_here - (PROCESS_BYTES + walk_moments if walk_workers == 1 else 0),
                    trial_workers * trial_each * local,
                ),
                walk_note + (f"; trials, {_workers(recipe, trial_workers, trial_each)}" if trial_workers else ""),
                # A single share is walked in the merge's own process.
                max(walk_each if walk_workers > 1 or not local else 0, trial_each),
            ),
            StagePlan(
                "evaluate",
                False,
                model * compared,
                PROCESS_BYTES
                + measured * max(3 * model, fisher_memory if "fisher" in recipe.evaluation.compare else 0),
            ),
            # An anchor alone is merged while it is written.
            StagePlan("publish", False, outline.stored_bytes, merging if recipe.anchor_alone else PROCESS_BYTES),
        )
    )


def _fits_heads(recipe: Recipe) -> bool:
    """Return whether an expert's head may be fitted: those of language models are merged, or none."""
    kinds = {None if expert.task is None else expert.task.kind for expert in recipe.experts}
    return recipe.regression.fits_heads is not None and bool(kinds - _HEADLESS)


def _makes_heads(recipe: Recipe) -> bool:
    """Return whether an expert's head is made out of its classes' names."""
    return any(isinstance(expert.task, ZeroShotImageClassification) for expert in recipe.experts)


def worker_shortage(stages: Sequence[StagePlan], recipe: Recipe) -> tuple[float, RecipeError] | None:
    """Return how many times the recipe's limit a worker needs, and the error that says so; None if each fits."""
    neediest = max((stage for stage in stages if not stage.cached), key=lambda stage: stage.worker_bytes, default=None)
    limit = parse_bytes(recipe.cluster.memory_limit)
    if neediest is None or neediest.worker_bytes <= limit:
        return None
    needed = readable_bytes(neediest.worker_bytes)
    message = (
        f"'cluster.memory_limit' is {readable_bytes(limit)}, but a worker of the stage '{neediest.stage}' needs "
        f"{needed}; raise it, or {_smaller(neediest, recipe)}"
    )
    return neediest.worker_bytes / limit, RecipeError(message)


def _smaller(stage: StagePlan, recipe: Recipe) -> str:
    """Return what to change so that a worker of a stage needs less memory."""
    if stage.stage == "grams":
        return "lower evaluation.batch_size or grams.shard_rows"
    if recipe.regression.mode == "propagated":
        return (
            "take fewer calibration rows, or fewer of their tokens (grams.tokens), or more cluster.workers, up to one "
            "for each expert, or lower evaluation.batch_size; regression.mode module-wise keeps no activations"
        )
    return "lower search.parallel to 1"


def _grams(recipe: Recipe, outline: Outline, tokens: Sequence[int], rows: Sequence[int]) -> StagePlan:
    """Return what the Gram stage needs; workers that the whole expert does not fit into have it streamed."""
    experts, settings = len(recipe.experts), recipe.grams
    sizes = outline.gram_sizes
    gram = sum(size**2 for size in sizes) * _FLOAT64
    if not recipe.reads_grams:
        return StagePlan("grams", False, 0, PROCESS_BYTES, "nothing in this merge reads them")
    match settings:
        case TaskVectorGrams():
            features, outputs = outline.largest_group
            # One input's at a time: the matrix and the product that is added to it, and the task vectors behind them.
            made = (2 * features**2 + features * outputs) * _FLOAT64
            return StagePlan("grams", False, gram * experts, PROCESS_BYTES + made, "from the task vectors, no data")
        case ArtifactGrams():
            return StagePlan("grams", False, gram * experts, PROCESS_BYTES, "made elsewhere, copied")
    shards = [math.ceil(count / settings.shard_rows) for count in rows]
    copies = experts * (3 if isinstance(settings, HybridGrams) else 1)
    workers, each, how = recipe.cluster.workers, whole_bytes(outline.weights, sizes), ""
    if each > parse_bytes(recipe.cluster.memory_limit):
        hidden = settings.shard_rows * max(tokens, default=0) * outline.hidden
        each = streamed_bytes(outline.outside, outline.largest_layer, outline.layer_gram_sizes, hidden)
        how = ", layer by layer"
    each += _inside(recipe, outline, tokens)
    some = "" if settings.tokens is None else f", {settings.tokens} tokens of each sequence"
    note = f"{sum(shards)} shards{how}{some}, {_workers(recipe, workers, each)}"
    here = workers * each if recipe.cluster.local else PROCESS_BYTES
    held = most_held(shards, in_flight(workers))
    return StagePlan("grams", False, gram * (copies + held), here, note, each)


def _walk(recipe: Recipe, outline: Outline, tokens: Sequence[int], rows: Sequence[int]) -> tuple[int, int, int]:
    """Return how many workers walk through the network (none without a walk), what the largest share needs, its sums.

    A worker holds what stands outside of the layers, of the merged model and of an expert, and the hidden states of its
    own tasks' rows in both. In a layer also its weights, and the experts' answers, with the streams that they went into
    and came to, as far as there is room, and a batch's beyond that. Behind the layers, for an output head, sums as wide
    as its input. And one group's moments of each task, half of that again while products are added to them, and what is
    mapped of the files.
    """
    if recipe.regression.mode != "propagated":
        return 0, 0, 0
    sample = sample_in(vars(recipe.grams)).get("tokens", max(tokens, default=0))
    each = [(count * most, count * min(most, sample)) for count, most in zip(rows, tokens, strict=True)]
    count = min(recipe.cluster.workers, len(each))
    bounds = [len(each) * share // count for share in range(count + 1)]
    shares = [each[low:high] for low, high in pairwise(bounds)]
    tasks = max(len(share) for share in shares)
    hidden, answered = outline.hidden * _FLOAT32, (outline.layer_answers + 2 * outline.hidden) * _FLOAT32
    streams = 2 * hidden * max(sum(run for run, _ in share) for share in shares)
    answers = max(sum(hidden * run + answered * kept for run, kept in share) for share in shares)
    room = room_for_answers(parse_bytes(recipe.cluster.memory_limit))
    if answers > room:
        batch = recipe.evaluation.batch_size * max((hidden + answered) * min(most, sample) for most in tokens)
        # The last that is kept, and one of those that are not.
        answers = min(answers, room + 2 * batch)
    inside = _moments(outline.largest_group_inside)
    features, outputs = outline.largest_group_outside
    outside = _moments((features, outputs))
    layer = 2 * outline.largest_layer * _FLOAT32 + answers + _inside(recipe, outline, tokens)
    head = 3 * features**2 * _FLOAT64 if without_answers(features, outputs) else outside // 2
    largest = max(layer + tasks * inside + inside // 2, tasks * outside + head)
    needed = PROCESS_BYTES + 2 * outline.outside * _FLOAT32 + streams + largest + MOST_BYTES
    return count, needed, tasks * max(inside, outside)


def _moments(group: tuple[int, int]) -> int:
    """Return the bytes of the moments of a group of so many features and outputs."""
    features, outputs = group
    return features * (features + outputs) * _FLOAT64


def _solving(outline: Outline) -> int:
    """Return what solving one group after the other takes, from Gram matrices.

    Beside a part and the sum the factorisation holds four such matrices, the maps five of their own.
    """
    features, outputs = outline.largest_group
    factored = 4 * features**2 + 5 * features * outputs
    return PROCESS_BYTES + 2 * _moments(outline.largest_group) + factored * _FLOAT64 + outline.widest * _FLOAT32


def _solving_walk(outline: Outline, parts: int) -> int:
    """Return what summing and solving one group after the other takes, from moments in so many parts.

    The sum uses its parts up; the factorisation holds four matrices beside it, the maps two of their own.
    """
    features, outputs = outline.largest_group
    factored = 4 * features**2 + 2 * features * outputs
    moments = _moments(outline.largest_group)
    sums = max(parts * moments, moments + factored * _FLOAT64)
    return PROCESS_BYTES + sums + outline.widest * _FLOAT32


def _inside(recipe: Recipe, outline: Outline, tokens: Sequence[int]) -> int:
    """Return the bytes of what a batch leaves inside of a layer: a gate, what it opens, and their product."""
    return 3 * recipe.evaluation.batch_size * max(tokens, default=0) * outline.widest_answer * _FLOAT32


def _workers(recipe: Recipe, count: int, each: int) -> str:
    if recipe.cluster.scheduler is not None:
        # Only the scheduler knows how many there are.
        return f"each worker needs {each / 2**30:.1f} GiB"
    return f"{count} worker{'' if count == 1 else 's'}, each needs {each / 2**30:.1f} GiB"
