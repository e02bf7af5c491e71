"""Addresses of object stores, and what the environment must add to them."""

from __future__ import annotations

import pytest
from object_server import KEY_ID, SECRET

from bmm.errors import OutputError
from bmm.store import Store
from bmm.stores.address import Address, endpoint, plain_http


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [("s3://models", "models", ""), ("s3://models/", "models", ""), ("s3://my.models/a/b-c/", "my.models", "a/b-c")],
)
def test_an_address_is_read_and_written(text: str, bucket: str, prefix: str) -> None:
    address = Address.parse(text)
    assert (address.bucket, address.prefix) == (bucket, prefix)
    assert Address.parse(str(address)) == address
    assert Store.open(text).location == str(address)


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///x", "s3://x", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/a?b=c", "gs://bucket/a"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(OutputError, match=r"s3://bucket/prefix"):
        Store.open(text)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(OutputError, match="belong in AWS_ACCESS_KEY_ID") as refused:
        Store.open(f"s3://{KEY_ID}:{SECRET}@bucket/x")
    assert SECRET not in str(refused.value)
    assert KEY_ID not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": None}, "needs credentials: set AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "needs AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "is not an address like https://host:port"),
        ({"AWS_ENDPOINT_URL": "ftp://host"}, "is not an address like https://host:port"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:90000"}, "AWS_ENDPOINT_URL is not an address like https://host:port"),
        ({"AWS_ENDPOINT": "http://[::1"}, "AWS_ENDPOINT is not an address like https://host:port"),
        ({"AWS_ENDPOINT_URL_S3": "https://host:port"}, "AWS_ENDPOINT_URL_S3 is not an address like https://host:port"),
        ({"AWS_SECRET_ACCESS_KEY": f"{SECRET}\n"}, "AWS_SECRET_ACCESS_KEY, for the store s3://bucket/x, has blanks or"),
        ({"AWS_SESSION_TOKEN": "a\tb"}, "AWS_SESSION_TOKEN, for the store s3://bucket/x, has blanks or line ends"),
    ],
)
def test_an_environment_that_lacks_something_is_refused(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(OutputError, match=said):
        Store.open("s3://bucket/x")


def test_plain_http_is_used_only_where_the_endpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plain_http()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host")
    assert not plain_http()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host")
    assert plain_http()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://host")
    assert not plain_http()


def test_copies_are_kept_apart_by_endpoint_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {Store.open(text).root for text in ("s3://bucket/a", "s3://bucket/b", "s3://bucket/a/b", "s3://other/a")}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host")
    folders.add(Store.open("s3://bucket/a").root)
    assert len(folders) == 5


def test_an_endpoint_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{KEY_ID}:{SECRET}@host:9000/x")
    assert endpoint() == "https://host:9000"
