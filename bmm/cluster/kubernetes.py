"""Workers as pods, through dask-kubernetes and Dask's operator: scheduler and workers run in the cluster.

The pods see the experts and a store in a folder through persistent volume claims, mounted where this machine has them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bmm.cluster.extra import required
from bmm.cluster.settings import KubernetesSettings
from bmm.errors import ClusterError
from bmm.memory import WORKER_ENVIRONMENT
from bmm.sizes import parse_bytes


@contextmanager
def kubernetes_cluster(settings: KubernetesSettings, workers: int, memory_limit: str) -> Iterator[tuple[Any, float]]:
    """Create a Dask cluster in Kubernetes that ends with the block.

    Yields dask-kubernetes' cluster, and how many seconds it may be without a worker.

    Raises:
        RecipeError: dask-kubernetes is missing.
        ClusterError: Kubernetes does not answer, has no operator for Dask, or does not start the scheduler.
    """
    operator = required("dask_kubernetes.operator", "dask-kubernetes", "cluster.kubernetes")
    seconds = 60 * settings.start_minutes
    spec = cluster_spec(settings, workers, memory_limit, f"bmm-{uuid.uuid4().hex[:8]}")
    try:
        cluster = operator.KubeCluster(
            custom_cluster_spec=spec,
            namespace=settings.namespace,
            resource_timeout=int(seconds),
            shutdown_on_close=True,
            quiet=True,
        )
    except Exception as error:
        # What is wrong comes from four libraries, with no type in common.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"Kubernetes did not start the Dask cluster: {said}") from error
    with cluster:
        yield cluster, seconds


def cluster_spec(settings: KubernetesSettings, workers: int, memory_limit: str, name: str) -> dict[str, Any]:
    """Return the `DaskCluster` resource: one core, one thread and the recipe's memory for each worker.

    Args:
        settings: the recipe's.
        workers: how many.
        memory_limit: of each.
        name: of the resource.
    """
    operator = required("dask_kubernetes.operator", "dask-kubernetes", "cluster.kubernetes")
    memory = str(parse_bytes(memory_limit))
    limits = {"cpu": "1", "memory": memory, **({"nvidia.com/gpu": "1"} if settings.gpu else {})}
    spec: dict[str, Any] = operator.make_cluster_spec(
        name=name,
        image=settings.image,
        n_workers=workers,
        resources={"requests": limits, "limits": limits},
        env=[{"name": key, "value": value} for key, value in {**WORKER_ENVIRONMENT, **settings.environment}.items()],
        worker_command=["dask", "worker", "--nthreads", "1", "--memory-limit", memory],
    )
    # The scheduler neither computes nor reads the store.
    spec["spec"]["scheduler"]["spec"]["containers"][0]["resources"] = {}
    pod = spec["spec"]["worker"]["spec"]
    (worker,) = pod["containers"]
    if settings.secrets:
        worker["envFrom"] = [{"secretRef": {"name": secret}} for secret in settings.secrets]
    if settings.claims:
        pod["volumes"] = [
            {"name": f"claim-{place}", "persistentVolumeClaim": {"claimName": claim}}
            for place, claim in enumerate(settings.claims.values())
        ]
        worker["volumeMounts"] = [
            {"name": f"claim-{place}", "mountPath": folder} for place, folder in enumerate(settings.claims)
        ]
    return spec
