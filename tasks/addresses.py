"""Addresses of servers, as they may be shown."""

from __future__ import annotations

import re

# The user name and password of any address in a text; a password may itself hold an @.
_CREDENTIALS = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s?#]*@")


def without_credentials(text: str) -> str:
    """Return a text with every address in it rid of user name and password."""
    return _CREDENTIALS.sub(r"\1", text)
