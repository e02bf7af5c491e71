"""fusion-bench's data-driven merges of models in memory, on lists of batches, for models that are not CLIP.

For tests and benchmarks. The mathematics, the hooks and the walk are fusion-bench's own: RegMean and Fisher through its
functions for a list of models (which want something like a `Trainer` for the batches), RegMean++ through its abstract
class with the hooks of its class for CLIP (which itself cannot be built in 0.2.33: "'dict' object has no attribute
'inverse'"); what that class says of CLIP's own modules is said here of any stack of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Layers = Callable[[nn.Module], nn.ModuleList]


class _Batches:
    """What fusion-bench asks of a `Trainer`: batches, and how to hand one to the model."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._train_batch_size = 1

    def get_train_dataloader(self) -> Iterable[Batch]:
        return self._batches

    def _prepare_inputs(self, batch: Batch) -> Batch:
        return batch


def regmean(
    experts: Sequence[nn.Module], batches: Sequence[Sequence[Batch]], *, off_diagonal: float = 0.9
) -> dict[str, Tensor]:
    """Return RegMean's parameters by name, from each expert's own batches, all of them.

    Its Gram matrices count padding rows. Parameters that are no linear map's weight are averaged.
    """
    from fusion_bench.method.regmean.regmean import regmean_merging

    trainers = [_Batches(own) for own in batches]
    everything = [10**9 for _ in experts]
    merged: dict[str, Tensor] = regmean_merging(list(experts), trainers, [], everything, off_diagonal)
    return {name: tensor.detach() for name, tensor in merged.items()}


def fisher(experts: Sequence[nn.Module], batches: Sequence[Sequence[Batch]]) -> dict[str, Tensor]:
    """Return its Fisher-weighted parameters by name, from classifiers (whose answer has `logits`) and their batches.

    Every parameter must have a gradient, and heads must be alike, or stand apart from the models given.
    """
    from fusion_bench.method.fisher_merging.fisher_merging import fisher_merging

    trainers = [_Batches(own) for own in batches]
    merged: dict[str, Tensor] = fisher_merging(list(experts), trainers, [], [10**9 for _ in experts])
    return {name: tensor.detach() for name, tensor in merged.items()}


def regmean_plus_plus(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Batch]],
    layers: Layers,
    *,
    off_diagonal: float = 0.95,
) -> dict[str, Tensor]:
    """Return RegMean++'s state by name: layer by layer, on what the merged model feeds the layer.

    Everything outside the stack of layers is averaged before it starts, as it averages CLIP's embeddings.

    Args:
        base: the base model.
        experts: models of its architecture by name.
        batches: each expert's own batches, keyword arguments of the model.
        layers: gives the stack of layers of such a model; each is called with hidden states first.
        off_diagonal: what is kept of the Gram matrices off their diagonal.
    """
    from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
    from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
    from fusion_bench.mixins import LightningFabricMixin
    from fusion_bench.modelpool import BaseModelPool

    prefix = next(name for name, module in base.named_modules() if module is layers(base))

    class Pool(BaseModelPool):
        def load_train_dataset(self, dataset_name: str) -> Sequence[Batch]:
            return batches[dataset_name]

    class Walk(RegMeanAlgorithmPlusPlus, LightningFabricMixin):
        get_regmean_weights = RegMeanAlgorithmForCLIPPlusPlus.get_regmean_weights

        def on_regmean_start(self) -> None:
            pass

        def get_layers(self, model: nn.Module) -> nn.ModuleList:
            return layers(model)

        def merge_embedding_layer(self, models_to_merge_dict: Mapping[str, nn.Module]) -> dict[str, Tensor]:
            states = [model.state_dict() for model in models_to_merge_dict.values()]
            outside = [name for name in states[0] if not name.startswith(f"{prefix}.")]
            floating = [name for name in outside if states[0][name].is_floating_point()]
            return {name: torch.stack([state[name] for state in states]).mean(0) for name in floating}

        def get_input_for_first_layer(self, model: nn.Module, train_dataset: Sequence[Batch]) -> list[Any]:
            seen: list[Any] = []
            handle = layers(model)[0].register_forward_pre_hook(
                lambda _, given, named: seen.append((given, named)), with_kwargs=True
            )
            try:
                for batch in train_dataset:
                    model(**batch)
            finally:
                handle.remove()
            return seen

        def layer_batches_forward(self, layer: nn.Module, batches_input: Sequence[Any]) -> list[Any]:
            found = []
            for (hidden, *given), named in batches_input:
                answer = layer(hidden, *given, **named)
                answer = answer if isinstance(answer, Tensor) else answer[0]
                found.append(((answer.detach(), *given), named))
            return found

        def update_merged_params_dict(
            self, merged_params_dict: dict[str, Tensor], new_merged_params: Mapping[str, Tensor], layer_idx: int
        ) -> dict[str, Tensor]:
            merged_params_dict.update(
                {f"{prefix}.{layer_idx}.{key}": value for key, value in new_merged_params.items()}
            )
            return merged_params_dict

    walk = Walk(
        num_regmean_examples=10**9,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=off_diagonal,
        weight_transpose=True,
    )
    merged = walk.run(Pool({"_pretrained_": base, **experts}))
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}
