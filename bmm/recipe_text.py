"""A recipe as text: YAML commented so that a newcomer learns the keys. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

_HEAD = """\
# One merge: a base model, experts fine-tuned from it, and one model that replaces them.
#
#     bmm plan  {file}      what will run, and the memory and disk it needs
#     bmm merge {file}      run it; what is finished already is not done again
#
# Paths are relative to this file. Only base_model, experts and output have to be given:
# every other key shows what it can say. A key that does not exist is refused.

# A folder that AutoModel loads, or a hub id with a revision (name/model@revision).
base_model: {base}

# Each expert is an ordinary checkpoint fine-tuned from the base: an encoder and a classification head.
# The encoders become one; each head is kept beside it, unchanged.
experts:
"""

_EXPERT = """\
  # {title}
  - name: {name}
    model: {model}
    task:
      kind: {kind}
"""

_KEY_WIDTH = 30
_LABEL_NOTE = "the column that holds the class: its name or its number"

_SPLIT_NOTES = (
    "# The task's own rows, three splits without a row in common, each handed to datasets.load_dataset:",
    "# calibration shows the regression what the expert sees, validation steers the search,",
    "# test is looked at once, at the end.",
)

_TAIL = """
# The model that the regression starts from and leans on: average, ta, ties, dare,
# tsv, iso-c, iso-cts, wudi, regmean, fisher, ace, or any checkpoint.
anchor: {{method: {anchor}}}

# What each layer is fed when an expert reads its own calibration rows. Without data: {{source: task-vectors}};
# with few rows: {{source: hybrid, rho: 0.5}}; made elsewhere: {{source: artifact, path: ./grams}}.
grams: {{source: activations}}

# propagated: layer by layer, each linear map is solved for on what the merged model itself feeds it.
# module-wise: each on its own, on what it is fed in the experts.
regression: {{mode: propagated}}

# How much to trust the anchor (lambda) and how far to go from the base (gamma) is searched for on validation,
# one pair for each type of layer. The same seed gives the same trials. More: parallel: 2 (trials side by side),
# minutes: 30, floors: {{all: 0.9}} (what each task must keep), objective: nll (the likelihood of the labels) or
# agreement (for rows without labels).
search: {{per: type, trials: {trials}, objective: share-of-expert, seed: {seed}}}

# The merged checkpoint with its heads, report.html and merge.json.
output: {output}

# Every night (`bmm deploy {file} --serve`): when it begins, and what a new model has to show to take the place of the
# one in `output`. Experts that come later are found with a line `- find: ./experts/*` under `experts`, and a task in
# which {{name}} stands for the name of each.
nightly:
  schedule: {{cron: "0 3 * * *", timezone: UTC}}
  gate: {{gain: 0.0, loss: 0.05}}
"""


@dataclass(frozen=True)
class TextKeys:
    """What a text classification task says beside its splits: columns, and tokens a text."""

    max_length: int
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"

    kind = "text-classification"

    def lines(self) -> list[tuple[str, str, str]]:
        """Return (key, value, what it says)."""
        pair = (
            [("text_pair", _scalar(self.text_pair), "the column that holds the second text")] if self.text_pair else []
        )
        return [
            ("text", _scalar(self.text), "the column that holds the text"),
            *pair,
            ("label", _scalar(self.label), _LABEL_NOTE),
            ("max_length", str(self.max_length), "tokens a text, longer ones are cut"),
        ]


@dataclass(frozen=True)
class ImageKeys:
    """What an image classification task says beside its splits: columns."""

    image: str = "image"
    label: str = "label"

    kind = "image-classification"

    def lines(self) -> list[tuple[str, str, str]]:
        """Return (key, value, what it says)."""
        return [
            ("image", _scalar(self.image), "the column that holds the image"),
            ("label", _scalar(self.label), _LABEL_NOTE),
        ]


@dataclass(frozen=True)
class AudioKeys:
    """What an audio classification task says beside its splits: columns, and how much of a sound is heard."""

    audio: str = "audio"
    label: str = "label"
    max_seconds: int = 30

    kind = "audio-classification"

    def lines(self) -> list[tuple[str, str, str]]:
        """Return (key, value, what it says)."""
        return [
            ("audio", _scalar(self.audio), "the column that holds the sound"),
            ("label", _scalar(self.label), _LABEL_NOTE),
            ("max_seconds", str(self.max_seconds), "of a sound, longer ones are cut"),
        ]


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of the recipe: what a person reads of it (`title`), its checkpoint, its rows and how they are read.

    `model` and the paths in `splits` are written as they are, so they are relative to the recipe's file.
    """

    name: str
    title: str
    model: str
    splits: Mapping[str, str]
    task: TextKeys | ImageKeys | AudioKeys


def recipe_text(
    entries: Sequence[ExpertEntry],
    *,
    file: str,
    output: str,
    anchor: str,
    trials: int,
    seed: int,
    base: str = "./base",
) -> str:
    """Return the YAML of a recipe for these experts."""
    text = _HEAD.format(file=file, base=_scalar(base))
    for index, entry in enumerate(entries):
        text += _EXPERT.format(
            title=" ".join(entry.title.split()),
            name=_scalar(entry.name),
            model=_scalar(entry.model),
            kind=entry.task.kind,
        )
        for key, value, note in entry.task.lines():
            said = f"{key}: {value}"
            text += f"      {said:<{_KEY_WIDTH}} # {note}\n"
        if index == 0:
            text += "".join(f"      {line}\n" for line in _SPLIT_NOTES)
        for split, path in entry.splits.items():
            key = f"{split}:"
            text += f"      {key:<12} {{path: {_builder(path)}, data_files: {_scalar(path)}, split: train}}\n"
    return text + _TAIL.format(file=file, anchor=anchor, trials=trials, seed=seed, output=_scalar(output))


def _builder(path: str) -> str:
    """Return the name of the `datasets` builder for a file."""
    return {".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix, "json")


def _scalar(value: str) -> str:
    """Return a string as YAML writes it inside braces too, quoted only where it must be."""
    return str(yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True)).strip()[1:-1]
