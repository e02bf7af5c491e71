"""Requests through a proxy that answers 503, resets and cuts: waited out, asked again, or explained."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from object_server import KEY_ID, SECRET, Fault, FaultyProxy
from store_benches import ObjectBench

from bmm.errors import OutputError
from bmm.stores import bucket as module
from bmm.stores.address import Address
from bmm.stores.bucket import Bucket
from bmm.stores.refusals import StoreUnreachableError


@pytest.fixture
def bucket(objects: ObjectBench) -> Bucket:
    return Bucket(Address.parse(objects.location), patience=20.0)


def test_small_objects_are_put_on_a_condition(bucket: Bucket) -> None:
    assert bucket.read("a/b") is None
    tag = bucket.create("a/b", b"one")
    assert tag
    assert bucket.create("a/b", b"two") is None
    found = bucket.read("a/b")
    assert found is not None
    assert (found.content, found.tag) == (b"one", tag)
    newer = bucket.replace("a/b", b"three", tag)
    assert newer not in (None, tag)
    assert bucket.replace("a/b", b"four", tag) is None
    assert bucket.replace("a/none", b"four", tag) is None
    assert [(one.path, one.bytes) for one in bucket.list("a")] == [("a/b", 5)]
    bucket.remove(["a/b", "a/none"])
    assert bucket.list("a") == []


@pytest.mark.parametrize("size", [0, 1, 100, module.PART_BYTES, module.PART_BYTES * 2 + 7])
def test_a_file_goes_there_and_back(bucket: Bucket, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "here").write_bytes(content)
    bucket.upload("a/file", tmp_path / "here")
    expected = hashlib.sha256(content).hexdigest()
    assert bucket.download("a/file", size, tmp_path / "back") == expected
    assert (tmp_path / "back").read_bytes() == content
    assert bucket.download("a/file", size, None) == expected
    assert bucket.download("a/file", size + 1, None) is None
    assert bucket.download("a/none", size, None) is None


FAULTS: list[tuple[Fault, ...]] = [
    ("503", "503", "503"),
    ("reset", "reset"),
    ("503", "reset", "lost"),
    # More than obstore itself asks for one request.
    ("503",) * 9,
]


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: "-".join(faults[:3]) + f"-{len(faults)}")
def test_faults_are_waited_out(
    bucket: Bucket, proxy: FaultyProxy, tmp_path: Path, faults: tuple[Fault, ...], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "here").write_bytes(b"some bytes")

    def twice(ask: Callable[[], object]) -> None:
        proxy.faults.clear()
        proxy.fail(*faults)
        ask()
        assert proxy.faults == list(faults)

    twice(lambda: bucket.upload("a/file", tmp_path / "here"))
    assert bucket.download("a/file", 10, None) == hashlib.sha256(b"some bytes").hexdigest()
    if len(faults) > 3:
        return
    twice(lambda: bucket.download("a/file", 10, None))
    twice(lambda: bucket.list("a"))
    twice(lambda: bucket.read("a/file"))
    twice(lambda: bucket.remove(["a/file"]))
    assert bucket.list("a") == []
    assert SECRET not in caplog.text
    assert KEY_ID not in caplog.text


def test_an_answer_cut_in_the_middle_is_asked_for_again(bucket: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "here").write_bytes(content)
    bucket.upload("a/file", tmp_path / "here")
    proxy.fail("cut", "cut", method="GET")
    assert bucket.download("a/file", len(content), tmp_path / "back") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "back").read_bytes() == content
    assert proxy.faults == ["cut", "cut"]


def test_parts_of_a_large_file_are_sent_again(bucket: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    content = os.urandom(module.PART_BYTES + 100)
    (tmp_path / "here").write_bytes(content)
    # Opening the upload, a part of it, closing it.
    for faults, method in ((("503", "reset"), "POST"), (("reset", "503"), "PUT"), (("503",), "POST")):
        proxy.faults.clear()
        proxy.fail(*faults, method=method)  # type: ignore[arg-type]
        bucket.upload("a/large", tmp_path / "here")
        assert proxy.faults == list(faults)
    assert bucket.download("a/large", len(content), None) == hashlib.sha256(content).hexdigest()


def test_a_condition_is_met_although_the_answer_was_lost(bucket: Bucket, proxy: FaultyProxy) -> None:
    proxy.fail("lost", method="PUT")
    tag = bucket.create("a/b", b"mine")
    assert tag is not None
    proxy.fail("lost", method="PUT")
    newer = bucket.replace("a/b", b"mine, again", tag)
    assert newer is not None
    found = bucket.read("a/b")
    assert found is not None
    assert (found.content, found.tag) == (b"mine, again", newer)
    proxy.fail("lost", method="PUT")
    assert bucket.create("a/b", b"another's") is None


def test_patience_ends_with_a_sentence(
    objects: ObjectBench, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    hasty = Bucket(Address.parse(objects.location), patience=0.5)
    proxy.choose = lambda *_: "503"
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnreachableError) as failed:
        hasty.read("a/b")
    said = str(failed.value)
    assert said.startswith(f"the store {objects.location} at http://127.0.0.1:{proxy.port} has not answered for")
    assert "trying again" in caplog.text
    for text in (said, caplog.text, repr(failed.value.__cause__)):
        assert SECRET not in text
        assert KEY_ID not in text
    assert failed.value.__suppress_context__


def test_a_refusal_is_a_sentence_at_once(bucket: Bucket, objects: ObjectBench, proxy: FaultyProxy) -> None:
    proxy.choose = lambda *_: "403"
    for ask in (lambda: bucket.read("a"), lambda: bucket.list("a"), lambda: bucket.create("a", b""), bucket.probe):
        asked = len(proxy.seen)
        with pytest.raises(OutputError, match=r"refuses these credentials \(SignatureDoesNotMatch\)") as refused:
            ask()
        assert len(proxy.seen) == asked + 1
        assert KEY_ID not in str(refused.value)
        assert refused.value.__suppress_context__


def test_a_bucket_that_is_not_there_is_named(objects: ObjectBench) -> None:
    missing = Bucket(Address.parse("s3://no-such-bucket/x"))
    for ask in (
        lambda: missing.read("a"),
        lambda: missing.list("a"),
        lambda: missing.create("a", b""),
        lambda: missing.download("a", 1, None),
        missing.probe,
    ):
        with pytest.raises(OutputError, match=r"there is no bucket no-such-bucket at http://127\.0\.0\.1:\d+; make it"):
            ask()


def test_an_endpoint_where_nobody_listens_is_named(objects: ObjectBench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnreachableError, match=r"has not answered for \d+ s"):
            Bucket(Address.parse(objects.location), patience=0.5).probe()
