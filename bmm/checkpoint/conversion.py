"""Between a checkpoint as it is stored and as transformers has it once it is loaded, by transformers' own rules.

For some architectures `save_pretrained` writes other names than the loaded model has (ViT), or other tensors: the
experts of a mixture are stored one matrix each and loaded as stacks. Here are the names, and tensors joined or cut in
either direction, from a `config.json` and headers; models are built on torch's meta device at most. Which of the names
are the encoder's is `bmm.checkpoint.architecture`'s question.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bmm.checkpoint.tensors import TensorInfo, dtype_name, torch_dtype
from bmm.digest import canonical_json
from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Conversion:
    """Stored tensors that belong together, and the loaded tensors that they become.

    Attributes:
        stored: what it is made of, by stored name.
        loaded: what becomes of it, by name.
    """

    def __init__(
        self, stored: Mapping[str, TensorInfo], turn: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], back: Any
    ) -> None:
        self.stored = stored
        self._turn = turn
        self._back = back
        self.loaded = {name: _info(name, tensor) for name, tensor in turn(_shapes(stored)).items()}

    @property
    def reversible(self) -> bool:
        """Whether transformers' rules lead back to the very tensors that are stored."""
        try:
            found = self._back(_shapes(self.loaded))
        except Exception:
            # Rules that lead one way only fail in ways of their own.
            return False
        return {name: tuple(tensor.shape) for name, tensor in found.items()} == {
            name: info.shape for name, info in self.stored.items()
        }

    def load(self, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the loaded tensors; `get` gives a stored one by name."""
        return self._turn({name: get(name) for name in self.stored})

    def store(self, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors, if it is `reversible`; `get` gives a loaded one by name."""
        found: dict[str, Tensor] = self._back({name: get(name) for name in self.loaded})
        return found


class Rules:
    """How transformers loads one architecture.

    Attributes:
        prefix: what a model with a head calls this encoder; empty where transformers cannot build it.
        parts: what the encoder's own parts are called; nothing where transformers cannot build it.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        # Of legacy names only LayerNorm's are known here, which `Checkpoint` modernises.
        rules = [] if model is None else get_model_conversion_mapping(model, add_legacy=False)
        self._model = model
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._shapes = {} if model is None else {name: tuple(one.shape) for name, one in model.state_dict().items()}
        self.prefix = "" if model is None else str(model.base_model_prefix)
        self.parts = frozenset(name.partition(".")[0] for name in self._shapes)

    def rename(self, name: str) -> tuple[str, bool]:
        """Return the loaded encoder's name for a stored one, and whether the tensor itself is changed on loading."""
        renamed, pattern = self._renamed(name)
        return renamed, pattern is not None

    def conversions(self, stored: Mapping[str, TensorInfo], where: str) -> list[Conversion]:
        """Return how stored tensors, by name, are joined and cut on loading; those left out stay as they are.

        Raises:
            CheckpointError: tensors that cannot be put together; begins with `where`.
        """
        if not self._converters:
            return []
        from transformers.core_model_loading import dot_natural_key

        groups: dict[tuple[str, str], dict[str, str]] = {}
        prefix = f"{self.prefix}."
        # A stack's matrices stand in the order of their numbers.
        for name in sorted(stored, key=dot_natural_key):
            inside = name.removeprefix(prefix)
            renamed, pattern = self._renamed(inside)
            if pattern is not None:
                groups.setdefault((name.removesuffix(inside), renamed), {})[name] = pattern
        return [self._conversion(*group, members, stored, where) for group, members in groups.items()]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, self._converters)  # type: ignore[no-any-return]

    def _conversion(
        self, prefix: str, target: str, members: Mapping[str, str], stored: Mapping[str, TensorInfo], where: str
    ) -> Conversion:
        from transformers.core_model_loading import apply_converters, apply_renamings

        patterns = set(members.values())
        forward = next(rule for rule in self._converters if patterns <= set(rule.source_patterns))
        backward = forward.reverse_transform()
        renamings = [rule.reverse_transform() for rule in reversed(self._renamings)]

        def turn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rule = copy.deepcopy(forward)
            for name, tensor in tensors.items():
                rule.add_tensor(target, name, members[name], tensor)
            return self._run(rule, target, prefix)

        def back(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rule = copy.deepcopy(backward)
            first = ""
            for name, tensor in tensors.items():
                inside = name.removeprefix(prefix)
                renamed, pattern = apply_converters(inside, [rule])
                first = first or renamed
                rule.add_tensor(renamed, name, pattern, tensor)
            found = self._run(rule, first, "")
            return {prefix + apply_renamings(name, renamings): tensor for name, tensor in found.items()}

        some = next(iter(members))
        try:
            made = Conversion({name: stored[name] for name in members}, turn, back)
        except Exception as error:
            raise CheckpointError(
                f"{where} has the tensor '{some}' and others that cannot be put together as '{target}' "
                f"({' '.join(str(error).split())[:200]}); save or download the model again"
            ) from error
        for name, info in made.loaded.items():
            wanted = self._shapes.get(name.removeprefix(prefix), info.shape)
            if info.shape != wanted:
                raise CheckpointError(
                    f"{where} has the tensor '{some}' and others, {len(members)} together, which make '{name}' of the "
                    f"shape {info.shape} where its config.json asks for {wanted}; save or download the model again"
                )
        return made

    def _run(self, rule: Any, target: str, prefix: str) -> dict[str, Tensor]:
        found = rule.convert(target, model=self._model, config=self._model.config)
        return {
            prefix + name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in sorted(found.items())
        }


def rules_of(config: Mapping[str, Any]) -> Rules:
    """Return the rules for the encoder that a `config.json` describes; none where transformers cannot build it.

    What is wrong with such a configuration is said where the task's own model is built from it.
    """
    return _rules(canonical_json(config))


@lru_cache(maxsize=16)
def _rules(config: str) -> Rules:
    import torch
    import transformers

    values = json.loads(config)
    try:
        settings = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(settings, trust_remote_code=False)
    except Exception:
        return Rules(None)
    return Rules(model)


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    import torch

    return {name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for name, info in infos.items()}


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype))
