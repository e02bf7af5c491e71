from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from functools import cache
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest

from bmm.cluster import local
from bmm.cluster.connection import workers
from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError
from bmm.memory import WORKER_ENVIRONMENT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_forked_from_one_process_that_has_imported_what_they_need() -> None:
    here = told_by_workers()
    ((parent, grandparent),) = {tuple(worker["ancestors"]) for worker in here["first"] + here["second"]}
    assert grandparent == here["process"] != parent
    assert all(worker["imported"] for worker in here["first"] + here["second"])
    # What a search for garbage touches is no longer shared with the process that it was forked from.
    assert all(worker["passed over"] > 100_000 for worker in here["first"] + here["second"])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_workers_take_the_memory_of_a_layer_for_the_next_one() -> None:
    here = told_by_workers()
    for worker in here["first"] + here["second"]:
        assert worker["set"] == WORKER_ENVIRONMENT
        # Of new memory each of the 50 tensors has 1,024 pages; the heap may grow by one or two of them.
        assert worker["faults"] < 4096


def test_workers_have_the_environment_of_now_and_one_thread() -> None:
    here = told_by_workers()
    assert {worker["told"] for worker in here["first"]} == {"first"}
    assert {worker["told"] for worker in here["second"]} == {"second"}
    # The sums of floating-point numbers depend on it.
    assert {worker["threads"] for worker in here["first"] + here["second"]} == {1}


def test_a_cluster_that_fails_to_close_hides_no_error_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
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


@cache
def told_by_workers() -> dict[str, Any]:
    """What workers of two clusters, one after the other, say of themselves: in a process that has forked none yet."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        "PYTHONPATH": str(Path(__file__).parents[3]),
        # What somebody's own cluster would have left in the environment of the process.
        "MALLOC_TRIM_THRESHOLD_": str(dask.config.get("distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_")),
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _state() -> dict[str, Any]:
    import torch

    def touched() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            torch.ones(1 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    touched()
    parent = psutil.Process(os.getppid())
    return {
        "set": {name: value for name, value in parent.environ().items() if name.startswith("MALLOC_")},
        "imported": "transformers.modeling_utils" in sys.modules,
        "passed over": gc.get_freeze_count(),
        "ancestors": [parent.pid, parent.ppid()],
        "threads": torch.get_num_threads(),
        "told": os.getenv("BMM_TEST_OF_WORKERS"),
        "faults": touched(),
    }


if __name__ == "__main__":
    told: dict[str, Any] = {"process": os.getpid()}
    for name in ("first", "second"):
        os.environ["BMM_TEST_OF_WORKERS"] = name
        with workers(ClusterSettings(workers=2)) as cluster:
            cluster.client.wait_for_workers(2)
            told[name] = list(cluster.client.run(_state).values())
    print(json.dumps(told))
