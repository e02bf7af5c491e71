"""Which token each row of an embedding stands for, as tokenizer files say it, and whether experts agree on it.

Read as plain JSON and text; the tokenizer itself is never run. Which rows are merged is
`bmm.checkpoint.comparison`'s question.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.shards import read_json_object
from bmm.errors import CheckpointError

EXTRA = "extra_"
_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "added_tokens.json")


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of embedding rows that a `config.json` speaks of, padding included; None without any."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(size) if size else None


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a config for another number of embedding rows."""
    if config.get("vocab_size"):
        return {**config, "vocab_size": size}
    return {**config, "text_config": {**config["text_config"], "vocab_size": size}}


def extra_name(parameter: str) -> str:
    """Return what the rows behind a parameter's shared ones are called (`….weight` -> `….extra_weight`)."""
    module, dot, leaf = parameter.rpartition(".")
    return f"{module}{dot}{EXTRA}{leaf}"


def check_tokens(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """Return the experts whose tokenizer has other tokens than the base's, after those that both have.

    Where the base has no tokenizer, the first expert's stands for it. Tokenizers that no file spells out in plain text
    (SentencePiece alone) are not compared.

    Raises:
        CheckpointError: one id means different tokens, so that rows under it do not belong together.
    """
    reference, owner = _files(base), f"the base {base.path}"
    if not reference:
        first = next(iter(experts))
        reference, owner = _files(experts[first]), f"expert '{first}'"
    tokens: dict[int, str] | None = None
    different = []
    for expert, checkpoint in experts.items():
        files = _files(checkpoint)
        if not files or not reference or _same_bytes(files, reference):
            continue
        tokens = read_tokens(reference) if tokens is None else tokens
        own = read_tokens(files)
        for index in sorted(tokens.keys() & own.keys()):
            if tokens[index] != own[index]:
                raise CheckpointError(
                    f"expert '{expert}' ({files[0].parent}) calls the token {index} {own[index]!r}, {owner} calls it "
                    f"{tokens[index]!r}; experts must add tokens after those of the base"
                )
        if own.keys() != tokens.keys():
            different.append(expert)
    return tuple(different)


def read_tokens(files: Sequence[Path]) -> dict[int, str]:
    """Return token id -> token, from the files of one tokenizer.

    Raises:
        CheckpointError: a file is damaged.
    """
    by_name = {file.name: file for file in files}
    tokens: dict[int, str] = {}
    try:
        if "tokenizer.json" in by_name:
            value = read_json_object(by_name["tokenizer.json"])
            vocabulary = value["model"].get("vocab") or {}
            if isinstance(vocabulary, dict):
                tokens = {int(index): token for token, index in vocabulary.items()}
            else:
                tokens = {index: entry[0] for index, entry in enumerate(vocabulary)}
            tokens |= {int(entry["id"]): entry["content"] for entry in value.get("added_tokens") or []}
        elif "vocab.txt" in by_name:
            tokens = dict(enumerate(by_name["vocab.txt"].read_text(encoding="utf-8").split("\n")))
            if tokens and not tokens[len(tokens) - 1]:
                tokens.pop(len(tokens) - 1)
        elif "vocab.json" in by_name:
            tokens = {int(index): token for token, index in read_json_object(by_name["vocab.json"]).items()}
        if "added_tokens.json" in by_name:
            tokens |= {int(index): token for token, index in read_json_object(by_name["added_tokens.json"]).items()}
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{files[0].parent} has a tokenizer that cannot be read ({error}); save it again"
        ) from None
    return tokens


def _files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    files = tuple(file for file in checkpoint.tokenizer_files if file.name in _FILES)
    return files if any(file.name != "added_tokens.json" for file in files) else ()


def _same_bytes(one: Sequence[Path], other: Sequence[Path]) -> bool:
    return [file.name for file in one] == [file.name for file in other] and all(
        filecmp.cmp(mine, theirs, shallow=False) for mine, theirs in zip(one, other, strict=True)
    )
