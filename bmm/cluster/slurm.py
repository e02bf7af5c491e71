"""Workers as Slurm jobs, through dask-jobqueue: the scheduler runs in this process, each job is one worker."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Status

from bmm.cluster.extra import required
from bmm.cluster.settings import SlurmSettings
from bmm.errors import ClusterError, RecipeError
from bmm.memory import WORKER_ENVIRONMENT

_LOOK_SECONDS = 5


@contextmanager
def slurm_cluster(settings: SlurmSettings, workers: int, memory_limit: str) -> Iterator[tuple[Any, float]]:
    """Start a scheduler here and submit the jobs, which are cancelled at the end of the block.

    Yields dask-jobqueue's cluster, and how many seconds it may be without a worker. A job that ends early (its time is
    up, its node is lost) is submitted again.

    Raises:
        RecipeError: dask-jobqueue or `sbatch` is missing, or this machine has no such interface.
        ClusterError: Slurm refuses a job.
    """
    jobqueue = required("dask_jobqueue", "dask-jobqueue", "cluster.slurm")
    if shutil.which("sbatch") is None:
        raise RecipeError("'cluster.slurm': there is no command sbatch here; run the merge where jobs are submitted")
    try:
        cluster = jobqueue.SLURMCluster(
            job_cls=_job_class(jobqueue),
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
            **job_options(settings, memory_limit),
        )
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"'cluster.slurm': the scheduler cannot start here: {_one_line(error)}") from None
    with cluster:
        try:
            cluster.sync(_submit, cluster, workers)
        except (OSError, ValueError, RuntimeError) as error:
            raise ClusterError(f"Slurm does not take the workers' jobs: {_one_line(error)}") from error
        # The same number for ever: what is lost is submitted again.
        cluster.adapt(minimum=workers, maximum=workers, interval=f"{_LOOK_SECONDS}s")
        yield cluster, 60 * settings.start_minutes


def _job_class(jobqueue: Any) -> Any:
    """Return dask-jobqueue's job of Slurm, but one that says when it is closed, since Dask asks."""

    class Job(jobqueue.slurm.SLURMJob):  # type: ignore[misc]
        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Job


async def _submit(cluster: Any, workers: int) -> None:
    # As scale() does, which would keep a refusal to itself.
    while len(cluster.worker_spec) < workers:
        cluster.worker_spec.update(cluster.new_worker_spec())
    await cluster


def job_options(settings: SlurmSettings, memory_limit: str) -> dict[str, Any]:
    """Return what dask-jobqueue is told of a job: one core, one process, one thread."""
    gpu = ["--gres=gpu:1"] if settings.gpu else []
    return {
        "cores": 1,
        "processes": 1,
        "memory": memory_limit.replace(" ", ""),
        "queue": settings.partition,
        "account": settings.account,
        "walltime": settings.walltime,
        "interface": settings.interface,
        "job_extra_directives": [*gpu, *settings.directives],
        "job_script_prologue": [
            *(f"export {name}={value}" for name, value in WORKER_ENVIRONMENT.items()),
            *settings.prologue,
        ],
        "python": settings.python,
        "log_directory": settings.logs,
        "job_name": "bmm-worker",
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
