"""Writes the nine CLIP recipes below `recipes/` from the facts in `clip_tasks.yaml`.

    python deployments/clip_recipes.py           write them
    python deployments/clip_recipes.py --check   exit 1 if one is not what the facts say

Nothing is looked up: which checkpoints, data sets, class names and sentences belong together is `clip_tasks.yaml`'s.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
WIDTH = 118
TASKS = (8, 14, 20)
TITLES = {"b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14"}
# What one of two workers needs in the walk, which holds half of the tasks' activations; `bmm plan --offline` says it.
MEMORY = {
    "b32": {8: "8GiB", 14: "8GiB", 20: "8GiB"},
    "b16": {8: "12GiB", 14: "16GiB", 20: "24GiB"},
    "l14": {8: "20GiB", 14: "32GiB", 20: "40GiB"},
}

_HEAD = """\
# CLIP {title}, {count} image tasks, the checkpoints of FusionBench (family F). Never hold its numbers against those of
# the TALL-mask checkpoints (family T), whose experts and DTD test split are others.
#
{published}
#
# Accuracy is on whole test splits; give `test` a number of `rows` for a first look. 256 calibration and 256 validation
# rows a task come from the training split, without a row in common. The numbers above name their own settings where
# they are published: task arithmetic and TIES at 0.3, RegMean on 256 rows a task.
#
# Written by deployments/clip_recipes.py from deployments/clip_tasks.yaml: change those. To pin what is read, add
# @REVISION to a model and `revision:` to a split. Weights are read from safetensors only: where a repository's main
# branch has none, name the revision that does (the hub keeps its own conversions as @refs/pr/N).
#
#     bmm plan --offline {file}      everything that can be known without the hub
#     bmm merge {file}

base_model: {base}

experts:
"""

_TAIL = """
anchor: {{method: tsv}}
grams: {{source: activations}}
regression: {{mode: propagated}}
search: {{per: type, trials: 24, seed: 0}}
evaluation: {{compare: [average, ta, ties, tsv, iso-c, iso-cts, wudi, regmean]}}
cluster: {{workers: 2, memory_limit: {memory}}}
output: {output}
"""


def recipes(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each recipe by the name of its file."""
    return {
        f"clip-{model}-{count}.yaml": recipe_text(facts, model, count) for model in facts["models"] for count in TASKS
    }


def recipe_text(facts: Mapping[str, Any], model: str, count: int) -> str:
    """Return the recipe of one model and the first `count` tasks."""
    file, ids = f"clip-{model}-{count}", facts["models"][model]
    tasks = dict(list(facts["tasks"].items())[:count])
    head = _HEAD.format(
        title=TITLES[model],
        count=count,
        published=_published(facts["tables"][count][model], tasks, model),
        file=f"deployments/recipes/{file}.yaml",
        base=ids["base"],
    )
    experts = [_expert(name, task, ids["expert"], model) for name, task in tasks.items()]
    return head + "\n".join(experts) + _TAIL.format(memory=MEMORY[model][count], output=f"./merged/{file}")


def _published(table: Mapping[str, float], tasks: Mapping[str, Any], model: str) -> str:
    """Return the comment that says what the merge is to be held against."""
    base, experts = (
        table.get(key, round(sum(task["published"][model][place] for task in tasks.values()) / len(tasks), 1))
        for place, key in enumerate(("base", "experts"))
    )
    methods = {name: value for name, value in table.items() if name not in ("base", "experts")}
    said = ", ".join(f"{name} {value}" for name, value in sorted(methods.items(), key=lambda entry: entry[1]))
    said = said or f"no method's mean over these {len(tasks)} tasks is published for this family that is known here"
    text = f"Published means in %: base {base}, experts {experts}; {said}."
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _expert(name: str, task: Mapping[str, Any], source: str, model: str) -> str:
    base, expert = task["published"][model]
    data = ", ".join(f"{key}: {_scalar(value)}" for key, value in task["data"].items())
    columns = {"image": "image", "label": "label", **task.get("columns", {})}
    classes = [one.strip() for one in task["classes"].split("|")]
    return f"""\
  # Published: base {base:.1f} %, expert {expert:.1f} %.
  - name: {name}
    model: {source.format(task=name)}
    task:
      kind: zero-shot-image-classification
      image: {columns["image"]}
      label: {columns["label"]}
      calibration: {{{data}, split: train, rows: 256}}
      validation: {{{data}, split: train, rows: 256, skip: 256}}
      test: {{{data}, split: {task.get("test", "test")}}}
      templates:
{_list(task["templates"])}
      classes:
{_list(classes)}
"""


def _list(values: Iterable[str]) -> str:
    """Return a flow sequence, wrapped between its values."""
    lines = [" " * 8 + "["]
    for value in values:
        item = f"{_scalar(value)}, "
        if len(lines[-1]) + len(item) > WIDTH:
            lines.append(" " * 9)
        lines[-1] += item
    return "\n".join(line.rstrip() for line in lines).removesuffix(",") + "]"


def _scalar(value: Any) -> str:
    """Return a value as YAML writes it inside braces, quoted only where it must be."""
    return str(yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True)).strip()[1:-1]


def main(arguments: list[str]) -> int:
    """Write the recipes, or with `--check` say which are not up to date."""
    facts = yaml.safe_load((HERE / "clip_tasks.yaml").read_text(encoding="utf-8"))
    stale = 0
    for name, text in recipes(facts).items():
        path = HERE / "recipes" / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" in arguments:
            sys.stderr.write(f"{path} is not what deployments/clip_tasks.yaml says; run {Path(__file__).name}\n")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
