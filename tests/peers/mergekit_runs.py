"""mergekit's merges of checkpoints on disk, through its configuration: in this process, or by its command.

For tests and benchmarks. Nothing of mergekit is replaced; models are written and read as its users do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def configuration(
    method: str,
    base: Path,
    experts: Sequence[Path],
    *,
    each: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Return mergekit's configuration of one merge.

    Args:
        method: its word for the method: `linear`, `task_arithmetic`, `ties`, `dare_linear`, `dare_ties`, …
        base: folder of the base model; left out for `linear`, which has none.
        experts: folders of the experts.
        each: parameters given to every expert alike (`weight` is 1 unless it stands here; `density`).
        shared: parameters of the whole merge (`normalize`, `lambda`, `rescale`).
        dtype: that the merge is computed and written in.
    """
    models = [{"model": str(path), "parameters": {"weight": 1.0, **(each or {})}} for path in experts]
    value: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype}
    if method != "linear":
        value["base_model"] = str(base)
    if shared:
        value["parameters"] = dict(shared)
    return value


def merge_here(config: Mapping[str, Any], output: Path, *, seed: int | None = None) -> Path:
    """Run a merge in this process, without tokenizer, and return the folder that it wrote."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(dict(config)), str(output), options)
    return output


def merge_by_command(config: Mapping[str, Any], output: Path, *, seed: int | None = None) -> Path:
    """Run `mergekit-yaml` as a command, for its time and memory, and return the folder that it wrote.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(f"{output.name}.yaml")
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(output), "--quiet"]
    command += ["--no-copy-tokenizer", "--no-write-model-card"]
    if seed is not None:
        command += ["--random-seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mergekit-yaml failed with {done.returncode}: {done.stderr[-2000:]}")
    return output
