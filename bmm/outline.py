"""What decides how much a merge takes: the encoder's parameters by name and shape, and how many tokens a row has.

Read from a checkpoint's headers or, without any checkpoint, from a `config.json`: then transformers builds the model
without weights. Which parameters are linear maps, and which of them share an input, is told by name here, so that no
forward pass is needed; what is merged is decided by `bmm.modules.linear`, which looks.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmm.checkpoint.architecture import Architecture, encoder_names
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.kinds.settings import PROCESSOR

_PATCHES = re.compile(r"patch_embed")
_NOT_MAPS = re.compile(r"embed|(^|\.)(wte|wpe|conv\d?)\.|relative_attention_bias")
_TRANSPOSED = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
# Read what another map, which stands for them all, reads too.
_FOLLOWERS = re.compile(
    r"(^|\.)(key|value|key_proj|[kv]_lin|[kv]_proj|up_proj|wi_1|(Self|EncDec)Attention\.[kv])(\.weight)?$"
)
_LAYER = re.compile(r".*?(^|\.)(layers?|blocks?|block|h|transformer)\.\d+\.")
# Of the models that read a waveform: samples a second, and samples of a frame.
_RATE, _FRAME = 16_000, 320
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Outline:
    """An encoder without its weights.

    Attributes:
        shapes: canonical name -> shape, of every parameter.
        stored_bytes: of all of them, as they are stored.
        config: the base's configuration.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored_bytes: int
    config: Mapping[str, Any]

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """Linear maps by the name of their parameter, as `(number, outputs, inputs)`; one parameter may hold many."""
        found = {}
        for name, shape in self.shapes.items():
            if len(shape) < 2 or (_NOT_MAPS.search(name) and not _PATCHES.search(name)):
                continue
            if len(shape) == 3 and not _PATCHES.search(name):
                found[name] = shape
            elif _TRANSPOSED.search(name):
                found[name] = (1, shape[1], shape[0])
            else:
                found[name] = (1, shape[0], math.prod(shape[1:]))
        return found

    @property
    def gram_sizes(self) -> list[int]:
        """Inputs of each distinct input's Gram matrix."""
        return [size for _, size in self._gram_sizes()]

    def _gram_sizes(self) -> list[tuple[str, int]]:
        return [
            (name, inputs)
            for name, (number, _, inputs) in self.matrices.items()
            if number > 1 or not _FOLLOWERS.search(name)
            for _ in range(number)
        ]

    @property
    def outside(self) -> int:
        """Number of the parameters that stand outside of the layers."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not _LAYER.match(name))

    @property
    def largest_layer(self) -> int:
        """Number of the parameters of the largest layer."""
        layers: dict[str, int] = {}
        for name, shape in self.shapes.items():
            if found := _LAYER.match(name):
                layers[found[0]] = layers.get(found[0], 0) + math.prod(shape)
        return max(layers.values(), default=0)

    @property
    def layer_gram_sizes(self) -> list[int]:
        """Inputs of each distinct input's Gram matrix in the layer that has most of them."""
        layers: dict[str, list[int]] = {}
        for name, size in self._gram_sizes():
            found = _LAYER.match(name)
            layers.setdefault(found[0] if found else name, []).append(size)
        return max(layers.values(), key=lambda sizes: sum(size**2 for size in sizes), default=[])

    @property
    def largest_group(self) -> tuple[int, int]:
        """Features and outputs of the maps of one input for which both, squared and multiplied, take most memory."""
        return _largest([(features, outputs) for _, features, outputs in self._groups()])

    @property
    def largest_group_inside(self) -> tuple[int, int]:
        """The same of the maps inside of layers."""
        return _largest([(features, outputs) for name, features, outputs in self._groups() if _LAYER.match(name)])

    @property
    def largest_group_outside(self) -> tuple[int, int]:
        """The same of the maps that stand before, between or behind layers."""
        return _largest([(features, outputs) for name, features, outputs in self._groups() if not _LAYER.match(name)])

    def _groups(self) -> list[tuple[str, int, int]]:
        groups: list[tuple[str, int, int]] = []
        for name, (_, outputs, inputs) in self.matrices.items():
            if groups and _FOLLOWERS.search(name) and groups[-1][1] == inputs:
                first, _, others = groups[-1]
                groups[-1] = (first, inputs, others + outputs)
            else:
                groups.append((name, inputs, outputs))
        return groups

    @property
    def widest(self) -> int:
        """Number of elements of the largest parameter."""
        return max((math.prod(shape) for shape in self.shapes.values()), default=0)

    @property
    def hidden(self) -> int:
        """Numbers in the hidden state of one token, between two layers: what most maps read.

        Not the fewest: patches of an image, or what attention is compressed to, may be smaller.
        """
        sizes = Counter(inputs for _, _, inputs in self.matrices.values())
        return max(sizes, key=lambda size: (sizes[size], -size), default=0)

    @property
    def widest_answer(self) -> int:
        """Outputs of the widest map inside of a layer, or of all maps where there are no layers."""
        inside = [outputs for name, (_, outputs, _) in self.matrices.items() if _LAYER.match(name)]
        return max(inside or [outputs for _, outputs, _ in self.matrices.values()], default=0)

    @property
    def layer_answers(self) -> int:
        """Numbers that the maps of one layer answer to a token, of the layer that answers most; without layers, all."""
        layers: Counter[str] = Counter()
        for name, (number, outputs, _) in self.matrices.items():
            if number == 1 and ((found := _LAYER.match(name)) or not self.largest_layer):
                layers[found[0] if found else ""] += outputs
        return max(layers.values(), default=0)

    def tokens(self, task: Mapping[str, Any], folder: Path | None = None) -> int:
        """Return how many tokens a row of a task has at most: as many as it is cut to, or as an image has patches.

        A sound has as many as its model has positions for, or makes of its seconds. An image is as large as the image
        processor in the expert's `folder` makes it, else as the model was made for.
        """
        if "max_length" in task:
            return int(task["max_length"])
        if "max_seconds" in task:
            return self._sound_tokens(float(task["max_seconds"]))
        vision = self.config.get("vision_config") or self.config
        image, patch = (vision.get(name) or default for name, default in (("image_size", 224), ("patch_size", 16)))
        sides = [max(size) if isinstance(size, list) else int(size) for size in (image, patch)]
        return (((folder and _processed_side(folder)) or sides[0]) // sides[1]) ** 2 + 1

    def _sound_tokens(self, seconds: float) -> int:
        """Return how many tokens a sound has: of Whisper, of a spectrogram in patches, of a waveform under strides."""
        config = self.config
        if "max_source_positions" in config:
            return int(config["max_source_positions"])
        if "num_mel_bins" in config and "patch_size" in config:
            patch = int(config["patch_size"])
            high = (int(config["num_mel_bins"]) - patch) // int(config.get("frequency_stride", 10)) + 1
            long = (int(config.get("max_length", 1024)) - patch) // int(config.get("time_stride", 10)) + 1
            return high * long + 2
        return math.ceil(seconds * _RATE / math.prod(config.get("conv_stride") or (_FRAME,)))


def _processed_side(folder: Path) -> int | None:
    """Return the longest side of the images that a folder's image processor makes, None where it does not say."""
    try:
        document = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = document.get("crop_size" if document.get("do_center_crop") else "size")
    given = size.values() if isinstance(size, dict) else [size]
    return max((side for side in given if isinstance(side, int)), default=None)


def outline_of(base: Checkpoint, architecture: Architecture) -> Outline:
    """Return the outline of a checkpoint, from its headers."""
    names = encoder_names(base, architecture.prefix(base.config))
    infos = {name: base.info(stored) for name, stored in names.items()}
    return Outline(
        {name: info.shape for name, info in infos.items()}, sum(info.nbytes for info in infos.values()), base.config
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json says.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"the configuration {path} cannot be read: {error.strerror}; name a config.json"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"the configuration {path} is not JSON: {error}; correct it") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"the configuration {path} must be a JSON object such as a model's config.json")
    return value


def outline_of_config(config: Mapping[str, Any], architecture: Architecture, where: str) -> Outline:
    """Return the outline of the model that a configuration describes.

    Args:
        config: as in config.json.
        architecture: of the first expert's task.
        where: the file, for messages.

    Raises:
        CheckpointError: transformers has no such model.
    """
    import torch
    import transformers

    prefix = architecture.prefix(dict(config))
    inner = architecture.encoder_config(dict(config))
    auto_class = architecture.auto_class if architecture.whole else "AutoModel"
    try:
        settings = transformers.CONFIG_MAPPING[inner["model_type"]].from_dict(inner)
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(settings, trust_remote_code=False)
        if inner == config and architecture.is_part(dict(config)):
            model = model.get_submodule(prefix)
    except Exception as error:
        # Each architecture checks its config in its own way, so any exception can mean an impossible value.
        raise CheckpointError(f"{where} does not describe a model: {' '.join(str(error).split())[:200]}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    each = _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
    return Outline(shapes, each * sum(math.prod(shape) for shape in shapes.values()), config)


def _largest(groups: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(groups, key=lambda group: group[0] * (group[0] + group[1]), default=(0, 0))
