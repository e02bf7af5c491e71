"""Telling people how a night ended: by webhook, Slack, mail and whatever else apprise speaks.

Whom to tell stands in `BMM_NOTIFY` (apprise's addresses, separated by blanks or line ends), which may hold passwords:
it is read where it is used, and nothing of it goes into a log, an artefact or a message. A message that cannot be sent
never fails a night.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bmm.report.night import headline, night_markdown

VARIABLE = "BMM_NOTIFY"


def tell_people(found: Mapping[str, Any]) -> str | None:
    """Send the end of a night to everybody in `BMM_NOTIFY`; return what went wrong, None if nothing did."""
    addresses = os.environ.get(VARIABLE, "").split()
    if not addresses:
        return None
    with _unlogged("apprise", "urllib3"):
        failed = _sent(addresses, found)
    return f"{VARIABLE}: {', '.join(failed)}" if failed else None


def _sent(addresses: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    """Send to each address; return what went wrong, by the addresses' numbers."""
    import apprise

    failed = []
    kind = {"promoted": "success", "rejected": "warning", "failed": "failure"}.get(found["outcome"], "info")
    for number, address in enumerate(addresses, 1):
        service = apprise.Apprise()
        if not service.add(address):
            failed.append(f"address {number} is none that apprise knows")
        elif not service.notify(
            title=headline(found),
            body=night_markdown(found),
            body_format=apprise.NotifyFormat.MARKDOWN,
            notify_type=kind,
        ):
            failed.append(f"address {number} could not be told")
    return failed


@contextmanager
def _unlogged(*names: str) -> Iterator[None]:
    """Keep these libraries' logs silent, which name whole addresses, for the length of the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
