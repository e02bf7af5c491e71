"""What a recipe may say about the Dask cluster that computes. No torch and no Dask here."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from bmm.part import SIZE_PATTERN, Part


def in_flight(workers: int) -> int:
    """Return how many requests are out at once: each worker computes one, others hide how long an answer travels."""
    return 3 * workers + 2


class SlurmSettings(Part):
    """Workers as jobs of a Slurm cluster, one core and one worker a job, submitted from where the merge runs."""

    partition: str | None = Field(default=None, min_length=1, description="partition of the jobs; else Slurm's default")
    account: str | None = Field(default=None, min_length=1, description="account that the jobs are charged to")
    walltime: str = Field(
        default="04:00:00",
        pattern=r"^(\d+-)?\d{1,3}(:\d{2}){1,2}$",
        description="longest time of a job; one that ends early is submitted again",
    )
    gpu: bool = Field(default=False, description="ask for a GPU for each worker (--gres=gpu:1)")
    interface: str | None = Field(
        default=None,
        min_length=1,
        description="network interface that this machine and the nodes reach each other by, ib0 for example",
    )
    directives: tuple[str, ...] = Field(
        default=(), description="further #SBATCH options of the jobs, --constraint=icelake for example"
    )
    prologue: tuple[str, ...] = Field(
        default=(), description="shell lines before the worker starts, module load python for example"
    )
    python: str | None = Field(
        default=None, min_length=1, description="Python of the nodes that has this package; else the one running here"
    )
    logs: str | None = Field(default=None, min_length=1, description="folder for what the jobs print")
    start_minutes: float = Field(
        default=60.0, gt=0, description="how long the jobs may wait in the queue while no worker runs"
    )


class KubernetesSettings(Part):
    """Workers as pods of a Kubernetes cluster that has Dask's operator, one worker a pod."""

    image: str = Field(min_length=1, description="container image that has this package")
    namespace: str | None = Field(default=None, min_length=1, description="namespace of the pods; else the current one")
    gpu: bool = Field(default=False, description="ask for a GPU for each worker (nvidia.com/gpu)")
    claims: dict[str, str] = Field(
        default_factory=dict,
        description="persistent volume claims by the folder where workers see them: experts and store must lie there",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the workers; these are kept in the output"
    )
    secrets: tuple[str, ...] = Field(
        default=(), description="Kubernetes secrets whose entries are environment variables of the workers"
    )
    start_minutes: float = Field(
        default=15.0, gt=0, description="how long pods may take to be placed and started while no worker runs"
    )


class ClusterSettings(Part):
    """The Dask cluster that computes: local worker processes, or `scheduler`, or `slurm`, or `kubernetes`."""

    scheduler: str | None = Field(default=None, description="tcp://host:port of a running scheduler")
    workers: int = Field(default=2, ge=1, description="local processes, Slurm jobs or pods, of one thread each")
    memory_limit: str = Field(default="8GiB", pattern=SIZE_PATTERN, description="memory of each worker")
    retry_seconds: float = Field(
        default=120.0,
        ge=0,
        description="how long a scheduler that went away, a store that is away, and a cluster without workers are "
        "waited for",
    )
    slurm: SlurmSettings | None = Field(
        default=None, description="workers as Slurm jobs; needs the extra 'cluster' and the command sbatch"
    )
    kubernetes: KubernetesSettings | None = Field(
        default=None, description="workers as pods; needs the extra 'cluster' and Dask's operator in the cluster"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        said = [name for name in ("scheduler", "slurm", "kubernetes") if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} are different clusters; keep one of them")
        return self

    @property
    def local(self) -> bool:
        """Whether the workers are processes of this machine that the merge starts itself."""
        return self.scheduler is None and self.slurm is None and self.kubernetes is None
