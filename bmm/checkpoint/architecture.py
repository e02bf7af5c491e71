"""What transformers says of an architecture: the encoder's prefix, and the parameters that a task's model needs.

Everything comes from `config.json` and transformers' own classes; models are built on torch's meta device at
most, so no weight is ever allocated. Which auto class a kind of task has is `bmm.kinds`' to say; no comparison of
checkpoints here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bmm.checkpoint.conversion import rules_of
from bmm.digest import canonical_json
from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from bmm.checkpoint.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Architecture:
    """What transformers calls the models of a kind of task.

    Attributes:
        auto_class: transformers' auto class ("AutoModelForSequenceClassification").
        noun: what messages call such a model ("text classifier").
        whole: the model is its own encoder and has no head (a language model); its prefix is empty.
        tower: the encoder is this part of a model of several towers ("vision"), and its head is made from the base.
    """

    auto_class: str
    noun: str
    whole: bool = False
    tower: str | None = None

    def prefix(self, config: dict[str, Any]) -> str:
        """Return the name under which such a model keeps its encoder ("bert", "roberta", "vit").

        Raises:
            CheckpointError: the config names no model type, one without such a model, or one whose encoder does not
                stand apart from its head.
        """
        if self.tower is not None and str(config.get("model_type")).endswith(f"_{self.tower}_model"):
            # The tower alone, as some experts are stored.
            return f"{self.tower}_model"
        model_class = self.model_class(config)
        if self.tower is not None:
            return f"{self.tower}_model"
        if self.whole:
            return ""
        try:
            encoder = _built(self.auto_class, canonical_json(config)).encoder
        except Exception:
            # What is wrong with the config is said where its parameters are asked for.
            return str(model_class.base_model_prefix)
        if encoder is None:
            raise CheckpointError(
                f"{model_class.__name__} does not keep its encoder apart from its head, so that no encoder can be "
                "merged; use an architecture that does"
            )
        return encoder

    def is_part(self, config: dict[str, Any]) -> bool:
        """Return whether the encoder is only a part of what `AutoModel` makes of a config.

        So it is in CLIP and SigLIP, whose text tower an image classifier does without, and in Whisper, whose decoder
        is not asked when sounds are classified.

        Raises:
            CheckpointError: as `prefix`.
        """
        if self.tower is not None:
            return True
        return not self.whole and self.prefix(config) != self.model_class(config).base_model_prefix

    def encoder_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a config that describes the encoder; all of it where no part of it does so alone."""
        try:
            tower = self.tower or (self.prefix(config).removesuffix("_model") if self.is_part(config) else None)
        except CheckpointError:
            return config
        inner = config.get(f"{tower}_config")
        if tower is None or inner is None:
            return config
        return {"model_type": f"{config.get('model_type')}_{tower}_model", **inner}

    def model_class(self, config: dict[str, Any]) -> Any:
        """Return the class that transformers has for a config.

        Raises:
            CheckpointError: the config names no model type, or one without such a model.
        """
        import transformers

        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError("config.json has no 'model_type'; save the model again with `save_pretrained`")
        if model_type not in transformers.CONFIG_MAPPING:
            raise CheckpointError(f"the model type '{model_type}' in config.json is not one that transformers has")
        config_class = transformers.CONFIG_MAPPING[model_type]
        classes = getattr(transformers, self.auto_class)._model_mapping
        if config_class not in classes:
            raise CheckpointError(f"transformers has no {self.noun} for the model type '{model_type}' in config.json")
        model_class = classes[config_class]
        return model_class[0] if isinstance(model_class, tuple) else model_class

    def missing(self, checkpoint: Checkpoint) -> list[str]:
        """Return the parameters that such a model needs and the checkpoint lacks, sorted.

        Of parameters which are tied to each other one is enough. Buffers do not count: they are made, not learnt.

        Raises:
            CheckpointError: the config does not describe a model that transformers can build.
        """
        prefix = self.prefix(checkpoint.config)
        encoder = encoder_names(checkpoint, prefix)
        start = "" if self.whole or self.tower is not None else f"{prefix}."
        present = {f"{start}{name}" for name in encoder} | (set(checkpoint.names()) - set(encoder.values()))
        return sorted(names[0] for names in self._parameters(checkpoint) if present.isdisjoint(names))

    def tied(self, checkpoint: Checkpoint) -> tuple[tuple[str, ...], ...]:
        """Return the groups of names that stand for one parameter, sorted; the first of each comes first in the model.

        Raises:
            CheckpointError: the config does not describe a model that transformers can build.
        """
        return tuple(sorted(names for names in self._parameters(checkpoint) if len(names) > 1))

    def parameters(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Return the names of all parameters that such a model has, tied ones under each of their names.

        Raises:
            CheckpointError: the config does not describe a model that transformers can build.
        """
        return frozenset(name for names in self._parameters(checkpoint) for name in names)

    def loads(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]] | None:
        """Return what such a model takes from a checkpoint, buffers too, by name; None of a tower, where it is unknown.

        The values are shapes.

        Raises:
            CheckpointError: the config does not describe a model that transformers can build.
        """
        if self.tower is not None:
            return None
        # What is wrong with the config is said in one place.
        self._parameters(checkpoint)
        return _built(self.auto_class, canonical_json(checkpoint.config)).loaded

    def beyond(self, checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
        """Return the first name that lies in a layer which its model would have if its config counted more of them.

        Transformers ignores such tensors; that the file and its config disagree on the model is the user's to settle.
        Layers that the architecture itself says to ignore (those that predict further tokens) are no contradiction.
        """
        if self.tower is not None:
            return None
        self._parameters(checkpoint)
        built = _built(self.auto_class, canonical_json(checkpoint.config))
        modules = {name[: part.start()] for name in built.loaded for part in _NUMBER.finditer(name)}
        layers = {name[: part.end()] for name in built.loaded for part in _NUMBER.finditer(name)}
        for name in names:
            parts = list(_NUMBER.finditer(name))
            if any(name[: one.start()] in modules and name[: one.end()] not in layers for one in parts) and not any(
                re.search(pattern, name) for pattern in built.ignored
            ):
                return name
        return None

    def _parameters(self, checkpoint: Checkpoint) -> list[tuple[str, ...]]:
        """Return the names of each parameter, those of tied ones together."""
        try:
            if self.tower is None:
                return _built(self.auto_class, canonical_json(checkpoint.config)).parameters
            # Its head is made from the base, so that only the tower counts.
            return _built("AutoModel", canonical_json(self.encoder_config(checkpoint.config))).parameters
        except Exception as error:
            # Each architecture checks its config in its own way, so any exception can mean an impossible value.
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'} does not describe a model: {' '.join(str(error).split())}"
            ) from error


@dataclass(frozen=True, slots=True)
class _Built:
    """What a model says of itself: the names of each parameter, those of tied ones together, and its encoder's name.

    `loaded` are the names and shapes of all that it takes from a checkpoint, buffers too; `ignored` are the patterns of
    names that it says may lie in one without being taken.

    Most classes say themselves what they call their encoder; in others it is the one part that is a model of its own.
    Where there is no such part, or more than one, it is None.
    """

    parameters: list[tuple[str, ...]]
    encoder: str | None
    loaded: Mapping[str, tuple[int, ...]]
    ignored: tuple[str, ...]


# The number of a layer in the name of a tensor, with the dot behind it.
_NUMBER = re.compile(r"(?<=\.)\d+\.")


@lru_cache(maxsize=32)
def _built(auto_class: str, config: str) -> _Built:
    """Build a class from a config.json on the meta device, and look at it."""
    import torch
    import transformers

    values = json.loads(config)
    settings = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(settings, trust_remote_code=False)
    model.tie_weights()
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    own = model.base_model_prefix
    models = [name for name, part in model.named_children() if isinstance(part, transformers.PreTrainedModel)]
    if not (own and hasattr(model, own)):
        own = models[0] if len(models) == 1 else None
    loaded = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
    return _Built([tuple(names) for names in tied.values()], own, loaded, ignored)


def _inner(checkpoint: Checkpoint) -> str:
    """Return the name of a language model's inner model; none where its parts stand in it directly (T5)."""
    pair = checkpoint.config.get("is_encoder_decoder")
    auto_class = "AutoModelForSeq2SeqLM" if pair else "AutoModelForCausalLM"
    kind = Architecture(auto_class, "encoder-decoder" if pair else "language model")
    own = str(kind.model_class(checkpoint.config).base_model_prefix)
    return own if any(name.startswith(f"{own}.") for name in kind.parameters(checkpoint)) else ""


def encoder_names(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """Return canonical name -> stored name of the encoder's tensors.

    Canonical is what transformers calls a parameter once the encoder is loaded, which for some architectures (ViT,
    DINOv2) is not what `save_pretrained` writes. Where the encoder is a part of a larger model (Whisper), a whole one
    may keep it below its own name for that model. A checkpoint without a single name under the prefix is stored
    without it, as transformers takes it too: the tensors of the encoder's own parts are the encoder's. An empty
    prefix is a whole language model, whose canonical names keep the name of its inner model; where that one was saved
    alone, they get it.

    Raises:
        CheckpointError: a tensor that transformers cuts or joins when it loads it.
    """
    names = checkpoint.names()
    if not prefix:
        own = _inner(checkpoint)
        if not own:
            return {name: name for name in names}
        inner = encoder_names(checkpoint, own)
        rest = set(names) - set(inner.values())
        return {f"{own}.{name}": stored for name, stored in inner.items()} | {name: name for name in rest}
    rules = rules_of(checkpoint.config)
    under: dict[str, str] = {}
    for start in (f"{prefix}.", f"{rules.prefix}.{prefix}."):
        under = under or {name.removeprefix(start): name for name in names if name.startswith(start)}
    found = {}
    for name, stored in (under or {name: name for name in names}).items():
        renamed, cut = rules.rename(name)
        if not under and rules.parts and renamed.partition(".")[0] not in rules.parts:
            continue
        if cut:
            raise CheckpointError(
                f"{checkpoint.path} stores the tensor '{stored}' in a form that transformers cuts or joins when it "
                "loads it, which cannot be merged"
            )
        found[renamed] = stored
    return found
