"""Zero-shot image classification: an image a row, and classes that are known by their names alone (CLIP).

The vision tower is the encoder that is merged. Everything else is the base's and frozen: the projection of images, and
the text tower, which makes each task's head out of its class names before anything is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, DataError, one_line
from bmm.evaluation.model import TaskModel, build_module
from bmm.evaluation.tokens import load_tokenizer, quiet_transformers
from bmm.kinds.image_classification import ImageClassificationKind
from bmm.kinds.images import ImageReader
from bmm.kinds.settings import ZeroShotImageClassification

_TEXTS = 256
_CLIP = Architecture("AutoModel", "CLIP model")


class ZeroShotImageClassificationKind(ImageClassificationKind):
    """`CLIPModel`: the vision tower merged, the text tower frozen."""

    name = "zero-shot-image-classification"
    architecture = Architecture("AutoModelForZeroShotImageClassification", "zero-shot image classifier", tower="vision")
    # The recipe's names are made for sentences; a data set has its own for the same ids.
    _classes_in_order = True

    @override
    def labels(self, checkpoint: Checkpoint, task: ZeroShotImageClassification) -> tuple[str, ...]:
        """Return the recipe's class names."""
        return task.classes

    @override
    def make_head(self, base: Checkpoint, task: ZeroShotImageClassification, where: str) -> dict[str, Tensor]:
        """Return the frozen projection, the scale, and the classes as the base's text tower sees them.

        A class's embedding `(projection,)` is the mean over the templates of the sentences' normalised embeddings,
        normalised again (Radford et al., arXiv 2103.00020, section 3.1.4).

        Raises:
            CheckpointError: the base is no CLIP model with both towers and a tokenizer.
            DataError: a sentence is longer than the text tower reads.
        """
        clip = _text_side(base)
        tokenizer = load_tokenizer(base.tokenizer_folder)
        limit = clip.config.text_config.max_position_embeddings
        sentences = [template.replace("{}", name) for name in task.classes for template in task.templates]
        found = []
        with torch.inference_mode(), quiet_transformers():
            for start in range(0, len(sentences), _TEXTS):
                some = sentences[start : start + _TEXTS]
                tokens = tokenizer(some, padding=True, return_tensors="pt")
                if tokens["input_ids"].shape[1] > limit:
                    longest = max(some, key=len)
                    raise DataError(
                        f"{where}: the sentence {longest[:60]!r} is longer than the {limit} tokens of the base's text "
                        "tower; shorten task.templates or task.classes"
                    )
                inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
                pooled = clip.text_model(**inputs).pooler_output
                found.append(nn.functional.normalize(clip.text_projection(pooled), dim=-1))
        embeddings = torch.cat(found).reshape(len(task.classes), len(task.templates), -1).mean(dim=1)
        return {
            "visual_projection.weight": clip.visual_projection.weight.detach().clone(),
            "logit_scale": clip.logit_scale.detach().clone(),
            "class_embeddings": nn.functional.normalize(embeddings, dim=-1).clone(),
        }

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a vision tower with its image processor; its head, which knows the classes, comes in from outside."""
        module = _ZeroShot(self.architecture.encoder_config(dict(config)), task)
        reader = ImageReader(folder, module.vision_model.config, task, reading.get("processor"))
        return _ZeroShotModel(task, module, "vision_model", batch_size, reader)

    @override
    def bare(self, config: Mapping[str, Any], task: str) -> TaskModel:
        """Build a vision tower."""
        module = _ZeroShot(self.architecture.encoder_config(dict(config)), task)
        return _ZeroShotModel(task, module, "vision_model", 1)


class _ZeroShotModel(TaskModel):
    """A vision tower with a head whose sizes only the head itself tells: a tower alone does not know them."""

    @override
    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Make room for the head, then copy it in."""
        self.module.make_room(*tensors["class_embeddings"].shape)
        super().load_head(tensors)


class _ZeroShot(nn.Module):
    """A vision tower, its projection, and classes as directions."""

    def __init__(self, config: Mapping[str, Any], task: str) -> None:
        super().__init__()
        self.vision_model = build_module(config, Architecture("AutoModel", "vision tower"), task)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.make_room(1, 1)

    def make_room(self, classes: int, width: int) -> None:
        """Take a head of some classes in a space of some width."""
        size = self.vision_model.config.hidden_size
        # Its values come from the head, and no random number is drawn for them.
        self.visual_projection = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, size, width, bias=False
        )
        self.class_embeddings = nn.Parameter(torch.zeros(classes, width))
        self.config = SimpleNamespace(num_labels=classes)
        self.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Return `logits`, (rows, classes)."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        images = nn.functional.normalize(self.visual_projection(pooled), dim=-1)
        return SimpleNamespace(logits=self.logit_scale.exp() * images @ self.class_embeddings.T)


def _text_side(base: Checkpoint) -> Any:
    """Return the base as a `CLIPModel` whose vision tower has no weights."""
    if base.config.get("model_type") != "clip":
        raise CheckpointError(
            f"{base.path} is a {base.config.get('model_type')}, but zero-shot image classification needs a whole CLIP "
            "model as base_model, whose text tower names the classes"
        )
    clip = build_module(base.config, _CLIP, "the base")
    stored = {name: base.tensor(name) for name in base.names() if not name.startswith("vision_model.")}
    try:
        missing, _ = clip.load_state_dict(stored, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the base {base.path} has tensors of other shapes than its config.json describes "
            f"({one_line(error)}); save or download it again"
        ) from None
    if lost := sorted(name for name in missing if not name.startswith("vision_model.")):
        raise CheckpointError(f"the base {base.path} lacks the tensor {lost[0]} of a CLIP model; name a whole one")
    return clip
