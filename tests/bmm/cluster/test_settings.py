from __future__ import annotations

from typing import Any

import pytest

from bmm.cluster.settings import ClusterSettings, KubernetesSettings, SlurmSettings
from bmm.errors import RecipeError
from bmm.recipe import Recipe

BASE = {
    "base_model": "./base",
    "experts": [{"name": "a", "model": "./a"}, {"name": "b", "model": "./b"}],
    "output": "./merged",
}


def cluster_of(said: Any) -> ClusterSettings:
    return Recipe.from_mapping({**BASE, "cluster": said}).cluster


def test_what_every_version_takes_is_taken() -> None:
    found = cluster_of({"scheduler": None, "workers": 2, "memory_limit": "8GiB"})
    assert found == ClusterSettings() == Recipe.from_mapping(BASE).cluster
    assert found.local
    assert not cluster_of({"scheduler": "tcp://10.0.0.1:8786"}).local


def test_a_cluster_survives_its_way_through_a_request() -> None:
    said = {"slurm": {"partition": "gpu", "gpu": True, "directives": ["--constraint=icelake"]}, "workers": 64}
    found = cluster_of(said)
    assert found.slurm == SlurmSettings(partition="gpu", gpu=True, directives=("--constraint=icelake",))
    assert not found.local
    assert ClusterSettings.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scheduler": "tcp://a:1", "slurm": {}}, "'cluster': scheduler and slurm are different clusters; keep one"),
        ({"slurm": {}, "kubernetes": {"image": "i"}}, "'cluster': slurm and kubernetes are different clusters"),
        ({"slurm": {"queue": "long"}}, r"unknown key 'cluster\.slurm\.queue'"),
        ({"slurm": {"walltime": "four hours"}}, r"'cluster\.slurm\.walltime'"),
        ({"kubernetes": {}}, r"the key 'cluster\.kubernetes\.image' is missing"),
        ({"retry_seconds": -1}, r"'cluster\.retry_seconds'"),
    ],
)
def test_what_a_cluster_cannot_be_is_said_in_one_sentence(said: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cluster_of(said)


def test_every_key_is_described() -> None:
    for part in (ClusterSettings, SlurmSettings, KubernetesSettings):
        for name, field in part.model_fields.items():
            assert field.description, f"{part.__name__}.{name} says nothing"
