"""Which methods the table has, each as what it changes in a recipe.

One place to add a row: `rows`. Running them is `benchmarks.runs`; a method that is no recipe of ours is another
project's code (`benchmarks.peers`) or was tried and not kept (`benchmarks.leads`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from benchmarks.leads import LEADS, Lead
from benchmarks.peers import Peer
from pydantic import TypeAdapter

from bmm.anchors.settings import AnchorSettings, Method, ScaledSettings
from bmm.report.notation import method_label

Changes = Mapping[str, Any]
Stage = Literal["experts", "grams", "anchor", "both", "search"]

# The strength that the unsearched rows use everywhere, so that nothing of theirs was chosen on the rows they are
# measured on.
LAMBDA = 0.1
ANCHOR_ITSELF = 1e12
# Tokens of each sequence where not all are kept.
TOKENS = 16
# Calibration rows of the row that has many.
MANY = 1024
# Many steps or a gradient for each row.
SLOW = ("WUDI, Adam", "Fisher")
QUICK_PEERS = ("mergekit: TIES", "fusion-bench: RegMean++")
MODULE_WISE: Changes = {"grams": {"source": "activations"}, "regression": {"mode": "module-wise"}}
HYBRID: Changes = {"grams": {"source": "hybrid"}, "regression": {"mode": "module-wise"}}
PROPAGATED: Changes = {"grams": {"source": "activations"}, "regression": {"mode": "propagated"}}
DATA_FREE: Changes = {"grams": {"source": "task-vectors"}, "regression": {"mode": "module-wise"}}


@dataclass(frozen=True)
class How:
    """A method as a recipe: `changes` to its keys, run up to `stage`, whose model is the result.

    `after` are recipes whose work this one builds on; its time includes theirs. The stage `both` is all that a search
    stands on, Grams and anchor.
    """

    changes: Changes
    stage: Stage
    after: tuple[How, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        method: its name.
        how: how its model is made.
        ours: whether it is this project's regression.
        data_free: whether it needs no rows at all, neither calibration nor validation.
        seeded: whether it depends on the calibration rows, so that each draw of them gives another model.
        chosen: whether something was chosen on the validation rows.
        aimed: whether it is what the aims for propagated regression are about: the walk over all tokens, at any λ and
            from any number of calibration rows; what is tried beside it is reported, not judged.
        rows: calibration rows a task, where not as many as the table's other rows have.
    """

    method: str
    how: How | Peer | Lead
    ours: bool
    data_free: bool
    seeded: bool
    chosen: bool = False
    aimed: bool = False
    rows: int | None = None

    @property
    def anchor(self) -> bool:
        """Whether it is one of this project's anchor methods."""
        return isinstance(self.how, How) and self.how.stage == "anchor"


def rows(trials: int, *, quick: bool = False) -> list[Row]:
    """Return all rows, searches with so many trials; quickly, without the slow ones and most of other projects'."""
    adam = _anchor("WUDI, Adam", {"method": "wudi", "solver": "adam"})
    everything = [*_published(), adam, *_scaled(), *_peers(), *_data_free(), *_ours(trials)]
    return [row for row in everything if not (quick and _slow(row))]


def _slow(row: Row) -> bool:
    if isinstance(row.how, Peer):
        return row.method not in QUICK_PEERS
    return not row.ours and (row.chosen or row.method in SLOW)


def sweep() -> list[Row]:
    """Return the rows of the figure over numbers of calibration rows: one strength for all, no search."""
    named = {"module-wise": MODULE_WISE, "hybrid": HYBRID, "propagated": PROPAGATED}
    return [
        Row(name, How(_fixed(changes, LAMBDA), "search"), ours=True, data_free=False, seeded=True)
        for name, changes in named.items()
    ]


def _published() -> list[Row]:
    """Return every anchor method at its published settings, which are the defaults."""
    methods: list[dict[str, Any]] = [{"method": name} for name in get_args(Method) if name != "checkpoint"]
    return [_anchor(_label(said["method"]), said) for said in methods]


def _peers() -> list[Row]:
    """Return other projects' code: methods of mergekit at weights and densities of the papers, fusion-bench's RegMeans.

    mergekit's own defaults give each expert's task vector the weight 1, with which no merge of several is usable.
    """
    fifth = {"density": 0.2}
    said: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("linear", {}),
        "task arithmetic": ("task_arithmetic", {"each": {"weight": 0.3}}),
        "TIES": ("ties", {"each": fifth, "shared": {"normalize": True}}),
        "DARE": ("dare_linear", {"each": {"weight": 0.3, "density": 0.1}, "seed": 0}),
        "DARE-TIES": ("dare_ties", {"each": {"weight": 0.3, "density": 0.1}, "seed": 0}),
        "DELLA": ("della", {"each": {"weight": 0.3, "density": 0.5, "epsilon": 0.1}, "seed": 0}),
        "breadcrumbs": ("breadcrumbs", {"each": {"weight": 0.3, "density": 0.9, "gamma": 0.01}}),
        "model stock": ("model_stock", {}),
    }
    rows = [
        Row(f"mergekit: {name}", Peer("mergekit", method, options), ours=False, data_free=True, seeded=False)
        for name, (method, options) in said.items()
    ]
    for name, method in (("RegMean", "regmean"), ("RegMean++", "regmean++")):
        how = Peer("fusion-bench", method, {})
        rows.append(Row(f"fusion-bench: {name}", how, ours=False, data_free=False, seeded=True))
    return rows


