"""How a base and its experts fit together: names, shapes and dtypes compared before any work.

What comes of it is a `bmm.checkpoint.layout.Layout`. Which stored name is whose is `bmm.checkpoint.canonical`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.canonical import canonical_names, tied_names
from bmm.checkpoint.layout import Layout, SharedParameter, dotted
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.tensors import TensorInfo
from bmm.checkpoint.vocabulary import check_tokens, extra_name, vocabulary_size
from bmm.errors import CheckpointError

# Settings which change what the same shapes compute; each architecture names them in its own way.
_DEFINING = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    *(
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "num_key_value_heads",
    ),
)


def compare(base: Checkpoint, experts: Mapping[str, Checkpoint], architectures: Mapping[str, Architecture]) -> Layout:
    """Compare the base with all experts and say where every tensor goes.

    Args:
        base: the base checkpoint.
        experts: the experts by name, in the recipe's order.
        architectures: by the same names, what transformers calls each expert's model.

    Raises:
        CheckpointError: another architecture; kinds of model that do not keep the same encoder; a tensor missing,
            superfluous, of another shape or kind.
    """
    prefix = _prefix(base, architectures)
    tokenizers = check_tokens(base, experts)
    for expert, checkpoint in experts.items():
        own, wanted = (architectures[expert].encoder_config(one.config) for one in (checkpoint, base))
        _check_config(expert, own, wanted)
    tied = tied_names(base, experts, architectures)
    base_names, copies = canonical_names(base, prefix, tied)
    expert_names: dict[str, dict[str, str]] = {}
    copied: dict[str, set[str]] = {}
    for expert, checkpoint in experts.items():
        expert_names[expert], repeated = canonical_names(checkpoint, prefix, tied)
        copied[expert] = set(repeated)
        if base_names.keys().isdisjoint(expert_names[expert]):
            raise CheckpointError(
                f"expert '{expert}' ({checkpoint.path}) shares no parameter with the base {base.path}; "
                "name an expert that was fine-tuned from this base"
            )
    shared: list[SharedParameter] = []
    heads: dict[str, dict[str, str]] = {expert: {} for expert in experts}
    loads = {expert: architectures[expert].loads(checkpoint) for expert, checkpoint in experts.items()}
    unmatched: list[str] = []
    unused: dict[str, dict[str, str]] = {expert: {} for expert in experts}
    for name in sorted(base_names.keys() | set().union(*expert_names.values())):
        holders = [expert for expert in experts if name in expert_names[expert]]
        if _is_float(name, base, base_names, experts, expert_names):
            # A model ignores what its architecture does not have, an old pooler or a mask; its expert lacks it then.
            useless = [expert for expert in holders if not _loaded(f"{dotted(prefix)}{name}", loads[expert])]
            for expert in useless:
                unused[expert][f"{dotted(prefix)}{name}"] = expert_names[expert][name]
            holders = [expert for expert in holders if expert not in useless]
        elif name not in base_names or len(holders) < len(experts):
            continue
        complete = name in base_names and len(holders) == len(experts)
        if not holders:
            unmatched += [name] if name in base_names else []
        elif len(holders) < len(experts) and _unneeded(f"{dotted(prefix)}{name}", holders, experts, architectures):
            # A pooler, say, that one kind of model does without: it travels with the heads that need it.
            for expert in holders:
                heads[expert][f"{dotted(prefix)}{name}"] = expert_names[expert][name]
            unmatched += [name] if name in base_names else []
        elif len(holders) < len(experts):
            raise CheckpointError(_partial(name, name in base_names, holders, list(experts)))
        elif complete:
            shared.append(_share(name, base, base_names, experts, expert_names))
        else:
            for expert in experts:
                heads[expert][f"{dotted(prefix)}{name}"] = expert_names[expert][name]
    for expert, checkpoint in experts.items():
        if architectures[expert].tower is None:
            encoder = set(expert_names[expert].values()) | copied[expert]
            head = [name for name in checkpoint.names() if name not in encoder]
            heads[expert].update({name: name for name in head if _loaded(name, loads[expert])})
            left = [name for name in head if name not in heads[expert] and checkpoint.info(name).is_float]
            unused[expert].update({name: name for name in left})
        _check_layers(expert, checkpoint, architectures[expert], unused[expert])
        if architectures[expert].whole and heads[expert]:
            raise CheckpointError(
                f"expert '{expert}' has the tensor '{min(heads[expert])}', which the base {base.path} lacks; name a "
                "base that was saved as AutoModelForCausalLM"
            )
        if missing := architectures[expert].missing(checkpoint):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"expert '{expert}' ({checkpoint.path}) lacks the parameter '{missing[0]}'{more} which its "
                f"architecture needs; save it as {architectures[expert].auto_class} with `save_pretrained`"
            )
        _check_head(expert, checkpoint, heads[expert], loads[expert] or {})
    extra, vocabulary = _own_rows(prefix, shared, heads, base, experts)
    merged = {parameter.name for parameter in shared}
    kept = {stored: name for stored, name in copies.items() if name in merged}
    alone = [base_names[name] for name in unmatched]
    dropped = sorted((set(base.names()) - set(base_names.values()) - set(copies)).union(alone))
    return Layout(
        prefix,
        tuple(shared),
        heads,
        tuple(dropped),
        extra=extra,
        vocabulary=vocabulary,
        tokenizers=tokenizers,
        tied=tied,
        copies=kept,
        unmatched=tuple(unmatched),
        unused=tuple(sorted({stored for names in unused.values() for stored in names.values()})),
    )


def _own_rows(
    prefix: str,
    shared: Sequence[SharedParameter],
    heads: Mapping[str, Mapping[str, str]],
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
) -> tuple[dict[str, dict[str, tuple[str, int, int]]], int | None]:
    """Return each expert's rows behind the base's vocabulary, and that vocabulary's size if any expert has another."""
    known = vocabulary_size(base.config)
    if known is None or all(
        # A vision tower alone has no vocabulary.
        vocabulary_size(checkpoint.config) in (None, known)
        for checkpoint in experts.values()
    ):
        return {}, None
    extra: dict[str, dict[str, tuple[str, int, int]]] = {}
    for expert, checkpoint in experts.items():
        rows = (vocabulary_size(checkpoint.config) or known) - known
        tables = {
            f"{dotted(prefix)}{one.name}": one.expert_keys[expert] for one in shared if one.shared_rows is not None
        }
        tables |= {
            name: stored
            for name, stored in heads[expert].items()
            if checkpoint.info(stored).shape[:1] == (known + rows,) and name.endswith((".weight", ".bias"))
        }
        if rows > 0:
            extra[expert] = {extra_name(name): (stored, known, rows) for name, stored in tables.items()}
    return extra, known


