"""Each objective is what its formula says, and its rows add up to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.evaluation.metrics import Measured
from bmm.evaluation.objectives import Reference, gains, mean_variance, same_answers, value_of
from bmm.evaluation.scores import ACCURACY, CLASSIFICATION

modest = settings(deadline=None, max_examples=25)


def a_task(seed: int, rows: int = 40, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    own, expert = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    return own, expert, torch.randint(0, classes, (rows,), generator=generator).tolist()


def measured(answers: torch.Tensor, labels: list[int], metric: str = "accuracy") -> Measured:
    return Measured(CLASSIFICATION[metric], CLASSIFICATION[metric].statistics(answers, labels))


@modest
@given(seed=st.integers(0, 1000))
def test_likelihood_and_agreement_are_torchs(seed: int) -> None:
    own, expert, labels = a_task(seed)
    reference = Reference(0.8, expert, labels)
    found = gains("nll", own, measured(own, labels), reference)
    assert found is not None
    wanted = -torch.nn.functional.cross_entropy(own.double(), torch.tensor(labels), reduction="none")
    assert np.allclose(found, wanted.numpy())
    found = gains("agreement", own, measured(own, labels), reference)
    assert found is not None
    both = own.double().log_softmax(1), expert.double().log_softmax(1)
    assert np.allclose(found, -torch.nn.functional.kl_div(*both, reduction="none", log_target=True).sum(1).numpy())
    assert (found <= 1e-12).all()
    same = gains("agreement", expert, measured(expert, labels), reference)
    assert same is not None
    assert np.allclose(same, 0.0)


@modest
@given(seed=st.integers(0, 1000), objective=st.sampled_from(["share-of-expert", "nll", "agreement"]))
def test_the_objective_is_the_mean_over_tasks_of_the_mean_over_rows(seed: int, objective: str) -> None:
    tasks = {f"t{place}": a_task(seed + place, rows=20 + 10 * place) for place in range(3)}
    references = {
        name: Reference(max(measured(expert, labels).score, 0.1), expert, labels)
        for name, (_, expert, labels) in tasks.items()
    }
    scored = {name: measured(own, labels) for name, (own, _, labels) in tasks.items()}
    found = {name: gains(objective, own, scored[name], references[name]) for name, (own, _, _) in tasks.items()}
    value, variance = value_of(objective, scored, found, references)
    rows = [one for one in found.values() if one is not None]
    assert len(rows) == 3
    assert value == pytest.approx(float(np.mean([one.mean() for one in rows])))
    # The jackknife of a mean is the mean's own variance.
    assert variance == pytest.approx(sum(one.var(ddof=1) / len(one) for one in rows) / 9)


def test_metrics_that_are_no_mean_over_rows_have_no_gains() -> None:
    own, expert, labels = a_task(0, classes=2)
    reference = Reference(0.5, expert, labels)
    assert gains("share-of-expert", own, measured(own, labels, "matthews"), reference) is None
    scored = {"a": measured(own, labels, "f1")}
    value, variance = value_of("share-of-expert", scored, {"a": None}, {"a": reference})
    assert value == pytest.approx(scored["a"].score / 0.5)
    assert variance > 0


def test_rows_without_labels_are_measured_against_the_expert() -> None:
    own, expert, labels = a_task(1)
    assert same_answers(expert, expert).score == 1.0
    assert same_answers(own, expert).score == float((own.argmax(1) == expert.argmax(1)).double().mean())
    with pytest.raises(BMMError, match="labels"):
        gains("nll", own, measured(own, labels), Reference(1.0, expert))
    with pytest.raises(BMMError, match="answers"):
        gains("agreement", own, measured(own, labels), Reference(1.0, None, labels))
    assert mean_variance(np.ones(1)) == 0.0
    assert ACCURACY.name == "accuracy"
