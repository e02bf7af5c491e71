"""Slurm by its own client library, with commands that stand in for a machine we have not got.

`sbatch`, `squeue` and `scancel` are small programs that start, list and kill what the job scripts say, on this
machine: the scripts, the workers and what these compute are real; queues, nodes and accounts are not.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from nights import ask_here

from bmm.cluster.connection import workers
from bmm.cluster.settings import ClusterSettings, SlurmSettings
from bmm.cluster.slurm import job_options
from bmm.errors import ClusterError, RecipeError
from bmm.pipeline import perform_here, run_stages
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.stages.request import Result
from bmm.store import Store

SBATCH = """#!/bin/bash
if grep -q '^#SBATCH -p nowhere' "$1"; then
    echo 'sbatch: error: invalid partition specified: nowhere' >&2
    exit 1
fi
number=1
until mkdir "$JOBS/$number" 2>/dev/null; do number=$((number + 1)); done
cp "$1" "$JOBS/$number/script"
SLURM_JOB_ID=$number setsid bash "$JOBS/$number/script" >"$JOBS/$number/output" 2>&1 </dev/null &
echo $! >"$JOBS/$number/pid"
echo "Submitted batch job $number"
"""
SCANCEL = """#!/bin/bash
kill -KILL -- "-$(cat "$JOBS/$1/pid")" 2>/dev/null || { echo "scancel: error: no job $1" >&2; exit 1; }
"""
SQUEUE = """#!/bin/bash
for job in "$JOBS"/*/; do kill -0 "$(cat "$job/pid")" 2>/dev/null && basename "$job"; done
exit 0
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the jobs that the stand-ins have started."""
    commands, folder = tmp_path / "commands", tmp_path / "jobs"
    commands.mkdir()
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL), ("squeue", SQUEUE)):
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(folder))
    return folder


def collected(recipe: Path, store: Path) -> Result:
    """Run the stages up to the Grams."""
    asked = Recipe.from_yaml(recipe)
    stages = ("experts", "task-vectors", "grams")
    return run_stages(asked, fingerprint_inputs(asked), Store.open(store), perform_here, stages)["grams"]


@pytest.mark.slow
def test_jobs_compute_the_grams_and_one_that_ends_is_submitted_again(
    pico: Path,
    tmp_path: Path,
    jobs: Path,
    edit_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = edit_recipe(pico, grams={"shard_rows": 4})
    with monkeypatch.context() as here:
        here.setattr("bmm.stages.grams.workers", lambda _: nullcontext())
        here.setattr("bmm.stages.grams.run_all", ask_here)
        reference = collected(recipe, tmp_path / "here")
    settings: dict[str, Any] = {
        "workers": 1,
        "memory_limit": "1GiB",
        "slurm": {"interface": "lo", "partition": "cpu", "walltime": "00:10:00", "prologue": ["export PROLOGUE=1"]},
    }
    edit_recipe(pico, cluster=settings)
    shards = tmp_path / "store" / "artefacts" / "gram-shard"

    def end_the_first_job() -> None:
        while not list(shards.glob("*/manifest.json")):
            time.sleep(0.005)
        os.killpg(int((jobs / "1" / "pid").read_text()), signal.SIGKILL)

    end = threading.Thread(target=end_the_first_job, daemon=True)
    end.start()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        result = collected(recipe, tmp_path / "store")
    end.join()
    assert result.outputs == reference.outputs, "the sums of jobs differ from those of this process"
    script = (jobs / "1" / "script").read_text()
    for line in ("#SBATCH -p cpu", "#SBATCH --cpus-per-task=1", "#SBATCH --mem=1G", "#SBATCH -t 00:10:00"):
        assert line in script
    assert "export PROLOGUE=1" in script
    assert "export MALLOC_TRIM_THRESHOLD_=" in script
    assert "--nthreads 1 --memory-limit 1.00GiB" in script
    assert len(list(jobs.iterdir())) >= 2, "the job that was lost was not submitted again"
    for job in jobs.iterdir():
        assert _ends(int((job / "pid").read_text())), f"the job {job.name} outlived the merge"


def _ends(group: int) -> bool:
    """Say whether a group of processes ends within a while; one that has been told to may take a moment."""
    for _ in range(100):
        if not any(_runs(process, group) for process in psutil.process_iter()):
            return True
        time.sleep(0.1)
    return False


def _runs(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.NoSuchProcess):
        return False


def test_what_slurm_refuses_is_told_in_its_words(jobs: Path) -> None:
    settings = ClusterSettings(slurm=SlurmSettings(interface="lo", partition="nowhere"))
    with (
        pytest.raises(
            ClusterError, match=r"Slurm does not take the workers' jobs: .*invalid partition specified"
        ) as said,
        workers(settings),
    ):
        raise AssertionError("a job was taken")
    assert "\n" not in str(said.value)
    assert list(jobs.iterdir()) == []


def test_without_sbatch_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("sbatch") is None
    with pytest.raises(RecipeError, match="no command sbatch"), workers(ClusterSettings(slurm=SlurmSettings())):
        raise AssertionError("started without Slurm")


def test_an_interface_that_is_none_is_named(jobs: Path) -> None:
    settings = ClusterSettings(slurm=SlurmSettings(interface="ib77"))
    with (
        pytest.raises(RecipeError, match=r"'cluster\.slurm': the scheduler cannot start here: .*ib77"),
        workers(settings),
    ):
        raise AssertionError("started on no interface")
    assert list(jobs.iterdir()) == []


def test_a_gpu_is_asked_for_beside_what_else_the_recipe_says() -> None:
    settings = SlurmSettings(gpu=True, directives=("--constraint=a100",), python="/opt/bmm/bin/python", account="lab")
    found = job_options(settings, "24 GiB")
    assert found["job_extra_directives"] == ["--gres=gpu:1", "--constraint=a100"]
    assert (found["cores"], found["processes"], found["memory"]) == (1, 1, "24GiB")
    assert (found["python"], found["account"], found["queue"]) == ("/opt/bmm/bin/python", "lab", None)
