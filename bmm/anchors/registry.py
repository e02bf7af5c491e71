"""Which class stands behind each anchor method of the recipe: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bmm.anchors.average import Average
from bmm.anchors.dare import DARE
from bmm.anchors.explicit import Explicit
from bmm.anchors.interface import Anchor
from bmm.anchors.isotropic import IsoC, IsoCTS
from bmm.anchors.settings import AnchorSettings
from bmm.anchors.task_arithmetic import TaskArithmetic
from bmm.anchors.ties import TIES
from bmm.anchors.tsv import TSV
from bmm.anchors.wudi import WUDI
from bmm.errors import BMMError

METHODS: dict[str, Callable[..., Anchor]] = {
    "average": Average,
    "ta": TaskArithmetic,
    "ties": TIES,
    "dare": DARE,
    "tsv": TSV,
    "iso-c": IsoC,
    "iso-cts": IsoCTS,
    "wudi": WUDI,
    "checkpoint": Explicit,
}


def build(settings: AnchorSettings, checkpoint_reader: Callable[[str], Tensor] | None = None) -> Anchor:
    """Return the anchor that `settings` asks for.

    `checkpoint_reader` gives the anchor checkpoint's tensor of a canonical name; only "checkpoint" uses it.

    Raises:
        BMMError: the method is "checkpoint" and there is no reader.
    """
    arguments: tuple[Any, ...] = (settings,)
    if settings.method == "checkpoint":
        if checkpoint_reader is None:
            raise BMMError("the anchor method 'checkpoint' was built without a reader of that checkpoint")
        arguments = (settings, checkpoint_reader)
    return METHODS[settings.method](*arguments)
