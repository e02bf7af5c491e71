"""The demo's recipe as text: YAML commented so that a newcomer learns the keys. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_HEAD = """\
# One merge: a base model, experts fine-tuned from it, and one model that replaces them.
#
#     bmm plan  {file}      what will run, and the memory and disk it needs
#     bmm merge {file}      run it; what is finished already is not done again
#
# Paths are relative to this file. Only base_model, experts and output have to be given:
# every other key shows what it can say. A key that does not exist is refused.

# A folder that AutoModel loads, or a hub id with a revision (name/model@revision).
base_model: ./base

# Each expert is an ordinary checkpoint fine-tuned from the base: an encoder and a classification head.
# The encoders become one; each head is kept beside it, unchanged.
experts:
"""

_EXPERT = """\
  # {title}
  - name: {name}
    model: ./{experts}/{name}
    task:
      kind: text-classification
      text: text                     # the column that holds the text
      label: label                   # the column that holds the class: its name or its number
      max_length: {max_length}                 # tokens a text, longer ones are cut
"""

_SPLIT_NOTES = (
    "# The task's own rows, three splits without a row in common, each handed to datasets.load_dataset:",
    "# calibration shows the regression what the expert sees, validation steers the search,",
    "# test is looked at once, at the end.",
)

_TAIL = """
# The model that the regression starts from and leans on: average, ta, ties, tsv, wudi, or any checkpoint.
anchor: {{method: {anchor}}}

# What each layer is fed when an expert reads its own calibration rows.
grams: {{source: activations}}

# Each linear layer is solved for on its own.
regression: {{mode: module-wise}}

# How much to trust the anchor (lambda) and how far to go from the base (gamma) is searched for on validation,
# one pair for each type of layer. The same seed gives the same trials.
search: {{per: type, trials: {trials}, objective: share-of-expert, seed: {seed}}}

# The merged checkpoint with its heads, report.html and merge.json.
output: {output}
"""


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of the recipe: its `name`, and its task in words."""

    name: str
    title: str


def recipe_text(
    entries: Sequence[ExpertEntry],
    *,
    file: str,
    experts: str,
    data: str,
    output: str,
    max_length: int,
    anchor: str,
    trials: int,
    seed: int,
) -> str:
    """Return the YAML of a recipe; `experts` and `data` are folders beside it, one subfolder an entry."""
    text = _HEAD.format(file=file)
    for index, entry in enumerate(entries):
        text += _EXPERT.format(name=entry.name, title=entry.title, experts=experts, max_length=max_length)
        if index == 0:
            text += "".join(f"      {line}\n" for line in _SPLIT_NOTES)
        for split in ("calibration", "validation", "test"):
            key, rows = f"{split}:", f"{data}/{entry.name}/{split}.jsonl"
            text += f"      {key:<12} {{path: json, data_files: {rows}, split: train}}\n"
    return text + _TAIL.format(anchor=anchor, trials=trials, seed=seed, output=output)
