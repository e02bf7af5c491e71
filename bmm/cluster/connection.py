"""Reaching Dask workers, and reaching them again: those of a scheduler that is running, or of one started here.

How workers are started is in `bmm.cluster.local`, `bmm.cluster.slurm` and `bmm.cluster.kubernetes`; what is asked of
them is `bmm.cluster.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from distributed import Client

from bmm.cluster.local import local_cluster
from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError, RecipeError
from bmm.progress import tell

_CONNECT_SECONDS = 20
_CLOSE_SECONDS = 5
Connect = Callable[[], Client]


class Cluster:
    """Workers behind a scheduler, and a client that is replaced when the connection is lost.

    Args:
        connect: returns a new client; raises `OSError` if the scheduler does not answer.
        where: what people call the scheduler.
        retry_seconds: how long a lost scheduler is tried again.
        start_seconds: how long there may be no worker.
        expected: how many workers there will be, where that is known: jobs and pods come one after the other.
    """

    def __init__(
        self,
        connect: Connect,
        where: str,
        retry_seconds: float,
        start_seconds: float | None = None,
        expected: int = 0,
    ) -> None:
        self._connect = connect
        self._where = where
        self.retry_seconds = retry_seconds
        self.start_seconds = retry_seconds if start_seconds is None else start_seconds
        self._expected = expected
        self.client = connect()

    @property
    def connected(self) -> bool:
        """Whether the scheduler answered when it was last heard of."""
        return bool(self.client.status == "running")

    def addresses(self) -> list[str]:
        """Return the addresses of the workers that there are now; raises `OSError` if the scheduler is away."""
        try:
            return sorted(self.client.scheduler_info(n_workers=-1)["workers"])
        except KeyError:
            # A client that is closing knows of nothing.
            raise OSError(f"the Dask scheduler {self._where} has gone away") from None

    def count(self) -> int:
        """Return how many workers there are or are to come, waiting for the first one.

        Raises:
            ClusterError: none came in time.
        """
        try:
            self.client.wait_for_workers(1, timeout=self.start_seconds)
        except TimeoutError:
            raise self.workerless() from None
        return max(self._expected, len(self.addresses()))

    def workerless(self) -> ClusterError:
        """Return the error that says that there has been no worker for too long."""
        return ClusterError(
            f"the Dask scheduler {self._where} has had no workers for {self.start_seconds:.0f} s; start some (what is "
            "computed already is kept), or remove the key from the recipe's 'cluster' to use local workers"
        )

    def restore(self) -> None:
        """Wait until the scheduler answers again.

        Raises:
            ClusterError: it has not for `retry_seconds`.
        """
        if self.connected:
            return
        tell(f"The Dask scheduler {self._where} has gone away; trying again for {self.retry_seconds:.0f} s.")
        end, pause = time.monotonic() + self.retry_seconds, 0.1
        # Dask's client tries by itself for a while, and then closes.
        while not self.connected:
            if self.client.status in ("closed", "closing"):
                with suppress(OSError):
                    self.client = self._connect()
                    continue
            if time.monotonic() >= end:
                raise ClusterError(
                    f"the Dask scheduler {self._where} has gone away and has not come back within "
                    f"{self.retry_seconds:.0f} s; start it and run again: what is computed already is kept"
                )
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        tell("It is back; what was asked of it is asked again.")

    def everywhere(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on every worker, as far as they answer."""
        with suppress(OSError, RuntimeError):
            self.client.run(function, *arguments, on_error="ignore")

    def close(self) -> None:
        """Let go of the client, whether the scheduler answers or not."""
        with suppress(OSError, RuntimeError):
            self.client.close(timeout=_CLOSE_SECONDS)


@contextmanager
def workers(settings: ClusterSettings) -> Iterator[Cluster]:
    """Yield the recipe's cluster; what was started for it ends with the block.

    Raises:
        RecipeError: the recipe's scheduler does not answer, or what its cluster needs is not there.
        ClusterError: the workers do not start.
    """
    if settings.scheduler is not None:
        address = settings.scheduler
        try:
            cluster = Cluster(_connects(address), f"at {address}", settings.retry_seconds)
        except (OSError, ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
            # Dask does not say in one way that an address is none, or that it has no certificates for tls://.
            said = " ".join(str(error).split()) or "it is not an address that Dask knows"
            raise RecipeError(
                f"'cluster.scheduler': no Dask scheduler answers at {address} ({said}); "
                "start it, correct the address, or remove the key to use local workers"
            ) from None
        try:
            if _has_dashboard(cluster.client):
                tell(f"Dask's dashboard: {cluster.client.dashboard_link}")
            yield cluster
        finally:
            cluster.close()
        return
    with _started(settings) as (own, start_seconds):
        cluster = Cluster(_connects(own), "of this merge", settings.retry_seconds, start_seconds, settings.workers)
        try:
            if settings.kubernetes is not None or find_spec("bokeh"):
                tell(f"Dask's dashboard: {own.dashboard_link}")
            yield cluster
        finally:
            cluster.close()


def _connects(place: Any) -> Connect:
    def connect() -> Client:
        return Client(place, timeout=_CONNECT_SECONDS)

    return connect


def _started(settings: ClusterSettings) -> AbstractContextManager[tuple[Any, float]]:
    """Return what starts the workers: gives Dask's cluster, and how long it may have none."""
    if settings.slurm is not None:
        from bmm.cluster.slurm import slurm_cluster

        return slurm_cluster(settings.slurm, settings.workers, settings.memory_limit)
    if settings.kubernetes is not None:
        from bmm.cluster.kubernetes import kubernetes_cluster

        return kubernetes_cluster(settings.kubernetes, settings.workers, settings.memory_limit)
    return local_cluster(settings)


def _has_dashboard(client: Client) -> bool:
    def look() -> bool:
        from importlib.util import find_spec

        return find_spec("bokeh") is not None

    # Sent whole, so that the scheduler's machine needs nothing of ours.
    return bool(client.run_on_scheduler(look))
