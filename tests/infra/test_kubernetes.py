"""The Kubernetes manifests: valid, guarded, and the same services as in the compose file.

kustomize puts them together where it is installed (kubectl has it); else the files are checked one by one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
VERSION = "1.33"
WORKLOADS = ("Deployment", "StatefulSet", "Job")
# Compose says these by other means; or not at all.
ONLY_HERE = {"PGDATA", "PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the overlay for one machine comes to, with secrets of its own."""
    kustomize = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if shutil.which(kustomize[0]) is None:
        pytest.skip("kustomize is not installed, nor kubectl, which has it")
    folder = tmp_path_factory.mktemp("kustomize") / "infra"
    shutil.copytree(INFRA, folder, ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    subprocess.run([sys.executable, str(INFRA / "services" / "make_secrets.py"), str(folder / "secrets")], check=True)
    overlay = str(folder / "kubernetes" / "overlays" / "dev")
    done = subprocess.run([*kustomize, overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def written() -> list[dict[str, Any]]:
    """The manifests as they are written, without what kustomize adds."""
    files = sorted((INFRA / "kubernetes" / "base").glob("*.yaml"))
    documents = [one for file in files for one in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    return [one for one in documents if one["kind"] != "Kustomization"]


def workloads(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] in WORKLOADS}


def pod(workload: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A workload's pod and its one container."""
    spec = workload["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def variables(container: dict[str, Any], merge: dict[str, str]) -> dict[str, str]:
    """A container's variables; those from the secrets as `${NAME}`."""
    found = dict(merge) if container.get("envFrom") else {}
    for one in container.get("env", []):
        if "value" in one:
            found[one["name"]] = re.sub(r"\$\((\w+)\)", r"${\1}", one["value"])
        else:
            key = one["valueFrom"]["secretKeyRef"]
            assert key["name"].startswith("passwords")
            found[one["name"]] = f"${{{key['key']}}}"
    return found


def plain(value: object) -> str:
    """A compose value as it is without further settings: defaults in place, secrets as `${NAME}`."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
    return re.sub(r"\$\{(\w+):\?[^}]*\}", r"${\1}", text)


def literals() -> dict[str, str]:
    said = yaml.safe_load((INFRA / "kubernetes" / "base" / "kustomization.yaml").read_text(encoding="utf-8"))
    (merge,) = said["configMapGenerator"]
    return dict(line.split("=", 1) for line in merge["literals"])


@pytest.mark.parametrize("manifest", written(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_each_manifest_is_valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    broken = {**manifest, "spec": {**manifest.get("spec", {}), "no-such-key": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_services_are_those_of_the_compose_file(compose: dict[str, Any]) -> None:
    found = workloads(written())
    assert set(found) == set(compose["services"])
    for name, service in compose["services"].items():
        _, container = pod(found[name])
        assert container["args"] == [plain(word) for word in service["command"]], name
        here = variables(container, literals())
        there = {key: plain(value) for key, value in service.get("environment", {}).items()}
        assert {key: value for key, value in here.items() if key not in ONLY_HERE - set(there)} == there, name
        if "healthcheck" in service:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["exec"]["command"] == service["healthcheck"]["test"][1:], name
        image = service["image"] if "build" not in service else plain(service["image"]).partition(":")[0]
        assert container["image"] == image, name
        limits = {key: plain(value) for key, value in service["deploy"]["resources"]["limits"].items()}
        said = container["resources"]["limits"]
        assert (said["cpu"], said["memory"].rstrip("i")) == (limits["cpus"], limits["memory"]), name
        assert found[name]["spec"].get("replicas", 1) == service["deploy"].get("replicas", 1), name


def test_every_pod_is_guarded() -> None:
    for name, workload in workloads(written()).items():
        spec, container = pod(workload)
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert set(container["resources"]) == {"requests", "limits"}, name
        # Nothing can be written but where something is mounted.
        assert name == "buckets" or "tmp" in [one["name"] for one in container["volumeMounts"]], name


def test_nothing_is_open_to_the_world_and_callers_are_named() -> None:
    manifests = written()
    assert {one["spec"].get("type", "ClusterIP") for one in manifests if one["kind"] == "Service"} == {"ClusterIP"}
    assert not [one for one in manifests if one["kind"] == "Ingress"]
    policies = {one["metadata"]["name"]: one["spec"] for one in manifests if one["kind"] == "NetworkPolicy"}
    assert policies.pop("nobody") == {"podSelector": {}, "policyTypes": ["Ingress"]}
    services = {one["metadata"]["name"]: one["spec"] for one in manifests if one["kind"] == "Service"}
    assert set(services) <= set(policies)
    for name, policy in policies.items():
        assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        for rule in policy["ingress"]:
            callers = [one["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for one in rule["from"]]
            assert set(callers) <= set(workloads(manifests))
        if name in services:
            assert [one["port"] for one in rule["ports"]] == [services[name]["ports"][0]["port"]]
    # Whoever names a service in an address may call it.
    for caller, workload in workloads(manifests).items():
        _, container = pod(workload)
        text = " ".join([*container["args"], *variables(container, literals()).values()])
        for called in re.findall(rf"(?:@|//)({'|'.join(services)}):\d", text):
            froms = [one["podSelector"]["matchLabels"] for one in policies[called]["ingress"][0]["from"]]
            allowed = {"app.kubernetes.io/name": caller} in froms
            # Dask's workers carry the variables of merges, and ask neither Prefect nor MLflow.
            assert allowed or (caller == "dask-worker" and called in ("prefect", "mlflow")), (caller, called)


def test_the_overlay_for_one_machine_is_whole(built: list[dict[str, Any]]) -> None:
    for manifest in built:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    found = workloads(built)
    assert set(found) == set(workloads(written()))
    assert found["dask-worker"]["spec"]["replicas"] == 1
    assert "2GiB" in pod(found["dask-worker"])[1]["args"]
    assert pod(found["dask-scheduler"])[1]["image"] == "bmm:0.1.0"
    assert {one["metadata"].get("namespace", "bmm") for one in built} == {"bmm"}
    # Every configuration map, secret and key that a pod asks for is there.
    kept = {
        one["metadata"]["name"]: set(one.get("data", {})) for one in built if one["kind"] in ("ConfigMap", "Secret")
    }
    for name, workload in found.items():
        spec, container = pod(workload)
        for one in container.get("env", []):
            if "valueFrom" in one:
                asked = one["valueFrom"]["secretKeyRef"]
                assert asked["key"] in kept[asked["name"]], (name, asked)
        for one in container.get("envFrom", []):
            assert kept[one["configMapRef"]["name"]], name
        for one in spec.get("volumes", []):
            if "secret" in one:
                assert kept[one["secret"]["secretName"]] == {"dask_ca", "dask_certificate", "dask_key"}
            if "configMap" in one:
                assert kept[one["configMap"]["name"]] == {"databases.sql"}
        mounted = {one["name"] for one in container.get("volumeMounts", [])}
        claimed = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
        assert mounted == {one["name"] for one in spec.get("volumes", [])} | claimed, name
