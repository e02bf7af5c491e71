"""The record of a finished merge in the store: its document, and the names of all that it was made from.

It is what remains when the output folder has been replaced: the report, the model card and the tracker's record can
be written from it, and what the merge needs can be told from what it does not (`bmm.reachable`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bmm.errors import OutputError
from bmm.stages.request import Result
from bmm.store import Draft, Reference, Store, artefact_key

KIND = "run"
_VERSION = 1
_DOCUMENT = "merge.json"


@dataclass(frozen=True)
class Run:
    """A finished merge, as the store has it."""

    document: dict[str, Any]
    model: Reference


def keep_run(store: Store, document: Mapping[str, Any], results: Mapping[str, Result]) -> Reference | None:
    """Write down a finished merge, once; return None where the store may only be read.

    Args:
        store: where its artefacts are.
        document: its `merge.json`.
        results: of all its stages, by name.
    """
    inputs = {
        "recipe": document["recipe_digest"],
        "model": results["publish"].outputs["model"],
        "records": {name: {"kind": f"stage-{name}", "key": result.key} for name, result in results.items()},
    }

    def make(draft: Draft) -> None:
        # Not sorted: tasks are shown in the recipe's order.
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        (draft.path / _DOCUMENT).write_text(text + "\n", encoding="utf-8")

    outputs = {name: dict(result.outputs) for name, result in results.items()}
    describe = {"inputs": inputs, "outputs": outputs, "version": _VERSION}
    try:
        return store.obtain(KIND, artefact_key(KIND, _VERSION, inputs, {}), make, describe=describe)[0]
    except OutputError:
        # The merge is whole; who shares a store without the right to write leaves nothing there.
        return None


def read_run(store: Store, reference: Reference) -> Run:
    """Return a merge that was written down.

    Raises:
        ArtefactDamagedError: its record is gone or damaged.
    """
    artefact = store.read(reference)
    model = Reference.from_json(artefact.manifest["made_from"]["inputs"]["model"])
    return Run(artefact.read_json(_DOCUMENT), model)
