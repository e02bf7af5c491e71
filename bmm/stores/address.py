"""Where an object store is: `s3://bucket/prefix` in words that may be seen, the rest from the environment.

Endpoint, region and credentials are read from the variables that every S3 tool knows (`AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_ACCESS_KEY_ID`, …) by the process that needs them, and stay there: an address travels in requests,
logs and manifests.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bmm.digest import digest_json
from bmm.errors import OutputError
from bmm.store import default_location

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*")
_ADDRESS = re.compile(r"https?://[^/\s]+/?\S*", re.IGNORECASE)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""What names the endpoint; the first one counts, as for other tools."""
_SENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION")
"""What goes into a request's headers."""
_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
)
"""What names credentials. A machine's role counts only if its endpoint is named: asking for one takes minutes."""


@dataclass(frozen=True)
class Address:
    """A bucket and a prefix in it; as text, what `Store.open` takes."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `s3://bucket/prefix`.

        Raises:
            OutputError: it is anything else.
        """
        scheme, _, rest = text.partition("://")
        if "@" in rest:
            # Not quoted: what stands before the @ is likely a secret.
            raise OutputError(
                "the store's address has an @ in it; credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if scheme != "s3":
            raise OutputError(
                f"the store {scheme}://… is neither a folder nor an s3://bucket/prefix; name one of these"
            )
        if not _BUCKET.fullmatch(bucket) or (prefix and not _PREFIX.fullmatch(prefix)) or _climbs(prefix):
            raise OutputError(f"the store {text} is not of the form s3://bucket/prefix; correct --store or BMM_STORE")
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def cache(self) -> Path:
        """The folder of this machine for copies; the same bucket at another endpoint is another store."""
        return default_location().parent / "objects" / f"{self.bucket}-{digest_json([endpoint(), str(self)])[:16]}"


def endpoint() -> str | None:
    """Return the endpoint that the environment names, as it may be shown; None for Amazon's own."""
    named = named_endpoint()
    if not named:
        return None
    parts = urlsplit(named)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def plain_http() -> bool:
    """Say whether the endpoint itself asks for plain http; nothing else may."""
    return (named_endpoint() or "").lower().startswith("http://")


def require_settings(address: Address) -> None:
    """Refuse an environment that names no credentials, or a strange endpoint.

    Raises:
        OutputError: which variable is wrong.
    """
    named_endpoint()
    for name in _SENT:
        value = os.environ.get(name, "")
        if value != value.strip() or not value.isprintable():
            # A file's last line end, most often; the client for S3 would end the process over it.
            raise OutputError(f"{name}, for the store {address}, has blanks or line ends around it; remove them")
    if not any(os.environ.get(name) for name in _SOURCES):
        raise OutputError(
            f"the store {address} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or AWS_SKIP_SIGNATURE=true for a public bucket)"
        )
    if os.environ.get("AWS_ACCESS_KEY_ID") and not os.environ.get("AWS_SECRET_ACCESS_KEY"):
        raise OutputError(f"the store {address} needs AWS_SECRET_ACCESS_KEY beside AWS_ACCESS_KEY_ID; set it")


def named_endpoint() -> str | None:
    """Return the endpoint that the environment names, None for Amazon's own.

    Raises:
        OutputError: it is no address; names the variable.
    """
    name = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if name is None:
        return None
    if not _is_address(os.environ[name]):
        raise OutputError(f"{name} is not an address like https://host:port; correct it")
    return os.environ[name]


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(_ADDRESS.fullmatch(text) and parts.hostname and (parts.port is None or parts.port > 0))
    except ValueError:
        return False


def _climbs(prefix: str) -> bool:
    return any(part in (".", "..") for part in prefix.split("/"))
