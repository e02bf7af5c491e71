"""What an object store's server says no to, in words of our own; its own may quote keys and signatures."""

from __future__ import annotations

import re

from bmm.errors import OutputError, StoreAwayError
from bmm.stores.address import Address, endpoint

_STATUS = re.compile(r"status code: (\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


class StoreUnreachableError(StoreAwayError):
    """The object store does not answer, or not sensibly, for longer than this program waits."""


def refusal(error: Exception, address: Address) -> Exception | None:
    """Return what an answer that asking again will not change means to the user; None for all others."""
    text = str(error)
    said, found = _CODE.search(text), _STATUS.search(text)
    code = said[1] if said else ""
    status = int(found[1]) if found else None
    if code == "NoSuchBucket":
        return no_bucket(address)
    if "redirect without LOCATION" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return OutputError(f"the bucket {address.bucket} is in another region; set AWS_REGION to that one")
    if status in (401, 403):
        return OutputError(
            f"the store {address} refuses these credentials ({code or status}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and what they may do"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
        return not_a_store(address, f"{status} {code}".strip())
    return None


def too_short(error: Exception) -> bool:
    """Say whether an object ends before the part that was asked for."""
    found = _STATUS.search(str(error))
    return found is not None and found[1] == "416"


def not_a_store(address: Address, said: str = "404") -> OutputError:
    """Return what to say of a server that answers like none of S3."""
    return OutputError(
        f"what answers for the store {address} at {_where()} does not speak S3 ({said}); correct AWS_ENDPOINT_URL"
    )


def unreachable(address: Address, seconds: float) -> StoreUnreachableError:
    """Return what to say when waiting is over."""
    return StoreUnreachableError(
        f"the store {address} at {_where()} has not answered for {seconds:.0f} s; run the same command again when it "
        "does, or correct AWS_ENDPOINT_URL"
    )


def no_bucket(address: Address) -> OutputError:
    """Return what to say of a bucket that is not there."""
    return OutputError(f"there is no bucket {address.bucket} at {_where()}; make it, or correct --store or BMM_STORE")


def require_bucket(error: Exception, address: Address) -> None:
    """Tell a missing bucket from a missing object.

    Raises:
        OutputError: the bucket is missing.
    """
    if "NoSuchBucket" in str(error):
        raise no_bucket(address) from None


def _where() -> str:
    return endpoint() or "Amazon's endpoint"
