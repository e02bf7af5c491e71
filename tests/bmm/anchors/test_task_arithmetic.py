from __future__ import annotations

import numpy as np
import pytest

from bmm.anchors.settings import TaskArithmeticSettings
from bmm.anchors.task_arithmetic import TaskArithmetic


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_it_adds_the_scaled_sum(scale, random_weights, task_vectors_of):
    weights = random_weights(experts=4)
    for name in weights.names():
        expected = weights.bases[name].double().numpy() + scale * np.sum(task_vectors_of(weights, name), axis=0)
        merged = TaskArithmetic(TaskArithmeticSettings(scale=scale)).merge(name, weights).tensor
        np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_one_expert_in_n_at_scale_one_over_n_is_the_average(random_weights):
    weights = random_weights(experts=4)
    merged = TaskArithmetic(TaskArithmeticSettings(scale=0.25)).merge("map.weight", weights).tensor
    mean = sum(expert["map.weight"].double() for expert in weights.experts) / 4
    np.testing.assert_allclose(merged.numpy(), mean.numpy(), rtol=1e-6, atol=1e-7)
