"""What a recipe may say about the search. No mathematics and no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

Per = Literal["model", "type", "depth", "type x depth", "module"]
"""What shares one set of hyperparameters."""
Hyperparameter = Literal["log10_lambda", "gamma", "anchor_scale", "rho", "task_weights"]
"""The keys of what is searched, in the order of a point's coordinates."""
HYPERPARAMETERS: tuple[Hyperparameter, ...] = get_args(Hyperparameter)
Searcher = Literal["bayesian", "saas", "random", "sobol", "cma-es"]
Objective = Literal["share-of-expert", "nll", "agreement"]

ALL_TASKS = "all"
"""In `floors`: every task that is not named."""

# Beyond these the arithmetic still works but nothing that a model could want is left to find.
LARGEST_LOG10_LAMBDA = 30.0
LARGEST = 1000.0


def _pair(value: Any) -> Any:
    """A number fixes a hyperparameter: a range whose ends are that number."""
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] <= value[1]:
        raise ValueError("the lower end must not be above the upper end")
    return value


Range = Annotated[
    tuple[float, float],
    BeforeValidator(_pair, json_schema_input_type=tuple[float, float] | float),
    AfterValidator(_ordered),
    Field(description="lower and upper end, or one number, which fixes it"),
]


class GroupSettings(BaseModel):
    """What is different for one module group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log10_lambda: Range | None = None
    gamma: Range | None = None
    anchor_scale: Range | None = None
    rho: Range | None = None
    task_weights: Range | None = None

    def ranges(self) -> dict[Hyperparameter, tuple[float, float]]:
        """Return what this group has of its own, by hyperparameter."""
        return {key: value for key in HYPERPARAMETERS if (value := getattr(self, key)) is not None}


class SearchSettings(BaseModel):
    """The outer loop: which hyperparameters vary together, how many trials, towards what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per: Per = Field(default="type", description="what shares one set of hyperparameters: a module group")
    trials: int = Field(default=24, ge=0, description="0, and by default without validation rows: no search")
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="at most so many trials that run the model (equal settings share one evaluation); null: no limit",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="no trial begins after so many minutes of a run, which a run that carries on has anew; null: no "
        "limit. With one, what is found depends on the machine's speed",
    )
    parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="trials evaluated at the same time, by the workers of `cluster`; a proposal knows those that are "
        "under way, so the number decides which trials there are",
    )
    searcher: Searcher = Field(
        default="bayesian",
        description="what proposes: bayesian (a Gaussian process in a trust region), saas (one with a sparse prior, "
        "for many groups), or, for comparison, random, sobol, cma-es (extra `cma-es`)",
    )
    objective: Objective = Field(
        default="share-of-expert",
        description="what is maximised on the validation rows, a mean over tasks: the metric over the expert's; nll, "
        "the negative log-likelihood of the labels, negated, which is the default of module-wise regression where "
        "every task's metric is the accuracy of a row's class; agreement, the Kullback-Leibler divergence from the "
        "expert's answers, negated, for which rows need no labels (`unlabelled` of a task, else its validation rows)",
    )
    floors: dict[str, Annotated[float, Field(ge=0, le=2)]] = Field(
        default_factory=dict,
        description="share of its expert's metric that a task must keep, by task; `all` for those that are not named",
    )
    also: Literal["worst-task"] | None = Field(
        default=None,
        description="worst-task: propose for the least share of any task as well as for the objective, and show "
        "which settings trade one for the other; the objective still chooses",
    )
    walk: Literal["once", "every-trial"] = Field(
        default="once",
        description="in propagated mode: once, trials vary λ on the sums of one walk, exact at that walk's λ; "
        "every-trial, each walks with its own, from the first layer whose λ no walk before had: exact, and far dearer",
    )
    racing: bool = Field(
        default=True,
        description="stop a trial once the rows seen so far leave it no chance against the best one before it",
    )
    seed: int = Field(default=0, ge=0, description="of every random draw of the search")
    log10_lambda: Range = Field(
        default=(-4.0, 2.0), description="the prior's strength; the upper end stands for the anchor itself"
    )
    # Wider, the search chases the noise of a few hundred validation rows. Measured on the demo's four tasks (experts of
    # 160 steps, 800 rows, 24 trials): [0.5, 1.5] ended at 100.3 % of the experts on validation and 95.7 % on test;
    # λ = 0.1 and γ = 1 have 98.1 % and 97.4 %.
    gamma: Range = Field(default=(0.9, 1.1), description="how far from the base to go: W₀ + γ (Ŵ − W₀)")
    anchor_scale: Range = Field(
        default=(1.0, 1.0), description="what the anchor's distance from the base is multiplied by, as a prior"
    )
    rho: Range | None = Field(
        default=None, description="share of the activations in hybrid Gram matrices; null: grams.rho"
    )
    task_weights: Range = Field(
        default=(1.0, 1.0),
        description="how much each expert counts in the sum over tasks, times regression.task_weights; needs the "
        "mode module-wise",
    )
    tied: list[Hyperparameter] = Field(
        default_factory=list,
        description="hyperparameters that have one value for all groups without a range of their own",
    )
    groups: dict[str, GroupSettings] = Field(
        default_factory=dict, description="ranges or numbers of single module groups, by the group's name"
    )

    @field_validator("log10_lambda", "gamma", "anchor_scale", "rho", "task_weights")
    @classmethod
    def _within(cls, value: tuple[float, float] | None, info: Any) -> tuple[float, float] | None:
        if value is not None and (wrong := out_of_bounds(info.field_name, value)):
            raise ValueError(wrong)
        return value

    @field_validator("tied")
    @classmethod
    def _sorted(cls, value: list[Hyperparameter]) -> list[Hyperparameter]:
        return [key for key in HYPERPARAMETERS if key in value]

    @field_validator("groups", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        for group, own in value.items() if isinstance(value, dict) else ():
            if own is None or (isinstance(own, dict) and all(said is None for said in own.values())):
                raise ValueError(f"'search.groups.{group}' says nothing; give it a range or a number, or remove it")
        return value

    @model_validator(mode="after")
    def _groups_within(self) -> SearchSettings:
        for group, own in self.groups.items():
            for key, value in own.ranges().items():
                if wrong := out_of_bounds(key, value):
                    raise ValueError(f"'search.groups.{group}.{key}': {wrong}")
            if own.log10_lambda is not None and own.log10_lambda[0] < own.log10_lambda[1] > self.log10_lambda[1]:
                raise ValueError(
                    f"'search.groups.{group}.log10_lambda': its upper end, {own.log10_lambda[1]:g}, is above that of "
                    f"search.log10_lambda, {self.log10_lambda[1]:g}, which stands for the anchor; lower it to that"
                )
        return self

    @field_validator("task_weights")
    @classmethod
    def _weighs(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] == value[1] != 1:
            raise ValueError("one number for all experts changes nothing; give a range, or remove it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _walked(cls, said: Any) -> Any:
        """A walk goes on with the weights that it has solved, around the anchor as it is, on all workers there are."""
        if not isinstance(said, dict) or said.get("walk") != "every-trial":
            return said
        if said.get("parallel", 1) != 1:
            raise ValueError("'search.parallel': a walk takes all workers; set it to 1, or walk: once")
        groups = said.get("groups")
        own = groups.values() if isinstance(groups, dict) else ()
        for where in (said, *(vars(one) if isinstance(one, GroupSettings) else one for one in own)):
            for key, plain in (("gamma", 1), ("anchor_scale", 1)) if isinstance(where, dict) else ():
                if where.get(key) not in (None, plain, [plain, plain], (plain, plain)):
                    raise ValueError(
                        f"'search.{key}': a walk in every trial goes on with the weights it has solved around the "
                        f"anchor; set it to {plain}, or walk: once"
                    )
        return {**said, "gamma": 1.0}

    @model_validator(mode="after")
    def _one_model(self) -> SearchSettings:
        if self.searcher == "saas" and (self.floors or self.also):
            raise ValueError("'search.searcher': saas takes one objective and no floors; choose bayesian")
        return self

    def searches(self, key: Hyperparameter) -> bool:
        """Say whether a hyperparameter is set here at all or left as it is without a search."""
        plain = {"task_weights": (1.0, 1.0), "anchor_scale": (1.0, 1.0), "rho": None}.get(key)
        return bool(self.trials) and any(value != plain for value in self._values(key))

    def _values(self, key: Hyperparameter) -> list[tuple[float, float] | None]:
        own = [value for group in self.groups.values() if (value := group.ranges().get(key))]
        return [getattr(self, key), *own]

    def identity(self) -> dict[str, Any]:
        """Return what the trials depend on, as JSON: all but how many there may be."""
        return self.model_dump(mode="json", exclude={"trials", "evaluations", "minutes"})


def out_of_bounds(key: str, value: tuple[float, float]) -> str | None:
    """Return what is wrong with a range, or None."""
    low, high = value
    if key == "log10_lambda":
        limits = (-LARGEST_LOG10_LAMBDA, LARGEST_LOG10_LAMBDA)
    elif key == "rho":
        limits = (0.0, 1.0)
    elif key == "task_weights":
        # In the sum over tasks none may vanish, which another list of experts says better.
        limits = (1e-3, LARGEST)
    else:
        limits = (-LARGEST, LARGEST)
    if not limits[0] <= low <= high <= limits[1]:
        within = f"within ±{limits[1]:g}" if limits[0] == -limits[1] else f"between {limits[0]:g} and {limits[1]:g}"
        return f"both ends must lie {within}"
    return None


def _none(value: Any) -> Any:
    return {"trials": 0} if value in (None, "none") else value


Search = Annotated[
    SearchSettings, BeforeValidator(_none, json_schema_input_type=SearchSettings | Literal["none"] | None)
]
"""The settings, or `none`, which says that there is no search."""
