"""Telling people how a night ended: by webhook, Slack, mail and whatever else apprise speaks.

Whom to tell stands in `BMM_NOTIFY` (apprise's addresses, separated by blanks or line ends), which may hold passwords:
it is read where it is used, and nothing of it goes into a log, an artefact or a message. A message that cannot be sent
never fails a night.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from bmm.report.night import headline, night_markdown

VARIABLE = "BMM_NOTIFY"


def tell_people(found: Mapping[str, Any]) -> str | None:
    """Send the end of a night to everybody in `BMM_NOTIFY`; return what went wrong, None if nothing did."""
    addresses = os.environ.get(VARIABLE, "").split()
    if not addresses:
        return None
    import apprise

    # It writes whole addresses into its log.
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
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
    return f"{VARIABLE}: {', '.join(failed)}" if failed else None
