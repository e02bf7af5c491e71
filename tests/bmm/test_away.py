from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bmm.away import Patience, patiently, store_at_hand
from bmm.errors import ArtefactDamagedError, StoreAwayError
from bmm.store import Draft, Reference, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def artefact(store: Store, key: str, meanwhile: Callable[[Store], object] = id) -> Reference:
    def make(draft: Draft) -> None:
        meanwhile(store)
        draft.write_json("value.json", key)

    return store.obtain("thing", key * 64, make)[0]


def take(store: Store) -> Path:
    return store.root.rename(store.root.with_name("elsewhere"))


def test_what_fails_while_the_store_is_there_fails_as_it_is(store: Store) -> None:
    witness = artefact(store, "a")
    with pytest.raises(ZeroDivisionError), store_at_hand(store, witness):
        raise ZeroDivisionError
    with store_at_hand(store, witness):
        assert artefact(store, "b").key == "b" * 64


def test_damage_is_not_absence(store: Store) -> None:
    witness = artefact(store, "a")
    (store.root / "artefacts" / "thing" / witness.key / "value.json").write_text("other")
    with pytest.raises(ArtefactDamagedError), store_at_hand(store, witness):
        store.read(witness)


def test_nothing_is_begun_in_a_store_that_is_away(store: Store) -> None:
    witness = artefact(store, "a")
    take(store)
    with pytest.raises(StoreAwayError, match="is not there any more"), store_at_hand(store, witness):
        raise AssertionError("begun")


def test_a_store_that_goes_away_in_the_middle_is_told_from_a_fault_and_not_made_anew(store: Store) -> None:
    witness = artefact(store, "a")
    with pytest.raises(StoreAwayError) as caught, store_at_hand(store, witness):
        artefact(store, "b", take)
    assert isinstance(caught.value.__cause__, OSError)
    assert not store.root.exists()
    store.root.with_name("elsewhere").rename(store.root)
    assert artefact(store, "b").key == "b" * 64


def test_it_is_tried_again_until_the_store_is_back(store: Store) -> None:
    witness = artefact(store, "a")
    elsewhere = take(store)
    tries = []

    def work() -> int:
        tries.append(1)
        if len(tries) == 3:
            elsewhere.rename(store.root)
        with store_at_hand(store, witness):
            return 7

    assert patiently(work, 60.0) == 7
    assert len(tries) == 3
    take(store)
    with pytest.raises(StoreAwayError):
        patiently(work, 0.0)
    assert len(tries) == 4


def test_pauses_grow_and_good_news_makes_patience_whole() -> None:
    patience = Patience(3600.0)
    pauses = [patience.pause() for _ in range(10)]
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0, 5.0]
    assert patience.tried
    patience.renew()
    assert not patience.tried
    assert patience.pause() == 0.2
    assert Patience(0.0).pause() is None
