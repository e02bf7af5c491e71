"""Which class stands behind each anchor method of the recipe: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmm.anchors.ace import ACE
from bmm.anchors.average import Average
from bmm.anchors.dare import DARE
from bmm.anchors.explicit import Explicit
from bmm.anchors.fisher import Fisher
from bmm.anchors.interface import Anchor, Sources
from bmm.anchors.isotropic import IsoC, IsoCTS
from bmm.anchors.regmean import RegMean
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
    "regmean": RegMean,
    "fisher": Fisher,
    "ace": ACE,
    "checkpoint": Explicit,
}


def build(settings: AnchorSettings, sources: Sources | None = None) -> Anchor:
    """Return the anchor that `settings` asks for; a method that needs more than weights is given that source first.

    Raises:
        BMMError: `sources` lacks what the method needs.
    """
    arguments: tuple[Any, ...] = (settings,)
    if settings.needs is not None:
        source = getattr(sources, settings.needs, None)
        if source is None:
            raise BMMError(f"the anchor method '{settings.method}' was built without a source of its {settings.needs}")
        arguments = (settings, source)
    return METHODS[settings.method](*arguments)
