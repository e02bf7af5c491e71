"""Leases of several machines on one bucket."""

from __future__ import annotations

import threading
import time

import pytest
from store_benches import ObjectBench, until

from bmm.stores.address import Address
from bmm.stores.bucket import Bucket
from bmm.stores.lease import Leases

SECONDS = 2.0


class Machines:
    """Leases by machine."""

    def __init__(self, bench: ObjectBench) -> None:
        self.bucket = Bucket(Address.parse(bench.location))

    def __call__(self, name: str, seconds: float = SECONDS) -> Leases:
        return Leases(self.bucket, self.bucket, name, seconds)

    def left(self) -> list[str]:
        return [one.path for one in self.bucket.list("leases")]


@pytest.fixture
def machine(objects: ObjectBench) -> Machines:
    return Machines(objects)


def test_one_at_a_time(machine: Machines) -> None:
    order: list[str] = []
    first, second = machine("a"), machine("b")

    def wait() -> None:
        with second.held("thing"):
            order.append("second")

    with first.held("thing"), first.held("another"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        with second.held_if_free("thing") as free:
            assert not free
        time.sleep(0.3)
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]
    assert machine.left() == []


def test_a_living_holder_keeps_what_it_holds(machine: Machines) -> None:
    taken = threading.Event()

    def wait() -> None:
        with machine("b").held("thing"):
            taken.set()

    with machine("a").held("thing"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not taken.wait(2 * SECONDS)
    assert taken.wait(60)
    waiting.join(60)


def test_an_abandoned_lease_is_taken_over_in_time_but_not_before(machine: Machines) -> None:
    machine.bucket.create("leases/thing.json", b'{"owner": "dead", "machine": "a", "beat": 3}')
    started = time.monotonic()
    with machine("b").held_if_free("thing") as free:
        assert not free
    with machine("b").held("thing"):
        assert time.monotonic() - started >= SECONDS
    assert machine.left() == []


def test_a_dead_process_of_the_same_machine_blocks_nobody(machine: Machines) -> None:
    # The caller holds the kernel's lock of this name, so whoever else of this machine had the lease is dead.
    machine.bucket.create("leases/thing.json", b'{"owner": "dead", "machine": "a", "beat": 3}')
    with machine("a", seconds=3600).held("thing"):
        assert machine.left() == ["leases/thing.json"]
    assert machine.left() == []


def test_a_lease_that_cannot_be_read_is_nobodys(machine: Machines) -> None:
    machine.bucket.create("leases/thing.json", b"\xff")
    with machine("a", seconds=3600).held("thing"):
        pass
    assert machine.left() == []


def test_who_has_lost_a_lease_leaves_it_to_its_new_holder(machine: Machines) -> None:
    with machine("a", seconds=0.4).held("thing"):
        # As if this machine had slept for too long.
        until(lambda: _steal(machine))
        time.sleep(0.5)
    left = machine.bucket.read("leases/thing.json")
    assert left is not None
    assert b"thief" in left.content


def _steal(machine: Machines) -> bool:
    blob = machine.bucket.read("leases/thing.json")
    stolen = b'{"owner": "thief", "machine": "c", "beat": 0}'
    return blob is not None and machine.bucket.replace("leases/thing.json", stolen, blob.tag) is not None