def _scaled() -> list[Row]:
    """Return those that have a scale with the best one on the validation rows."""
    methods = [name for name in get_args(Method) if name != "checkpoint"]
    scaled = [name for name in methods if isinstance(_settings({"method": name}), ScaledSettings)]
    return [_anchor(f"{_label(name)}, best scale", {"method": name, "scale": "validation"}) for name in scaled]


def _anchor(label: str, said: dict[str, Any]) -> Row:
    settings = _settings(said)
    seeded = settings.needs is not None
    return Row(
        label,
        How({"anchor": said}, "anchor"),
        ours=False,
        data_free=not seeded and not settings.chooses_scale,
        seeded=seeded,
        chosen=settings.chooses_scale,
    )


def _label(method: str) -> str:
    """Return a method's name in the table, where WUDI stands twice."""
    return "WUDI, exact" if method == "wudi" else method_label(method)


def _settings(said: dict[str, Any]) -> AnchorSettings:
    found: AnchorSettings = TypeAdapter(AnchorSettings).validate_python(said)
    return found


def _data_free() -> list[Row]:
    rows = []
    for method, label in (("tsv", "TSV-M"), ("wudi", "WUDI")):
        around = {**DATA_FREE, "anchor": {"method": method}}
        for name, strength in ((f"λ = {LAMBDA:g}", LAMBDA), ("λ by evidence", "evidence")):
            how = How(_fixed(around, strength), "search")
            rows.append(Row(f"data-free on {label}, {name}", how, ours=True, data_free=True, seeded=False))
    return rows


def _ours(trials: int) -> list[Row]:
    walked = How(_fixed(PROPAGATED, LAMBDA), "search")
    held_out = How(_fixed(PROPAGATED, "held-out"), "search")
    twice = _fixed({**PROPAGATED, "regression": {**PROPAGATED["regression"], "rounds": 2}}, LAMBDA)
    kept = keeping_heads(PROPAGATED)
    # So strong a prior that nothing but the heads is fitted, on Gram matrices that need no rows.
    heads_alone = {**DATA_FREE, "regression": {**DATA_FREE["regression"], "heads": LAMBDA}}
    alone = [
        Row(name, How(changes, "search"), ours=True, data_free=False, seeded=True)
        for name, changes in (
            ("propagated, the experts' heads", _fixed(kept, LAMBDA)),
            (f"propagated, {TOKENS} tokens a sequence", _fixed(_sampled(PROPAGATED), LAMBDA)),
            ("module-wise", _fixed(MODULE_WISE, LAMBDA)),
            (f"module-wise, {TOKENS} tokens a sequence", _fixed(_sampled(MODULE_WISE), LAMBDA)),
            ("anchor with fitted heads", _fixed(heads_alone, ANCHOR_ITSELF)),
        )
    ]
    return [
        Row("propagated", walked, ours=True, data_free=False, seeded=True, aimed=True),
        Row(
            f"propagated, {MANY:,} rows, {TOKENS} tokens a sequence",
            How(_fixed(_sampled(PROPAGATED), LAMBDA), "search"),
            ours=True,
            data_free=False,
            seeded=True,
            aimed=True,
            rows=MANY,
        ),
        Row("propagated, λ by held-out rows", held_out, ours=True, data_free=False, seeded=True, aimed=True),
        Row("propagated, two rounds", How(twice, "search", (walked,)), ours=True, data_free=False, seeded=True),
        *alone,
        *(Row(name, lead, ours=True, data_free=False, seeded=True) for name, lead in LEADS.items()),
        _searched("module-wise, searched", MODULE_WISE, trials),
        _searched("module-wise, searched, the experts' heads", keeping_heads(MODULE_WISE), trials),
        _searched("hybrid, searched", HYBRID, trials, How(MODULE_WISE, "grams")),
        _searched("hybrid, searched, the experts' heads", keeping_heads(HYBRID), trials, How(MODULE_WISE, "grams")),
        replace(_searched("propagated, searched", PROPAGATED, trials, walked), aimed=True),
    ]


def keeping_heads(changes: Changes) -> Changes:
    """Return `changes` with the experts' heads left as they are."""
    return {**changes, "regression": {**changes["regression"], "heads": "keep"}}


def _searched(name: str, changes: Changes, trials: int, *after: How) -> Row:
    how = How({**changes, "search": {"trials": trials}}, "search", after)
    return Row(name, how, ours=True, data_free=False, seeded=True, chosen=True)


def _sampled(changes: Changes) -> Changes:
    """Return `changes` with only so many tokens of each sequence kept."""
    return {**changes, "grams": {**changes["grams"], "tokens": TOKENS}}


def _fixed(changes: Changes, strength: float | str) -> Changes:
    """Return `changes` with the prior's strength given, or found without validation rows, and no search."""
    return {**changes, "regression": {**changes["regression"], "lambda": strength}, "search": "none"}
