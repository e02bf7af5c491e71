from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import yaml
from jsonschema import Draft4Validator

from bmm.cluster.connection import workers
from bmm.cluster.kubernetes import cluster_spec
from bmm.cluster.settings import ClusterSettings, KubernetesSettings
from bmm.errors import ClusterError, RecipeError
from bmm.memory import WORKER_ENVIRONMENT

FULL = KubernetesSettings(
    image="registry.example/bmm:1",
    namespace="merging",
    gpu=True,
    claims={"/data/experts": "experts", "/data/store": "store"},
    environment={"BMM_ALLOWED_FOLDERS": "/data"},
    secrets=("object-store",),
)


def schema() -> Any:
    """The schema of a DaskCluster in the operator's chart, closed: Kubernetes drops what it does not name."""
    chart = files("dask_kubernetes").joinpath("operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml")
    return _closed(yaml.safe_load(chart.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(part) for part in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(part) for key, part in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    elif isinstance(node.get("properties"), dict) and node.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.parametrize("settings", [KubernetesSettings(image="bmm"), FULL])
def test_the_resource_is_one_that_the_operator_takes(settings: KubernetesSettings) -> None:
    known = schema()
    known["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    resource = cluster_spec(settings, 4, "8 GiB", "bmm-1")
    assert [error.message for error in Draft4Validator(known).iter_errors(resource)] == []
    assert (resource["apiVersion"], resource["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    assert resource["metadata"] == {"name": "bmm-1"}
    broken = {**resource, "spec": {**resource["spec"], "worker": {"replicas": "four", "spec": {}}}}
    assert list(Draft4Validator(known).iter_errors(broken))


def test_a_pod_is_one_worker_of_one_thread_with_what_the_recipe_gives_it() -> None:
    spec = cluster_spec(FULL, 4, "8GiB", "bmm-1")["spec"]
    assert spec["worker"]["replicas"] == 4
    pod = spec["worker"]["spec"]
    (worker,) = pod["containers"]
    limits = {"cpu": "1", "memory": str(8 * 2**30), "nvidia.com/gpu": "1"}
    assert worker["resources"] == {"requests": limits, "limits": limits}
    assert worker["args"][:6] == ["dask", "worker", "--nthreads", "1", "--memory-limit", str(8 * 2**30)]
    environment = {entry["name"]: entry["value"] for entry in worker["env"]}
    assert environment == {**WORKER_ENVIRONMENT, "BMM_ALLOWED_FOLDERS": "/data"}
    assert worker["envFrom"] == [{"secretRef": {"name": "object-store"}}]
    places = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert {mount["mountPath"]: places[mount["name"]] for mount in worker["volumeMounts"]} == FULL.claims
    (scheduler,) = spec["scheduler"]["spec"]["containers"]
    assert (scheduler["image"], scheduler["resources"]) == (FULL.image, {})


def test_without_the_package_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "dask_kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dask_kubernetes", None)
    settings = ClusterSettings(kubernetes=KubernetesSettings(image="bmm"))
    said = (
        r"'cluster\.kubernetes' needs the package dask-kubernetes, .* pip install 'bayesian-model-merging\[cluster\]'"
    )
    with pytest.raises(RecipeError, match=said), workers(settings):
        raise AssertionError("started without the package")


@pytest.mark.slow
def test_without_a_cluster_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ClusterSettings(kubernetes=KubernetesSettings(image="bmm", start_minutes=0.05))
    with pytest.raises(ClusterError, match="Kubernetes did not start the Dask cluster: ") as caught, workers(settings):
        raise AssertionError("started nowhere")
    assert "\n" not in str(caught.value)