def _prefix(base: Checkpoint, architectures: Mapping[str, Architecture]) -> str:
    """Return the one name under which the models of all experts keep the encoder of the base."""
    prefixes: dict[str, str] = {}
    for expert, architecture in architectures.items():
        try:
            prefixes.setdefault(architecture.prefix(base.config), expert)
        except CheckpointError as error:
            raise CheckpointError(f"the base {base.path}: {error}") from None
    if len(prefixes) > 1:
        one, other = list(prefixes.values())[:2]
        raise CheckpointError(
            f"the experts '{one}' ({architectures[one].noun}) and '{other}' ({architectures[other].noun}) do not keep "
            "the same encoder of this base; merge them in two recipes"
        )
    return next(iter(prefixes))


def _check_config(expert: str, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    own, wanted = config.get("model_type"), base["model_type"]
    if own != wanted:
        raise CheckpointError(
            f"expert '{expert}' is a {own or 'model without a model_type'}, the base a {wanted}: "
            "experts must have been fine-tuned from the base"
        )
    for key in _DEFINING:
        if key in config and key in base and config[key] != base[key]:
            raise CheckpointError(
                f"expert '{expert}' has '{key}' {config[key]} in its config.json, the base "
                f"{base[key]}: experts must have been fine-tuned from the base"
            )


def _is_float(
    name: str,
    base: Checkpoint,
    base_names: Mapping[str, str],
    experts: Mapping[str, Checkpoint],
    expert_names: Mapping[str, Mapping[str, str]],
) -> bool:
    """Return whether anybody stores this tensor as floats; the architecture makes integer buffers itself."""
    infos = [checkpoint.info(expert_names[e][name]) for e, checkpoint in experts.items() if name in expert_names[e]]
    if name in base_names:
        infos.append(base.info(base_names[name]))
    return any(info.is_float for info in infos)


def _loaded(name: str, known: Collection[str] | None) -> bool:
    """Return whether a model takes a tensor from its checkpoint, as far as it is known what it takes."""
    return known is None or name in known


def _check_layers(expert: str, checkpoint: Checkpoint, architecture: Architecture, unused: Mapping[str, str]) -> None:
    """Refuse tensors of whole layers that the config does not count; `unused` is loaded name -> stored name."""
    if name := architecture.beyond(checkpoint, unused):
        raise CheckpointError(
            f"expert '{expert}' stores '{unused[name]}', a layer that {checkpoint.path / 'config.json'} lacks; "
            "correct the config's number of layers, or save the model again with `save_pretrained`"
        )


def _check_head(
    expert: str, checkpoint: Checkpoint, head: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, stored in head.items():
        found = checkpoint.info(stored).shape
        if name in shapes and found != shapes[name]:
            raise CheckpointError(
                f"expert '{expert}' has {name} of shape {list(found)}, but {checkpoint.path / 'config.json'} describes "
                f"one of {list(shapes[name])}; correct the config (its id2label names the classes), or save the model "
                "again with `save_pretrained`"
            )


def _unneeded(
    name: str, holders: Sequence[str], experts: Mapping[str, Checkpoint], architectures: Mapping[str, Architecture]
) -> bool:
    """Say whether the experts that lack a parameter are of other kinds than its holders, and do without it."""
    kinds = {architectures[expert].auto_class for expert in holders}
    lacking = [expert for expert in experts if expert not in holders]
    return all(
        architectures[expert].auto_class not in kinds and name not in architectures[expert].parameters(experts[expert])
        for expert in lacking
    )


def _partial(name: str, in_base: bool, holders: list[str], experts: list[str]) -> str:
    lacking = next(expert for expert in experts if expert not in holders)
    if in_base:
        return (
            f"expert '{lacking}' lacks the tensor '{name}', which the base and expert '{holders[0]}' have; "
            "save the whole model with `save_pretrained`"
        )
    return (
        f"expert '{holders[0]}' has the encoder tensor '{name}', which the base and expert '{lacking}' lack; "
        "all experts must have the base's architecture"
    )


def _share(
    name: str,
    base: Checkpoint,
    base_names: Mapping[str, str],
    experts: Mapping[str, Checkpoint],
    expert_names: Mapping[str, Mapping[str, str]],
) -> SharedParameter:
    """Check that all hold the same kind of tensor under a canonical name, and record where."""
    wanted = base.info(base_names[name])
    dtypes: dict[str, str] = {}
    rows: int | None = None
    for expert, checkpoint in experts.items():
        own = checkpoint.info(expert_names[expert][name])
        if own.shape != wanted.shape:
            if not _is_vocabulary(own, checkpoint, wanted, base):
                raise CheckpointError(_other_shape(name, expert, own, wanted))
            rows = min(rows or wanted.shape[0], own.shape[0])
        if own.dtype != wanted.dtype and not (own.is_float and wanted.is_float):
            raise CheckpointError(
                f"expert '{expert}' stores the tensor '{name}' as {own.dtype}, the base as {wanted.dtype}; "
                "save both with the same kind of numbers"
            )
        dtypes[expert] = own.dtype
    keys = {expert: expert_names[expert][name] for expert in experts}
    return SharedParameter(name, wanted.shape, wanted.dtype, base_names[name], keys, dtypes, rows)


def _is_vocabulary(own: TensorInfo, checkpoint: Checkpoint, wanted: TensorInfo, base: Checkpoint) -> bool:
    """Return whether two tensors differ in nothing but the number of their models' tokens."""
    sizes = vocabulary_size(checkpoint.config), vocabulary_size(base.config)
    return own.shape[1:] == wanted.shape[1:] and (*own.shape[:1], *wanted.shape[:1]) == sizes


def _other_shape(name: str, expert: str, own: TensorInfo, wanted: TensorInfo) -> str:
    return (
        f"expert '{expert}' has the tensor '{name}' in the shape {own.shape}, the base in {wanted.shape}; "
        "experts must have been fine-tuned from the base"
    )
