from __future__ import annotations

import os
import sys
import time
from multiprocessing import active_children
from typing import Any

import psutil
import pytest

from bmm.cluster import local
from bmm.cluster.connection import workers
from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_forked_from_one_process_that_lives_on() -> None:
    parents, imported = set(), []
    for _ in range(2):
        with workers(ClusterSettings(workers=2)) as cluster:
            parents |= set(cluster.client.run(os.getppid).values())
            imported += cluster.client.run(_has_imported, "transformers.modeling_utils").values()
    (parent,) = parents
    assert parent != os.getpid()
    assert psutil.Process(parent).ppid() == os.getpid()
    assert imported == [True] * 4


def test_workers_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("first", "second"):
        monkeypatch.setenv("BMM_TEST_OF_WORKERS", told)
        with workers(ClusterSettings(workers=1)) as cluster:
            assert set(cluster.client.run(os.getenv, "BMM_TEST_OF_WORKERS").values()) == {told}
            # One thread each, which the sums of floating-point numbers depend on.
            assert set(cluster.client.run(os.getenv, "OMP_NUM_THREADS").values()) == {"1"}
            assert set(cluster.client.run(_threads).values()) == {1}


def test_a_cluster_that_fails_to_close_hides_no_error_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    class Stuck(distributed.LocalCluster):
        """What distributed does where a nanny is starting its worker at the moment of closing."""

        asked = 0

        def close(self, *arguments: Any, **keywords: Any) -> Any:
            type(self).asked += 1
            if self.asked == 1:
                raise AssertionError("can only join a started process")
            return super().close(*arguments, **keywords)

    monkeypatch.setattr(local, "LocalCluster", Stuck)
    cluster = workers(ClusterSettings(workers=1))
    assert cluster.__enter__().count() == 1
    error = ClusterError("what went wrong")
    # Not swallowed, and not replaced by the close that fails.
    assert cluster.__exit__(type(error), error, None) is False
    assert Stuck.asked == 1
    time.sleep(1.0)
    assert not [child for child in active_children() if child.name.startswith("Dask Worker process")]


def _has_imported(module: str) -> bool:
    return module in sys.modules


def _threads() -> int:
    import torch

    return torch.get_num_threads()
